"""Plots of analyses, drawn through matplotlib's objects: ``pyplot`` and its state are the user's."""

from __future__ import annotations

import math
from typing import Any

from lightning_quant.analysis.sensitivity import Sensitivity
from lightning_quant.errors import MissingExtraError

#: Where what has no noise is drawn.
_EXACT_DB = 80.0


def plot_sensitivity(found: Sensitivity, limit: int = 40) -> Any:
    """What each layer costs, the most harmful one at the top.

    Args:
        found: From :func:`lightning_quant.sensitivity`.
        limit: Of more layers, so many are drawn.

    Returns:
        A ``matplotlib.figure.Figure``; ``figure.savefig("layers.png")`` writes it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "a plot") from error
    layers = found.worst_first[:limit]
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(layers)), layout="constrained")
    axes = figure.subplots()
    places = range(len(layers))
    axes.barh(places, [_drawn(layer.sqnr_only_db) for layer in layers], color="#1f6f8b", label="only it in int8")
    axes.plot(
        [_drawn(layer.sqnr_all_but_db) for layer in layers], places, "o", color="#b5482a", label="all but it in int8"
    )
    axes.axvline(_drawn(found.sqnr_db), color="#5d6771", linestyle="--", label="all in int8")
    axes.set_yticks(places, [layer.name for layer in layers])
    axes.invert_yaxis()
    axes.set_xlabel("SQNR of the output, dB (more is better)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    return figure


def _drawn(value: float) -> float:
    return _EXACT_DB if value == math.inf else max(value, -_EXACT_DB)
