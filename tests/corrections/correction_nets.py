"""Small nets in which one thing is wrong each, and what they share in tests of corrections."""

from __future__ import annotations

from typing import Any

import torch
from models import mobile
from modules import digits
from torch import nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, convert, prepare
from lightning_quant.analysis.sqnr import sqnr_db

BACKENDS = ("fx", "eager", "pt2e")


class Separable(nn.Module):
    """Takes ``(N, 3, 12, 12)``. Every kind of pair; channels whose scales differ by a hundred."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.depthwise, self.bn2 = nn.Conv2d(channels, channels, 3, groups=channels), nn.BatchNorm2d(channels)
        self.pointwise, self.bn3 = nn.Conv2d(channels, 2 * channels, 1, groups=2), nn.BatchNorm2d(2 * channels)
        self.hidden, self.head = nn.Linear(2 * channels, 32), nn.Linear(32, 10, bias=False)
        per_group = channels // 2
        with torch.no_grad():
            for norm in (self.bn1, self.bn2, self.bn3):
                norm.weight.uniform_(0.5, 1)
                norm.bias.normal_()
                norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            for number, norm in enumerate((self.bn1, self.bn2, self.bn3)):
                # what one layer makes larger, the next one reads with smaller weights: the function is that of a net
                # without them
                scale = 10 ** torch.empty(norm.num_features).uniform_(-1.5, 1.5)
                norm.weight.mul_(scale)
                norm.bias.mul_(scale)
                if number == 0:
                    self.depthwise.weight.div_(scale[:, None, None, None])
                elif number == 1:
                    self.pointwise.weight[:channels].div_(scale[None, :per_group, None, None])
                    self.pointwise.weight[channels:].div_(scale[None, per_group:, None, None])
                else:
                    self.hidden.weight.div_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv(x)))
        x = F.leaky_relu(self.bn2(self.depthwise(x)))
        x = F.max_pool2d(F.relu(self.bn3(self.pointwise(x))), 2)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return self.head(F.relu(self.hidden(x)))


class Attention(nn.Module):
    """Takes ``(N, T, 32)``: a block of a transformer, with outlier channels behind both normalizations."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.RMSNorm(size)
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, 64), nn.Linear(64, size)
        with torch.no_grad():
            self.norm1.weight[3], self.norm1.weight[7], self.norm2.weight[5] = 40.0, 25.0, 30.0
            for layer in (self.q, self.k, self.v):
                layer.weight[:, [3, 7]] /= 30
            self.up.weight[:, 5] /= 30

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        scores = F.softmax(self.q(h) @ self.k(h).transpose(1, 2) / 5.6, -1)
        x = x + self.out(scores @ self.v(h))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def made(kind: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return kind().eval()


def batch(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(net: nn.Module, backend: Any, data: torch.Tensor, **settings: Any) -> nn.Module:
    prepared = prepare(net, QuantConfig(backend=backend, **settings), method="static", example_inputs=data)
    prepared(data)
    return prepared


def int8_db(net: nn.Module, prepared: nn.Module, data: torch.Tensor) -> float:
    """How near the int8 model is to the float one, on data that nothing was calibrated on."""
    with torch.no_grad():
        return sqnr_db(net(data), convert(prepared)(data))


def knows_digits() -> nn.Module:
    """A depthwise network that has learned the first thousand digits."""
    images, labels = digits()
    images = images[:1000] / 16
    torch.manual_seed(0)
    net = mobile()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(4):
        for rows in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
    return net.eval()
