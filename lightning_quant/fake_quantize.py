"""The fake quantize of activations that training runs through."""

from __future__ import annotations

from typing import Any

import torch

from lightning_quant._torch_ao import FusedMovingAvgObsFakeQuantize


class SharedFakeQuantize(FusedMovingAvgObsFakeQuantize):
    """A fake quantize that several tensors of a graph may share, such as the inputs and the output of ``torch.cat``.

    Torch moves the average at every call. Of tensors with different ranges (parts of a concatenation, the input and
    the output of a pooling) that gives a mean of their ranges, and clips the wider ones for good. Here the average
    moves once for each forward pass, towards the union of what its calls showed.

    Attributes:
        calls_per_forward: How many tensors share it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls_per_forward = 1
        #: Calls of this forward pass, and the range that they showed.
        self._calls = 0
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        #: The average before this forward pass; None: there was none.
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """``X`` of any shape, rounded to the grid if fake quantize is on; the range follows if observing is on."""
        # torch's fused kernel gives symmetric ranges other scales than its observer gives to convert
        observing = bool(self.observer_enabled[0])
        if not self.is_symmetric_quant and (self.calls_per_forward == 1 or not observing):
            rounded: torch.Tensor = super().forward(X)
            return rounded
        if observing:
            self._observe(X.detach())
        if not bool(self.fake_quant_enabled[0]):
            return X
        observer: Any = self.activation_post_process
        return torch.fake_quantize_per_tensor_affine(
            X, self.scale, self.zero_point, observer.quant_min, observer.quant_max
        )

    def _observe(self, x: torch.Tensor) -> None:
        observer: Any = self.activation_post_process
        if self._calls == 0:
            empty = observer.min_val.numel() == 0 or bool(torch.isinf(observer.min_val).any())
            self._before = None if empty else (observer.min_val.clone(), observer.max_val.clone())
            self._seen = None
        self._calls = (self._calls + 1) % self.calls_per_forward
        if x.numel():
            low, high = torch.aminmax(x.float())
            if self._seen is not None:
                low, high = torch.minimum(low, self._seen[0]), torch.maximum(high, self._seen[1])
            self._seen = (low, high)
        if self._seen is None or (self._before is not None and self._calls != 0):
            return
        low, high = self._seen
        if self._before is not None:
            weight = observer.averaging_constant
            low = self._before[0] + weight * (low - self._before[0])
            high = self._before[1] + weight * (high - self._before[1])
        # in the first pass of all there is no average: every call sets what was seen so far
        observer.min_val.copy_(low)
        observer.max_val.copy_(high)
        scale, zero_point = self.calculate_qparams()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
