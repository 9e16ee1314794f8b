"""The values that a rounded weight can have, and the scale that suits it best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_quant.backends.weighted import WeightedLayer, WeightQuantization

#: Scales that are tried, as shares of the one whose ends are the largest weight.
_SHARES = tuple(share / 40 for share in range(40, 13, -1))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that a weight can have: ``(q - zero_point) * scale`` for ``low <= q <= high``.

    Attributes:
        scale: ``(groups, outputs, 1)``, float32.
        zero_point: Shaped the same, whole numbers in float32.
        low: The least integer.
        high: The largest one.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    low: int
    high: int

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The integers of ``weight``, rounded to nearest, in float32."""
        return (torch.round(weight / self.scale) + self.zero_point).clamp(self.low, self.high)

    def values(self, integers: torch.Tensor) -> torch.Tensor:
        """What integers stand for."""
        return (integers - self.zero_point) * self.scale


@dataclass(frozen=True)
class _Errors:
    """Squared error of a weight that is rounded to nearest, weighed by the power of what it is multiplied with."""

    weight: torch.Tensor
    power: torch.Tensor

    def of(self, grid: Grid, together: bool) -> torch.Tensor:
        found = (grid.values(grid.nearest(self.weight)) - self.weight).square_().mul_(self.power).sum(-1, keepdim=True)
        return found.sum().expand_as(found) if together else found


def grid_of(quantization: WeightQuantization, weight: torch.Tensor, power: torch.Tensor) -> Grid:
    """The scale with the least error of rounding to nearest; never so large that no weight is at an end of the range.

    A weight with a zero point keeps its scale.

    Args:
        quantization: Of the weight.
        weight: ``(groups, outputs, inputs)``.
        power: ``(groups, 1, inputs)``, the mean square of what each weight is multiplied with.
    """
    shape = (*weight.shape[:2], 1)
    scale = quantization.scale.expand(weight.shape[0] * weight.shape[1]).reshape(shape)
    zero_point = quantization.zero_point.float().expand(scale.numel()).reshape(shape)
    ends = {"low": quantization.quant_min, "high": quantization.quant_max}
    best = Grid(scale=scale, zero_point=zero_point, **ends)
    if bool((zero_point != 0).any()):
        return best
    errors = _Errors(weight, power)
    together = quantization.axis is None
    least = errors.of(best, together)
    for share in _SHARES:
        tried = Grid(scale=scale * share, zero_point=zero_point, **ends)
        found = errors.of(tried, together)
        best = Grid(scale=torch.where(found < least, tried.scale, best.scale), zero_point=zero_point, **ends)
        least = torch.minimum(least, found)
    return best


def keep(layer: WeightedLayer, grid: Grid, integers: torch.Tensor) -> torch.Tensor:
    """Let a layer have this weight, and convert round it to these very integers. Gives the weight.

    Args:
        layer: Changed.
        grid: Of its weight.
        integers: ``(groups, outputs, inputs)``.
    """
    quantization = layer.quantization
    assert quantization is not None
    scale = grid.scale.reshape(-1)
    layer.fix_ranges(scale if quantization.axis == 0 else scale[:1])
    layer.set_weight(grid.values(integers).reshape(layer.weight.shape))
    return layer.weight
