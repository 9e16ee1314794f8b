"""The figures of a report: metrics, latency and sizes of files, coverage, and what stayed in float and why."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_quant.analysis.coverage import Coverage, coverage
from lightning_quant.analysis.kernels import kernels
from lightning_quant.analysis.latency import latency_ms
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.backends.graph import engine, info
from lightning_quant.backends.tracing import LAYER
from lightning_quant.capture import Capture
from lightning_quant.config import FormatName, QuantConfig
from lightning_quant.errors import CoverageError
from lightning_quant.evaluate import ValidationData, copy_of, evaluate
from lightning_quant.exporters import Artifact
from lightning_quant.exporters.torchscript import freeze
from lightning_quant.inputs import Sample
from lightning_quant.parts import Part, Quantized, join, put_artifacts
from lightning_quant.progress import SILENT, Progress
from lightning_quant.report import FormatReport
from lightning_quant.runtime import Explicit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """What one process knows of the files: those that were written, loaded again, and timed.

    Attributes:
        artifacts: The files.
        formats: The formats that were asked for; the native one first.
        left_out: Format -> why it was not written.
        loaded: (format, target) -> the file, loaded.
        times: Milliseconds by format and target; see :func:`times_of`.
    """

    artifacts: tuple[Artifact, ...]
    formats: tuple[FormatName, ...]
    left_out: dict[str, str]
    loaded: dict[tuple[str, str], Any]
    times: dict[str, float]


def times_of(
    parts: list[Part], artifacts: tuple[Artifact, ...], loaded: dict[tuple[str, str], Any]
) -> dict[str, float]:
    """Milliseconds of one sample: ``format/target``, ``format in float/target``, and ``float/target``."""
    calls: dict[str, Any] = {}
    for part in parts:
        name = part.program.name
        single = part.program.of_size(1, part.float_program)
        frozen = freeze(part.float_program, part.program.of_size(2, part.float_program))
        calls[f"float/{name}"] = lambda frozen=frozen, single=single: frozen(*single)
        for artifact in artifacts:
            if artifact.target == name:
                runner, in_float = loaded[artifact.format, name], artifact.in_float
                if part.program.state:  # each call from the beginning
                    runner = Explicit(runner)
                calls[f"{artifact.format}/{name}"] = lambda runner=runner, single=single: runner(*single)
                if in_float is not None:
                    calls[f"{artifact.format} in float/{name}"] = lambda run=in_float, single=single: run(*single)
    return latency_ms(calls)


def metrics_of_files(
    quantized: Quantized,
    parts: list[Part],
    loaded: dict[tuple[str, str], Any],
    data: ValidationData | None,
    progress: Progress = SILENT,
) -> dict[str, dict[str, float]]:
    """Format -> the module's validation metrics with its files in place; all processes together."""
    interfaces = {part.program.name: part.interface for part in parts}
    metrics: dict[str, dict[str, float]] = {}
    for format_name in dict.fromkeys(name for name, _ in loaded):
        metrics[format_name] = {}
        if data is not None:
            twin = copy_of(quantized.float_module)
            for name in interfaces:
                loaded[format_name, name].reset_state()
            put_artifacts(twin, {name: (loaded[format_name, name], where) for name, where in interfaces.items()})
            metrics[format_name] = evaluate(twin, data, progress=progress, text=f"Validating {format_name}")
            for name in interfaces:
                loaded[format_name, name].reset_state()
    return metrics


def format_reports(
    parts: list[Part], written: Written, metrics: dict[str, dict[str, float]]
) -> dict[str, FormatReport]:
    """Each format's size, latency, SQNR and metrics, all of reloaded files."""
    targets = [part.program.name for part in parts]
    times = written.times
    entries = {}
    for format_name in metrics:
        own = [a for a in written.artifacts if a.format == format_name]
        in_its_runtime = [times[key] for name in targets if (key := f"{format_name} in float/{name}") in times]
        counted = [found for a in own if (found := kernels(a.path)) is not None]
        entries[format_name] = FormatReport(
            size_bytes=sum(a.size_bytes for a in own),
            latency_ms=sum(times[f"{format_name}/{name}"] for name in targets),
            latency_ms_float=sum(in_its_runtime) if in_its_runtime else _native_float(format_name, times, targets),
            sqnr_db=min(a.sqnr_db for a in own),
            metrics=metrics[format_name],
            int8_kernels=sum(found.int8 for found in counted) if counted else None,
            float_kernels=sum(found.floating for found in counted) if counted else None,
            left_float=tuple(join(a.target, layer) for a in own for layer in a.left_float),
        )
    return entries


def _native_float(format_name: str, times: dict[str, float], targets: Iterable[str]) -> float | None:
    """The float model as frozen TorchScript, for the format whose runtime that is."""
    return sum(times[f"float/{name}"] for name in targets) if format_name == "torchscript" else None


def class_labels(module: Any) -> tuple[str, ...] | None:
    """The names of a module's classes, if it has them under one of the usual names; None: it does not."""
    values = [value for name in _LABELS if isinstance(value := getattr(module, name, None), (list, tuple, dict))]
    found = next((value for value in values if value), None)
    if found is None:
        found = getattr(getattr(module, "config", None), "id2label", None)  # transformers
    if isinstance(found, dict):
        # of one direction or the other
        pairs = [(k, v) if isinstance(k, int) else (v, k) for k, v in found.items()]
        found = [label for _, label in sorted(pairs)] if all(isinstance(k, int) for k, _ in pairs) else None
    if not isinstance(found, (list, tuple)) or not all(isinstance(label, str) for label in found):
        return None
    return tuple(found)


_LABELS = ("class_labels", "class_names", "classes", "id2label", "class_to_idx", "idx_to_class", "labels")


def part_sqnr_db(part: Part) -> float:
    """Of what a program gives in int8 against what it gives in float, on real input."""
    with torch.no_grad(), engine(part.program.config.engine):
        return sqnr_db(part.float_program(*part.program.inputs), part.program.converted(*part.program.inputs))


def size_bytes(module: nn.Module) -> int:
    """Of the Parameters and buffers, each counted once."""
    tensors = {id(x): x for x in (*module.parameters(), *module.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def kept_parts(quantized: Quantized) -> dict[str, str]:
    """Submodule that runs its own code between graphs -> why."""
    return {
        join(name, kept): reason
        for name, graph in quantized.converted.items()
        for kept, reason in info(graph).kept.items()
    }


def fused_groups(quantized: Quantized) -> list[tuple[str, ...]]:
    """Names of modules that run as one kernel."""
    return [
        tuple(f"{name}.{member}" if name else member for member in group.members)
        for name, graph in quantized.converted.items()
        for group in info(graph).fused
    ]


def float_layers(quantized: Quantized, captured: Capture, covered: Coverage) -> dict[str, str]:
    """Every layer that stays float, and why.

    What runs inside of a TorchScript program runs under the name of the program. A row of that name says nothing where
    the float layers of the program are known by their own names.
    """
    found = dict(captured.float_layers)
    rows = [row for row in covered.rows if row.weighted and not row.int8 and row.name not in found]
    for name, graph in quantized.converted.items():
        if any(isinstance(part, torch.jit.ScriptModule) for part in graph.modules()):
            found |= {join(name, layer): reason for layer, reason in info(graph).float_layers.items()}
            own = [row for row in rows if row.name == (name or "forward")]
            if len(own) <= sum(_is_within(layer, name) for layer in found):
                rows = [row for row in rows if row not in own]
    return found | {row.name: row.reason for row in rows}


def _is_within(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")


def check_coverage(covered: Coverage, config: QuantConfig) -> None:
    """Warn where little runs in int8.

    Raises:
        CoverageError: It is less than ``config.min_coverage``.
    """
    least = 0.5 if config.min_coverage is None else config.min_coverage
    weighted = [row for row in covered.rows if row.weighted]
    tables_alone = not any(row.macs for row in weighted) and any(row.int8 for row in weighted)
    if covered.share >= least or tables_alone:
        return
    missing = sorted((row for row in covered.rows if not row.int8 and row.weighted), key=lambda row: -row.macs)
    text = (
        f"{covered.share:.1%} of the multiply-accumulates of layers with weights run in int8, less than {least:.0%}. "
        f"The largest that stay float: {'; '.join(f'{row.name} ({row.reason})' for row in missing[:5])}."
    )
    if config.min_coverage is not None:
        raise CoverageError(f"{text} Lower QuantConfig(min_coverage=...), or quantize them.")
    log.warning("%s", text)


def covered_by(quantized: Quantized, captured: Capture, sample: Sample, parts: list[Part]) -> Coverage:
    """Coverage of one batch through everything that the module runs, with the names that the user knows."""
    module = copy.deepcopy(quantized.module)
    if sample.data is not None:
        batch = sample.data
        found = coverage(module, (), run=lambda: evaluate(module, batch))
    else:
        rows = [row for part in parts for row in coverage(part.program.converted, part.program.inputs).rows]
        found = Coverage(tuple(rows))
    return as_users_know_it(found, quantized, captured)


def as_users_know_it(found: Coverage, quantized: Quantized, captured: Capture) -> Coverage:
    """The rows of the int8 module, with the names that layers have in the float one, and why some stay float."""
    places = {
        child: name
        for name, graph in quantized.converted.items()
        for child, part in quantized.module.named_modules()
        if part is graph
    }
    known = {
        join(name, layer): reason
        for name, graph in quantized.converted.items()
        for layer, reason in info(graph).float_layers.items()
    }
    renamed = []
    for row in found.rows:
        name = row.name
        for place, target in places.items():
            if name == place or name.startswith(place + "."):
                inner = name[len(place) + 1 :]
                name = ".".join(x for x in (target, "" if inner == LAYER else inner) if x) or "forward"
        reason = row.reason if row.int8 else known.get(name, captured.float_layers.get(name, row.reason))
        renamed.append(replace(row, name=name, reason=reason))
    return Coverage(tuple(renamed))
