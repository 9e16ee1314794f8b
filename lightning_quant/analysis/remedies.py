"""Why a layer is sensitive, from what it is given and from its weight, and what helps against that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_quant.analysis.sqnr import Power

#: A channel is an outlier if its largest value is this many times that of the median channel.
OUTLIER = 8.0
#: The range has few large values if it is this many times the one that has 99.9 % of them.
RARE = 4.0
#: Of the output: a layer alone that gives more costs nothing to speak of.
HARMLESS_DB = 40.0
#: One of two errors counts alone if it is this much larger.
_CLEARLY_DB = 3.0
#: Rows of a sample of values from which quantiles are taken.
_SAMPLES = 65536


@dataclass
class Observed:
    """What was seen of one layer in float.

    Attributes:
        weight_error: Of its output, where only the weight is rounded.
        input_error: Of its output, where only the input is.
        clipped: Squared error of what is outside of the range, over that of all values.
        input_range: Least and largest value.
        kept_range: What is not clipped.
        rare: The largest value over that which 99.9 % of all are not above.
        channels: The largest value of each channel of the input.
        weight_spread: The largest output channel of the weight over the median one.
        per_channel: The weight has a scale for each output channel.
        depthwise: Each of its outputs reads one channel.
    """

    weight_error: Power = field(default_factory=Power)
    input_error: Power = field(default_factory=Power)
    clipped: Power = field(default_factory=Power)
    input_range: tuple[float, float] | None = None
    kept_range: tuple[float, float] | None = None
    rare: float = 1.0
    channels: torch.Tensor | None = None
    weight_spread: float = 1.0
    depthwise: bool = False

    @property
    def outlier_channels(self) -> tuple[int, ...]:
        """Channels of the input whose values are far larger than those of most others, the largest first."""
        channels = self.channels
        if channels is None or channels.numel() < 4:
            return ()
        # of many channels that are 0 (behind a ReLU), the median says nothing
        usual = channels[channels > 0].median() if bool((channels > 0).any()) else torch.tensor(0.0)
        if usual <= 0:
            return ()
        found = (channels > OUTLIER * usual).nonzero().flatten().tolist()
        return tuple(sorted(found, key=lambda c: -float(channels[c])))


def observed(seen: Observed, given: torch.Tensor, weight: torch.Tensor, kind: str, rounding: Any) -> None:
    """Add what a layer was given.

    Args:
        seen: Changed in place.
        given: Its input, ``(batch, channels, ...)`` of a convolution, ``(..., channels)`` of a linear layer.
        weight: In float.
        kind: The kind of the layer.
        rounding: What rounds the input; None: nothing does.
    """
    if given.numel() == 0 or not given.is_floating_point():
        return
    low, high = (float(end) for end in torch.aminmax(given))
    before = seen.input_range or (low, high)
    seen.input_range = min(low, before[0]), max(high, before[1])
    axis = 1 if "conv" in kind.lower() else -1
    largest = given.detach().abs().movedim(axis, 0).reshape(given.shape[axis], -1).amax(1)
    seen.channels = largest if seen.channels is None else torch.maximum(seen.channels, largest)
    flat = given.flatten()
    flat = flat[:: max(1, flat.numel() // _SAMPLES)].abs()
    usual = float(torch.quantile(flat[:_SAMPLES].float(), 0.999))
    seen.rare = max(seen.rare, max(-low, high) / usual) if usual > 0 else seen.rare
    by_channel = weight.detach().abs().reshape(weight.shape[0], -1).amax(1)
    median = float(by_channel.median())
    seen.weight_spread = float(by_channel.max()) / median if median > 0 else 1.0
    seen.depthwise = "conv" in kind.lower() and weight.shape[1] == 1 and weight.shape[0] > 1
    kept = getattr(rounding, "range", None)
    if kept is not None:
        seen.kept_range = kept
        seen.clipped.add(given, given.clamp(*kept))


def remedy(kind: str, sqnr_only_db: float, sqnr_db: float, seen: Observed, method: str) -> str:
    """What may help a layer.

    Args:
        kind: Of the layer.
        sqnr_only_db: Of the output, where only it is quantized.
        sqnr_db: Of the output, where all layers are.
        seen: What was seen of it.
        method: dynamic, static or qat.

    Returns:
        A few words; nothing, if it costs nothing to speak of.
    """
    if sqnr_only_db >= HARMLESS_DB or sqnr_only_db >= sqnr_db + 20:  # a hundredth of the noise
        return ""
    if seen.weight_error.signal == 0:
        return "skip"
    of_weight = seen.weight_error.sqnr_db
    of_input = seen.input_error.sqnr_db if seen.input_error.signal else float("inf")
    if of_weight < of_input - _CLEARLY_DB:
        return _for_weight(seen)
    return _for_input(kind, seen, method)


def _for_weight(seen: Observed) -> str:
    if seen.weight_spread > OUTLIER:
        if seen.depthwise:
            return "one scale for each channel of the weight, or equalize it with the layer before"
        return "one scale for each channel of the weight (qscheme='per_channel_symmetric')"
    return "adaptive rounding of the weight, or skip"


def _for_input(kind: str, seen: Observed, method: str) -> str:
    linear = "linear" in kind.lower()
    if method == "dynamic":
        return "SmoothQuant, or skip" if linear and seen.outlier_channels else "skip"
    if seen.outlier_channels:
        return (
            "SmoothQuant, or skip with the layer before" if linear else "equalize with the layer before, or skip both"
        )
    error = seen.input_error.sqnr_db
    if seen.clipped.signal and seen.clipped.sqnr_db < error + _CLEARLY_DB + 10:
        return "a wider range (observer='min_max'), or more calibration data"
    if seen.rare > RARE:
        return "a narrower range (observer='percentile')"
    return "skip"
