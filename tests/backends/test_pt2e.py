"""PT2E: export, observers placed by our quantizer, training through torchao's fake quantizes, QDQ programs."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Block, Mlp, Residual
from modules import Classifier, Digits, convnet, trainer, weights
from torch import nn
from torch.nn import functional as F

from lightning_quant import (
    ArtifactError,
    CaptureError,
    ConfigError,
    ExportConfig,
    MissingExtraError,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    _torch_ao,
    convert,
    coverage,
    export,
    load,
    prepare,
)
from lightning_quant._torch_ao import is_fake_quantize
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.arguments import Call
from lightning_quant.backends import pt2e
from lightning_quant.backends.graph import followers, info, is_graph, link, observers, sees_weights
from lightning_quant.phases import freeze_batch_norm, load_observer_state, observer_state, set_observing

pytest.importorskip("torchao", reason="torchao is not installed: pip install 'lightning-quant[pt2e]'")

PT2E = QuantConfig(backend="pt2e")
ONE_SCALE = QuantConfig(backend="pt2e", weight=TensorSpec(qscheme="per_tensor_symmetric"))


class Functions(nn.Module):
    """Takes ``(N, 3, 8, 8)``, gives ``(N, 5)``: functions, a concatenation, a sum, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) / 5)
        self.bias = nn.Parameter(torch.randn(6))
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.norm = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(12, 12, 2, stride=2, groups=2)
        self.relu = nn.ReLU()
        self.matrix = nn.Parameter(torch.randn(12, 5) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.conv2d(x, self.kernel, self.bias, padding=1))
        y = self.relu(self.norm(self.up(x)))
        z = F.max_pool2d(y, 2)
        x = torch.cat([z + x, z], 1)
        x = self.relu(self.down(x))
        x = F.dropout(x.mean((2, 3)), 0.3, self.training)
        return x @ self.matrix


class Odd(nn.Module):
    """Takes ``(N, 3, 8, 8)``, gives ``(N, 5)``. Batch norms and dropouts are not at their defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.drop = nn.Dropout(0.2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.bn_up = nn.BatchNorm2d(8, eps=1e-2, momentum=0.2)
        self.alone = nn.BatchNorm2d(8, eps=1e-3, momentum=0.05)
        self.fc = nn.Linear(8, 5)
        self.bn_fc = nn.BatchNorm1d(5, eps=1e-3, momentum=None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(F.relu_(self.bn(self.conv(x))))
        x = self.alone(F.gelu(self.bn_up(self.up(x))))
        return self.bn_fc(self.fc(F.dropout(x.mean((2, 3)), 0.4, self.training)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(self.embed(x))[0])


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def settled(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(*(torch.randn_like(x) if x.is_floating_point() else x for x in inputs))
    return model.eval()


def calibrated(model: nn.Module, example: torch.Tensor, config: QuantConfig = PT2E, method: Any = "static") -> Any:
    prepared = prepare(model, config, method=method, example_inputs=example)
    with torch.no_grad():
        prepared(example)
        for _ in range(3):
            prepared(torch.randn_like(example) if example.is_floating_point() else torch.randint_like(example, 20))
    return prepared


IMAGES, ROWS, TOKENS, SEQUENCES = (
    torch.randn(4, 3, 8, 8), torch.randn(4, 4), torch.randint(0, 20, (4, 6)), torch.randn(4, 6, 16),
)  # fmt: skip

NETS: Any = {
    "functions": (Functions, IMAGES),
    "odd": (Odd, IMAGES),
    "residual": (Residual, IMAGES),
    "mlp": (Mlp, ROWS),
    "tagger": (Tagger, TOKENS),
    "transformer": (transformer, SEQUENCES),
}


# ---- every net, every method


@pytest.mark.parametrize("net", NETS)
def test_static_gives_what_float_gives(net: str) -> None:
    make, example = NETS[net]
    model = settled(make(), example)
    converted = convert(calibrated(model, example))
    with torch.no_grad():
        # 8 bits give 40 dB and more on one layer; over the few layers here roundings add up to less than 15 dB
        assert sqnr_db(model(example), converted(example)) > 25
        for rows in (1, 3, 64):
            data = example[torch.arange(rows) % 4]
            assert sqnr_db(model(data), converted(data)) > 25
    found = coverage(converted, example)
    expected = {"tagger": 32 / (32 + 512)}.get(net, 1.0)  # the linear layer: 8 * 4 of 8 * 4 + 4 * 8 * (8 + 8)
    assert found.share == pytest.approx(expected)
    assert not any("observer" in type(module).__name__.lower() for module in converted.modules())
    assert {x.dtype for x in converted.state_dict().values() if x.dim() > 1} <= {torch.int8, torch.float32}


@pytest.mark.parametrize("net", NETS)
def test_training_reaches_all_weights_and_converts(net: str) -> None:
    make, example = NETS[net]
    model = settled(make(), example)
    prepared: Any = prepare(model, PT2E, method="qat", example_inputs=example)
    assert info(prepared).interface.owner == ""  # one graph of all of it
    assert {id(p) for p in prepared.parameters()} == {id(p) for p in model.parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    prepared.train()
    for _ in range(3):
        optimizer.zero_grad()
        prepared(example).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    prepared.eval()
    with torch.no_grad():
        trained, converted = prepared(example), convert(prepared)(example)
    # the same integers in another order of sums: a rounding here and there differs by one step of 255
    assert sqnr_db(trained, converted) > 30


@pytest.mark.parametrize("net", ["mlp", "tagger", "transformer"])
def test_dynamic_quantizes_linear_layers(net: str) -> None:
    make, example = NETS[net]
    model = make().eval()
    converted = convert(prepare(model, PT2E, method="dynamic", example_inputs=example))
    with torch.no_grad():
        assert sqnr_db(model(example), converted(example)) > 30
    rows = [row for row in coverage(converted, example).rows if row.weighted]
    assert {row.int8 for row in rows if "rnn" not in row.op and "embedding" not in row.op} == {True}
    if net == "tagger":
        assert info(converted).float_layers == {
            "embed": "torchao's quantizers leave embeddings in float: use backend='fx'",
            "lstm": "torchao has no int8 form of recurrent layers: use backend='fx'",
        }


# ---- training


def _switched_off(prepared: Any) -> None:
    for module in observers(prepared).values():
        module.disable_fake_quant()
        module.disable_observer()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "config", [PT2E, QuantConfig(backend="pt2e", weight=TensorSpec(qscheme="per_tensor_symmetric"))]
)
def test_without_fake_quantize_the_graph_is_the_model(training: bool, config: QuantConfig) -> None:
    model = settled(Odd(), IMAGES)
    twin = copy.deepcopy(model).double()
    prepared: Any = prepare(model, config, method="qat", example_inputs=IMAGES)
    link(prepared, model)
    model.double()
    prepared.double()
    _switched_off(prepared)
    twin.train(training)
    prepared.train(training)
    for _ in range(2):
        data = torch.randn(6, 3, 8, 8, dtype=torch.double)
        outputs = []
        for module in (twin, prepared):
            torch.manual_seed(1)
            outputs.append(module(data))
            outputs[-1].square().sum().backward()
        # double rounds by 1e-16, and the sums have a few hundred terms
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-12)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9, msg=name)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-9, atol=1e-12)
    assert twin.bn.num_batches_tracked == 20 + 2 * training


def test_a_batch_norm_of_zeros_gives_no_nan() -> None:
    for config in (PT2E, ONE_SCALE):
        model = settled(Block(4), torch.randn(2, 4, 8, 8))
        nn.init.zeros_(model.bn2.weight)
        example = torch.randn(2, 4, 8, 8)
        prepared: Any = prepare(model, config, method="qat", example_inputs=example)
        prepared.train()(example).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert model.bn2.weight.grad.abs().sum() > 0
        assert convert(prepared)(example).isfinite().all()


def test_frozen_batch_norms_stay_frozen() -> None:
    model = settled(Residual(), IMAGES)
    prepared: Any = prepare(model, PT2E, method="qat", example_inputs=IMAGES)
    link(prepared, model)
    model.train()
    prepared.train()
    model.blocks[0].bn1.eval()  # type: ignore[union-attr]
    before = {name: x.clone() for name, x in model.named_buffers()}
    prepared(IMAGES)
    moved = {name.rpartition(".")[0] for name, x in model.named_buffers() if not torch.equal(x, before[name])}
    assert moved == {"bn", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2"}
    assert len(freeze_batch_norm(prepared)) == 4
    before = {name: x.clone() for name, x in model.named_buffers()}
    prepared(IMAGES)
    assert all(torch.equal(x, before[name]) for name, x in model.named_buffers())


class Activated(nn.BatchNorm2d):
    """Does more than its base class, as timm's ``BatchNormAct2d`` does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(x))


def test_a_batch_norm_of_another_class_is_followed() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4, eps=1e-2), nn.Conv2d(4, 4, 3)), IMAGES)
    prepared: Any = prepare(model, PT2E, method="qat", example_inputs=IMAGES)
    link(prepared, model)
    assert [(type(a), b) for a, b in followers(prepared, model)] == [(nn.BatchNorm2d, model[1])]  # type: ignore[index]
    prepared.train()(IMAGES)
    assert prepared.get_buffer("1.running_mean") is model.get_buffer("1.running_mean")
    assert model.get_buffer("1.num_batches_tracked") == 21
    prepared.eval()
    with torch.no_grad():
        assert sqnr_db(model.eval()(IMAGES), convert(prepared)(IMAGES)) > 25


def test_a_linked_graph_uses_the_buffers_of_the_model_also_after_a_move() -> None:
    model = settled(Residual(), IMAGES)
    prepared: Any = prepare(model, PT2E, method="qat", example_inputs=IMAGES)
    link(prepared, model)
    assert prepared.bn is model.bn
    model.double().float()  # new tensors in the place of the buffers, as on another device
    link(prepared, model)
    for name, buffer in prepared.named_buffers():
        if not any(name.startswith(f"{observer}.") for observer in observers(prepared)):
            assert buffer is model.get_buffer(name)


def test_a_copy_trains_alone() -> None:
    model = settled(Functions(), IMAGES)
    prepared: Any = prepare(model, PT2E, method="qat", example_inputs=IMAGES)
    twin = copy.deepcopy(prepared)
    before = copy.deepcopy(prepared.state_dict())
    twin.train()(IMAGES).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in prepared.state_dict().items())
    assert twin.train() is twin


def test_observers_are_found_frozen_and_restored() -> None:
    model = settled(Residual(), IMAGES)
    prepared: Any = prepare(model, PT2E, method="qat", example_inputs=IMAGES)
    kinds = {name: sees_weights(prepared, name) for name in observers(prepared)}
    assert sum(kinds.values()) == 6  # layers with weights
    assert all(is_fake_quantize(module) for module in observers(prepared).values())
    set_observing(prepared, activations=False, weights=True)
    for name, module in observers(prepared).items():
        assert bool(module.observer_enabled) == sees_weights(prepared, name)  # type: ignore[arg-type]
    set_observing(prepared, activations=True, weights=True)
    prepared.eval()(IMAGES)
    state = observer_state(prepared)
    other: Any = prepare(model, PT2E, method="qat", example_inputs=IMAGES)
    load_observer_state(other, state)
    assert all(torch.equal(x, state[name]) for name, x in observer_state(other).items())
    prepared.eval()
    with torch.no_grad():
        set_observing(prepared, activations=False, weights=False)
        set_observing(other.eval(), activations=False, weights=False)
        assert torch.equal(prepared(IMAGES), other(IMAGES))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(3, 4, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 3)
        self.fc = nn.Linear(36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([F.relu(self.a(x)), self.b(x)], 1)
        return self.fc(F.gelu(self.c(F.pad(F.max_pool2d(x, 2), [0, 1, 0, 1]))).flatten(1))


def test_operators_that_move_data_run_in_int8_and_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = calibrated(Pooled().eval(), IMAGES)
    converted: Any = convert(prepared)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    sources = [node.args[0].target for node in converted.graph.nodes if node.target is quantize]
    aten = torch.ops.aten
    # both convolutions, the first with its ReLU, write int8, and so does all that stands before the third
    for target in (aten.relu.default, aten.conv2d.default, aten.cat.default, aten.max_pool2d.default):
        assert target in sources, target
    assert aten.flatten.using_ints in sources
    assert aten.gelu.default not in sources  # its result is only moved: there is nothing in int8 before it
    monkeypatch.setattr(pt2e, "spread", lambda graph_module: None)
    with torch.no_grad():
        assert torch.equal(convert(prepared)(IMAGES), converted(IMAGES))


# ---- what cannot be one graph


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.sum() > 0:
            return x
        return self.second(x)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.fc(x) * self.calls


class Averages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)  # type: ignore[union-attr, operator]
        return x - self.mean  # type: ignore[operator]


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return x * 2 if self.training else x


def test_a_branch_on_data_is_named_and_its_parts_are_quantized() -> None:
    with pytest.raises(CaptureError, match=r"test_pt2e\.py:\d+: \w*: .*[Dd]ata-dependent"):
        pt2e.check(Branches(), Call((ROWS,)), "static", PT2E)
    prepared: Any = prepare(Branches(), PT2E, method="static", example_inputs=ROWS.abs())
    prepared(ROWS)
    assert "first.graph" in [name for name, module in prepared.named_modules() if is_graph(module)]


@pytest.mark.parametrize("method", ["static", "qat"])
def test_state_is_not_baked(method: Any) -> None:
    with pytest.raises(CaptureError, match=r"its forward changes self\.calls: it carries state from call to call"):
        pt2e.check(Counts(), Call((ROWS,)), method, PT2E)


class Skips(nn.Module):
    """Leaves its layer out for half of the rows of a batch, and gives the same for all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        if self.training:
            y = y * torch.empty(x.shape[0], 1).bernoulli_(0.5)
        return y * 0 + self.fc.bias


def test_what_only_training_does_is_not_lost() -> None:
    with pytest.raises(CaptureError, match=r"computes other things in training than in evaluation: a branch on"):
        pt2e.check(Skips(), Call((ROWS,)), "qat", PT2E)
    with pytest.raises(CaptureError, match=r"its forward changes self\.mean"):
        pt2e.check(Averages(), Call((ROWS,)), "qat", PT2E)
    with pytest.raises(CaptureError, match=r"computes other things in training than in evaluation"):
        pt2e.check(Auxiliary(), Call((ROWS,)), "qat", PT2E)
    pt2e.check(Averages(), Call((ROWS,)), "static", PT2E)


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, batch: dict[str, torch.Tensor], *, scale: float = 1.0) -> dict[str, Any]:
        a = self.a(batch["x"])
        return {"a": a, "both": [a, self.b(batch["y"]) * scale]}


def test_containers_go_in_and_out() -> None:
    model = Containers().eval()
    batch = {"x": ROWS, "y": torch.randn(4, 4)}
    prepared: Any = prepare(model, PT2E, method="static", example_inputs={"batch": batch, "scale": 2.0})
    prepared(batch, scale=2.0)
    found, expected = convert(prepared)(batch, scale=2.0), model(batch, scale=2.0)
    assert found.keys() == expected.keys()
    assert sqnr_db(expected, found) > 30


def test_skip_and_settings_are_respected() -> None:
    model = settled(Residual(), IMAGES)
    config = replace(ONE_SCALE, skip=("blocks.0",), reduce_range=True, activation=TensorSpec(observer="min_max"))
    converted: Any = convert(calibrated(model, IMAGES, config))
    integers = [x for x in converted.state_dict().values() if x.dtype == torch.int8]
    assert len(integers) == 4  # of six layers
    assert all(x.abs().max() == 63 for x in integers)
    assert coverage(converted, IMAGES).share < 0.7


# ---- files


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_pt2_files_are_what_they_were_written_from(method: Any, tmp_path: Path) -> None:
    model = settled(Mlp(), ROWS)
    prepared = calibrated(model, ROWS, method=method)
    files = export(prepared, None, ExportConfig(directory=str(tmp_path), formats=("pt2",)), ROWS)
    loaded = load(files["pt2"])
    converted = convert(prepared)
    for rows in (1, 3, 64):
        data = torch.randn(rows, 4)
        torch.testing.assert_close(loaded(data), converted(data), rtol=0, atol=0)
    assert loaded.eval() is loaded
    assert {x.dtype for x in loaded.state_dict().values() if x.dim() == 2} == {torch.int8}  # no float weight is left
    assert coverage(loaded, ROWS).share == 1.0


def test_fx_writes_pt2_files_too(tmp_path: Path) -> None:
    model = settled(Residual(), IMAGES)
    prepared = calibrated(model, IMAGES, QuantConfig())
    files = export(prepared, None, ExportConfig(directory=str(tmp_path), formats=("torchscript", "pt2")), IMAGES)
    loaded = load(files["pt2"])
    assert sqnr_db(load(files["torchscript"])(IMAGES), loaded(IMAGES)) > 30
    # the same layers are int8 in both, whichever way they are written
    rows = [coverage(x, IMAGES) for x in (convert(prepared), loaded)]
    assert [r.share for r in rows] == [1.0, 1.0]
    assert [r.macs for r in rows[0].rows] == [r.macs for r in rows[1].rows]


def test_coverage_is_that_of_fx() -> None:
    model = settled(Residual(), IMAGES)
    ours, theirs = (
        convert(calibrated(model, IMAGES, QuantConfig(backend=backend, skip=("blocks.1.conv2",))))  # type: ignore[arg-type]
        for backend in ("pt2e", "fx")
    )
    a, b = coverage(ours, IMAGES), coverage(theirs, IMAGES)
    assert [(row.macs, row.int8) for row in a.rows] == [(row.macs, row.int8) for row in b.rows]
    assert 0 < a.share < 1


@pytest.mark.parametrize("how", ["truncated", "foreign", "text"])
def test_a_damaged_or_foreign_pt2_file_is_refused(how: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    if how == "foreign":
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)), path)
    elif how == "text":
        path.write_text("not an archive")
    else:
        prepared = calibrated(Mlp().eval(), ROWS)
        export(prepared, None, ExportConfig(directory=str(tmp_path), formats=("pt2",)), ROWS)
        path.write_bytes(path.read_bytes()[:-200])
    expected = "not written by lightning_quant" if how == "foreign" else "damaged or foreign"
    with pytest.raises(ArtifactError, match=expected):
        load(path)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _torch_ao.pt2e.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lightning-quant\[pt2e\]'"):
        _torch_ao.pt2e()
    _torch_ao.pt2e.cache_clear()


def test_another_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _torch_ao.pt2e.cache_clear()
    monkeypatch.setitem(_torch_ao._PT2E, "torchao.quantization.pt2e", ("NoSuchObserver",))
    with pytest.raises(ConfigError, match=r"torchao \S+: .*NoSuchObserver.*The backend was tried with torchao 0\.18"):
        _torch_ao.pt2e()
    _torch_ao.pt2e.cache_clear()


# ---- known architectures


def _unsettled(name: str) -> nn.Module:
    """With random weights and ten steps of its own momentum: what its layers read is as small as 4e-4."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed: pip install torchvision")
    model: nn.Module = getattr(torchvision.models, name)(weights=None).train()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(16, 3, 96, 96))
    return model.eval()


@pytest.mark.torchvision
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_architectures_of_torchvision(name: str) -> None:
    model, example = _unsettled(name), torch.randn(8, 3, 96, 96)
    converted = convert(calibrated(model, example))
    with torch.no_grad():
        assert sqnr_db(model(example), converted(example)) > 25
    assert coverage(converted, example).share == 1.0


@pytest.mark.torchvision
@pytest.mark.slow
def test_small_activations_have_all_levels() -> None:
    """The smallest scale of torchao's x86 configuration is 2**-12: below 255 * 2**-12 = 0.06 it leaves levels out."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    model, example = _unsettled("mobilenet_v3_small"), torch.randn(8, 3, 96, 96)
    program = torch.export.export(
        model, (example[:2],), dynamic_shapes=({0: torch.export.Dim("b", min=2)},), strict=True
    )
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    stock = prepare_pt2e(program.module(), quantizer)
    with torch.no_grad():
        stock(example)
        by_torchao = sqnr_db(model(example), convert_pt2e(stock)(example))
        ours = sqnr_db(model(example), convert(calibrated(model, example))(example))
    assert by_torchao < 25 < ours


# ---- the callbacks


def test_training_survives_sanity_check_checkpoint_and_test() -> None:
    callback = QuantizationAwareTraining(PT2E, export=ExportConfig(formats=("pt2",)))
    model = Classifier(convnet())
    runner = trainer(callback, max_epochs=2, num_sanity_val_steps=2, enable_checkpointing=True)
    runner.fit(model, datamodule=Digits())
    assert callback.report is not None
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    # 2 epochs of training batches, and none of the sanity check or of validation
    assert {int(m.num_batches_tracked) for m in norms} == {2 * runner.num_training_batches}  # type: ignore[arg-type]
    path = runner.checkpoint_callback.best_model_path
    tested = runner.test(model, datamodule=Digits(), ckpt_path=path)
    assert tested[0].keys() == {"test_loss", "test_acc"}
    fresh = QuantizationAwareTraining(PT2E, export=ExportConfig(formats=("pt2",)))
    again = trainer(fresh, enable_checkpointing=True).test(Classifier(convnet()), datamodule=Digits(), ckpt_path=path)
    assert again == tested


def test_calibration_ends_with_a_report_and_files_that_load() -> None:
    callback = PostTrainingQuantization(PT2E, export=ExportConfig(formats=("pt2", "onnx")))
    trainer(callback).validate(Classifier(convnet()), datamodule=Digits())
    report: Any = callback.report
    assert report.artifacts == {"pt2": Path("quantized/model.pt2"), "onnx": Path("quantized/model.onnx")}
    assert report.coverage == 1.0
    assert report.sqnr_db > 25
    for path in report.artifacts.values():
        loaded = load(path)
        for rows in (1, 3, 64):
            assert loaded(torch.randn(rows, 1, 8, 8)).shape == (rows, 10)


def test_training_ends_with_a_report_and_files_that_load() -> None:
    callback = QuantizationAwareTraining(PT2E, export=ExportConfig(formats=("pt2", "onnx")))
    model = Classifier(convnet())
    before = weights(model)
    trainer(callback, max_epochs=1, num_sanity_val_steps=1).fit(model, datamodule=Digits())
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    report: Any = callback.report
    assert report.coverage == 1.0
    assert report.sqnr_db > 25
