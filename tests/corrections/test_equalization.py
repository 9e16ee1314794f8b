"""Equalization between layers keeps the float function, to the bits of its numbers, and lifts int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from correction_nets import BACKENDS, Separable, batch, int8_db, made, observed
from torch import nn
from torch.nn import functional as F

from lightning_quant import CaptureError, ConfigError, QuantConfig, TensorSpec, cross_layer_equalization, prepare
from lightning_quant.backends.flow import Flow
from lightning_quant.backends.graph import info
from lightning_quant.corrections.equalization import equalize
from lightning_quant.corrections.sending import changes_of

X, T = batch(64, 3, 12, 12), batch(64, 3, 12, 12, seed=2)
ONE_SCALE = TensorSpec(qscheme="per_tensor_symmetric")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_float_function_stays(backend: str) -> None:
    """In float64, where rounding of the scaled weights is 1e-16 each."""
    net = made(Separable)
    prepared: Any = prepare(net, QuantConfig(backend=backend), method="static", example_inputs=X)  # type: ignore[arg-type]
    prepared = prepared.double().requires_grad_(False)
    expected, weights = prepared(X.double()), changes_of(prepared).layers
    assert equalize(prepared) == 4
    torch.testing.assert_close(prepared(X.double()), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    changed = changes_of(prepared).layers
    assert all(not torch.allclose(weights[key][0], changed[key][0], rtol=1e-3) for key in weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_are_equal_between_the_layers_of_a_pair(backend: str) -> None:
    """Equation 10 of the paper: the range of a channel is the same on both sides, at the end, of all pairs at once."""
    prepared: Any = cross_layer_equalization(observed(made(Separable), backend, X), [X])
    for pair in Flow(prepared).pairs():
        given = pair.first.grouped().abs().amax((2, 3)).reshape(-1)
        read = pair.second.grouped().abs().amax((1, 3)).reshape(-1)
        torch.testing.assert_close(given, read, rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_badly_scaled_channels_gain(backend: str) -> None:
    net = made(Separable)
    prepared = observed(net, backend, X, weight=ONE_SCALE)
    before = int8_db(net, prepared, T)
    equalized = cross_layer_equalization(prepared, [X])
    assert int8_db(net, equalized, T) > before + 10
    assert int8_db(net, prepared, T) == before  # what was given is as it was
    assert [(one.name, one.changes) for one in info(equalized).corrected] == [("cross_layer_equalization", 4)]


class Joints(nn.Module):
    """Takes ``(N, 4, 8, 8)``. Read twice, summed, clamped, not homogeneous, called twice; then three pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(8))
        self.hidden, self.head = nn.Linear(4 * 16, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.convs
        x = c[0](x)
        x = c[1](x) + c[2](x)
        x = F.relu6(c[3](x))
        x = F.silu(c[4](x))
        x = c[5](c[5](x))
        x = F.avg_pool2d(F.relu(c[7](F.relu(c[6](x)))), 2)
        return self.head(F.relu(self.hidden(torch.flatten(x, 1))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_are_those_that_nothing_else_reads(backend: str) -> None:
    prepared: Any = observed(made(Joints), backend, batch(8, 4, 8, 8))
    found = [(pair.first.name, pair.second.name, pair.positions) for pair in Flow(prepared).pairs()]
    # fx and eager have a layer for each call
    calls = [("convs.5", "convs.5_call1", 1), ("convs.5_call1", "convs.6", 1)]
    assert found == [
        *(calls if backend != "pt2e" else []),
        ("convs.6", "convs.7", 1),
        ("convs.7", "hidden", 16),
        ("hidden", "head", 1),
    ]
    expected = prepared.double()(batch(8, 4, 8, 8).double())
    assert equalize(prepared) == len(found)
    torch.testing.assert_close(prepared(batch(8, 4, 8, 8).double()), expected, rtol=1e-9, atol=1e-9)


class Axes(nn.Module):
    """Takes ``(N, 4, 4, 4)``: a linear layer over what a mean leaves, which may be positions or channels."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.head, self.dims = nn.Conv2d(4, 4, 1), nn.Linear(4, 2), dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean(self.dims))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dims", "pairs"), [((2, 3), 1), ((-1, -2), 1), ((3,), 0), ((1, 2), 0)])
def test_a_mean_has_to_leave_the_channels(backend: str, dims: tuple[int, ...], pairs: int) -> None:
    net = Axes(dims).eval()
    prepared: Any = observed(net, backend, batch(8, 4, 4, 4))
    assert len(Flow(prepared).pairs()) == pairs


def test_a_channel_without_weights_stays() -> None:
    net = made(Separable)
    with torch.no_grad():
        net.depthwise.weight[4] = 0
        net.hidden.weight[:, 7] = 0
    prepared: Any = cross_layer_equalization(observed(net, "fx", X), [X])
    assert torch.isfinite(prepared(T)).all()
    torch.testing.assert_close(prepared(T), net(T), rtol=1e-4, atol=1e-4 * float(net(T).detach().abs().max()))


def test_what_cannot_be_is_said() -> None:
    prepared = observed(made(Separable), "fx", X)
    with pytest.raises(ConfigError, match="there is no batch"):
        cross_layer_equalization(prepared, [])
    with pytest.raises(CaptureError, match=r"was not made by lightning_quant\.prepare"):
        cross_layer_equalization(made(Separable), [X])
    dynamic = prepare(nn.Linear(4, 2), method="dynamic", example_inputs=torch.randn(2, 4))
    with pytest.raises(ConfigError, match="method='dynamic': weights are corrected after calibration"):
        cross_layer_equalization(dynamic, [torch.randn(2, 4)])
