"""Eager mode without its handwork: held against float, against torch's own eager recipe, and against FX graph mode."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Branching, Mlp, Residual, calibrated, decibels, settle
from modules import Classifier, Digits, convnet, different, trainer, weights
from torch import nn
from torch.nn import functional as F

from lightning_quant import (
    CalibrationError,
    CaptureError,
    ConfigError,
    ExportConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    convert,
    coverage,
    load,
    prepare,
)
from lightning_quant._torch_ao import (
    DeQuantStub,
    FakeQuantizeBase,
    QuantStub,
    convert_modules,
    dynamic_modules,
    fused_quantized_modules,
    prepare_modules,
    quantized_modules,
)
from lightning_quant.arguments import Call, Captured
from lightning_quant.backends import eager, embeddings, reference
from lightning_quant.backends.eager_stubs import Functional
from lightning_quant.backends.graph import info, is_graph, link, observers
from lightning_quant.config import Method, resolve
from lightning_quant.exporters.qdq import to_qdq
from lightning_quant.fake_quantize import FakeQuantize
from lightning_quant.qconfig import layer_qconfig

EAGER = QuantConfig(backend="eager")
METHODS: tuple[Method, ...] = ("dynamic", "static", "qat")

#: A rounding to 8 bits of a range that is used in full costs 20 * log10(2**8 * sqrt(12) * rms / range): 40 to 50 dB for
#: activations. These networks have up to 12 in a row, whose errors add up: 10 * log10(12) = 11 dB less.
ENOUGH_DB = 25

#: Int8 kernels requantize in float32; where a value lies between two steps the float form may round it to the other
#: one. One in a thousand values off by one of 255 steps is 10 * log10(1000 * 255**2 * (rms / range)**2) > 60 dB in one
#: layer; such a step travels through the layers behind it, which leaves less than half of the decibels.
TIES_DB = 30


class Functionals(nn.Module):
    """Layers as functions and modules, one ReLU for all, cat, add, dropout, a transposed convolution.

    Takes ``(N, 3, 8, 8)``, gives ``(N, 5)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.bias = nn.Parameter(torch.randn(8) * 0.1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.mix = nn.Conv2d(16, 8, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.relu(F.conv2d(x, self.weight, self.bias, padding=1))
        deep = self.relu(self.up(self.relu(self.norm(self.down(first)))))
        y = self.relu(self.mix(torch.cat([first, deep], 1)) + first)
        return self.fc(F.dropout(y, 0.2, self.training).mean((2, 3)))


class Gated(nn.Module):
    """What mobile networks are made of: hard swish, squeeze and excitation, products. Takes ``(N, 3, 8, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(self.pool(y)))))
        return self.last(F.leaky_relu(self.norm(y), 0.1)).flatten(1)


class Tagger(nn.Module):
    """Takes ``(N, T)`` of words below 20, gives ``(N, T, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.rnn = nn.LSTM(8, 12, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(24, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.rnn(self.words(x))
        return self.out(F.relu(self.hidden(y)))


class Transformer(nn.Module):
    """Takes ``(N, T, 32)``, gives ``(N, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.encoder(x).mean(1))


def images() -> torch.Tensor:
    return torch.randn(16, 3, 8, 8)


NETWORKS: dict[str, tuple[Any, Any]] = {
    "functionals": (lambda: settle(Functionals()), images),
    "residual": (lambda: settle(Residual()), images),
    "gated": (lambda: settle(Gated()), images),
    "mlp": (lambda: Mlp().eval(), lambda: torch.randn(32, 4)),
    "tagger": (lambda: Tagger().eval(), lambda: torch.randint(0, 20, (8, 10))),
    "transformer": (lambda: Transformer().eval(), lambda: torch.randn(8, 6, 32)),
    "in parts": (lambda: Branching().eval(), lambda: torch.rand(32, 4)),
}
CONV_NETS = ("functionals", "residual", "gated")


def modules_of(model: nn.Module, kind: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


# ---- whole networks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_int8_is_close_to_float(name: str, method: Method) -> None:
    make, data = NETWORKS[name]
    model, x = make(), data()
    if method == "dynamic" and name == "gated":
        with pytest.raises(CaptureError, match=r"^Gated has nothing that can be quantized"):
            prepare(model, EAGER, method=method, example_inputs=x)
        return
    before = copy.deepcopy(model.state_dict())
    prepared = calibrated(model, x, method=method, config=EAGER, passes=3)
    assert not different(before, model.state_dict())
    int8 = convert(prepared)
    assert decibels(model(x), int8(x)) >= ENOUGH_DB
    if method != "dynamic" or name not in CONV_NETS:
        assert coverage(int8, (x,)).share >= 0.75
    if method != "dynamic":
        assert decibels(int8(x), reference(prepared)(x)) >= TIES_DB


@pytest.mark.parametrize("name", NETWORKS)
def test_it_agrees_with_fx(name: str) -> None:
    """The same observers give the same ranges; concatenations and pools have their own here, and shared ones there."""
    make, data = NETWORKS[name]
    model, x = make(), data()
    found = [convert(calibrated(model, x, config=QuantConfig(backend=b)))(x) for b in ("eager", "fx")]
    assert decibels(*found) >= (100 if name in ("mlp", "transformer", "in parts") else ENOUGH_DB)


def test_it_is_an_eager_mode_model() -> None:
    prepared = calibrated(settle(Functionals()), images(), config=EAGER)
    assert modules_of(prepared, QuantStub)
    assert modules_of(prepared, DeQuantStub)
    operations = [m.operation for m in prepared.modules() if isinstance(m, Functional)]
    assert sorted(operations) == ["add_relu", "cat"]
    int8 = convert(prepared)
    assert not modules_of(int8, (QuantStub, DeQuantStub, quantized_modules.FloatFunctional))
    assert len(modules_of(int8, quantized_modules.QFunctional)) == 2
    assert len(modules_of(int8, fused_quantized_modules.ConvReLU2d)) == 2
    assert len(modules_of(int8, quantized_modules.ConvTranspose2d)) == 1
    # of the input and the logits, and around the average
    assert len(modules_of(int8, quantized_modules.Quantize)) == len(modules_of(int8, quantized_modules.DeQuantize)) == 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in int8.modules())


# ---- the two errors that everybody meets in eager mode


class WithoutStubs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class WithPlus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.quant(x)
        return self.dequant(self.c(self.a(x) + self.b(x)))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (WithoutStubs, r"Could not run 'quantized::conv2d\.new' with arguments from the 'CPU' backend"),
        # the name of the overload depends on the release
        (WithPlus, r"Could not run 'aten::add\.(Tensor|out)' with arguments from the 'QuantizedCPU' backend"),
    ],
)
def test_the_classic_errors_cannot_be_reached(kind: Any, text: str) -> None:
    model, x = kind().eval(), torch.randn(4, 3, 8, 8)
    # torch's own recipe, as its documentation gives it
    stock = copy.deepcopy(model)
    stock.qconfig = layer_qconfig(resolve(EAGER), "static", nn.Conv2d)
    prepare_modules(stock, inplace=True)
    stock(x)
    convert_modules(stock, inplace=True)
    with pytest.raises(NotImplementedError, match=f"^{text}"):
        stock(x)

    int8 = convert(calibrated(model, x, config=EAGER))
    assert decibels(model(x), int8(x)) >= ENOUGH_DB
    assert coverage(int8, (x,)).share == 1


# ---- fusion follows the data


def test_what_is_not_connected_is_not_fused() -> None:
    """In the order of registration these look like convolution, batch norm and ReLU."""

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.bn = nn.BatchNorm2d(3)
            self.relu = nn.ReLU()
            self.other = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.relu(self.other(x))) + self.bn(x)

    model, x = settle(Crossed()), images()
    for method in ("static", "qat"):
        prepared = calibrated(model, x, method=method, config=EAGER, passes=3)
        assert [group.members for group in info(prepared).fused] == [("other", "relu")]
        assert decibels(model(x), convert(prepared)(x)) >= ENOUGH_DB


def test_a_value_that_something_else_reads_is_not_fused_away() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.next = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return self.next(F.relu(y)), y

    model, x = Read().eval(), images()
    prepared = calibrated(model, x, config=EAGER)
    assert info(prepared).fused == ()
    for expected, found in zip(model(x), convert(prepared)(x), strict=True):
        assert decibels(expected, found) >= ENOUGH_DB


# ---- parts that cannot be traced


def test_known_layers_inside_of_what_cannot_be_traced_have_stubs_of_their_own() -> None:
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.deep = nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.relu(self.stem(x))
            while y.abs().max() > 1:
                y = y / 2
            return self.head(self.deep(y).mean((2, 3)))

    model, x = Depends().eval(), images()
    prepared = calibrated(model, x, config=EAGER)
    assert type(prepared) is Depends
    parts = [prepared.stem, prepared.deep, prepared.head]
    assert all(isinstance(part, Captured) and is_graph(part.graph) for part in parts)
    for part in parts:
        assert len(modules_of(part, QuantStub)) == len(modules_of(part, DeQuantStub)) == 1
    int8 = convert(prepared)
    assert decibels(model(x), int8(x)) >= ENOUGH_DB
    assert coverage(int8, (x,)).share == 1
    assert decibels(int8(x), reference(prepared)(x)) >= TIES_DB


def test_what_is_kept_keeps_its_layers_float_and_its_hooks() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if bool((x > -1e9).all()) else x

    model = nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 3)).eval()
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(32, 4)
    graph = eager.prepare(model, EAGER, "static", Call((x,)))
    assert list(info(graph).kept) == ["1"]
    assert info(graph).float_layers == {"2": "it has forward hooks, which an int8 kernel would not run"}
    graph(x)
    int8 = eager.convert(graph)
    assert type(int8.get_submodule("1.fc")) is nn.Linear
    assert type(int8.get_submodule("2.module")) is nn.Linear
    assert isinstance(int8.get_submodule("0"), quantized_modules.Linear)
    assert decibels(model(x), int8(x)) >= ENOUGH_DB


# ---- what prepare and convert promise


def test_skip_leaves_layers_and_what_is_inside_of_a_block_float() -> None:
    model, x = settle(Residual()), images()
    config = QuantConfig(backend="eager", skip=("blocks.0", "fc"))
    prepared = calibrated(model, x, config=config)
    int8 = convert(prepared)
    assert not [name for name in modules_of(int8, quantized_modules.Conv2d) if name.startswith("blocks.0")]
    assert type(int8.fc) is nn.Linear
    assert len(modules_of(int8, quantized_modules.Conv2d)) == 3
    # the sum of the first block is float, and that of the second has a float part
    assert not modules_of(int8, Functional)
    assert decibels(model(x), int8(x)) >= ENOUGH_DB


def test_a_copy_is_independent_and_its_state_can_be_loaded() -> None:
    """Observers hang on hooks: a copy of the graph has to feed its own."""
    model, x = settle(Residual()), images()
    prepared = prepare(model, EAGER, method="static", example_inputs=x)
    twin = copy.deepcopy(prepared)
    twin(x)
    with pytest.raises(CalibrationError, match=r"^9 observers saw no data \(the first: "):
        convert(prepared)
    other = prepare(model, EAGER, method="qat", example_inputs=x)
    fresh = prepare(model, EAGER, method="qat", example_inputs=x)
    other(x)
    fresh.load_state_dict(other.state_dict())
    assert torch.equal(convert(fresh)(x), convert(other)(x))
    first = convert(twin)(x)
    assert torch.equal(convert(twin)(x), first)
    assert torch.equal(convert(copy.deepcopy(twin))(x), first)


def test_two_uses_of_one_layer_have_a_range_each() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(100 * self.fc(x))

    model, x = Twice().eval(), torch.randn(64, 4)
    for method in ("static", "qat"):
        prepared = calibrated(model, x, method=method, config=EAGER, passes=3)
        assert decibels(model(x), convert(prepared)(x)) >= ENOUGH_DB


def test_dynamic_quantizes_tables_and_recurrent_layers() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 16)
            self.bag = nn.EmbeddingBag(30, 16, mode="sum")
            self.mean = nn.EmbeddingBag(30, 16, mode="mean")
            self.limited = nn.Embedding(30, 16, max_norm=1.0)
            self.gru = nn.GRU(16, 8, batch_first=True)
            self.cell = nn.LSTMCell(16, 8)
            self.fc = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, _ = self.gru(self.words(x) + self.limited(x))
            h, _ = self.cell(self.bag(x) + self.mean(x))
            return self.fc(torch.cat([y[:, -1], h], 1))

    model, x = Words().eval(), torch.randint(0, 30, (8, 5))
    int8 = convert(calibrated(model, x, method="dynamic", config=EAGER))
    kinds = {name: type(getattr(int8, name)) for name in ("words", "bag", "mean", "limited", "gru", "cell", "fc")}
    assert kinds == {
        "words": embeddings.Int8Table,
        "bag": embeddings.Int8Table,
        "mean": embeddings.Int8Table,
        "limited": nn.Embedding,
        "gru": dynamic_modules.GRU,
        "cell": dynamic_modules.LSTMCell,
        "fc": dynamic_modules.Linear,
    }
    assert decibels(model(x), int8(x)) >= ENOUGH_DB


@pytest.mark.parametrize("method", ["static", "qat"])
def test_a_network_of_recurrent_layers_alone_has_nothing_to_observe(method: Method) -> None:
    model, x = nn.LSTM(4, 6).eval(), torch.randn(7, 3, 4)
    prepared = calibrated(model, x, method=method, config=EAGER)
    int8 = convert(prepared)
    assert modules_of(int8, dynamic_modules.LSTM)
    assert decibels(model(x)[0], int8(x)[0]) >= ENOUGH_DB


def test_dynamic_has_no_neutral_form() -> None:
    prepared = calibrated(Mlp().eval(), torch.randn(8, 4), method="dynamic", config=EAGER)
    text = "backend='eager' with method='dynamic' has no neutral form: the ranges of activations are taken when they"
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}"):
        eager.reference(prepared)


@pytest.mark.parametrize("method", ["static", "qat"])
def test_a_weight_that_is_computed_is_quantized_as_it_is_computed(method: Method) -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.both = nn.Parameter(torch.randn(8, 4) * 0.5)
            self.bias = nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.conv2d(x, self.weight / self.weight.std() / 4, None, padding=1).mean((2, 3))
            return F.linear(F.relu(F.linear(y, self.both[:4], self.bias[:4])), self.both[4:], self.bias[4:])

    model, x = Computed().train(), images()
    prepared = calibrated(model, x, method=method, config=EAGER, passes=3)
    if method == "qat":
        link(prepared, model)
        loss = prepared(x).square().sum()
        assert all(g.any() for g in torch.autograd.grad(loss, list(model.parameters())))
        with torch.no_grad():
            model.weight.mul_(torch.rand(4, 1, 1, 1) + 0.5)  # the last step before it is converted
    int8 = convert(prepared)
    assert coverage(int8, (x,)).share == 1
    assert decibels(model(x), int8(x)) >= ENOUGH_DB
    assert decibels(int8(x), reference(prepared)(x)) >= TIES_DB


def test_what_gives_more_than_tensors_is_given_float() -> None:
    """Cross attention: one of its results is None."""
    model = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    data = torch.randn(4, 5, 16), torch.randn(4, 6, 16)
    for method in ("static", "qat"):
        prepared = calibrated(model, *data, method=method, config=EAGER, passes=3)
        assert info(prepared)
        int8 = convert(prepared)
        assert decibels(model(*data), int8(*data)) >= ENOUGH_DB
        assert coverage(int8, data).share == 1


def test_a_weight_that_is_read_elsewhere_stays_readable() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x)) + self.a.weight.abs().mean()

    model, x = Tied().eval(), torch.randn(32, 4)
    for method in METHODS:
        int8 = convert(calibrated(model, x, method=method, config=EAGER, passes=3))
        assert decibels(model(x), int8(x)) >= ENOUGH_DB


# ---- training


@pytest.mark.parametrize("name", ["functionals", "residual", "gated", "transformer"])
def test_training(name: str) -> None:
    """Gradients reach every weight; with fake quantize off it is the float model, in float64, in both modes."""
    make, data = NETWORKS[name]
    model, x = make().train(), data()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    prepared = prepare(model, EAGER, method="qat", example_inputs=x)
    link(prepared, model)
    parameters = dict(model.named_parameters())
    assert {id(p) for p in prepared.parameters()} == {id(p) for p in parameters.values()}
    gradients = torch.autograd.grad(prepared(x).square().mean(), list(parameters.values()))
    assert all(g.isfinite().all() for g in gradients)
    assert all(g.any() for n, g in zip(parameters, gradients, strict=True) if n != "stem.bias")
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeBase):
            module.disable_fake_quant()
            module.disable_observer()
    model.double()
    prepared.double()
    link(prepared, model)
    x = x.double()
    for training in (False, True):
        model.train(training)
        prepared.train(training)
        torch.manual_seed(3)
        expected = model(x)
        wanted = torch.autograd.grad(expected.square().sum(), list(parameters.values()))
        torch.manual_seed(3)
        found = prepared(x)
        given = torch.autograd.grad(found.square().sum(), list(parameters.values()))
        # float64 has 1e-16; sums in another order, and a folded batch norm, leave some of it
        assert (expected - found).norm() <= 1e-9 * expected.norm()
        scale = max(g.norm() for g in wanted)
        assert all((a - b).norm() <= 1e-9 * scale for a, b in zip(wanted, given, strict=True))


def test_training_moves_the_batch_norms_of_the_model() -> None:
    """Also those that stand alone, which are observed and therefore other objects than the model's."""
    model, x = settle(Gated()), images()
    prepared = prepare(model, EAGER, method="qat", example_inputs=x)
    assert info(prepared).batch_norms == {"stem.0.bn": "stem.1", "norm": "norm"}
    link(prepared, model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    prepared.train()
    prepared(5 * x)
    for name, value in model.named_buffers():
        assert not torch.equal(value, before[name])


def test_trainable_layers_are_those_of_fx() -> None:
    net = nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 1),
        nn.Flatten(), nn.Linear(4 * 4, 4), nn.ReLU(), nn.Linear(4, 2),
    )  # fmt: skip
    x = torch.randn(16, 3, 8)
    kinds = []
    for backend in ("eager", "fx"):
        prepared = prepare(net, QuantConfig(backend=backend), method="qat", example_inputs=x)
        kinds.append({n: type(m) for n, m in prepared.named_modules() if hasattr(m, "weight_fake_quant")})
        seen = [m for m in prepared.modules() if isinstance(m, FakeQuantize) and not m.is_per_channel]
        assert seen
        for module in seen:
            assert module.activation_post_process.averaging_constant == 0.1
    assert kinds[0] == kinds[1]
    assert len(kinds[0]) == 5


def test_a_run_trains_converts_and_writes() -> None:
    callback = QuantizationAwareTraining(EAGER, export=ExportConfig(formats=("torchscript", "onnx")))
    module = Classifier(convnet())
    run = trainer(callback, max_epochs=2)
    before = weights(module)
    run.fit(module, datamodule=Digits())
    assert set(before) == set(weights(module))
    assert different(before, weights(module))
    report = callback.report
    assert report is not None
    assert report.coverage == 1
    assert report.sqnr_db >= ENOUGH_DB
    assert report.fused == [("net.0", "net.1", "net.2")]
    folder = Path("quantized")
    assert {f.name for f in folder.iterdir()} == {"report.html", "report.json", "report.md", "model.ts", "model.onnx"}
    x = torch.randn(5, 1, 8, 8)
    for name in ("model.ts", "model.onnx"):
        assert decibels(callback.quantized_model(x), load(folder / name)(x)) >= TIES_DB

    # a checkpoint of it resumes with the same weights and ranges
    checkpoint = Path("last.ckpt")
    run.save_checkpoint(checkpoint)
    again, other = (
        Classifier(convnet()),
        QuantizationAwareTraining(EAGER, export=ExportConfig(directory="again", formats=("torchscript",))),
    )
    trainer(other, max_epochs=2).fit(again, datamodule=Digits(), ckpt_path=checkpoint, weights_only=True)
    assert not different(weights(module), weights(again))
    assert torch.equal(callback.quantized_model(x), other.quantized_model(x))


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_post_training_quantization_writes_its_files(method: Method) -> None:
    export = ExportConfig(formats=("torchscript", "onnx") if method == "static" else ("torchscript",))
    callback = PostTrainingQuantization(EAGER, method=method, export=export)
    trainer(callback).validate(Classifier(convnet()), datamodule=Digits())
    files = {"model.ts", "model.onnx"} if method == "static" else {"model.ts"}
    assert {f.name for f in Path("quantized").iterdir()} == {"report.html", "report.json", "report.md", *files}
    assert callback.report is not None
    assert callback.report.config["backend"] == "eager"
    assert callback.report.sqnr_db >= ENOUGH_DB


# ---- the neutral form


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("name", CONV_NETS)
def test_the_neutral_form_can_be_exported(name: str, method: Method) -> None:
    make, data = NETWORKS[name]
    model, x = make(), data()
    prepared = calibrated(model, x, method=method, config=EAGER, passes=2)
    stored = to_qdq(eager.reference(prepared))
    assert torch.equal(stored(x), reference(prepared)(x))
    # no float weights are left
    assert not [n for n, p in stored.named_parameters() if p.dim() > 1]
    program = torch.export.export(stored, (x,), strict=False)
    assert torch.equal(program.module()(x), stored(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_observers_are_found_by_name(name: str) -> None:
    make, data = NETWORKS[name]
    prepared = prepare(make(), EAGER, method="qat", example_inputs=data())
    for graph in [m for m in prepared.modules() if is_graph(m)]:
        found = observers(graph)
        assert found
        for key, module in found.items():
            assert graph.get_submodule(key) is module
