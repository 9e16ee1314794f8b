"""What can be switched between rounded and float in a simulated graph: activations, weights, whole modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_quant.backends.int8_weight import Int8Weight


def rounded(x: torch.Tensor, scale: float, zero_point: int, low: int, high: int) -> torch.Tensor:
    """``(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale``, without a gradient.

    In four passes that are vectorised: ``torch.fake_quantize_per_tensor_affine`` takes ten times as long, because it
    keeps a mask for the gradient.
    """
    return x.mul(1.0 / scale).round_().clamp_(low - zero_point, high - zero_point).mul_(scale)


class Rounding(nn.Module):
    """``(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale`` where it is on, else ``x``."""

    def __init__(self, scale: float, zero_point: int, low: int, high: int) -> None:
        super().__init__()
        self.enabled = False
        self.scale, self.zero_point, self.low, self.high = scale, zero_point, low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of any shape, floating point."""
        return rounded(x, self.scale, self.zero_point, self.low, self.high) if self.enabled else x

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value that are not clipped."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale


class DynamicRounding(nn.Module):
    """The same with the range of each tensor as it comes."""

    def __init__(self, choose: Callable[..., Any], arguments: tuple[Any, ...], limits: tuple[int, int]) -> None:
        super().__init__()
        self.enabled = False
        self.choose, self.arguments, self.limits = choose, arguments, limits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of any shape, floating point."""
        if not self.enabled:
            return x
        scale, zero_point = self.choose(x, *self.arguments)
        return rounded(x, float(scale), int(zero_point), *self.limits)


class SwitchedWeight(nn.Module):
    """Gives a weight, rounded or in float."""

    def __init__(self, floating: torch.Tensor, rounded: torch.Tensor, holder: str = "") -> None:
        super().__init__()
        self.enabled = False
        #: The module of the float model that has it, where that is known.
        self.holder = holder
        self.register_buffer("floating", floating.detach())
        self.register_buffer("rounded", rounded.detach())

    def forward(self) -> torch.Tensor:
        """The weight."""
        return self.weight(self.enabled)

    def weight(self, rounded: bool) -> torch.Tensor:
        """One of the two."""
        return self.get_buffer("rounded" if rounded else "floating")


class SwitchedLayer(SwitchedWeight):
    """A linear or (transposed) convolution with a weight that is rounded or in float, and what is fused with it."""

    def __init__(self, layer: Int8Weight, floating: torch.Tensor, kind: str) -> None:
        super().__init__(floating, layer.dequantized())
        self.layer, self.kind = layer, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # a weight alone is read, a layer is called
        """As the float layer."""
        return self.layer.compute(x, self.weight(self.enabled))


class Switched(nn.Module):
    """A module in float, or what stands in its place in the int8 model; both take and give floats."""

    def __init__(self, off: nn.Module, on: nn.Module, kind: str) -> None:
        super().__init__()
        self.enabled = False
        self.off, self.on, self.kind = off, on, kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What one of them gives."""
        return (self.on if self.enabled else self.off)(*args, **kwargs)
