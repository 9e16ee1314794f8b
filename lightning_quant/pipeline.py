"""From prepared graphs to a verified int8 model: convert -> evaluate -> export -> verify -> report.

Post-training quantization and quantization-aware training end in the same two functions, :func:`convert_module` and
:func:`deliver`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant import evaluate as evaluation
from lightning_quant._roots import detached_modules
from lightning_quant._torch_ao import quiet
from lightning_quant.analysis.coverage import Coverage
from lightning_quant.backends import capture_targets, prepare_target
from lightning_quant.backends.graph import info
from lightning_quant.backends.state import unchanged
from lightning_quant.capture import Capture
from lightning_quant.config import ExportConfig, Method, QuantConfig, resolve_formats
from lightning_quant.errors import ConfigError
from lightning_quant.evaluate import ValidationData, copy_of, evaluate
from lightning_quant.exporters import (
    Artifact,
    Facts,
    files_of,
    write,
)
from lightning_quant.exporters.describing import remarks_on_bits
from lightning_quant.figures import (
    Written,
    check_coverage,
    class_labels,
    covered_by,
    float_layers,
    format_reports,
    fused_groups,
    kept_parts,
    metrics_of_files,
    part_sqnr_db,
    size_bytes,
    times_of,
)
from lightning_quant.inputs import Sample
from lightning_quant.layer_reports import layer_reports
from lightning_quant.parts import Graphs, Part, Quantized, parts_of
from lightning_quant.placement import Observed, ToFile, divert
from lightning_quant.progress import SILENT, Progress
from lightning_quant.provenance import checksums, versions
from lightning_quant.ranks import merge_ranks
from lightning_quant.report import QuantReport
from lightning_quant.report_page import NO_HTML, can_write_html, write_html
from lightning_quant.runtime import load
from lightning_quant.samples import SampleCounter
from lightning_quant.team import ALONE, Team

log = logging.getLogger(__name__)


def capture(module: Any, sample: Sample, config: QuantConfig, method: Method) -> Capture:
    """The targets of a LightningModule: its children, or its own forward where layers sit directly on it.

    Raises:
        CaptureError: Nothing that can be quantized was found.
        ConfigError: A pattern matches nothing.
    """
    return capture_targets(module, sample.recordings, config, method, prefer_children=True)


def check_dtypes(module: Any, captured: Capture) -> None:
    """Refuse weights that are not float32, from which int8 kernels are made.

    Raises:
        ConfigError: A target has one.
    """
    for target in captured.targets:
        for name, parameter in module.get_submodule(target.name).named_parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                raise ConfigError(
                    f"{target.label}: {name} is {str(parameter.dtype).removeprefix('torch.')}, and int8 is made from "
                    "float32 weights. Call .float() on the module before the run."
                )


def prepare_graphs(module: nn.Module, captured: Capture, config: QuantConfig, method: Method) -> Graphs:
    """Target name -> prepared graph."""
    return {t.name: prepare_target(module, captured, t.name, config, method) for t in captured.targets}


def calibrate(
    module: Any, graphs: Graphs, data: ValidationData, *, batches: int | None = None, progress: Progress = SILENT
) -> dict[str, float]:
    """Run the validation loop once on a copy: observers see the data, and the metrics are those of the float module.

    Of several processes (``data.team``), each shows its share to its observers, which then become those of all data.

    Args:
        module: The float LightningModule. Not changed.
        graphs: Prepared for ``static``. Their observers move.
        data: The validation batches.
        batches: How many are observed, of each process; None: all.
        progress: Where a line shows the batches.
    """
    twin = copy_of(module)
    routes = []
    for name, graph in graphs.items():
        route = Observed(graph, info(graph).interface)
        routes.append(route)
        divert(twin.get_submodule(name), route)

    def stop() -> None:
        for route in routes:
            route.enabled = False

    with quiet():
        metrics = evaluation.calibrate(twin, data, stop, batches=batches, progress=progress)
    if data.team.size > 1:
        merge_ranks(nn.ModuleList(graphs.values()), data.team.group)
    return metrics


@detached_modules()
def deliver(
    quantized: Quantized,
    captured: Capture,
    sample: Sample,
    data: ValidationData | None,
    config: QuantConfig,
    method: Method,
    export: ExportConfig,
    *,
    metrics_float: dict[str, float] | None = None,
    metrics_before: dict[str, float] | None = None,
    team: Team = ALONE,
    made_by: dict[str, Any] | None = None,
    progress: Progress = SILENT,
    run: str = "",
    amend: Callable[[QuantReport], QuantReport] = lambda report: report,
) -> QuantReport:
    """Evaluate the int8 model, write and verify its files, time them, and write the report.

    Of several processes, which all have to call it with the same model, rank 0 writes, times and reports; the others
    are given its files to validate their share of the data with, and its report.

    Args:
        quantized: From :func:`convert_module`.
        captured: From :func:`capture`.
        sample: From :func:`lightning_quant.inputs.sample`.
        data: The validation batches; None: there are none, and no metrics.
        config: As the user gave it.
        method: dynamic, static or qat.
        export: Which files, and where.
        metrics_float: If they are known already.
        metrics_before: Of the module before training.
        team: The processes that take part.
        made_by: The callback, from :func:`lightning_quant.provenance.made_by`; None: none did.
        progress: Where lines show the steps.
        run: Who asks for it, for the report.
        amend: What is to be added to the report before it is written.

    Raises:
        ExportError: A file could not be written or computes something else. No file of this run is left.
        RankError: On the other ranks, where rank 0 raises.
    """
    compared = _compared(quantized, data, metrics_float, progress)
    parts = parts_of(quantized, sample, captured)
    covered = covered_by(quantized, captured, sample, parts)
    written: list[Written] = []

    def write_files() -> list[tuple[str, str, str, dict[str, bytes]]]:
        check_coverage(covered, config)
        facts = {"float": compared.metrics_float, "int8": compared.metrics_int8}
        written.append(_write(quantized, parts, config, method, export, facts, progress))
        return [(a.format, a.target, a.path.name, _contents(a.path, team)) for a in written[0].artifacts]

    files = team.by_first(write_files)
    with tempfile.TemporaryDirectory() as folder:
        loaded = team.by_each(lambda: written[0].loaded if written else _received(files, Path(folder)))
        metrics = metrics_of_files(quantized, parts, loaded, data, progress)

    def report() -> QuantReport:
        with progress.step("Comparing layers", None):
            found = _report(quantized, captured, parts, covered, written[0], metrics, config, method)
        found = replace(
            found,
            **asdict(compared),
            metrics_before=metrics_before,
            num_processes=team.size,
            made_by=made_by or {},
            run=run,
        )
        found = amend(found)
        found.write(export.path)
        if can_write_html():
            write_html(found, export.path / "report.html")
        return found

    return team.by_first(report)


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Metrics of validation, and of how many samples they are: fields of the report."""

    metrics_float: dict[str, float]
    metrics_int8: dict[str, float]
    num_samples: int | None


def _compared(
    quantized: Quantized, data: ValidationData | None, metrics_float: dict[str, float] | None, progress: Progress
) -> _Compared:
    if data is None:
        return _Compared(metrics_float=metrics_float or {}, metrics_int8={}, num_samples=None)
    if metrics_float is None:
        twin = copy_of(quantized.float_module)
        metrics_float = evaluate(twin, data, progress=progress, text="Validating float")
    counter = SampleCounter(data.root)
    with unchanged(quantized.module):
        metrics_int8 = evaluate(
            quantized.module, data, callbacks=[counter.callback], progress=progress, text="Validating int8"
        )
    return _Compared(metrics_float=metrics_float, metrics_int8=metrics_int8, num_samples=counter.of_all(data.team))


def _write(
    quantized: Quantized,
    parts: list[Part],
    config: QuantConfig,
    method: Method,
    export: ExportConfig,
    metrics: dict[str, dict[str, float]],
    progress: Progress,
) -> Written:
    formats, left_out = resolve_formats(config, method, export)
    optional = formats[1:] if export.formats is None else ()
    # each is written, and then compared with its program
    with progress.step("Writing files", 2 * len(parts) * len(formats)) as advance:
        artifacts, not_written = write(
            [part.program for part in parts],
            formats,
            export.path,
            optional,
            fastest=export.batch_sizes if export.skip_slow else (),
            with_float=True,
            facts=Facts(metrics, class_labels(quantized.float_module)),
            tell=advance,
        )
    loaded = {(a.format, a.target): load(a.path) for a in artifacts}
    with progress.step("Measuring latency", None):
        times = times_of(parts, artifacts, loaded)
    return Written(artifacts, formats, left_out | not_written, loaded, times)


def _contents(path: Path, team: Team) -> dict[str, bytes]:
    """A file and those that belong to it, for other processes, which may run where its folder is not."""
    return {file.name: file.read_bytes() for file in files_of(path)} if team.size > 1 else {}


def _received(files: list[tuple[str, str, str, dict[str, bytes]]], folder: Path) -> dict[tuple[str, str], Any]:
    """(format, target) -> the file, loaded from what rank 0 has sent."""
    loaded = {}
    for format_name, target, name, contents in files:
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        loaded[format_name, target] = load(folder / name)
    return loaded


def _report(
    quantized: Quantized,
    captured: Capture,
    parts: list[Part],
    covered: Coverage,
    written: Written,
    metrics: dict[str, dict[str, float]],
    config: QuantConfig,
    method: Method,
) -> QuantReport:
    """The report, without the metrics of the models."""
    entries = format_reports(parts, written, metrics)
    native = entries[written.formats[0]]
    resolved = parts[0].program.config
    layers, unseen = layer_reports(quantized, captured)
    notes = []
    if not can_write_html():
        notes.append(NO_HTML)
    notes += remarks_on_bits(resolved, written.formats)
    notes += _corrected(quantized)
    if len(parts) > 1 or parts[0].program.name:
        notes.append("The module's own forward could not be captured around its targets: there is one file per target.")
        notes += [f"That is because of its state. {part.refused}" for part in parts[:1] if part.refused]
    return QuantReport(
        method=method,
        config={**asdict(resolved), "targets": list(config.targets), "skip": list(config.skip)},
        targets=[name or "forward" for name in quantized.converted],
        metrics_before=None,
        metrics_float={},
        metrics_int8={},
        size_bytes_float=sum(size_bytes(part.float_program) for part in parts),
        size_bytes_int8=native.size_bytes,
        latency_ms_float=sum(written.times[f"float/{part.program.name}"] for part in parts),
        latency_ms_int8=native.latency_ms,
        num_threads=torch.get_num_threads(),
        sqnr_db=min(part_sqnr_db(part) for part in parts),
        coverage=covered.share,
        artifacts=_paths(written.artifacts),
        formats=entries,
        formats_left_out=written.left_out,
        kept=kept_parts(quantized),
        float_layers=float_layers(quantized, captured, covered),
        fused=fused_groups(quantized),
        layers=layers,
        layers_unseen=unseen,
        coverage_layers=tuple(row for row in covered.rows if row.weighted),
        checksums=checksums(file for artifact in written.artifacts for file in files_of(artifact.path)),
        versions=versions(),
        notes=notes,
    )


def _corrected(quantized: Quantized) -> list[str]:
    """What corrections did to each target."""
    return [
        f"{name or 'forward'}: {one.name} changed {one.changes} {one.of}."
        for name, graph in quantized.prepared.items()
        for one in info(graph).corrected
    ]


def _paths(artifacts: tuple[Artifact, ...]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for artifact in artifacts:
        if artifact.target:
            paths.setdefault(artifact.format, {})[artifact.target] = artifact.path
        else:
            paths[artifact.format] = artifact.path
    return paths


def _native_files(report: QuantReport) -> dict[str, Any]:
    """Target name -> the file in the backend's native format, loaded; ``""``: the module's own forward."""
    files = next(iter(report.artifacts.values()))
    return {name: load(file) for name, file in files.items()} if isinstance(files, dict) else {"": load(files)}


def loaded_model(report: QuantReport) -> nn.Module:
    """The native file of a report; of several, a module that has them where the targets were."""
    files = _native_files(report)
    if "" in files:
        whole: nn.Module = files[""]
        return whole
    model = nn.Module()
    for name, loaded in files.items():
        *parents, last = name.split(".")
        place = model
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(last, loaded)
    return model.eval()


def put_files(module: nn.Module, report: QuantReport) -> None:
    """Let a LightningModule run the native files of a report in the places of its targets. Undone by ``restore``."""
    for name, loaded in _native_files(report).items():
        divert(module.get_submodule(name), ToFile(loaded))
