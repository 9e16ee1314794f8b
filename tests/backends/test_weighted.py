"""The layers with weights of a prepared graph: what is stored there is what convert and the simulation use."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_quant import ConfigError, QuantConfig, TensorSpec, convert, prepare
from lightning_quant.analysis.simulation import simulate, simulation
from lightning_quant.backends.weighted import WeightedLayer, weighted_layers

BACKENDS = ("fx", "eager", "pt2e")


class Layers(nn.Module):
    """Takes ``(N, 3, 8, 8)``: dense, grouped, transposed, linear; with batch norm, without bias, as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, groups=8)
        self.up = nn.ConvTranspose2d(16, 4, 2, stride=2, groups=2)
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.plain = nn.Linear(6, 5, bias=False)
        self.skipped = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.up(self.depthwise(x)).mean((2, 3))
        return self.skipped(self.plain(F.linear(x, self.weight)))


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def made() -> Layers:
    torch.manual_seed(0)
    net = Layers().eval()
    with torch.no_grad():
        for tensor in (net.bn.weight, net.bn.running_var):
            tensor.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return net


def observed(net: nn.Module, backend: Any, **settings: Any) -> Any:
    prepared = prepare(net, QuantConfig(backend=backend, **settings), method="static", example_inputs=X)
    prepared(X)
    return prepared


def by_name(prepared: Any) -> dict[str, WeightedLayer]:
    return {layer.name: layer for layer in weighted_layers(prepared)}


def rounded_by_numpy(weight: torch.Tensor, scale: Any, axis: int | None) -> np.ndarray[Any, Any]:
    shape = [1] * weight.dim()
    if axis is not None:
        shape[axis] = -1
    step = scale.numpy().reshape(shape)
    integers = np.clip(np.rint(weight.numpy() * (np.float32(1) / step)), -127, 127)
    return np.asarray(integers * step, dtype=np.float32)


def stored(prepared: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The float and the rounded weight of each layer of the int8 model."""
    parts = [part for part in simulate(prepared).modules() if hasattr(part, "floating")]
    return [(part.floating, part.rounded) for part in parts]  # type: ignore[misc]


def rounding_of(prepared: Any, weight: torch.Tensor) -> torch.Tensor:
    (found,) = [r for f, r in stored(prepared) if f.shape == weight.shape and torch.equal(f, weight)]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_are_those_of_the_simulation(backend: str) -> None:
    prepared = observed(made(), backend, skip=("skipped",))
    found = weighted_layers(prepared)
    assert [one.name for one in found if one.quantization] == [
        one.name for one in simulation(simulate(prepared)).layers
    ]
    assert [one.name for one in found if one.quantization is None] == ["skipped"]
    assert [tuple(one.grouped().shape) for one in found] == [
        (1, 8, 3, 9), (8, 2, 1, 9), (2, 2, 8, 4), (1, 6, 4, 1), (1, 5, 6, 1), (1, 4, 5, 1)
    ]  # fmt: skip
    assert [one.output_channels for one in found] == [8, 16, 4, 6, 5, 4]
    assert [one.input_channels for one in found] == [3, 8, 16, 4, 6, 5]
    for one in found:
        assert torch.equal(one.ungrouped(one.grouped()), one.weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stored_weight_is_the_one_that_is_rounded(backend: str) -> None:
    prepared = observed(made(), backend, weight=TensorSpec(observer="min_max"))
    for name, layer in by_name(prepared).items():
        for factor in (0.25, 3.0):
            weight = layer.weight * factor
            layer.set_weight(weight)
            quantization = by_name(prepared)[name].quantization
            assert quantization is not None
            expected = rounded_by_numpy(weight, quantization.scale, quantization.axis)
            # an affine range of one scale would have more than 127 integers on a side
            assert float(quantization.scale.max()) == pytest.approx(float(weight.abs().max()) / 127, rel=1e-6)
            np.testing.assert_array_equal(rounding_of(prepared, weight).numpy(), expected)
            np.testing.assert_array_equal(quantization.rounded(weight).numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_ranges_stand_whatever_weight_is_stored(backend: str) -> None:
    prepared = observed(made(), backend)
    for name, layer in by_name(prepared).items():
        before = layer.quantization
        assert before is not None
        layer.fix_ranges(before.scale * 1.5)
        weight = layer.weight * 0.5
        layer.set_weight(weight)
        quantization = by_name(prepared)[name].quantization
        assert quantization is not None
        assert torch.equal(quantization.scale, before.scale * 1.5)
        expected = rounded_by_numpy(weight, before.scale * 1.5, before.axis)
        np.testing.assert_array_equal(rounding_of(prepared, weight).numpy(), expected)
    assert torch.isfinite(convert(prepared)(X)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_converts_as_if_the_float_model_had_these_weights(backend: str) -> None:
    """Of a model that is changed before anything is observed, the int8 output is the same to the last bit."""
    net = made()
    changed = prepare(net, QuantConfig(backend=backend), method="static", example_inputs=X)  # type: ignore[arg-type]
    layers = list(weighted_layers(changed))
    by_hand = copy.deepcopy(net)
    bias = torch.linspace(-1, 1, 5)
    with torch.no_grad():
        layers[1].set_weight(layers[1].weight.flip(0))
        by_hand.depthwise.weight.copy_(net.depthwise.weight.flip(0))
        layers[4].set_bias(bias)
        by_hand.plain = nn.Linear(6, 5)
        by_hand.plain.weight.copy_(net.plain.weight)
        by_hand.plain.bias.copy_(bias)
        layers[5].set_bias(layers[5].bias * 2)  # type: ignore[operator]
        by_hand.skipped.bias.mul_(2)
    changed(X)
    assert torch.equal(convert(changed)(X), convert(observed(by_hand, backend))(X))
    assert not torch.equal(convert(changed)(X), convert(observed(net, backend))(X))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_channels(backend: str) -> None:
    prepared = observed(made(), backend)
    up = by_name(prepared)["up"]
    x, before = torch.randn(2, 16, 4, 4), up.weight.clone()

    def computed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.conv_transpose2d(x, weight, bias, stride=2, groups=2)

    outputs, inputs = torch.rand(4) + 0.5, torch.rand(16) + 0.5
    bias = up.bias
    up.scale_outputs(outputs)
    torch.testing.assert_close(computed(up.weight, up.bias), computed(before, bias) * outputs[:, None, None])
    x, before = x * inputs[:, None, None], up.weight
    expected = computed(before)
    up.scale_inputs(inputs)
    x = x / inputs[:, None, None]
    torch.testing.assert_close(computed(up.weight), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_is_changed_alone(backend: str) -> None:
    prepared = observed(made(), backend)
    before = stored(prepared)
    twin = copy.deepcopy(prepared)
    for layer in weighted_layers(twin):
        layer.fix_ranges(layer.quantization.scale * 2)  # type: ignore[union-attr]
        layer.set_weight(layer.weight + 1)
        layer.set_bias(torch.ones(layer.output_channels))
    for old, new in zip(before, stored(prepared), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


class Tied(nn.Module):
    """Takes ``(N, T)`` integers: the last layer has the weight of the first, which looks up its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_weight_changes_for_its_layer_alone(backend: Any) -> None:
    torch.manual_seed(0)
    net, ids = Tied().eval(), torch.arange(12).reshape(2, 6)
    config = QuantConfig(backend=backend, weight=TensorSpec(observer="min_max"))
    prepared = prepare(net, config, method="static", example_inputs=ids)
    prepared(ids)
    (head,) = weighted_layers(prepared)
    head.set_weight(head.weight * 2)
    torch.testing.assert_close(prepared(ids), net(ids) * 2)
    (head,) = weighted_layers(prepared)
    assert head.quantization is not None
    assert float(head.quantization.scale.max()) == pytest.approx(2 * float(net.head.weight.detach().abs().max()) / 127)
    # one rounding of tanh, whose range is 2 at most, and one of the weight, each of half a step
    torch.testing.assert_close(convert(prepared)(ids), net(ids) * 2, atol=6 * (0.01 * 5 + 0.03), rtol=0)


class Product(nn.Module):
    """Takes ``(N, 4)``: a product of matrices, which has no bias in an exported graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_what_cannot_be_is_said() -> None:
    x = torch.randn(5, 4)
    prepared = prepare(Product(), QuantConfig(backend="pt2e"), method="static", example_inputs=x)
    prepared(x)
    (layer,) = weighted_layers(prepared)
    assert not layer.can_have_bias
    assert layer.grouped().shape == (1, 3, 4, 1)
    with pytest.raises(ConfigError, match=r"a matmul has no bias. Leave it out"):
        layer.set_bias(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"its weight is \(4, 3\), and \(3, 4\) was given"):
        layer.set_weight(torch.zeros(3, 4))
    with pytest.raises(ConfigError, match=r"give one scale above 0 for each of \(3,\), not \(2,\)"):
        layer.fix_ranges(torch.ones(2))
    dynamic = prepare(nn.Linear(4, 2), method="dynamic", example_inputs=x)
    with pytest.raises(ConfigError, match=r"method='dynamic': weights are corrected after calibration"):
        weighted_layers(dynamic)
    scripted = prepare(nn.Linear(4, 2), QuantConfig(backend="torchscript"), method="static", example_inputs=x)
    with pytest.raises(ConfigError, match=r"backend='torchscript': weights are corrected in graphs of modules"):
        weighted_layers(scripted)
    floating = prepare(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), QuantConfig(skip=("1",)), method="static", example_inputs=x
    )
    with pytest.raises(ConfigError, match="it stays float, and has no range to fix"):
        weighted_layers(floating)[1].fix_ranges()


def test_few_bits_of_a_weight() -> None:
    x = torch.randn(5, 4)
    prepared = prepare(nn.Linear(4, 2), QuantConfig(weight=TensorSpec(bits=4)), method="static", example_inputs=x)
    (layer,) = weighted_layers(prepared)
    assert layer.quantization is not None
    assert (layer.quantization.quant_min, layer.quantization.quant_max) == (-7, 7)
