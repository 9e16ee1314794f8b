"""The plots of a report, from its numbers alone: SVG whose text and colours are those of the page that it stands in.

They are drawn through matplotlib's objects and never through ``pyplot``, whose state is the user's. Colours are written
as CSS variables, so that one drawing is right in light and in dark mode.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

from lightning_quant.analysis.histograms import Spread
from lightning_quant.analysis.layers import LayerReport
from lightning_quant.errors import MissingExtraError
from lightning_quant.layer_reports import cost_db

Colours = dict[str, str]

#: Drawn in, and replaced by those of the page that have these names: no colour of a picture is as dark as these.
VARIABLES: Colours = {
    "ink": "#010101", "muted": "#020202", "line": "#030303", "total": "#040404", "alone": "#050505", "worst": "#060606",
    "weight": "#070707",
}  # fmt: skip
#: For pictures that stand alone, as in TensorBoard: white paper.
PAPER: Colours = {
    "ink": "#1c2126", "muted": "#5d6771", "line": "#dfe3e7", "total": "#8b97a3", "alone": "#1f6f8b", "worst": "#b5482a",
    "weight": "#6b5fa3",
}  # fmt: skip
#: Up to so many layers have a row with their name each; more are dots in their order.
NAMED = 30
#: How many of the worst are marked, and which part of all at most.
MARKED, _PART = 5, 3
_POINTS = 72  # an SVG's user unit is one of so many in an inch
#: Where SQNR that has no end is drawn.
_EXACT_DB = 80.0


def figure(width: int, height: int) -> Any:
    """An empty ``matplotlib.figure.Figure`` of so many CSS pixels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "report", "a plot") from error
    return Figure(figsize=(width / _POINTS, height / _POINTS), dpi=_POINTS, layout="constrained")


def as_svg(drawn: Any, label: str) -> str:
    """A figure as an ``<svg>`` element, whose colours are ``var(--ink)`` and so on, of the page.

    Args:
        drawn: From one of the functions below, in :data:`VARIABLES`.
        label: What it shows, for those who cannot see it.
    """
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    head = f'<svg viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{_escaped(label)}" width="{size[1]}"'
    svg = re.sub(r"<svg[^>]*", head, svg, count=1)
    for name, colour in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def as_pixels(drawn: Any) -> Any:
    """A figure as a NumPy array, uint8 ``(height, width, 4)``, on white paper. For loggers of pictures."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn.set_facecolor("white")
    drawn.set_dpi(2 * _POINTS)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def shown_name(name: str, most: int) -> str:
    """A name of a layer, without its beginning where it is long: the end is what tells layers apart."""
    return name if len(name) <= most else "…" + name[1 - most :]


def worst_layers(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """The int8 layers that cost most by themselves, the worst first: up to five, and a third of them at most."""
    known = [layer for layer in layers if layer.int8 is not False and math.isfinite(cost_db(layer))]
    return sorted(known, key=cost_db)[: min(MARKED, math.ceil(len(known) / _PART))]


# ---- SQNR of the layers


def sqnr_plot(layers: Sequence[LayerReport], width: int = 1040, colours: Colours = VARIABLES) -> Any:
    """The SQNR of each layer, in the order in which they run.

    Args:
        layers: At least one has a figure.
        width: In CSS pixels.
        colours: Name -> colour.

    Returns:
        A figure. The worst layers have numbers, those of :func:`worst_layers`.
    """
    shown = [layer for layer in layers if layer.sqnr_db is not None or layer.alone_db is not None]
    named = len(shown) <= NAMED
    drawn = figure(width, 50 + 24 * max(3, len(shown))) if named else figure(width, 300)
    axes = drawn.subplots()
    places = list(range(len(shown)))
    for kind, colour in (("sqnr_db", "total"), ("alone_db", "alone")):
        points = [(place, _end_db(value)) for place, layer in enumerate(shown)
                  if (value := getattr(layer, kind)) is not None]  # fmt: skip
        if not points:
            continue
        along, values = [p for p, _ in points], [v for _, v in points]
        xy = (values, along) if named else (along, values)
        style: dict[str, Any] = {"linewidth": 1.4} if kind == "sqnr_db" else {"linestyle": "none", "marker": "o"}
        axes.plot(*xy, color=colours[colour], markersize=5.5, zorder=2 if kind == "sqnr_db" else 3, **style)
    _mark_worst(axes, shown, named, colours)
    _style(axes, colours)
    if named:
        most = 34 if width > 600 else 18
        axes.set_yticks(places, [shown_name(layer.name, most) for layer in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("SQNR in dB (further right is better)", color=colours["muted"])
        axes.grid(axis="both", color=colours["line"], linewidth=0.8)
    else:
        axes.set_xlabel("layers, in the order in which they run", color=colours["muted"])
        axes.set_ylabel("SQNR in dB", color=colours["muted"])
        axes.grid(axis="y", color=colours["line"], linewidth=0.8)
    return drawn


def _end_db(value: float) -> float:
    return max(-20.0, min(_EXACT_DB, value)) if not math.isnan(value) else -20.0


def _mark_worst(axes: Any, shown: list[LayerReport], named: bool, colours: Colours) -> None:
    for number, layer in enumerate(worst_layers(shown), start=1):
        if layer.alone_db is None:
            continue
        place, value = shown.index(layer), _end_db(layer.alone_db)
        xy = (value, place) if named else (place, value)
        axes.plot(*xy, marker="o", markersize=7.5, color=colours["worst"], zorder=4)
        axes.annotate(
            str(number), xy, xytext=(0, -7) if not named else (8, 0), textcoords="offset points", fontweight="bold",
            ha="center" if not named else "left", va="top" if not named else "center_baseline", fontsize=12,
            color=colours["worst"], zorder=5,
        )  # fmt: skip


def _style(axes: Any, colours: Colours) -> None:
    """No frame, quiet ticks."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=12, labelcolor=colours["muted"])
    axes.xaxis.label.set_size(12)
    axes.yaxis.label.set_size(12)
    axes.set_axisbelow(True)
    axes.margins(x=0.03)


# ---- values


def spread_plot(layer: LayerReport, width: int = 330, colours: Colours = VARIABLES) -> Any:
    """What a layer reads and its weight as two histograms, with the range that the integers reach.

    Args:
        layer: With at least one histogram.
        width: In CSS pixels.
        colours: Name -> colour.
    """
    parts = [(spread, title, colour) for spread, title, colour in (
        (layer.reads, "what it reads", "alone"), (layer.weight, "its weight", "weight"),
    ) if spread is not None and spread.counts]  # fmt: skip
    drawn = figure(width, 116)
    for axes, (spread, title, colour) in zip(drawn.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        _draw_spread(axes, spread, colours[colour], colours)
        axes.set_title(title, loc="left", fontsize=12, color=colours["muted"], pad=4)
    return drawn


def _draw_spread(axes: Any, spread: Spread, colour: str, colours: Colours) -> None:
    bins = len(spread.counts)
    width = (spread.high - spread.low) / bins if spread.high > spread.low else 1.0
    edges = [spread.low + number * width for number in range(bins + 1)]
    heights = [math.log10(1 + count) for count in spread.counts]  # outliers are few, and matter
    axes.stairs(heights, edges, fill=True, color=colour, alpha=0.55)
    for clip in (spread.clip_low, spread.clip_high):
        if clip is not None:
            axes.axvline(clip, color=colours["worst"], linewidth=1.3, linestyle=(0, (3, 2)))
    _style(axes, colours)
    axes.set_yticks([])
    axes.set_ylim(0, 1.12 * max(heights))
    low = min(x for x in (spread.low, spread.clip_low) if x is not None)
    high = max(x for x in (spread.high, spread.clip_high) if x is not None)
    axes.set_xticks([low, high], [f"{low:.3g}", f"{high:.3g}"])
    axes.get_xticklabels()[0].set_ha("left")
    axes.get_xticklabels()[-1].set_ha("right")
    axes.spines["bottom"].set_visible(True)
    axes.spines["bottom"].set_color(colours["line"])
