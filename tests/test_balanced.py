"""The step of a weight with which its errors add up to least: by exhaustive search, and what a network gains by it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_quant import ConfigError, LayerConfig, QuantConfig, TensorSpec, convert, prepare
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.backends.weighted import weighted_layers
from lightning_quant.balanced import best_shares
from lightning_quant.config import check_method

BACKENDS = ("fx", "eager", "pt2e")
TO_THE_ENDS = TensorSpec(observer="min_max")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(row: np.ndarray, step: float) -> tuple[float, float]:
    """The sum of the squares, and the sum."""
    error = np.rint(row / step) * step - row
    return float((error**2).sum()), float(error.sum())


@pytest.mark.parametrize("inputs", [3, 9, 64, 5000])
def test_it_is_the_best_of_sixteen_steps(inputs: int) -> None:
    rows = drawn(50, inputs, seed=inputs)
    scale = rows.abs().amax(1) / 127
    found = best_shares(rows, scale)
    assert found.dtype == torch.float32
    for row, least, share in zip(rows.double().numpy(), scale.double().numpy(), found.numpy(), strict=True):
        costs = {}
        for tried in np.linspace(1, 1 + 1 / 16, 16, dtype=np.float32):
            squares, total = errors(row, float(least) * float(tried))
            costs[tried] = squares + 2 * total**2
        # a value in the middle between two integers may be rounded the other way in float32
        assert costs[share] <= min(costs.values()) * (1 + 1e-3)


def test_errors_no_longer_add_up() -> None:
    rows = drawn(300, 32)
    scale = rows.abs().amax(1) / 127
    shares = best_shares(rows, scale)
    before = np.array([errors(row, float(step)) for row, step in zip(rows.numpy(), scale, strict=True)])
    after = np.array([errors(row, float(step)) for row, step in zip(rows.numpy(), scale * shares, strict=True)])
    assert (after[:, 1] ** 2).mean() < (before[:, 1] ** 2).mean() / 20
    assert after[:, 0].mean() < 1.1 * before[:, 0].mean()


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn(7, 20)
    scale = rows.abs().amax(1) / 127
    whole = best_shares(rows, scale)
    monkeypatch.setattr("lightning_quant.balanced._TOGETHER", 40)
    assert torch.equal(best_shares(rows, scale), whole)


def test_channels_without_values_and_tensors_without_them() -> None:
    eps = torch.full((3,), torch.finfo(torch.float32).eps)
    assert torch.equal(best_shares(torch.zeros(3, 4), eps), torch.ones(3))
    assert torch.equal(best_shares(torch.zeros(3, 0), eps), torch.ones(3))
    assert best_shares(torch.zeros(3, 4, device="meta"), eps.to("meta")).is_meta


class Net(nn.Module):
    """Takes ``(N, 3, 12, 12)``: convolutions of every kind, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depthwise = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=12)
        self.up, self.fc = nn.ConvTranspose2d(12, 6, 2), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.up(F.relu(self.depthwise(F.relu(self.conv(x))))))
        return self.fc(x.mean((2, 3)))


def quantized(net: nn.Module, x: torch.Tensor, backend: Any, **settings: Any) -> Any:
    prepared = prepare(net, QuantConfig(backend=backend, **settings), method="static", example_inputs=x)
    prepared(x)
    return prepared


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_have_the_steps(backend: str) -> None:
    """Whatever is converted has them; transposed convolutions have one scale for all channels, whose ends are exact."""
    torch.manual_seed(0)
    net, x = Net().eval(), drawn(8, 3, 12, 12)
    prepared = quantized(net, x, backend, reduce_range=False)
    layers = weighted_layers(prepared)
    assert [layer.balance is not None for layer in layers] == [True, True, False, True]
    for layer in layers:
        how = layer.quantization
        assert how is not None
        if layer.balance is None:
            assert float(how.scale) == pytest.approx(float(layer.weight.abs().max()) / 127)
            continue
        rows = layer.weight.flatten(1)
        scale = rows.abs().amax(1) / 127
        torch.testing.assert_close(how.scale, scale * best_shares(rows, scale))
    if backend != "pt2e":
        packed: Any = convert(prepared).get_submodule("fc")
        assert layers[-1].quantization is not None
        torch.testing.assert_close(packed.weight().q_per_channel_scales().float(), layers[-1].quantization.scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_of_relus_is_nearer_to_float(backend: str) -> None:
    """Of eight random ones, by 1 dB on average at the least; weights alone are rounded coarsely."""
    gains = []
    for seed in range(8):
        torch.manual_seed(seed)
        sizes = (24, 48, 48, 48, 8)
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        net = nn.Sequential(*layers[:-1]).eval()
        x, t = drawn(256, 24).relu(), drawn(256, 24, seed=1).relu()
        found = []
        for weight in (TensorSpec(bits=6, observer="min_max"), TensorSpec(bits=6)):
            with torch.no_grad():
                found.append(sqnr_db(net(t), convert(quantized(net, x, backend, weight=weight))(t)))
        gains.append(found[1] - found[0])
    assert np.mean(gains) > 1


def test_where_it_has_no_meaning() -> None:
    balanced = TensorSpec(observer="balanced")
    with pytest.raises(ConfigError, match=r"activation.observer='balanced'\): it looks at what errors of weights add"):
        QuantConfig(activation=balanced)
    with pytest.raises(ConfigError, match=r"weight.qscheme='per_tensor_symmetric'\): it chooses a scale for each out"):
        LayerConfig(name="fc", weight=TensorSpec(observer="balanced", qscheme="per_tensor_symmetric"))
    with pytest.raises(ConfigError, match=r"with backend='fx', method='qat': training moves weights, so that scales"):
        check_method(QuantConfig(weight=balanced), "qat")
    with pytest.raises(ConfigError, match=r"with backend='torchscript', method='static': TorchScript graph mode comp"):
        check_method(QuantConfig(weight=balanced, backend="torchscript"), "static")
