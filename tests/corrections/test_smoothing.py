"""SmoothQuant: outlier channels go into the weights that read them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from correction_nets import BACKENDS, Attention, Separable, batch, int8_db, made, observed
from torch import nn

from lightning_quant import ConfigError, smoothquant
from lightning_quant.backends.graph import info
from lightning_quant.backends.norms import norms
from lightning_quant.backends.weighted import weighted_layers
from lightning_quant.corrections.smoothing import smooth

X, T = batch(64, 9, 32), batch(64, 9, 32, seed=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outlier_channels_cost_nothing_afterwards(backend: str) -> None:
    net = made(Attention)
    prepared = observed(net, backend, X)
    before = int8_db(net, prepared, T)
    smoothed = smoothquant(prepared, [X[:32], X[32:]])
    assert int8_db(net, smoothed, T) > before + 10
    assert int8_db(net, smoothquant(prepared, [X], alpha=None), T) > before + 10
    assert int8_db(net, prepared, T) == before
    assert [(one.name, one.changes) for one in info(smoothed).corrected] == [("smoothquant", 2)]
    torch.testing.assert_close(smoothed(T), net(T), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_the_scales_are_those_of_the_paper(backend: str, alpha: float) -> None:
    """Equation 4, by hand, of the three layers behind the first normalization, which share the scales."""
    net = made(Attention)
    with torch.no_grad():
        largest = net.norm1(X).abs().amax((0, 1))
        read = torch.stack([layer.weight for layer in (net.q, net.k, net.v)]).abs().amax((0, 1))
    scale = largest**alpha / read ** (1 - alpha)
    smoothed: Any = smoothquant(observed(net, backend, X), [X], alpha=alpha)
    weights = {layer.name: layer.weight for layer in weighted_layers(smoothed)}
    torch.testing.assert_close(weights["k"], net.k.weight.detach() * scale, rtol=1e-4, atol=1e-6)
    vectors = norms(smoothed)[0].vectors()
    torch.testing.assert_close(vectors[0], net.norm1.weight.detach() / scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vectors[1], net.norm1.bias.detach() / scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_between_convolutions(backend: str) -> None:
    """Those of a net that differ a thousandfold; the float function stays, but for its bits."""
    net, x, other = made(Separable), batch(64, 3, 12, 12), batch(64, 3, 12, 12, seed=2)
    prepared = observed(net, backend, x)
    smoothed = smoothquant(prepared, [x])
    assert [one.changes for one in info(smoothed).corrected] == [4]
    assert int8_db(net, smoothed, other) > int8_db(net, prepared, other) + 6
    torch.testing.assert_close(smoothed(other), net(other), rtol=1e-4, atol=1e-4)


class WrittenOut(nn.Module):
    """Takes ``(N, T, 8)``: an RMS norm as language models write it, then layers; a norm that is read elsewhere, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 8)
        with torch.no_grad():
            self.weight[2] = 50.0
            self.gate.weight[:, 2] /= 50
            self.up.weight[:, 2] /= 50

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = self.norm(self.down(torch.relu(self.gate(h)) * self.up(h)))
        return x + self.head(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_is_written_out(backend: str) -> None:
    net, x = made(WrittenOut), batch(64, 5, 8)
    prepared = observed(net, backend, x)
    smoothed = smoothquant(prepared, [x])
    assert [one.changes for one in info(smoothed).corrected] == [1]
    torch.testing.assert_close(smoothed(x), net(x), rtol=1e-4, atol=1e-4)
    assert int8_db(net, smoothed, batch(64, 5, 8, seed=2)) > int8_db(net, prepared, batch(64, 5, 8, seed=2)) + 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_float_function_stays(backend: str) -> None:
    """In float64, where rounding of the scaled weights is 1e-16 each."""
    prepared: Any = observed(made(Attention), backend, X).double()
    expected = prepared(X.double())
    smooth(prepared, [(X.double(),)])
    torch.testing.assert_close(prepared(X.double()), expected, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_is_said() -> None:
    prepared = observed(nn.Linear(4, 2), "fx", torch.randn(3, 4))
    with pytest.raises(ConfigError, match=r"smoothquant\(alpha=1.5\): give a number from 0 to 1"):
        smoothquant(prepared, [torch.randn(3, 4)], alpha=1.5)
    assert [one.changes for one in info(smoothquant(prepared, [torch.randn(3, 4)])).corrected] == [0]
