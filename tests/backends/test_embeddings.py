"""Tables in 8 bits: what they hold and give, in training too, and what stays float."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY, calibrated, decibels
from modules import ONE_FORMAT, trainer
from roots import pl
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_quant import (
    ExportConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    convert,
    coverage,
    export,
    load,
    prepare,
)
from lightning_quant.arguments import Call
from lightning_quant.backends import capture_targets, embeddings, fx, reference
from lightning_quant.backends.embeddings import Int8Table, StoredTable, Table, fake_quantized, quantized, row_qparams
from lightning_quant.backends.graph import info
from lightning_quant.capture import record_calls
from lightning_quant.config import FormatName, Method
from lightning_quant.exporters import qdq

ALL_METHODS = pytest.mark.parametrize("method", ["dynamic", "static", "qat"])
ROWS, WIDTH = 30, 12


def indices(*shape: int) -> torch.Tensor:
    return torch.randint(0, ROWS, shape)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """The table as it can be read from 8 bits, by hand: from the least to the largest value of a row in 255 steps."""
    rows = weight.detach().double().numpy()
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    step = np.where(high > low, (high - low) / 255, 1)
    return torch.tensor(np.rint((rows - low) / step) * step + low, dtype=torch.float32)


# ---- the arithmetic


@PROPERTY
@given(st.integers(0, 2**31), st.floats(-6, 4), st.floats(-3, 3))
def test_a_row_is_what_it_was_to_half_a_step(seed: int, magnitude: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(5, 9, generator=generator) + shift) * 10**magnitude
    scale, zero_point = row_qparams(rows)
    integers = quantized(rows, scale, zero_point)
    assert integers.dtype == torch.uint8
    read = (integers.float() - zero_point) * scale
    # float32 of numbers as large as the zero point, which is added and subtracted, beside the half step
    slack = (zero_point.abs() + 255) * scale * 2.0**-21
    assert ((read - rows).abs() <= scale / 2 + slack).all()
    assert (read.amin(1) - rows.amin(1)).abs().max() <= slack.max()
    assert torch.equal(fake_quantized(rows), rows + (read - rows))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-30])
def test_a_row_of_one_value_is_exact(value: float) -> None:
    rows = torch.full((2, 5), value)
    scale, zero_point = row_qparams(rows)
    assert torch.equal((quantized(rows, scale, zero_point).float() - zero_point) * scale, rows)


def test_no_rows() -> None:
    assert fake_quantized(torch.empty(0, 3)).shape == (0, 3)


def pair(layer: Any) -> tuple[nn.Module, nn.Module]:
    """The int8 table of a layer, and the layer with the rows that it should read."""
    table = Table(layer, fake_quantize=False)
    twin = type(layer).from_pretrained(rounded(layer.weight))
    for name in ("padding_idx", "mode", "include_last_offset"):
        if hasattr(layer, name):
            setattr(twin, name, getattr(layer, name))
    return Int8Table(table.reading, embeddings._packed(*table.stored())), twin


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (7,), (0,), (3, 4), (2, 3, 4), (2, 1, 2, 2)], ids=str)
def test_rows_of_indices_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = nn.Embedding(ROWS, WIDTH, padding_idx=-1)
    int8, twin = pair(layer)
    x = indices(*shape).to(dtype)
    found = int8(x)
    assert found.shape == (*shape, WIDTH)
    torch.testing.assert_close(found, twin(x))
    for other in (Table(layer, fake_quantize=True), StoredTable(Table(layer, fake_quantize=False))):
        torch.testing.assert_close(other(x), twin(x))
    assert torch.equal(Table(layer, fake_quantize=False)(x), layer(x))
    assert torch.equal(int8(torch.tensor([ROWS - 1])), torch.zeros(1, WIDTH))


def test_indices_with_strides() -> None:
    pairs = indices(6, 2)
    int8, twin = pair(nn.Embedding(ROWS, WIDTH))
    torch.testing.assert_close(int8(pairs[:, 1]), twin(pairs[:, 1]))
    int8, twin = pair(nn.EmbeddingBag(ROWS, WIDTH))
    torch.testing.assert_close(int8(pairs.t()), twin(pairs.t()))


def test_an_index_that_is_not_there() -> None:
    int8, _ = pair(nn.Embedding(ROWS, WIDTH))
    with pytest.raises(RuntimeError, match="out of bounds"):
        int8(torch.tensor([ROWS]))


CALLS: dict[str, tuple[Any, ...]] = {
    "bags of one size": (torch.arange(12).reshape(3, 4),),
    "offsets": (torch.arange(12), torch.tensor([0, 5, 5, 9])),
    "offsets of another type": (torch.arange(12, dtype=torch.int32), torch.tensor([0, 5, 5, 9])),
    "weights": (torch.arange(12).reshape(3, 4), None, torch.linspace(-1, 1, 12).reshape(3, 4)),
    "offsets and weights": (torch.arange(12), torch.tensor([0, 5, 5, 9]), torch.linspace(-1, 1, 12)),
}


@pytest.mark.parametrize("padding", [None, 7])
@pytest.mark.parametrize("last", [False, True], ids=["", "last offset"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("name", CALLS)
def test_bags(name: str, mode: str, last: bool, padding: int | None) -> None:
    if mode == "mean" and "weights" in name:
        return  # torch refuses
    layer = nn.EmbeddingBag(ROWS, WIDTH, mode=mode, include_last_offset=last, padding_idx=padding)
    nn.init.normal_(layer.weight)  # the padding row is not zero: it is left out, not added
    x, *more = CALLS[name]
    if last and more and more[0] is not None:
        more[0] = torch.cat([more[0], torch.tensor([12])])
    int8, twin = pair(layer)
    table = Table(layer, fake_quantize=False)
    expected = twin(x, *(y.to(x.dtype) if y is not None and not y.is_floating_point() else y for y in more))
    # sums of at most 5 values of about 1 in float32, in another order
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(int8(x, *more), expected, **close)
    torch.testing.assert_close(StoredTable(table)(x, *more), expected, **close)
    torch.testing.assert_close(Table(layer, fake_quantize=True)(x, *more), expected, **close)
    torch.testing.assert_close(table(x, *more), layer(x, *more), **close)


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 2}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=lambda x: str(*x)
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_are_those_of_the_float_layer(kind: Any, options: dict[str, Any]) -> None:
    layer = kind(ROWS, WIDTH, **options)
    table = Table(layer, fake_quantize=True)
    assert table.weight is layer.weight
    x = torch.randint(0, 5, (4, 3))  # some more than once
    factors = torch.randn(layer(x).shape)
    output = layer(x)
    if kind is nn.EmbeddingBag and "scale_grad_by_freq" in options:
        # the bags of torch 2.13 count some rows as often as others: their rows are averaged here
        output = F.embedding(x, layer.weight, **options).mean(1)
    (output * factors).sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    (table(x) * factors).sum().backward()
    found = layer.weight.grad
    assert found.is_sparse == expected.is_sparse == options.get("sparse", False)
    torch.testing.assert_close(found.to_dense(), expected.to_dense())
    assert found.to_dense().abs().sum() > 0


# ---- in models


class Reader(nn.Module):
    """Takes indices ``(N, length)``; gives ``(N, 4)``."""

    def __init__(self, table: nn.Module | None = None, rows: int = ROWS) -> None:
        super().__init__()
        self.table = table or nn.Embedding(rows, WIDTH)
        self.fc = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.table(x)).mean(-2))


def rows_of(int8: nn.Module, *data: torch.Tensor) -> dict[str, list[tuple[str, int, bool]]]:
    found: dict[str, list[tuple[str, int, bool]]] = {}
    for row in coverage(int8, data).rows:
        found.setdefault(row.name, []).append((row.op, row.macs, row.int8))
    return found


def packed_tables(int8: nn.Module) -> list[nn.Module]:
    return [module for module in int8.modules() if isinstance(module, Int8Table)]


@ALL_METHODS
@pytest.mark.parametrize("shape", [(4, 7), (4, 2, 7)], ids=["2-D", "3-D"])
def test_an_embedding_is_in_int8(method: Method, shape: tuple[int, ...]) -> None:
    model, x = Reader().eval(), indices(*shape)
    weight = model.table.weight.detach().clone()
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    assert rows_of(int8, x)["table"] == [("quantized::embedding_byte", 0, True)]
    found = coverage(int8, x)
    assert found.share == 1
    assert info(int8).float_layers == {}
    torch.testing.assert_close(int8.table(x), rounded(weight)[x])
    assert decibels(model(x), int8(x)) > 25
    assert torch.equal(model.table.weight, weight)
    assert type(model.table) is nn.Embedding
    if method != "dynamic":
        # the reference is float arithmetic on the same integers
        assert decibels(reference(prepared)(x), int8(x)) > 40


def test_in_training_the_rows_are_rounded_and_the_weight_trained() -> None:
    model, x = Reader(), indices(4, 7)
    prepared = prepare(model, method="qat", example_inputs=x)
    assert prepared.table.weight is model.table.weight
    torch.testing.assert_close(prepared.table(x), rounded(model.table.weight)[x])
    assert not torch.equal(prepared.table(x), model.table(x))
    prepared(x).sum().backward()
    read = torch.zeros(ROWS, dtype=torch.bool)
    read[x.unique()] = True
    assert torch.equal(model.table.weight.grad.abs().sum(1) > 0, read)
    with torch.no_grad():
        model.table.weight.mul_(3)
    prepared.eval()
    torch.testing.assert_close(convert(prepared).table(x), rounded(model.table.weight)[x])


@pytest.mark.parametrize("method", ["static", "qat"])
def test_calibration_reads_float_rows_and_training_rounded_ones(method: Method) -> None:
    prepared = prepare(Reader().eval(), method=method, example_inputs=indices(4, 7))
    assert prepared.table.fake_quantize is (method == "qat")


class Subclass(nn.Embedding):
    """Reads by positions of its own, as position embeddings of language models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x + 2) % ROWS)


class Functional(nn.Module):
    def __init__(self, bag: bool = False) -> None:
        super().__init__()
        self.bag = bag
        self.weight = nn.Parameter(torch.randn(ROWS, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bag:
            return F.embedding_bag(x, self.weight, mode="sum").unsqueeze(-2)
        return F.embedding(x, self.weight, padding_idx=0)


@ALL_METHODS
@pytest.mark.parametrize(
    "make",
    [lambda: Subclass(ROWS, WIDTH), Functional, lambda: Functional(bag=True)],
    ids=["subclass", "function", "function of bags"],
)
def test_functions_count_as_much_as_modules(make: Any, method: Method) -> None:
    model, x = Reader(make()).eval(), indices(4, 7)
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    assert decibels(model(x), int8(x)) > 25
    (table,) = packed_tables(int8)
    assert table.packed.weight().dtype == torch.quint8
    assert not any(p.shape == (ROWS, WIDTH) for p in int8.parameters())
    if method == "qat":
        prepared.train()
        prepared(x).sum().backward()
        (parameter,) = model.table.parameters()
        assert parameter.grad is not None


class Tied(nn.Module):
    """One table, read under two names and twice under one, and the weight of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(ROWS, WIDTH)
        self.second = nn.Embedding(ROWS, WIDTH)
        self.out = nn.Linear(WIDTH, ROWS, bias=False)
        self.second.weight = self.out.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.first(x) + self.second(x) + self.first(x.flip(-1))))


@ALL_METHODS
def test_a_shared_table_is_stored_once(method: Method, tmp_path: Path) -> None:
    model, x = Tied().eval(), indices(4, 7)
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    found = rows_of(int8, x)
    assert found["first"] == [("quantized::embedding_byte", 0, True)] * 2
    assert found["second"] == found["first"][:1]
    assert found["out"][0][2]
    assert len({id(table.packed) for table in packed_tables(int8)}) == 1
    assert decibels(model(x), int8(x)) > 20
    if method == "qat":
        prepared.train()
        prepared(x).sum().backward()
        assert model.first.weight.grad is model.out.weight.grad


FORMATS: tuple[FormatName, ...] = ("torchscript", "onnx")


class Bags(nn.Module):
    def __init__(self, table: nn.EmbeddingBag) -> None:
        super().__init__()
        self.table = table
        self.fc = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        return self.fc(self.table(x, offsets))


LARGE = 3000
MODELS: dict[str, tuple[Any, Any]] = {
    "embedding": (lambda: Reader(rows=LARGE), lambda: (torch.randint(0, LARGE, (4, 7)),)),
    "bags of one size": (
        lambda: Bags(nn.EmbeddingBag(LARGE, WIDTH, padding_idx=3)),
        lambda: (torch.randint(0, LARGE, (4, 7)),),
    ),
    "offsets": (
        lambda: Bags(nn.EmbeddingBag(LARGE, WIDTH, mode="sum")),
        lambda: (torch.randint(0, LARGE, (25,)), torch.tensor([0, 3, 9, 9])),
    ),
}


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("name", MODELS)
def test_files(name: str, method: Method, tmp_path: Path) -> None:
    """Both formats hold 8 bits a value and two floats a row: ``(12 + 8) / 48`` of the table, and some kB."""
    make, data = MODELS[name]
    model, x = make().eval(), data()
    prepared = calibrated(model, *x, method=method)
    paths = export(prepared, None, ExportConfig(directory=tmp_path, formats=FORMATS), Call(x, {}))
    table = LARGE * WIDTH * 4
    for path in paths.values():
        assert path.stat().st_size < table * 20 / 48 + 30_000
        torch.testing.assert_close(load(path)(*x), convert(prepared)(*x), atol=0.05, rtol=0)
        assert decibels(model(*x), load(path)(*x)) > 25
    if name != "offsets":
        (fresh,) = data()
        assert load(paths["onnx"])(fresh[:1]).shape == (1, 4)


@pytest.mark.parametrize("name", MODELS)
def test_the_neutral_form_has_no_float_table(name: str) -> None:
    make, data = MODELS[name]
    prepared = calibrated(make().eval(), *(x := data()))
    neutral = qdq(prepared)
    assert torch.equal(neutral(*x), fx.reference(prepared)(*x))
    tensors = [*neutral.parameters(), *neutral.buffers()]
    assert [t.dtype for t in tensors if t.shape == (LARGE, WIDTH)] == [torch.uint8]


# ---- what stays float

REASONS = {
    "max_norm": (lambda: nn.Embedding(ROWS, WIDTH, max_norm=1.0), "max_norm changes the rows of the table as they"),
    "mode": (
        lambda: nn.EmbeddingBag(ROWS, WIDTH, mode="max"),
        "there is no int8 kernel of an embedding bag with mode='max'",
    ),
}


@ALL_METHODS
@pytest.mark.parametrize("name", REASONS)
def test_what_stays_float_says_why(name: str, method: Method) -> None:
    make, reason = REASONS[name]
    layer = make()
    model = Reader(layer).eval() if name != "mode" else Bags(layer).eval()
    x = indices(4, 7)
    int8 = convert(calibrated(model, x, method=method))
    (found,) = info(int8).float_layers.values()
    assert found.startswith(reason)
    rows = {row.name: row for row in coverage(int8, x, reasons=info(int8).float_layers).rows}
    assert not rows["table"].int8
    assert rows["table"].reason == found
    assert rows["table"].macs == 0
    assert rows["fc"].int8
    assert decibels(model(x), int8(x)) > 25


def test_a_table_of_another_type_stays_float() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(ROWS, WIDTH, dtype=torch.bfloat16)
            self.fc = nn.Linear(WIDTH, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.table(x).float())

    known = info(prepare(Half().eval(), method="static", example_inputs=indices(4, 7)))
    assert known.float_layers == {"table": "the int8 kernel gives float32, and its table is bfloat16"}


def test_a_table_that_is_skipped_stays_float() -> None:
    model, x = Reader().eval(), indices(4, 7)
    int8 = convert(calibrated(model, x, config=QuantConfig(skip=("table",))))
    assert type(int8.table) is nn.Embedding
    assert rows_of(int8, x)["table"] == [("aten::embedding", 0, False)]


def test_a_hooked_table_stays_float() -> None:
    model, x = Reader().eval(), indices(4, 7)
    model.table.register_forward_hook(lambda module, args, output: output + 1)
    int8 = convert(calibrated(model, x))
    assert info(int8).float_layers == {"table": "it has forward hooks, which an int8 kernel would not run"}
    assert packed_tables(int8) == []
    assert decibels(model(x), int8(x)) > 25


def test_a_wrong_kernel_is_found_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert embeddings.is_right(WIDTH, False)
    assert embeddings.is_right(WIDTH, True)
    ask = embeddings.is_right.__wrapped__
    with monkeypatch.context() as patch:
        right = Int8Table.forward
        patch.setattr(Int8Table, "forward", lambda self, *data: right(self, *data) * 1.01)
        assert not ask(WIDTH, False)
        assert not ask(WIDTH, True)
    monkeypatch.setattr(embeddings, "is_right", lambda width, is_bag: False)
    model, x = Reader().eval(), indices(4, 7)
    int8 = convert(calibrated(model, x))
    text = f"the int8 kernel for it is wrong on this CPU with torch {torch.__version__}"
    assert info(int8).float_layers == {"table": text}
    assert type(int8.table) is nn.Embedding


def test_asking_leaves_no_trace() -> None:
    rng = torch.get_rng_state()
    embeddings.is_right.__wrapped__(5, True)
    assert torch.equal(torch.get_rng_state(), rng)


# ---- capture


def test_a_table_that_its_callers_read_is_in_no_graph() -> None:
    """Language models hold their table inside of the network, and read it outside of it."""

    class Net(Reader):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.fc(rows)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = self.net.table(x)
            if rows.sum() > 1e9:  # no graph can stand for this
                return rows
            return self.net(rows)

    model, x = Model().eval(), indices(4, 7)
    recordings = record_calls(model, lambda twin: twin(x))
    found = capture_targets(model, recordings, QuantConfig(), "static")
    assert [target.name for target in found.targets] == ["net"]
    assert found.float_layers == {"net.table": "it is called from outside of net, which holds it"}


# ---- with a Trainer


class Recommender(pl.LightningModule):
    """Two tables and the product of their rows: no multiply-accumulates at all."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.users = nn.Embedding(50, 8, sparse=sparse)
        self.items = nn.Embedding(60, 8, sparse=sparse)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        return (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        pairs, ratings = batch
        return F.mse_loss(self(pairs), ratings)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = torch.optim.SparseAdam if self.users.sparse else torch.optim.Adam
        return kind(list(self.parameters()), lr=0.02)

    def train_dataloader(self) -> DataLoader:
        pairs = torch.randint(0, 50, (64, 2))
        return DataLoader(list(zip(pairs, torch.randn(64), strict=True)), batch_size=16)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_recommender_is_trained_and_becomes_int8(sparse: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Recommender(sparse)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = QuantizationAwareTraining(export=ONE_FORMAT)
    trainer(callback, max_epochs=2).fit(model)
    assert model.state_dict().keys() == before.keys()
    assert not torch.equal(model.users.weight, before["users.weight"])
    assert callback.report is not None
    assert callback.report.float_layers == {}
    assert callback.report.sqnr_db > 30
    assert not re.search("multiply-accumulates", caplog.text)  # there are none: nothing to warn of


def test_a_recommender_is_quantized_after_training() -> None:
    callback = PostTrainingQuantization(export=ONE_FORMAT)
    trainer(callback).validate(Recommender())
    assert callback.report is not None
    # 110 rows of 8 values and two floats in the place of 8 floats, and some kB of a file
    assert callback.report.size_bytes_float == 110 * 8 * 4
    assert callback.report.float_layers == {}
