"""As ``own_classes``, of torchao's kind."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e import FakeQuantize, MinMaxObserver


class HalfRange(MinMaxObserver):
    """Takes half of the range that it sees."""

    def calculate_qparams(self) -> Any:
        return self._calculate_qparams(self.min_val / 2, self.max_val / 2)


class CountingFakeQuantize(FakeQuantize):
    """Torchao's own, which counts its calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)
