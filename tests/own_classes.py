"""Observers, fake quantizes and modules as users write them, in a module of their own so that they can be imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver
from torch.ao.quantization.observer import UniformQuantizationObserverBase


class HalfRange(MinMaxObserver):
    """Takes half of the range that it sees."""

    def calculate_qparams(self) -> Any:
        return self._calculate_qparams(self.min_val / 2, self.max_val / 2)


class Wider(MinMaxObserver):
    """Takes twice the range that it sees; written so that it can be scripted."""

    @torch.jit.export
    def calculate_qparams(self):  # type: ignore[no-untyped-def]
        return self._calculate_qparams(self.min_val * 2, self.max_val * 2)


class TwiceTheMean(UniformQuantizationObserverBase):
    """Written from scratch: the range is from zero to twice the mean of what is positive."""

    def __init__(self, dtype: torch.dtype = torch.quint8, quant_min: Any = None, quant_max: Any = None) -> None:
        super().__init__(dtype=dtype, quant_min=quant_min, quant_max=quant_max)
        self.register_buffer("min_val", torch.tensor(float("inf")))
        self.register_buffer("max_val", torch.tensor(float("-inf")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positive = x.detach()[x.detach() > 0]
        self.min_val.copy_(torch.zeros(()))
        self.max_val.copy_(2 * positive.mean() if positive.numel() else torch.ones(()))
        return x

    def calculate_qparams(self) -> Any:
        return self._calculate_qparams(self.min_val, self.max_val)


class CountingFakeQuantize(FakeQuantize):
    """Torch's own, which counts its calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


class NotAnObserver:
    """Derives from nothing."""


class Doubled(nn.Module):
    """A layer that no table knows: ``2 * (x @ weight)``, with a branch on data that stops a trace."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size) / size**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.abs().max() < 0:
            return x
        return 2 * (x @ self.weight)


class ObservedDoubled(nn.Module):
    """Observes the largest input."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("largest", torch.zeros(()))

    @classmethod
    def from_float(cls, module: Doubled) -> ObservedDoubled:
        return cls(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return 2 * (x @ self.weight)


class ObservedWithItsOwnWeight(ObservedDoubled):
    """Forgets to use the Parameter of the layer."""

    @classmethod
    def from_float(cls, module: Doubled) -> ObservedDoubled:
        return cls(nn.Parameter(module.weight.detach().clone()))


class QuantizedDoubled(nn.Module):
    """Rounds its input to eighths of the largest one that was observed: so coarse that a test can see it."""

    def __init__(self, weight: torch.Tensor, largest: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.step = largest / 8

    @classmethod
    def from_observed(cls, module: ObservedDoubled) -> QuantizedDoubled:
        return cls(module.weight.detach().clone(), float(module.largest))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * (torch.round(x / self.step) * self.step) @ self.weight


class QuantizedFromFloat(nn.Module):
    """Made from the layer itself."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    @classmethod
    def from_float(cls, module: Doubled) -> QuantizedFromFloat:
        return cls(torch.round(module.weight.detach() * 16) / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * (x @ self.weight)


class Network(nn.Module):
    """Convolutions around a layer of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.own = Doubled(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(self.own(x.mean((2, 3))))
