"""GPTQ on prepared models: weights and biases that make up for errors of rounding, and stay what they are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from correction_nets import BACKENDS, Separable, batch, int8_db, knows_digits, made, observed
from modules import digits
from torch import nn
from torch.nn import functional as F

from lightning_quant import ConfigError, LayerConfig, TensorSpec, adaround, bias_correction, convert, gptq
from lightning_quant import analytic_bias_correction as analytic
from lightning_quant.backends.graph import info
from lightning_quant.backends.weighted import weighted_layers

X, T = batch(64, 3, 12, 12), batch(64, 3, 12, 12, seed=2)
FOUR = TensorSpec(bits=4)
HALVES = [X[:32], X[32:]]


class Layers(nn.Module):
    """Takes ``(N, 3, 12, 12)``: dense, grouped, depthwise, transposed and padded convolutions, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 1), stride=(2, 1), groups=4)
        self.depthwise = nn.Conv2d(12, 12, 2, dilation=2, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2, bias=False)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.hardswish(self.depthwise(F.relu6(self.grouped(x))))
        return self.fc(F.relu(self.up(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return knows_digits()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trained_net_is_nearer_to_float_than_with_biases_alone(trained: nn.Module, backend: str) -> None:
    images, _ = digits()
    data, unseen = images[:512] / 16, images[1000:] / 16
    for bits, gain in ((4, 2.0), (8, 0.0)):
        prepared = observed(trained, backend, data, weight=TensorSpec(bits=bits))
        biases, both = (int8_db(trained, way(prepared, data.split(128)), unseen) for way in (bias_correction, gptq))
        assert both > biases + gain


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_layer(backend: Any) -> None:
    """All but the transposed convolution, whose bias alone is corrected, have new weights: on their grids."""
    net = made(Layers)
    prepared = observed(net, backend, X, weight=FOUR)
    corrected: Any = gptq(prepared, HALVES)
    assert [(one.name, one.changes, one.of) for one in info(corrected).corrected] == [("gptq", 4, "layers")]
    moved = []
    for before, layer in zip(weighted_layers(prepared), weighted_layers(corrected), strict=True):
        found, old = layer.quantization, before.quantization
        assert found is not None
        assert old is not None
        assert layer.bias is not None
        if "transpose" in layer.kind.lower():
            assert torch.equal(layer.weight, before.weight)
            assert before.bias is None
            continue
        torch.testing.assert_close(found.rounded(layer.weight), layer.weight, rtol=1e-6, atol=0)
        moved.append(bool((layer.weight != old.rounded(before.weight)).any()))
    assert moved == [True] * 4
    with torch.no_grad():
        shift, was = ((convert(of)(X) - net(X)).mean(0).norm() for of in (corrected, prepared))
    assert shift < was / 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_in_float_stays(backend: str) -> None:
    net = made(Layers)
    left = LayerConfig(name="depthwise", dtype="float")
    prepared = observed(net, backend, X, weight=FOUR, layers=(left,))
    corrected: Any = gptq(prepared, HALVES)
    assert info(corrected).corrected[0].changes == 3
    (layer,) = (layer for layer in weighted_layers(corrected) if layer.name.startswith("depthwise"))
    assert torch.equal(layer.weight, net.depthwise.weight)


def test_nothing_else_changes() -> None:
    prepared: Any = observed(made(Separable), "fx", X, weight=FOUR)
    before = {name: value.clone() for name, value in prepared.state_dict().items()}
    random = torch.get_rng_state()
    first, again, other = (gptq(prepared, HALVES, positions=300, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    weights: list[Any] = [[layer.weight for layer in weighted_layers(model)] for model in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_of_two_corrections_each_would_undo_what_the_other_did() -> None:
    """Measured: a bias correction behind GPTQ takes the weights that make up for errors as the float model."""
    prepared = observed(made(Separable), "fx", X, weight=FOUR)
    ways: dict[str, Any] = {
        "adaround": lambda p: adaround(p, [X], iterations=1),
        "gptq": lambda p: gptq(p, [X]),
        "bias_correction": lambda p: bias_correction(p, [X]),
        "analytic_bias_correction": analytic,
    }
    for first, make in ways.items():
        once = make(prepared)
        for second, remake in ways.items():
            if first == second == "adaround":  # weights on their grid are rounded to where they are
                continue
            text = (
                f"{second}: {first} made up for errors of rounding already, and {second} would take what it did for an "
                "error. Give what was not corrected so."
            )
            with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
                remake(once)


def test_numbers_are_checked() -> None:
    prepared = observed(made(Separable), "fx", X)
    with pytest.raises(ConfigError, match=re.escape("gptq(positions=0): give 1 or more.")):
        gptq(prepared, [X], positions=0)
    with pytest.raises(ConfigError, match=re.escape("batches=...: there is no batch.")):
        gptq(prepared, [])
