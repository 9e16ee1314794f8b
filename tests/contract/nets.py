"""The networks that every backend and method has to take, each with its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from models import Mlp, Residual, settle
from torch import nn
from torch.nn import functional as F


class Functional(nn.Module):
    """Functions with weights of their own, ``cat``, ``+``, a transposed convolution, one ReLU twice, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.bias = nn.Parameter(torch.randn(8) / 5)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.relu = nn.ReLU()
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.conv2d(x, self.weight, self.bias, padding=1))
        y = self.relu(self.bn(self.conv(x)) + x)
        y = self.relu(self.up(torch.cat([x, y], 1)))
        y = F.dropout(y, 0.2, self.training)
        return self.fc(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Tagger(nn.Module):
    """An LSTM over ``(N, 6, 8)`` that gives ``(N, 6, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0])


class Encoder(nn.Module):
    """Two layers of a transformer over ``(N, 6, 16)`` that give ``(N, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


@dataclass(frozen=True)
class Net:
    """One network.

    Attributes:
        build: Gives it in eval mode.
        shape: Of one sample.
        convolutional: All of it runs in int8, and it has to keep 25 dB.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    convolutional: bool = False

    def data(self, count: int) -> torch.Tensor:
        """Standard normal input."""
        return torch.randn(count, *self.shape)


NETS: dict[str, Net] = {
    "functional": Net(lambda: settle(Functional()), (3, 8, 8), convolutional=True),
    "residual": Net(lambda: settle(Residual()), (3, 8, 8), convolutional=True),
    "mlp": Net(lambda: Mlp().eval(), (4,)),
    "tagger": Net(lambda: Tagger().eval(), (6, 8)),
    "encoder": Net(lambda: Encoder().eval(), (6, 16)),
}
