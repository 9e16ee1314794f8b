"""Small models, and what tests do with them: settle batch norms, calibrate, compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from torch import nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, prepare
from lightning_quant.arguments import Call
from lightning_quant.config import Method

#: For property tests: the same examples in every run, and no clock, which a busy machine would fail.
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Residual(nn.Module):
    """Takes ``(N, 3, 8, 8)``, gives ``(N, 5)``. Its blocks use one ReLU module twice."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


class Mlp(nn.Module):
    """Takes ``(N, 4)``, gives ``(N, 3)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.act = nn.ReLU()
        self.second = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(x)))


class TwoInputs(nn.Module):
    """Two inputs of ``(N, 4)`` and a setting; gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)

    def forward(self, a: torch.Tensor, *, b: torch.Tensor, double: bool = False) -> dict[str, torch.Tensor]:
        y = self.left(a) + self.right(b)
        return {"sum": y + y if double else y, "left": self.left(a)}


class Branching(nn.Module):
    """Chooses one of its parts by the values that it gets, so that no graph can stand for it as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Mlp()
        self.down = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) if x.sum() > 0 else self.down(x)


def settle(model: nn.Module, shape: tuple[int, ...] = (32, 3, 8, 8), steps: int = 10) -> nn.Module:
    """Let the running statistics of batch norms be those of standard normal input. Returns ``model`` in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(torch.randn(shape))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def calibrated(
    model: nn.Module,
    *data: Any,
    method: Method = "static",
    config: QuantConfig | None = None,
    passes: int = 1,
    **named: Any,
) -> Any:
    """``model`` prepared on a call of it, of which its observers have then seen ``passes`` passes; in eval mode."""
    prepared = prepare(model, config, method=method, example_inputs=Call(data, named))
    with torch.no_grad():
        for _ in range(passes):
            prepared(*data, *named.values())
    return prepared.eval()


def decibels(reference: torch.Tensor, other: torch.Tensor) -> float:
    """``10 * log10(sum(ref^2) / sum((ref - other)^2))``, computed by NumPy."""
    a, b = (x.detach().double().numpy() for x in (reference, other))
    with np.errstate(divide="ignore"):  # equal: infinite
        return float(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))


def _separable(width: int, out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
    ]  # fmt: skip


def mobile() -> nn.Sequential:
    """Depthwise and pointwise convolutions by turns, as in a MobileNet: ten layers with weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        *_separable(16, 32), nn.MaxPool2d(2), *_separable(32, 32), *_separable(32, 64), *_separable(64, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def poisoned(net: nn.Sequential, conv: int = 10) -> nn.Sequential:
    """The first channel behind a layer is 3000 times as large, and the next layer divides by it: the same function."""
    net = copy.deepcopy(net)
    norm: Any = net[conv + 1]
    following: Any = net[conv + 3]
    with torch.no_grad():
        norm.weight[0] *= 3000
        norm.bias[0] *= 3000
        (following.weight[0] if following.groups > 1 else following.weight[:, 0]).div_(3000)
    return net


Network = tuple[Callable[[], nn.Module], tuple[int, ...]]
#: One of each kind, and the shape of its input.
NETWORKS: dict[str, Network] = {
    "residual": (Residual, (4, 3, 8, 8)),
    "mlp": (Mlp, (5, 4)),
    "lstm": (lambda: nn.LSTM(3, 5, batch_first=True), (4, 6, 3)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (4, 5, 8)),
}


def exportable(network: Network) -> tuple[nn.Module, torch.Tensor]:
    """The network after calibration on noise, ready for its neutral form, and the noise."""
    make, shape = network
    torch.manual_seed(0)
    model = make().eval()
    if isinstance(model, Residual):
        settle(model)
    x = torch.randn(shape)
    return calibrated(model, x), x
