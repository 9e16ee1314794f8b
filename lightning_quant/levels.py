"""Tensors of few values, such as images: the grid that is laid over them exactly.

An image of 8 bits has 256 values, 768 if its three colours are normalized apart. Its error of rounding is then no
uniform noise: the grid from the least to the greatest of 256 values has a point for each, but 0 is one of its points
too, and all values are as far from theirs as 0 is from a value. Where images are normalized to -1 ... 1, that is half a
step, the most there can be, and which way they are rounded is up to the last bit of a division. A step a few
thousandths larger has a third of that error.
"""

from __future__ import annotations

import math

import numpy as np
import torch

#: A tensor of more values than this is a continuous one.
MOST = 1024
#: Values of a tensor that are looked at.
_SAMPLES = 8192
#: Each value has to come this often on average: of a continuous tensor few come twice.
_REPEATS = 16
#: Share of what was counted that has to be one of the values.
_COVERED = 0.99
#: Steps that are tried: up to a sixteenth larger than the least, by how many of them the range then has.
_LARGER, _FINENESS = 1 / 16, 1 / 4
#: How much larger than the least a step may be that is the distance of two values: others may come later.
_EXACT = 2.0


def none() -> torch.Tensor:
    """Of a tensor that was not seen: ``(0,)``, float32."""
    return torch.zeros(0)


def is_many(levels: torch.Tensor) -> bool:
    """Whether there are more than ``MOST``, of which none is known."""
    return levels.numel() == 1 and math.isinf(levels.item())


def seen(levels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``levels``, and those of ``x`` that are not 0.

    Args:
        levels: ``(count,)``, float32, sorted; or the infinity that stands for many.
        x: Any shape, floating point, finite. Of a large one, values at places that depend on its size alone.
    """
    if is_many(levels):
        return levels
    flat = x.detach().flatten()
    if flat.numel() > _SAMPLES:
        generator = torch.Generator().manual_seed(0)
        places = torch.randint(flat.numel(), (_SAMPLES,), generator=generator)
        flat = flat[places.to(flat.device)]
    flat = flat.to(levels.device, torch.float32)
    return together(levels, flat[flat != 0])


def together(*parts: torch.Tensor) -> torch.Tensor:
    """The values of all parts, in any order the same; infinity, if they are many."""
    found = torch.cat(parts).unique()
    many = found.numel() > MOST or (found.numel() > 0 and bool(found[-1].isinf()))
    return found.new_full((1,), math.inf) if many else found


def padded(levels: torch.Tensor) -> torch.Tensor:
    """``(MOST,)``, so that all processes send as much: filled with NaN."""
    return torch.cat([levels, levels.new_full((MOST - levels.numel(),), math.nan)])


def of_padded(sent: torch.Tensor) -> torch.Tensor:
    """``(ranks, MOST)`` from :func:`padded` -> the values of all of them."""
    return together(sent[~sent.isnan()])


def counts_of(levels: torch.Tensor, counts: np.ndarray, width: float) -> np.ndarray | None:
    """How often each level was counted; None: these are not the values of the tensor, which has many.

    Args:
        levels: From :func:`seen`.
        counts: ``(2 * half,)``: of a histogram without zeros, whose bins are ``width`` wide, the middle at 0.
        width: As said.
    """
    total = counts.sum()
    if is_many(levels) or levels.numel() == 0 or total < _REPEATS * levels.numel():
        return None
    half = len(counts) // 2
    places = np.clip(np.floor(levels.double().cpu().numpy() / width), -half, half - 1).astype(np.int64) + half
    _, inverse, sharing = np.unique(places, return_inverse=True, return_counts=True)
    found: np.ndarray = counts[places] / sharing[inverse]
    return found if found.sum() >= _COVERED * total else None


def least_error(
    levels: np.ndarray, counts: np.ndarray, first: tuple[float, float], steps: int, *, lowest: int | None = None
) -> tuple[float, float]:
    """The range whose grid has the least mean squared error over these values.

    Tried are ``first``, the steps of ranges that hold all values, up to a sixteenth larger, and the least distance of
    two values, up to twice as large.

    Args:
        levels: ``(count,)``, sorted, without 0.
        counts: ``(count,)``: how often each of them comes.
        first: A range, ``low <= 0 <= high``.
        steps: ``quant_max - quant_min``.
        lowest: ``quant_min`` less the zero point, where that is given: the range is then ``(-high, high)``, whose step
            is ``2 * high / steps``. Default: the zero point is chosen, too.

    Returns:
        ``(low, high)``.
    """
    low, high = min(float(levels[0]), 0.0), max(float(levels[-1]), 0.0)
    numbers = np.arange(steps + 1, steps / (1 + _LARGER), -_FINENESS)
    least = (high - low) if lowest is None else 2 * max(-low, high)
    distance = np.diff(np.union1d(levels, [0.0])).min()
    exact = [distance] if distance <= _EXACT * least / steps else []
    tried = np.array([(first[1] - first[0]) / steps, *(least / numbers), *exact])
    if lowest is None:
        down = np.floor(low / tried)
        ends = np.clip(np.concatenate([down, down + 1]), -steps, 0)
        tried = np.concatenate([tried, tried])
    else:
        ends = np.full(tried.shape, float(lowest))
    scale, end = tried[:, None], ends[:, None]
    rounded = np.clip(np.rint(levels / scale), end, end + steps) * scale
    best = int(np.argmin(((rounded - levels) ** 2 * counts).sum(1)))
    step = float(tried[best])
    if lowest is not None:
        return -step * steps / 2, step * steps / 2
    return step * float(ends[best]), step * (float(ends[best]) + steps)
