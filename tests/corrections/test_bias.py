"""Bias correction: the mean of what each layer gives is that of the float model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from correction_nets import BACKENDS, Separable, batch, int8_db, made, observed
from torch import nn

from lightning_quant import TensorSpec, bias_correction, convert
from lightning_quant.backends.graph import info
from lightning_quant.backends.weighted import weighted_layers

X, T = batch(64, 3, 12, 12), batch(64, 3, 12, 12, seed=2)
FEW = TensorSpec(bits=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_bits_shift_means_that_come_back(backend: str) -> None:
    net = made(Separable)
    prepared = observed(net, backend, X, weight=FEW)
    corrected = bias_correction(prepared, [X[:32], X[32:]])
    assert int8_db(net, corrected, T) > int8_db(net, prepared, T) + 3
    assert [(one.name, one.changes) for one in info(corrected).corrected] == [("bias_correction", 5)]

    def shift(of: nn.Module) -> float:
        with torch.no_grad():
            return float((convert(of)(X) - net(X)).mean(0).norm())

    # the output of fx and eager is rounded once more, to steps of a 255th of its range: by chance to either side
    assert shift(corrected) < shift(prepared) / 5


class Layer(nn.Module):
    """Takes ``(N, 3)`` or ``(N, T, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_one_layer_the_bias_is_the_weights_error_times_the_mean(backend: str) -> None:
    """Equation 12 of the paper: ``E[y] - E[y_q] = (W - W_q) E[x]``, with inputs on the grid of their range."""
    torch.manual_seed(0)
    net = Layer().eval()
    x = torch.randint(0, 256, (40, 5, 3), generator=torch.Generator().manual_seed(0)).float()
    x[0, 0], x[0, 1] = 0, 255
    prepared: Any = observed(net, backend, x, weight=FEW, activation=TensorSpec(observer="min_max"))
    (layer,) = weighted_layers(prepared)
    assert layer.quantization is not None
    error = net.layer.weight.detach() - layer.quantization.rounded(net.layer.weight.detach())
    corrected: Any = bias_correction(prepared, [x])
    (layer,) = weighted_layers(corrected)
    assert layer.bias is not None
    torch.testing.assert_close(layer.bias, error @ x.mean((0, 1)), rtol=1e-4, atol=1e-4)
    assert weighted_layers(prepared)[0].bias is None


class Twice(nn.Module):
    """Takes ``(N, 4)``: one layer that is called twice, and a product that has no bias in an exported graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x))) @ self.weight


# fx and eager have a layer for each call
@pytest.mark.parametrize(("backend", "changes"), [("fx", 3), ("eager", 3), ("pt2e", 0)])
def test_layers_that_cannot_have_a_bias_of_their_own_stay(backend: str, changes: int) -> None:
    net = made(Twice)
    prepared = observed(net, backend, batch(16, 4), weight=FEW)
    corrected: Any = bias_correction(prepared, [batch(16, 4)])
    assert [one.changes for one in info(corrected).corrected] == [changes]
    if changes == 0:
        assert torch.equal(weighted_layers(corrected)[0].bias, net.layer.bias.detach())  # type: ignore[arg-type]
