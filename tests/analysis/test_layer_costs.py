"""What int8 costs each layer: against arithmetic written out here, the float model, and the int8 model itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, TensorSpec, convert, prepare
from lightning_quant.analysis.layer_graph import graph_of
from lightning_quant.analysis.layers import LayerReport, float_layers_of, layers_of
from lightning_quant.analysis.side_by_side import run_both
from lightning_quant.backends import reference_graph
from lightning_quant.backends.graph import link, observers

# networks this small gain nothing from a second thread
torch.set_num_threads(1)
BACKENDS = ("fx", "eager", "pt2e")


class Residual(nn.Module):
    """Convolutions with batch norm, a ReLU6, an activation as a function, a sum, a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act = nn.ReLU6(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = F.relu(y + self.bn2(self.conv2(y)), inplace=True)
        return self.head(y.mean((2, 3)))


def db(reference: torch.Tensor, other: torch.Tensor) -> float:
    reference, other = reference.double(), other.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))


def made(model: nn.Module, x: Any, method: str, backend: str = "fx", **config: Any) -> tuple[Any, Any]:
    prepared = prepare(model, QuantConfig(backend=backend, **config), method=method, example_inputs=x)
    if method == "qat":
        link(prepared, model)  # its batch norms are those of the model
    prepared.train(method == "qat")
    call = x if isinstance(x, tuple) else (x,)
    for _ in range(3):
        prepared(*call)
    return prepared.eval(), convert(prepared.eval())


def found(*args: Any, **kwargs: Any) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in layers_of(*args, **kwargs)}


# ---- both sides are what they are called


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_float_it_is_the_float_model_and_in_int8_the_reference(backend: str, method: str) -> None:
    model, x = Residual(), torch.randn(6, 1, 8, 8)
    prepared, converted = made(model, x, method, backend)
    sides = run_both(graph_of(prepared, converted, {}), (x,), lambda *_: None)
    with torch.no_grad():
        # batch norms are folded, so that sums are rounded otherwise
        assert db(copy.deepcopy(model).eval()(x), sides.floating) > 110
        assert torch.equal(sides.int8, reference_graph(prepared)(x))
    assert db(sides.floating, sides.int8) < 60


@pytest.mark.parametrize("method", ["static", "qat", "dynamic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layer_has_its_figures(backend: str, method: str) -> None:
    x = torch.randn(64, 1, 8, 8)
    layers = found(*made(Residual(), x, method, backend), (x,))
    assert list(layers) == ["conv1", "conv2", "head"]
    assert [layer.kind for layer in layers.values()] == ["Conv2d", "Conv2d", "Linear"]
    for name, layer in layers.items():
        assert layer.reads is not None
        assert layer.weight is not None
        if method == "dynamic" and name != "head":  # there are int8 kernels of linear layers alone
            assert (layer.int8, layer.alone_db, layer.weight_db) == (False, None, None)
            continue
        assert layer.int8
        assert 25 < layer.alone_db < 60
        # an error more may by chance undo a part of another
        assert 20 < layer.sqnr_db < layer.alone_db + 1
        assert 40 < layer.weight_db < 60
        assert layer.weight.clipped == 0
        assert (layer.reads.clip_high is None) == (method == "dynamic")


def test_what_is_prepared_and_the_data_stay_as_they_are() -> None:
    model, x = Residual(), torch.randn(6, 1, 8, 8)
    prepared, converted = made(model, x, "qat")
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    data = x.clone()
    layers_of(prepared, converted, (x,))
    assert torch.equal(x, data)
    after = prepared.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    assert prepared.conv1.weight is model.conv1.weight


# ---- figures by hand


def grid(x: torch.Tensor, scale: Any, zero_point: Any, least: int, most: int) -> torch.Tensor:
    return (torch.clamp(torch.round(x / scale) + zero_point, least, most) - zero_point) * scale


def weight_grid(weight: torch.Tensor) -> torch.Tensor:
    """One symmetric scale for each output channel: its largest weight is 127."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return grid(weight, scale, 0, -127, 127)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_alone_by_hand(backend: str) -> None:
    """Two linear layers. What the second one costs alone has nothing of the first one's error in it."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(64, 16)
    spec = TensorSpec(observer="min_max")
    layers = found(*made(model, x, "static", backend, activation=spec, weight=spec, reduce_range=False), (x,))
    with torch.no_grad():
        hidden = F.relu(model[0](x))
        for name, layer, read in (("0", model[0], x), ("2", model[2], hidden)):
            low, high = min(0.0, float(read.min())), max(0.0, float(read.max()))
            scale = (high - low) / 255
            rounded = grid(read, scale, round(-low / scale), 0, 255)
            alone = F.linear(rounded, weight_grid(layer.weight), layer.bias)
            expected, seen = layer(read), layers[name]
            if name == "0":  # looked at behind its ReLU where that is fused with it
                assert seen.alone_db in (
                    pytest.approx(db(expected, alone), abs=0.05),
                    pytest.approx(db(F.relu(expected), F.relu(alone)), abs=0.05),
                )
            else:
                assert seen.alone_db == pytest.approx(db(expected, alone), abs=0.05)
            assert seen.weight_db == pytest.approx(db(layer.weight, weight_grid(layer.weight)), abs=0.05)
            assert seen.reads.clip_low == pytest.approx(low, abs=scale)
            assert seen.reads.clip_high == pytest.approx(high, abs=scale)
            assert seen.reads.clipped == 0
            assert seen.reads.low == pytest.approx(float(read.min()))


def test_with_all_in_int8_it_is_what_the_int8_model_gives() -> None:
    model, x = Residual(), torch.randn(6, 1, 8, 8)
    prepared, converted = made(model, x, "static")
    with torch.no_grad():
        expected = db(copy.deepcopy(model).eval()(x), converted(x))
    # the reference and the int8 kernels round ties in their own ways
    assert found(prepared, converted, (x,))["head"].sqnr_db == pytest.approx(expected, abs=1.0)


@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_of_dynamic_layers_the_int8_kernels_are_run(backend: str) -> None:
    model, x = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), torch.randn(64, 16)
    prepared, converted = made(model, x, "dynamic", backend)
    layers = found(prepared, converted, (x,))
    with torch.no_grad():
        hidden = model[1](model[0](x))
        second = dict(converted.named_modules())["2"]
        assert layers["2"].alone_db == pytest.approx(db(model[2](hidden), second(hidden)), abs=0.01)
        assert layers["2"].sqnr_db == pytest.approx(db(model(x), converted(x)), abs=0.01)


# ---- a layer with a fault is found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_range_that_is_too_narrow_is_seen_where_it_is(backend: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(256, 8)
    prepared, _ = made(model, x, "static", backend)
    prepared_too_low, _ = made(model, x / 10, "static", backend)
    healthy = found(prepared, convert(prepared), (x,))
    sick = found(prepared_too_low, convert(prepared_too_low), (x,))
    assert healthy["0"].reads.clipped < 0.01
    assert sick["0"].reads.clipped > 0.5
    assert sick["0"].alone_db < 10 < healthy["0"].alone_db - 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_with_an_outlier_is_the_worst(backend: str) -> None:
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(256, 8)
    with torch.no_grad():
        model[2].weight[:, 0] = 100.0  # of each channel: 8 bits are spent on it
    x[:, 0] = 0
    with torch.no_grad():
        model[1].weight[0] = model[1].bias[0] = 0  # what it multiplies is 0
    layers = found(*made(model, x, "static", backend), (x,))
    assert min(layers, key=lambda name: layers[name].alone_db) == "2"


# ---- other layers


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.table(tokens))[0])


@pytest.mark.parametrize("method", ["static", "dynamic"])
@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_recurrent_layers_and_embeddings(backend: str, method: str) -> None:
    model, tokens = Tagger(), torch.randint(0, 20, (6, 5))
    layers = found(*made(model, tokens, method, backend), (tokens,))
    assert {name: layer.kind for name, layer in layers.items()} == {
        "table": "Embedding", "lstm": "LSTM", "head": "Linear",
    }  # fmt: skip
    for layer in layers.values():
        assert layer.int8
        assert 25 < layer.alone_db < 80
        assert layer.weight is not None
    assert layers["lstm"].reads.clip_high is None  # its ranges are taken while it runs


def test_a_layer_in_float_has_no_cost_of_its_own() -> None:
    x = torch.randn(6, 1, 8, 8)
    layers = found(*made(Residual(), x, "static", skip=("conv2",)), (x,))
    assert layers["conv2"].int8 is False
    assert layers["conv2"].alone_db is None
    assert layers["conv2"].sqnr_db > 30  # of what came before it


def test_a_layer_that_runs_twice_has_the_worst_of_its_figures() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, x = Twice(), torch.randn(64, 8)
    layers = layers_of(*made(model, x, "static"), (x,))
    assert [layer.name for layer in layers] == ["layer"]


def test_a_single_layer_is_the_target_itself() -> None:
    x = torch.randn(64, 8)
    for backend in BACKENDS:
        (layer,) = layers_of(*made(nn.Linear(8, 4), x, "static", backend), (x,))
        assert layer.name == ""


def test_of_programs_the_float_layers_are_seen() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)), torch.randn(3, 1, 8, 8)
    layers = float_layers_of(model, lambda: model(x))
    assert [(x.name, x.kind, x.int8, x.alone_db) for x in layers] == [
        ("0", "Conv2d", None, None), ("3", "Linear", None, None),
    ]  # fmt: skip
    assert layers[0].reads.low == pytest.approx(float(x.min()))
    assert layers[0].weight.high == pytest.approx(float(model[0].weight.detach().max()))
    assert not model[0]._forward_pre_hooks


def test_the_comparison_of_these_tests_can_fail() -> None:
    x = torch.randn(100)
    assert db(x, x + 0.1 * x.std() * torch.randn(100)) == pytest.approx(20, abs=2)
    assert observers(made(nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4), "static")[0])
