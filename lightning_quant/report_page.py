"""A report as one HTML page: tables, plots, files and their checksums. It is read without a network or scripts.

The page is made from the numbers of the report alone, so that a ``report.json`` becomes a page again at any time. What
it says is put together here, and how it looks is in ``templates/report.html``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lightning_quant.analysis.layers import SAMPLES, LayerReport
from lightning_quant.analysis.sampling import standard_error
from lightning_quant.errors import MissingExtraError
from lightning_quant.formatting import (
    shown_bytes,
    shown_count,
    shown_db,
    shown_ms,
    shown_number,
    shown_share,
    shown_threads,
)
from lightning_quant.layer_reports import cost_db
from lightning_quant.provenance import as_yaml
from lightning_quant.report import QuantReport
from lightning_quant.report_plots import as_svg, spread_plot, sqnr_plot, worst_layers

_NEEDED = ("matplotlib", "jinja2")
#: What a report says where the page was left out.
NO_HTML = (
    "report.html was not written: it needs the packages of an extra. Install them with: "
    "pip install 'lightning-quant[report]'"
)
#: Width of the plots for wide screens and for phones, in CSS pixels; which one is seen is the style sheet's choice.
_WIDE, _NARROW = 1000, 340
#: How many of the worst layers the page proposes to leave in float first.
_SKIPPED = 2


def can_write_html() -> bool:
    """Whether the packages for it are installed."""
    return all(find_spec(package) is not None for package in _NEEDED)


def write_html(report: QuantReport, path: str | Path) -> Path:
    """Write a report as a page.

    Args:
        report: Of a run, or from :meth:`QuantReport.load`.
        path: The file. Its folder has to exist.

    Returns:
        ``path``.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(html_of(report), encoding="utf8")
    partial.replace(path)
    return path


def html_of(report: QuantReport) -> str:
    """The page as text.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "report", "report.html") from error
    pages = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_quant"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return pages.get_template("report.html").render(
        report=report,
        cards=_cards(report),
        metrics=_metrics(report),
        latencies=_latencies(report),
        files=_files(report),
        rows=_layers(report),
        shares=_shares(report),
        plots=_plots(report),
        worst=_worst(report),
        spreads=_spreads(report),
        code=_code(report),
        settings=_settings(report),
        samples=SAMPLES,
        threads=shown_threads(report.num_threads),
        sqnr=shown_db(report.sqnr_db),
    )


# ---- figures


@dataclass(frozen=True)
class Card:
    """One of the figures at the top.

    Attributes:
        title: What it is.
        value: In large letters.
        detail: Below it.
    """

    title: str
    value: str
    detail: str


def _cards(report: QuantReport) -> list[Card]:
    cards = []
    shared = [name for name in sorted(report.metrics_float) if name in report.metrics_int8]
    if shared:
        samples = report.num_samples
        first = min(shared, key=lambda name: standard_error(name, report.metrics_int8[name], samples or 1) is None)
        before, after = report.metrics_float[first], report.metrics_int8[first]
        cards.append(Card(first, shown_number(after), f"{shown_number(before)} in float, {after - before:+.4f}"))
    ratio = report.size_bytes_float / max(1, report.size_bytes_int8)
    cards.append(Card("size", shown_bytes(report.size_bytes_int8),
                      f"{shown_bytes(report.size_bytes_float)} in float, {ratio:.1f} times as small"))  # fmt: skip
    best = report.formats[report.fastest] if report.formats else None
    latency = best.latency_ms if best else report.latency_ms_int8
    speed = report.latency_ms_float / max(1e-9, latency)
    detail = f"{shown_ms(report.latency_ms_float)} as float TorchScript, {speed:.1f} times as fast"
    cards.append(Card(f"latency, {report.fastest}" if best else "latency", shown_ms(latency), detail))
    detail = f"SQNR of the output {shown_db(report.sqnr_db)}"
    cards.append(Card("multiply-accumulates in int8", f"{100 * report.coverage:.1f} %", detail))
    return cards


def _with_error(name: str, value: float | None, samples: int | None) -> tuple[str, str]:
    """A value and its sampling error, both as text."""
    if value is None:
        return "", ""
    error = standard_error(name, value, samples)
    return shown_number(value), "" if error is None else f"± {error:.4f}"


def _metrics(report: QuantReport) -> dict[str, Any]:
    columns = {"float": report.metrics_float, "int8": report.metrics_int8}
    if report.metrics_before:
        columns = {"before training": report.metrics_before, **columns}
    columns |= {name: entry.metrics for name, entry in report.formats.items() if entry.metrics}
    rows = []
    for name in sorted(report.metrics_float.keys() | report.metrics_int8.keys()):
        a, b = report.metrics_float.get(name), report.metrics_int8.get(name)
        change = "" if a is None or b is None else f"{b - a:+.4f}"
        cells = [_with_error(name, values.get(name), report.num_samples) for values in columns.values()]
        rows.append({"name": name, "cells": cells, "change": change})
    has_errors = any(error for row in rows for _, error in row["cells"])
    return {"head": list(columns), "rows": rows, "has_errors": has_errors}


def _latencies(report: QuantReport) -> list[dict[str, Any]]:
    rows: list[tuple[str, float | None, float | None]] = []
    if "torchscript" not in report.formats:
        rows = [("float TorchScript", None, report.latency_ms_float)]
    rows += [(name, entry.latency_ms, entry.latency_ms_float) for name, entry in report.formats.items()]
    longest = max((x for _, *pair in rows for x in pair if x is not None), default=0.0) or 1.0

    def bar(value: float) -> dict[str, Any]:
        return {"text": shown_ms(value), "width": round(100 * value / longest, 1)}

    found = []
    for name, int8, floating in rows:
        speed = "" if int8 is None or floating is None else f"{floating / max(1e-9, int8):.2f} times"
        is_fastest = bool(report.formats) and name == report.fastest
        found.append({
            "name": name, "bars": [(kind, bar(value)) for kind, value in (("int8", int8), ("float", floating))
                                   if value is not None], "speed": speed, "is_fastest": is_fastest,
        })  # fmt: skip
    return found


def _files(report: QuantReport) -> list[dict[str, Any]]:
    found = []
    for name, entry in report.formats.items():
        files = report.artifacts[name]
        paths = list(files.values()) if isinstance(files, dict) else [files]
        kernels = ""
        if entry.int8_kernels is not None and entry.float_kernels is not None:
            kernels = f"{entry.int8_kernels} of {entry.int8_kernels + entry.float_kernels}"
        names = [part for path in paths for part in _parts_of(Path(path), report.checksums)]
        found.append({
            "format": name, "size": shown_bytes(entry.size_bytes), "kernels": kernels, "sqnr": shown_db(entry.sqnr_db),
            "files": [(part, report.checksums.get(part, "")) for part in names],
        })  # fmt: skip
    return found


def _parts_of(path: Path, known: dict[str, str]) -> list[str]:
    """The names of a file and of those that belong to it: the weights of an OpenVINO file lie beside it."""
    beside = path.with_suffix(".bin").name
    return [path.name, *([beside] if path.suffix == ".xml" and beside in known else [])]


# ---- layers


def _layers(report: QuantReport) -> list[dict[str, Any]]:
    """One row for each layer with weights, with what is known of it from both sides: as it ran, and beside float."""
    known = {layer.name: layer for layer in report.layers}
    macs: dict[str, int] = {}
    for row in report.coverage_layers:
        macs[row.name] = macs.get(row.name, 0) + row.macs
    reasons = {row.name: row.reason for row in report.coverage_layers if not row.int8} | report.float_layers
    total = sum(macs.values()) or 1  # an embedding multiplies nothing
    widest = max(macs.values(), default=0) or 1
    marked = {layer.name: number for number, layer in enumerate(worst_layers(report.layers), start=1)}
    rows = []
    for name in [*known, *(name for name in macs if name not in known)]:
        layer = known.get(name) or LayerReport(name=name, kind="", int8=name not in reasons)
        runs = "float" if name in reasons or layer.int8 is False else "int8"
        rows.append({
            "name": name, "kind": layer.kind, "runs": runs, "reason": reasons.get(name, ""),
            "share": shown_share(macs[name] / total) if name in macs else "",
            "width": round(100 * macs.get(name, 0) / widest, 1),
            "alone": _db(layer.alone_db), "total": _db(layer.sqnr_db), "weight": _db(layer.weight_db),
            "reads": _range(layer.reads), "clipped": shown_share(layer.reads.clipped) if layer.reads else "",
            "number": marked.get(name, ""),
        })  # fmt: skip
    return rows


def _db(value: float | None) -> str:
    return "" if value is None else "exact" if value == math.inf else f"{value:.1f}"


def _range(spread: Any) -> str:
    if spread is None or spread.clip_low is None or spread.clip_high is None:
        return ""
    return f"{spread.clip_low:.3g} to {spread.clip_high:.3g}"


def _shares(report: QuantReport) -> dict[str, str]:
    """Multiply-accumulates in int8 and in float."""
    int8 = sum(row.macs for row in report.coverage_layers if row.int8)
    floating = sum(row.macs for row in report.coverage_layers if not row.int8)
    return {"int8": shown_count(int8), "float": shown_count(floating), "width": f"{100 * report.coverage:.2f}"}


def _plots(report: QuantReport) -> dict[str, str]:
    """The SQNR of the layers, for wide screens and for phones; empty where nothing is known."""
    if not any(layer.sqnr_db is not None or layer.alone_db is not None for layer in report.layers):
        return {}
    label = "SQNR of each layer, alone and with all layers before it in int8"
    drawn = {"wide": sqnr_plot(report.layers, _WIDE), "narrow": sqnr_plot(report.layers, _NARROW)}
    return {name: _markup(as_svg(plot, f"{label} ({name})")) for name, plot in drawn.items()}


def _markup(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)  # ours: as_svg escapes what it is given


def _worst(report: QuantReport) -> list[dict[str, str]]:
    return [
        {
            "name": layer.name,
            "alone": _db(layer.alone_db),
            "weight": _db(layer.weight_db),
            "advice": _advice(layer, report),
        }
        for layer in worst_layers(report.layers)
    ]


#: Share of values beyond the range from which the range is what costs. Of a normal distribution so many are beyond 3
#: standard deviations.
_MANY_CLIPPED = 0.0027
#: Two equal errors together are so much worse than one of them: 10 * log10(2).
_HALF_DB = 3.0


def _advice(layer: LayerReport, report: QuantReport) -> str:
    """What is most likely the cause, and what can be done."""
    if layer.weight_db is not None and (layer.alone_db is None or layer.weight_db < layer.alone_db + _HALF_DB):
        return f"The rounding of its weight costs most. {_advice_on_weight(report)}"
    reads = layer.reads
    if reads is not None and reads.clipped is not None and reads.clipped > _MANY_CLIPPED:
        remedy = "Let ranges follow more batches." if report.method == "qat" else (
            "Calibrate on more data, or with activation.observer='min_max'."
        )  # fmt: skip
        return f"{shown_share(reads.clipped)} of the values that it reads are cut off. {remedy}"
    if reads is not None and reads.clip_low is not None and reads.clip_high is not None:
        step = (reads.clip_high - reads.clip_low) / 255
        remedy = "" if report.method == "qat" else " Try activation.observer='percentile'."
        return f"What it reads is rounded in steps of {step:.2g}, and most of its values are small.{remedy}"
    return "Leave it in float, and look at the metrics again."


def _advice_on_weight(report: QuantReport) -> str:
    config = report.config
    qscheme = str(config["weight"]["qscheme"])
    if qscheme.startswith("per_tensor") or (qscheme == "auto" and config["engine"] == "qnnpack"):
        return "One scale per channel helps: weight.qscheme='per_channel_symmetric'."
    if report.method == "qat":
        return "Train longer with fake quantize, or with weight.fake_quantize='learned'."
    if config.get("reduce_range"):
        return "On this CPU weights have 7 bits (reduce_range). QuantizationAwareTraining makes up for much of that."
    return "QuantizationAwareTraining makes up for much of that."


def _spreads(report: QuantReport) -> list[dict[str, Any]]:
    """The histograms that the report has, the worst layers first."""
    kept = [layer for layer in report.layers if any(s is not None and s.counts for s in (layer.reads, layer.weight))]
    found = []
    for layer in sorted(kept, key=cost_db):
        label = f"Histograms of layer {layer.name}: what it reads, and its weight"
        found.append({
            "name": layer.name, "kind": layer.kind, "alone": _db(layer.alone_db),
            "clipped": shown_share(layer.reads.clipped) if layer.reads else "", "range": _range(layer.reads),
            "svg": _markup(as_svg(spread_plot(layer), label)),
        })  # fmt: skip
    return found


# ---- what reproduces it


def _code(report: QuantReport) -> str:
    """A line that leaves the worst layers in float."""
    names = [f'"{layer.name}"' for layer in worst_layers(report.layers) if layer.int8][:_SKIPPED]
    return f"QuantConfig(skip=({', '.join(names)}{',' * (len(names) == 1)}))" if names else ""


def _settings(report: QuantReport) -> dict[str, Any]:
    if report.made_by:
        return {"yaml": as_yaml(report.made_by), "is_callback": True}
    text: str = yaml.safe_dump(_simple(report.to_dict()["config"]), sort_keys=False, width=100)
    return {"yaml": text, "is_callback": False}


def _simple(config: dict[str, Any]) -> dict[str, Sequence[Any] | Any]:
    return {name: value for name, value in config.items() if value not in (None, [], {})}
