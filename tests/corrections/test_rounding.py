"""AdaRound on prepared models: weights on the grid, the same integers when converted, layers nearer to float."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from correction_nets import knows_digits
from models import Branching, Residual, calibrated, decibels, settle
from modules import digits
from torch import nn
from torch.nn import functional as F

from lightning_quant import ConfigError, QuantConfig, TensorSpec, convert, prepare
from lightning_quant.analysis.simulation import simulate, simulation, switch
from lightning_quant.analysis.switches import SwitchedLayer
from lightning_quant.backends import reference
from lightning_quant.backends.weighted import weighted_layers
from lightning_quant.corrections.rounding import adaround

BACKENDS = ("fx", "eager", "pt2e")


class Layers(nn.Module):
    """Takes ``(N, 3, 8, 8)``: dense, grouped, depthwise, with activations of several kinds, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 1), stride=(2, 1), groups=4)
        self.depthwise = nn.Conv2d(12, 12, 2, dilation=2, groups=12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.hardswish(self.depthwise(F.relu6(self.grouped(x))))
        return self.fc(x.mean((2, 3)))


def config(backend: Any = "fx", bits: int = 4, **settings: Any) -> QuantConfig:
    return QuantConfig(backend=backend, weight=TensorSpec(bits=bits, **settings), reduce_range=False)


def images(count: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def observed(net: nn.Module, backend: Any = "fx", data: torch.Tensor | None = None, **settings: Any) -> Any:
    return calibrated(net, images() if data is None else data, config=config(backend, **settings))


def made(kind: type[nn.Module] = Layers) -> nn.Module:
    torch.manual_seed(0)
    return settle(kind(), steps=2)


def integers(int8: nn.Module, name: str) -> torch.Tensor:
    """Of a layer of an int8 model of fx or eager."""
    packed: Any = int8.get_submodule(name)
    found: torch.Tensor = packed.weight().int_repr()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("qscheme", ["auto", "per_tensor_symmetric", "per_channel_affine"])
def test_weights_are_on_the_grid_and_stay_there(backend: Any, bits: int, qscheme: Any) -> None:
    if (backend, qscheme) == ("pt2e", "per_channel_affine"):
        qscheme = "per_channel_symmetric"  # torchao's kernels take no other
    prepared = observed(made(), backend, bits=bits, qscheme=qscheme)
    rounded = adaround(prepared, [images(32, 1), images(32, 2)], iterations=60)
    layers = weighted_layers(rounded)
    assert len(layers) == 4
    moved = 0
    int8 = convert(rounded)
    for layer, before in zip(layers, weighted_layers(prepared), strict=True):
        found = layer.quantization
        assert found is not None
        scale, zero_point = (found.along(x, layer.weight) for x in (found.scale, found.zero_point))
        steps = layer.weight.double() / scale.double() + zero_point
        whole = steps.round()
        # a product of float32 and a whole number is off by half a unit in its last place, 2 ** -24
        assert (steps - whole).abs().max() < 128 * 2.0**-23
        assert whole.min() >= found.quant_min
        assert whole.max() <= found.quant_max
        assert torch.equal(found.rounded(layer.weight), layer.weight)
        moved += int((before.quantization.rounded(before.weight) != layer.weight).sum())  # type: ignore[union-attr]
        if backend != "pt2e":
            assert torch.equal(integers(int8, layer.name).double(), whole)
    assert moved > 20
    # what runs in int8 is what was looked for: the reference graph has the weights that were stored
    stored = [layer.weight for layer in layers]
    assert weights_of(rounded) == pytest.approx([float(w.double().abs().sum()) for w in stored], rel=1e-6)


def weights_of(rounded: nn.Module) -> list[float]:
    """Sums of the weights that the int8 model has, by the simulation of it, which is made from the reference graph."""
    from lightning_quant.analysis.branching import Runner

    graph = simulate(rounded)
    runner = Runner(graph)
    found = [runner.weight_of(node) for node in runner.nodes if node.name in runner.layers]
    return [float(stored.weight(True).double().abs().sum()) for stored in found if stored is not None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_else_changes(backend: Any) -> None:
    prepared = observed(made(), backend)
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    random = torch.get_rng_state()
    data = images(16, 1)
    expected = convert(prepared)(data)
    first, again, other = (adaround(prepared, [data], iterations=40, positions=80, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert torch.equal(convert(prepared)(data), expected)
    weights = [[layer.weight for layer in weighted_layers(model)] for model in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))
    assert not first.training


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return knows_digits()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trained_net_is_nearer_to_float(trained: nn.Module, backend: Any) -> None:
    images, labels = digits()
    data, unseen = images[:512] / 16, images[1000:] / 16
    prepared = observed(trained, backend, data)
    with torch.no_grad():
        rounded = adaround(prepared, data.split(128), iterations=300)
        expected = trained(unseen)
        nearest, learned = (convert(model)(unseen) for model in (prepared, rounded))
    assert decibels(expected, learned) > decibels(expected, nearest) + 3
    right = [float((y.argmax(1) == labels[1000:]).float().mean()) for y in (expected, nearest, learned)]
    assert right[2] >= right[0] - 0.02


def test_each_layer_of_a_trained_net_is_nearer_to_float(trained: nn.Module) -> None:
    """Given what the model so far gives it, each layer is nearer to its float output than rounded to nearest."""
    data = digits()[0][:256] / 16
    prepared = observed(trained, data=data)
    rounded = adaround(prepared, [data], iterations=300)
    before = {layer.name: layer for layer in weighted_layers(prepared)}
    after = {layer.name: layer for layer in weighted_layers(rounded)}
    graph = simulate(rounded)
    floats, quantized = inputs_of(simulate(prepared), data, on=False), inputs_of(graph, data, on=True)
    for name in floats:
        layer: Any = graph.get_submodule(name)
        assert isinstance(layer, SwitchedLayer)
        activation = layer.layer.after or (lambda x: x)

        def gives(x: torch.Tensor, weight: torch.Tensor, own: Any = layer.layer, after: Any = activation) -> Any:
            return after(own.compute(x, weight))

        expected = gives(floats[name], before[name].weight)
        # with the scales that were chosen, and the observer's: the better of the two
        nearest = min(
            float((gives(quantized[name], how.rounded(before[name].weight)) - expected).square().mean())
            for how in (after[name].quantization, before[name].quantization)
            if how is not None
        )
        learned = float((gives(quantized[name], after[name].weight) - expected).square().mean())
        assert learned < nearest, name


def inputs_of(graph: nn.Module, data: torch.Tensor, *, on: bool) -> dict[str, torch.Tensor]:
    """What each layer of a simulated graph reads."""
    layers = [layer.name for layer in simulation(graph).layers]
    switch(graph, layers if on else ())
    found: dict[str, torch.Tensor] = {}
    handles = [
        graph.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name in layers
    ]
    with torch.no_grad():
        graph(data)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_blocks_and_a_relu_that_is_used_twice(backend: Any) -> None:
    net = made(Residual)
    prepared = observed(net, backend, observer="min_max")  # of random weights, errors that add up are most of them
    data, unseen = images(128, 1), images(64, 2)
    rounded = adaround(prepared, [data], iterations=200)
    with torch.no_grad():
        nearest, learned = (decibels(net(unseen), convert(model)(unseen)) for model in (prepared, rounded))
        exact = decibels(reference(rounded)(unseen), convert(rounded)(unseen))
    assert learned > nearest + 1
    assert exact > 30  # kernels and float arithmetic differ by a step of an activation here and there


def test_a_model_of_several_graphs() -> None:
    net = Branching().eval()
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    x = x - x.sum() / x.numel() + 1
    prepared = prepare(net, config(), method="static", example_inputs=x)
    prepared(x)
    prepared(-x)
    rounded = adaround(prepared, [x, -x], iterations=50)
    for batch in (x, -x):
        assert decibels(net(batch), convert(rounded)(batch)) >= decibels(net(batch), convert(prepared)(batch))


def test_what_cannot_be() -> None:
    x = torch.randn(8, 4)
    net = nn.Linear(4, 2)
    prepared = calibrated(net, x, config=config())
    with pytest.raises(ConfigError, match=r"^adaround\(batches=...\): there is no batch. Give some of the data that"):
        adaround(prepared, [])
    with pytest.raises(ConfigError, match=r"^adaround\(iterations=0\): give 1 or more.$"):
        adaround(prepared, [x], iterations=0)
    with pytest.raises(ConfigError, match=r"^adaround\(positions=0\): give 1 or more.$"):
        adaround(prepared, [x], positions=0)
    with pytest.raises(ConfigError, match=r"^method='dynamic': weights are corrected after calibration"):
        adaround(calibrated(net, x, method="dynamic"), [x])


def test_few_rows_and_positions() -> None:
    prepared = observed(made())
    copied = copy.deepcopy(prepared)
    assert all(
        torch.isfinite(layer.weight).all()
        for layer in weighted_layers(adaround(copied, [images(1)], iterations=5, positions=3))
    )
