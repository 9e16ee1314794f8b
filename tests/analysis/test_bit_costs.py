"""Noise of fewer bits in one layer's weights: as if the float model had these weights, rounded by NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from models import Mlp, Residual, calibrated, settle
from torch import nn

from lightning_quant import QuantConfig, TensorSpec, prepare
from lightning_quant.analysis.bit_costs import bit_costs, in_bits
from lightning_quant.analysis.simulation import simulate_graph, simulation
from lightning_quant.backends.weighted import WeightedLayer, weighted_layers

BITS = (8, 4, 2)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric, one scale for each row, its ends at the largest weight."""
    rows = weight.double().numpy().reshape(len(weight), -1)
    largest = 2 ** (bits - 1) - 1
    scale = np.abs(rows).max(1, keepdims=True) / largest
    return torch.tensor(np.round(rows / scale) * scale, dtype=torch.float32).reshape(weight.shape)


def noise(net: nn.Module, name: str, bits: int, x: torch.Tensor) -> float:
    changed = copy.deepcopy(net)
    layer: Any = changed.get_submodule(name)
    with torch.no_grad():
        layer.weight.copy_(rounded(layer.weight, bits))
        expected, found = net(x).double(), changed(x).double()
    return float((expected - found).square().sum() / expected.square().sum())


class Convs(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Hardswish(), nn.Flatten(), nn.Linear(96, 5)
        )


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
@pytest.mark.parametrize("kind", [Convs, Mlp])
def test_as_if_the_float_model_had_these_weights(backend: Any, kind: Any) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    x = torch.randn(32, 3, 8, 8) if kind is Convs else torch.randn(32, 4)
    to_the_ends = TensorSpec(observer="min_max")
    prepared = calibrated(net, x, config=QuantConfig(backend=backend, weight=to_the_ends, reduce_range=False))
    graph = simulate_graph(prepared)
    before = [part.rounded.clone() for part in graph.modules() if hasattr(part, "rounded")]
    found = bit_costs(graph, weighted_layers(prepared), [(x,)] * 20, BITS)
    names = [name for name, layer in net.named_modules() if hasattr(layer, "weight")]
    assert [one.skip for one in found] == names
    for one in found:
        assert one.weights == net.get_submodule(one.skip).weight.numel()  # type: ignore[union-attr, operator]
        assert one.noises[8] < one.noises[4] < one.noises[2]
        for bits in BITS:
            # one of many weights may be rounded the other way, from float32 scales
            assert one.noises[bits] == pytest.approx(noise(net, one.skip, bits, x), rel=1e-2)
    # the graph is as it was
    after = [part.rounded for part in graph.modules() if hasattr(part, "rounded")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(graph(x), net(x))


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_batch_norms_and_residual_sums(backend: Any) -> None:
    torch.manual_seed(0)
    net = settle(Residual(), steps=2)
    x = torch.randn(32, 3, 8, 8)
    prepared = calibrated(net, x, config=QuantConfig(backend=backend))
    graph = simulate_graph(prepared)
    found = bit_costs(graph, weighted_layers(prepared), [(x,)], BITS)
    assert [one.skip for one in found] == [layer.skip for layer in simulation(graph).layers]
    assert all(0 < one.noises[8] < one.noises[4] < one.noises[2] for one in found)


@pytest.mark.parametrize("qscheme", ["per_channel_symmetric", "per_tensor_symmetric", "per_channel_affine"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("observer", ["auto", "min_max"])
def test_in_bits_is_what_a_config_of_so_many_bits_gives(observer: Any, qscheme: Any, bits: int) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(16, 8), torch.randn(8, 16)

    def of(bits: int) -> WeightedLayer:
        config = QuantConfig(weight=TensorSpec(bits=bits, qscheme=qscheme, observer=observer), reduce_range=False)
        (layer,) = weighted_layers(prepare(net, config, method="static", example_inputs=x))
        return layer

    found, expected = in_bits(of(8), bits), of(bits).quantization
    assert expected is not None
    assert (found.quant_min, found.quant_max, found.axis) == (expected.quant_min, expected.quant_max, expected.axis)
    torch.testing.assert_close(found.scale, expected.scale)
    # of affine ones the range itself was moved to a whole number of steps
    assert (found.zero_point - expected.zero_point).abs().max() <= (1 if "affine" in qscheme else 0)
