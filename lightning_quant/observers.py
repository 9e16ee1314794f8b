"""Range estimation from histograms, at about the cost of min and max.

Every value is looked at once for min and max, and up to ``SAMPLES`` values of a tensor are counted, of the first
tensors more: one from each of as many stretches of equal length, at a place that is drawn. By the inequality of
Dvoretzky, Kiefer and Wolfowitz (Massart 1990) the share of values below any number is then right to
``sqrt(log(2 / p) / (2 * n))`` with probability ``1 - p`` for ``n`` counted values: to 0.4 % after ten tensors, with
probability 0.99. Stretches only make it better.

Bins are as wide as a power of two and begin at multiples of it. When values come that do not fit, each two become one,
and counts are multiples of ``1 / PARTS``, so that histograms of any order, or of several processes, have the same sum,
exactly, while a bin has less than ``2 ** 53 / PARTS`` of them: 69 thousand million.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

from lightning_quant import levels, native
from lightning_quant._torch_ao import ObserverBase, UniformQuantizationObserverBase
from lightning_quant.errors import CalibrationError
from lightning_quant.range_search import Counts, least_divergence, least_error, quantiles

#: Values of a tensor that are counted, at the most; of the first ``EARLY`` ones, with which a short calibration ends,
#: ``EARLY`` times as many, half, a third ...
SAMPLES = 16384
EARLY = 8
#: A value that is counted stands for ``x.numel() / samples`` values: ``samples`` divides this power of two, or is all.
PARTS = SAMPLES * EARLY
#: Bins on either side of 0.
HALF = 4096
#: A bin is at least 2 to the power of this wide: its inverse is still a float32.
_LEAST_EXPONENT = -100
#: What a histogram looks for. ``share`` is chosen by corrections alone: ``percentile`` per cent of the way from 0 to
#: the least and the greatest value.
SEARCHES = ("histogram", "percentile", "entropy", "share")


class HistogramObserver(UniformQuantizationObserverBase):
    """Observes one range for a tensor; see the module's docstring.

    Args:
        search: ``histogram``: the range with the least mean squared error; ``percentile``; ``entropy``: that with the
            least Kullback-Leibler divergence.
        percentile: Per cent of the values not above the range, and not below; for ``search="percentile"``.
        **kwargs: ``dtype``, ``qscheme``, ``quant_min``, ``quant_max``, ``eps`` of torch's observers.
    """

    def __init__(self, search: str = "histogram", percentile: float = 99.99, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        complete(self, search, percentile)

    def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
        """Count ``x_orig``, of any shape, and give it back."""
        observe(self, x_orig)
        return x_orig

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Scale (float32) and zero point (int64), one each, shape ``(1,)``."""
        found: tuple[torch.Tensor, torch.Tensor] = self._calculate_qparams(*chosen_range(self))
        return found


def complete(observer: Any, search: str, percentile: float) -> None:
    """Give an observer of torch.ao or torchao the buffers and settings that :func:`observe` works on."""
    observer.search, observer.percentile = search, percentile
    observer.tensors = observer.drawn = 0
    # (2 * HALF,) once it has seen something: torch.ao makes many observers that never do
    observer.register_buffer("histogram", torch.zeros(0, dtype=torch.float64))
    observer.register_buffer("zeros", torch.zeros((), dtype=torch.float64))
    observer.register_buffer("exponent", torch.tensor(_LEAST_EXPONENT))
    observer.register_buffer("min_val", torch.tensor(math.inf))
    observer.register_buffer("max_val", torch.tensor(-math.inf))
    observer.register_buffer("levels", levels.none())


def is_histogram(observer: Any) -> bool:
    """Whether ``observer`` is one of ours that counts, of torch.ao or of torchao."""
    return getattr(observer, "search", None) in SEARCHES and hasattr(observer, "histogram")


def observe(observer: Any, x: torch.Tensor) -> None:
    """Add the values of ``x`` to the histogram.

    Raises:
        CalibrationError: ``x`` has NaN or infinity.
    """
    x = x.detach()
    if x.numel() == 0:
        return
    if not x.is_floating_point():
        x = x.float()
    if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        x = x.contiguous()
    if observer.histogram.numel() == 0:
        observer.histogram.resize_(2 * HALF).zero_()
    samples = min(SAMPLES * max(1, EARLY // (observer.tensors + 1)), x.numel())
    plain = x.device.type == "cpu" and x.dtype in native.DTYPES and observer.histogram.device.type == "cpu"
    kernels = native.kernels() if plain else None
    if kernels is None:
        infinite = _count(observer, x, samples)
    else:
        buffers = (observer.histogram, observer.zeros, observer.min_val, observer.max_val, observer.exponent)
        into = native.Histogram(*(buffer.data_ptr() for buffer in buffers), HALF)
        infinite = kernels.count[x.dtype](
            x.data_ptr(), x.numel(), samples, observer.drawn % 2**32, ctypes.addressof(into), torch.get_num_threads()
        )
    if infinite:
        raise CalibrationError(
            "an activation has values that are NaN or infinite, so that it has no range. Look for the batch of the "
            "calibration data that gives them, by evaluating the float model."
        )
    observer.levels = levels.seen(observer.levels, x)
    observer.tensors += 1
    observer.drawn += samples  # other places the next time


def coarser(histogram: torch.Tensor, doublings: int) -> torch.Tensor:
    """The same counts in bins that are ``2 ** doublings`` times as wide. ``(2 * HALF,)`` to ``(2 * HALF,)``."""
    result = torch.zeros_like(histogram)
    if doublings >= HALF.bit_length():  # all of a side in one bin
        result[HALF - 1], result[HALF] = histogram[:HALF].sum(), histogram[HALF:].sum()
        return result
    merged = histogram.reshape(-1, 2**doublings).sum(1)
    start = HALF - merged.numel() // 2
    result[start : start + merged.numel()] = merged
    return result


def merge(observer: Any, other: Any) -> None:
    """Add what ``other`` has counted, as if ``observer`` had seen it too. In any order the sum is the same."""
    if other.histogram.numel() == 0:
        return
    if observer.histogram.numel() == 0:
        observer.histogram.resize_(2 * HALF).zero_()
    exponent = max(int(observer.exponent.item()), int(other.exponent.item()))
    for one in (observer, other):
        counts = coarser(one.histogram, exponent - int(one.exponent.item()))
        if one is observer:
            observer.histogram.copy_(counts)
        else:
            observer.histogram.add_(counts.to(observer.histogram.device))
    observer.exponent.fill_(exponent)
    observer.zeros.add_(other.zeros.to(observer.zeros.device))
    observer.min_val.copy_(torch.minimum(observer.min_val, other.min_val.to(observer.min_val.device)))
    observer.max_val.copy_(torch.maximum(observer.max_val, other.max_val.to(observer.max_val.device)))
    observer.levels = levels.together(observer.levels, other.levels.to(observer.levels.device))


def _count(observer: Any, x: torch.Tensor, samples: int) -> bool:
    """As the kernel does, with torch's operators; which values are counted is not the same."""
    low, high = (end.item() for end in torch.aminmax(x))
    if not math.isfinite(low) or not math.isfinite(high):
        return True
    most = max(-low, high)
    # frexp: most / HALF < 2 ** needed
    needed = math.frexp(most / HALF)[1] if most > 0 else _LEAST_EXPONENT
    exponent = int(observer.exponent.item())
    if needed > exponent:
        observer.histogram.copy_(coarser(observer.histogram, needed - exponent))
        observer.exponent.fill_(needed)
        exponent = needed
    observer.min_val.clamp_(max=low)
    observer.max_val.clamp_(min=high)
    flat = x.flatten()
    weight = flat.numel() / samples
    if samples < flat.numel():
        generator = torch.Generator().manual_seed(observer.drawn)
        drawn = torch.rand(samples, dtype=torch.float64, generator=generator).to(x.device)
        places = (torch.arange(samples, device=x.device) + drawn) * weight
        flat = flat[places.long().clamp_(max=flat.numel() - 1)]
    flat = flat.to(torch.float64)
    observer.zeros += (flat == 0).sum().to(observer.zeros) * weight
    bins = torch.floor(flat * 2.0**-exponent).clamp_(-HALF, HALF - 1).long() + HALF
    counts = torch.bincount(bins[flat != 0], minlength=2 * HALF)
    observer.histogram += counts.to(observer.histogram) * weight
    return False


def chosen_range(observer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of the range, float32 scalars; infinite and crossed, if nothing was observed."""
    if bool(torch.isinf(observer.min_val)):
        return observer.min_val, observer.max_val
    found = Counts(
        observer.histogram.cpu().numpy(),
        2.0 ** int(observer.exponent.item()),
        observer.zeros.item(),
        observer.min_val.item(),
        observer.max_val.item(),
    )
    symmetric = observer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    steps = observer.quant_max - observer.quant_min
    if observer.search == "percentile":
        low, high = quantiles(found, observer.percentile)
    elif observer.search == "share":
        low, high = (min(found.low, 0.0) * observer.percentile / 100, max(found.high, 0.0) * observer.percentile / 100)
    elif observer.search == "entropy":
        low, high = least_divergence(found, steps, symmetric=symmetric)
    else:
        low, high = least_error(found, steps, symmetric=symmetric)
        counts = levels.counts_of(observer.levels, found.counts, found.width)
        if counts is not None:
            known = observer.levels.double().cpu().numpy()
            lowest = observer.quant_min - _zero_point(observer) if symmetric else None
            low, high = levels.least_error(known, counts, (low, high), steps, lowest=lowest)
    return observer.min_val.new_tensor(low), observer.max_val.new_tensor(high)


def _zero_point(observer: Any) -> int:
    """That of every symmetric range."""
    _, zero_point = observer._calculate_qparams(torch.tensor(-1.0), torch.tensor(1.0))
    return int(zero_point)


class FixedRange(ObserverBase):
    """Observes nothing: its scales were chosen. See :meth:`like`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x``."""
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]  # torch.ao declares no types
        """As they were given: scale (float32) and zero point (int64), of one shape."""
        return self.get_buffer("scale"), self.get_buffer("zero_point")

    @classmethod
    def like(cls, observer: Any, scale: torch.Tensor, zero_point: torch.Tensor) -> FixedRange:
        """In the place of ``observer``, with its integers and its axis.

        Args:
            observer: Of torch.ao or torchao.
            scale: float32, ``(channels,)``, or ``(1,)``.
            zero_point: int64, of that shape.
        """
        made = cls(dtype=observer.dtype)
        copy_settings(made, observer, scale, zero_point)
        return made


def copy_settings(made: Any, observer: Any, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
    """Give a new observer what conversion asks of one."""
    for name in ("qscheme", "quant_min", "quant_max", "ch_axis", "eps", "is_dynamic"):
        if hasattr(observer, name):
            setattr(made, name, getattr(observer, name))
    made.is_fixed = True
    made.register_buffer("scale", scale.detach().clone())
    made.register_buffer("zero_point", zero_point.detach().clone())


def is_fixed(observer: Any) -> bool:
    """Whether ``observer`` is a :class:`FixedRange`, of torch.ao or of torchao."""
    return getattr(observer, "is_fixed", False) is True
