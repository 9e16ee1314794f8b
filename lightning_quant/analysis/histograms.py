"""How the values of a tensor are spread, and which of them the int8 grid reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: Values of a tensor that are counted, drawn evenly. The standard error of a bin's share is at most 0.5 / sqrt of this,
#: which is 0.2 %.
SAMPLE = 1 << 16
BINS = 40
#: A value that was only rounded moves by half a step; one that was cut off by a whole one is no mere tie at the end.
_ROUNDED = 1.0


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The values of a tensor, and the range that its integers reach.

    Attributes:
        low: The least value.
        high: The largest value.
        clip_low: The least value that an integer stands for; of one scale per channel, that of the widest channel.
            None: there is no fixed range.
        clip_high: The largest one.
        clipped: Share of the values that moved by more than a step, 0 to 1: they were outside of the range (of their
            channel). None: there is no fixed range.
        counts: How many values are in each of equally wide bins from ``low`` to ``high``, of a sample; empty: they were
            not kept.
    """

    low: float
    high: float
    clip_low: float | None = None
    clip_high: float | None = None
    clipped: float | None = None
    counts: tuple[int, ...] = ()


def spread(
    x: torch.Tensor, rounded: torch.Tensor | None = None, step: torch.Tensor | None = None, *, bins: int = BINS
) -> Spread | None:
    """The spread of a tensor.

    Args:
        x: Floating-point, of any shape. NaN and infinity do not count.
        rounded: What its integers stand for, of the same shape; None: there is no fixed range.
        step: The scale of each value, of a shape that broadcasts to that of ``x``. Given with ``rounded``.
        bins: How many are counted.

    Returns:
        None, where there is no finite value.

    >>> spread(torch.tensor([0.0, 1.0, 1.0, 4.0]), bins=4).counts
    (1, 2, 0, 1)
    """
    if not x.numel():
        return None
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    seen = sampled(x)
    if not math.isfinite(high - low):
        seen = x.detach().reshape(-1)
        seen = sampled(seen[torch.isfinite(seen)])
        if not seen.numel():
            return None
        low, high = (float(v) for v in torch.aminmax(seen))
    counts = torch.histc(seen.float(), bins, low, high) if high > low else torch.tensor([float(seen.numel())])
    clipped = None
    if rounded is not None and step is not None:
        if step.numel() == 1:  # of a weight, all values are looked at, each with the step of its channel
            x, rounded = sampled(x), sampled(rounded)
        clipped = float(((x - rounded).abs() > _ROUNDED * step).float().mean())
    return Spread(low=low, high=high, clipped=clipped, counts=tuple(int(n) for n in counts))


def sampled(x: torch.Tensor) -> torch.Tensor:
    """``SAMPLE`` values ``(n,)`` of a tensor, at the same places of all tensors of a size; all if it has no more."""
    values = x.detach().reshape(-1)
    if values.numel() <= SAMPLE:
        return values
    generator = torch.Generator().manual_seed(0)
    return values[torch.randint(values.numel(), (SAMPLE,), generator=generator)]
