"""From a histogram to the range that is worth its integers: what lies outside of it is cut off.

All functions take a :class:`Counts` and give ``(low, high)`` with ``low <= 0 <= high``, as float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: How many ends of a range are tried at a time, from 0 to the outermost value.
_ENDS = 96


@dataclass(frozen=True)
class Counts:
    """What is known of the values of a tensor.

    Attributes:
        counts: ``(2 * half,)``, float64: how many values other than 0 are in ``[(i - half) * width, (i - half + 1) *
            width)``.
        width: Of a bin.
        zeros: How many values are 0, which every grid has.
        low: The least value.
        high: The greatest.
    """

    counts: np.ndarray
    width: float
    zeros: float
    low: float
    high: float

    @property
    def edges(self) -> np.ndarray:
        """The lower ends of all bins, and the upper end of the last."""
        half = len(self.counts) // 2
        return np.arange(-half, half + 1) * self.width

    @property
    def centres(self) -> np.ndarray:
        """What the values of each bin are taken for."""
        return np.clip(self.edges[:-1] + self.width / 2, self.low, self.high)


def least_error(found: Counts, steps: int, *, symmetric: bool) -> tuple[float, float]:
    """The range with the least mean squared error.

    Within the range the error is that of rounding: ``step ** 2 / 12`` on average (Bennett 1948), but the square of the
    value itself where that is rounded to 0, which every grid has. Outside of it it is the squared distance to its end.

    Args:
        found: The values.
        steps: ``quant_max - quant_min``.
        symmetric: The range is as wide on both sides of 0.
    """
    errors = _Errors(found, steps)
    if symmetric:
        most = max(-found.low, found.high, 0.0)
        ends = np.linspace(0, most, _ENDS + 1)[1:]
        for _ in range(2):
            best = ends[int(np.argmin(errors.symmetric(ends)))]
            ends = _around(best, ends)
        return -best, best
    lows, highs = _candidates(-min(found.low, 0.0)), _candidates(max(found.high, 0.0))
    for _ in range(2):
        total = errors.of(lows, highs)
        row, column = np.unravel_index(int(np.argmin(total)), total.shape)
        low, high = lows[row], highs[column]
        lows, highs = _around(low, lows), _around(high, highs)
    return -float(low), float(high)


def _candidates(most: float) -> np.ndarray:
    return np.linspace(0, most, _ENDS + 1) if most > 0 else np.zeros(1)


def _around(best: float, tried: np.ndarray) -> np.ndarray:
    """Ends between the neighbours of the best one."""
    if len(tried) == 1:
        return tried
    step = tried[1] - tried[0]
    return np.linspace(max(best - step, 0.0), min(best + step, tried[-1]), 65)


class _Errors:
    """Sums of squared errors of many ranges, from sums over the bins below an edge."""

    def __init__(self, found: Counts, steps: int) -> None:
        self.found, self.steps = found, steps
        centres = found.centres
        self.sums = [np.concatenate([[0.0], np.cumsum(found.counts * centres**power)]) for power in range(3)]
        self.half = len(found.counts) // 2

    def _below(self, x: np.ndarray) -> list[np.ndarray]:
        """The three sums over all values below x, linear within a bin."""
        place = np.clip(x / self.found.width + self.half, 0, 2 * self.half)
        index = np.minimum(place.astype(np.int64), 2 * self.half - 1)
        part = place - index
        return [s[index] + part * (s[index + 1] - s[index]) for s in self.sums]

    def _outside(self, lows: np.ndarray, highs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        low, high = self._below(-lows), self._below(highs)
        beyond = [s[-1] - part for s, part in zip(self.sums, high, strict=True)]
        error_low = low[2] + 2 * lows * low[1] + lows**2 * low[0]
        error_high = beyond[2] - 2 * highs * beyond[1] + highs**2 * beyond[0]
        return np.maximum(error_low, 0), np.maximum(error_high, 0), low[0], high[0]

    def of(self, lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
        """``(lows, highs)``: those of the ranges ``(-low, high)``."""
        error_low, error_high, below, above = self._outside(lows, highs)
        inside = above[None, :] - below[:, None]
        ends = np.broadcast_to(lows[:, None], inside.shape), np.broadcast_to(highs[None, :], inside.shape)
        return error_low[:, None] + error_high[None, :] + self._rounding(*ends, inside)

    def _rounding(self, lows: np.ndarray, highs: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """That of ``inside`` values between ``-low`` and ``high``."""
        step = (lows + highs) / self.steps
        least, most = self._below(-np.minimum(step / 2, lows)), self._below(np.minimum(step / 2, highs))
        squares, near = most[2] - least[2], most[0] - least[0]
        total: np.ndarray = squares + np.maximum(inside - near, 0) * step**2 / 12
        return total

    def symmetric(self, ends: np.ndarray) -> np.ndarray:
        """Those of the ranges ``(-end, end)``."""
        error_low, error_high, below, above = self._outside(ends, ends)
        return error_low + error_high + self._rounding(ends, ends, above - below)


def quantiles(found: Counts, percentile: float) -> tuple[float, float]:
    """The range between two quantiles.

    Args:
        found: The values.
        percentile: Per cent of the values that are not above the upper end; as many are not below the lower one.
    """
    half = len(found.counts) // 2
    counts = found.counts.copy()
    counts[half] += found.zeros
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    share = percentile / 100 * sums[-1]
    edges = found.edges
    high = float(np.interp(share, sums, edges))
    low = float(np.interp(sums[-1] - share, sums, edges))
    return min(max(low, found.low), 0.0), max(min(high, found.high), 0.0)


def least_divergence(found: Counts, steps: int, *, symmetric: bool) -> tuple[float, float]:
    """The range whose rounded distribution differs least from that of the values, by Kullback and Leibler.

    As TensorRT chooses it (Migacz 2017, "8-bit Inference with TensorRT"): what lies outside is counted at the ends, and
    the bins of a step share what it has, as far as they have any. One number narrows both ends.

    Args:
        found: The values.
        steps: ``quant_max - quant_min``.
        symmetric: The range is as wide on both sides of 0.
    """
    half = len(found.counts) // 2
    low, high = -min(found.low, 0.0), max(found.high, 0.0)
    if symmetric:
        low = high = max(low, high)
    best, least = (-low, high), np.inf
    for share in np.linspace(1, 0.1, 91):
        first = half - int(np.ceil(low * share / found.width))
        last = half + int(np.ceil(high * share / found.width))
        if last - first <= steps:  # a bin for each integer: nothing more to find out
            break
        inside = found.counts[max(first, 0) : min(last, 2 * half)]
        true = inside.copy()
        true[0] += found.counts[: max(first, 0)].sum()
        true[-1] += found.counts[min(last, 2 * half) :].sum()
        cells = np.linspace(0, len(inside), steps + 2).astype(np.int64)[:-1]
        filled = inside > 0
        held = np.add.reduceat(inside, cells)
        shared = np.add.reduceat(filled.astype(np.float64), cells)
        spread = np.repeat(held / np.maximum(shared, 1), np.diff(np.append(cells, len(inside)))) * filled
        known = true > 0
        if not spread.any() or not known.any():
            continue
        p, q = true / true.sum(), np.maximum(spread / spread.sum(), 1e-12)
        divergence = float(np.sum(p[known] * np.log(p[known] / q[known])))
        if divergence < least:
            best, least = (-low * share, high * share), divergence
    return best
