"""From prepared graphs to a verified int8 model: convert -> evaluate -> export -> verify -> report.

Post-training quantization and quantization-aware training end in the same two functions, :func:`convert_module` and
:func:`deliver`.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant import evaluate as evaluation
from lightning_quant._roots import detached_modules, root_of
from lightning_quant._torch_ao import quiet
from lightning_quant.analysis.coverage import Coverage, coverage
from lightning_quant.analysis.kernels import kernels
from lightning_quant.analysis.latency import latency_ms
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.arguments import Call, Captured, Interface, Positional, signature_of
from lightning_quant.backends import assemble, capture_targets, convert_graph, inner_first, prepare_target
from lightning_quant.backends.graph import engine, info, put
from lightning_quant.backends.tracing import LAYER, trace_around
from lightning_quant.capture import Capture, record_calls
from lightning_quant.config import ExportConfig, FormatName, Method, QuantConfig, resolve_formats
from lightning_quant.errors import CaptureError, CoverageError, ExportError
from lightning_quant.evaluate import ValidationData, copy_of, evaluate
from lightning_quant.exporters import (
    Artifact,
    Facts,
    Program,
    check_exportable,
    files_of,
    one_config,
    qdq,
    smaller,
    write,
)
from lightning_quant.exporters.torchscript import freeze
from lightning_quant.inputs import Sample, recorded_forward
from lightning_quant.placement import Observed, ToFile, ToGraph, divert, graft, plain_train
from lightning_quant.ranks import merge_ranks
from lightning_quant.report import FormatReport, QuantReport
from lightning_quant.runtime import load
from lightning_quant.structures import shape_of
from lightning_quant.team import ALONE, Team

log = logging.getLogger(__name__)

Graphs = dict[str, nn.Module]


def capture(module: Any, sample: Sample, config: QuantConfig, method: Method) -> Capture:
    """The targets of a LightningModule: its children, or its own forward where layers sit directly on it.

    Raises:
        CaptureError: Nothing that can be quantized was found.
        ConfigError: A pattern matches nothing.
    """
    return capture_targets(module, sample.recordings, config, method, prefer_children=True)


def prepare_graphs(module: nn.Module, captured: Capture, config: QuantConfig, method: Method) -> Graphs:
    """Target name -> prepared graph."""
    return {t.name: prepare_target(module, captured, t.name, config, method) for t in captured.targets}


def calibrate(
    module: Any, graphs: Graphs, data: ValidationData, *, batches: int | None = None, progress: bool = True
) -> dict[str, float]:
    """Run the validation loop once on a copy: observers see the data, and the metrics are those of the float module.

    Of several processes (``data.team``), each shows its share to its observers, which then become those of all data.

    Args:
        module: The float LightningModule. Not changed.
        graphs: Prepared for ``static``. Their observers move.
        data: The validation batches.
        batches: How many are observed, of each process; None: all.
        progress: Show a progress bar.
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


@dataclass(frozen=True)
class Quantized:
    """An int8 model and what it was made from.

    Attributes:
        module: A copy of the LightningModule with int8 in the place of its targets; CPU, eval.
        converted: Target name -> int8 graph.
        prepared: Target name -> the graph that it was converted from.
        float_module: The float copy that it is compared with.
    """

    module: Any
    converted: Graphs
    prepared: Graphs
    float_module: Any


def convert_module(module: Any, graphs: Graphs) -> Quantized:
    """Convert each graph and put it into a copy of ``module``, from which the float layers are taken out.

    Raises:
        CalibrationError: An observer saw no data.
    """
    converted = {name: convert_graph(graph, _empty(graph)) for name, graph in graphs.items()}
    float_module = copy_of(module)
    int8 = copy_of(module)
    for name in inner_first(converted):
        graph = converted[name]
        known = info(graph)
        for kept in known.kept:
            put(graph, kept, int8.get_submodule(_join(name, kept)))
        # what is kept stays where it is as well: code outside of the graph may look into it
        replaced = tuple(part for part in known.replaced if part not in known.kept)
        graft(int8.get_submodule(name), graph, known.interface, replaced)
    plain_train(int8)
    return Quantized(int8.eval(), converted, graphs, float_module)


def _empty(graph: nn.Module) -> dict[str, nn.Module]:
    """Nothing in the places of what the graph keeps: it is put there afterwards."""
    return {name: _Vacant() for name in info(graph).kept}


class _Vacant(nn.Module):
    """The place of what a graph keeps. Not an ``nn.Identity``: torch.ao would hand int8 through it."""


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


@dataclass(frozen=True)
class _Part:
    """One file: the program that it is written from, its float twin, and how a call becomes its inputs."""

    program: Program
    float_program: nn.Module
    interface: Interface


def _parts(quantized: Quantized, sample: Sample, captured: Capture) -> list[_Part]:
    """One part for the module's own forward if a file can hold it and it reaches every target, else one per target."""
    module = quantized.float_module
    names = outermost(quantized.converted)
    call = recorded_forward(sample.recordings, module)
    if names != ("",) and call is not None and type(module).forward is not root_of(module).LightningModule.forward:
        part = _around(quantized, names, call) or _whole(quantized, call)
        if part is not None:
            return [part]
    parts: list[_Part] = []
    pending = list(names)
    while pending:
        name = pending.pop(0)
        part = _single(quantized, captured, name)
        if _is_exportable(part.program):
            parts.append(part)
        else:
            inside = {n: g for n, g in quantized.converted.items() if n != name and n.startswith(_join(name, ""))}
            pending = [*outermost(inside), *pending]
    return parts


def _is_exportable(program: Program) -> bool:
    try:
        check_exportable(program)
    except ExportError:
        return False
    return True


def outermost(graphs: Iterable[str]) -> tuple[str, ...]:
    """The targets that are not inside of another one."""
    names = list(graphs)
    return tuple(n for n in names if not any(n != other and f"{n}.".startswith(_join(other, "")) for other in names))


def _in_qdq(quantized: Quantized) -> tuple[Any, Graphs]:
    """A copy of the module with its targets in the neutral form, and those graphs."""
    module = copy_of(quantized.float_module)
    graphs: Graphs = {name: qdq(graph, _empty(graph)) for name, graph in quantized.prepared.items()}
    assemble(module, graphs, {name: info(graph) for name, graph in quantized.prepared.items()})
    return module, graphs


def _around(quantized: Quantized, names: tuple[str, ...], call: Call) -> _Part | None:
    """The module's forward as a graph that calls the graphs of the targets, if it can be traced and written so."""
    try:
        traced = trace_around(copy_of(quantized.float_module), call, names)
    except CaptureError:
        return None
    if traced.kept.keys() - set(names):
        return None
    around, interface = traced.graph_module, traced.interface

    def filled(graphs: Graphs) -> nn.Module:
        program = copy.deepcopy(around)
        for name in names:
            program.add_submodule(name, Captured(graphs[name], info(quantized.converted[name]).interface))
        return program.eval()

    program = _program(
        "",
        filled(quantized.converted),
        lambda: filled(_in_qdq(quantized)[1]),
        interface,
        call,
        quantized,
        in_float=around,
    )
    return _Part(program, around, interface) if _is_exportable(program) else None


def _whole(quantized: Quantized, call: Call) -> _Part | None:
    """The module's forward as Python runs it, if a file can hold that."""
    try:
        interface = Interface.of(signature_of(quantized.float_module), call)
    except CaptureError:
        return None
    output = None

    def run(twin: nn.Module) -> None:
        nonlocal output
        output = twin(*call.args, **call.keywords)

    reached = record_calls(copy_of(quantized.float_module), run)
    if not reached.keys() >= set(quantized.converted):
        return None
    interface = interface.returning(shape_of(output))
    in_float = Positional(quantized.float_module, interface)
    program = _program(
        "",
        Positional(quantized.module, interface),
        lambda: Positional(_in_qdq(quantized)[0], interface),
        interface,
        call,
        quantized,
        opaque=True,
        in_float=in_float,
    )
    return _Part(program, in_float, interface) if _is_exportable(program) else None


def _single(quantized: Quantized, captured: Capture, name: str) -> _Part:
    graph = quantized.converted[name]
    known = info(graph)
    target = next(t for t in captured.targets if t.name == name)
    call = target.call
    if name:
        float_program: nn.Module = Positional(quantized.float_module.get_submodule(name), known.interface)
    else:  # a LightningModule cannot be traced by torch.jit, its graph can
        float_program = trace_around(copy_of(quantized.float_module), call, tuple(known.kept)).graph_module
    program = _program(
        name,
        graph,
        lambda: _in_qdq(quantized)[1][name],
        known.interface,
        call,
        quantized,
        opaque=bool(known.kept),
        in_float=float_program,
    )
    program = replace(program, free_dims=target.free_dims)
    return _Part(program, float_program, known.interface)


def _program(
    name: str,
    converted: nn.Module,
    in_qdq: Callable[[], nn.Module],
    interface: Interface,
    call: Call,
    quantized: Quantized,
    *,
    in_float: nn.Module,
    opaque: bool = False,
) -> Program:
    infos = [info(graph) for graph in quantized.converted.values()]
    inside = any(known.kept for known in infos)
    return Program(
        name,
        converted,
        in_qdq,
        interface.flatten(call.args, call.keywords),
        interface,
        one_config(infos),
        infos[0].method,
        opaque=opaque or (inside and not name),
        in_float=in_float,
    )


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
    run: str = "",
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
        run: Who asks for it, for the report.

    Raises:
        ExportError: A file could not be written or computes something else. No file of this run is left.
        RankError: On the other ranks, where rank 0 raises.
    """
    if metrics_float is None:
        metrics_float = evaluate(copy_of(quantized.float_module), data) if data else {}
    metrics_int8 = evaluate(quantized.module, data) if data else {}
    parts = _parts(quantized, sample, captured)
    covered = _coverage(quantized, captured, sample, parts)
    written: list[_Written] = []

    def write_files() -> list[tuple[str, str, str, dict[str, bytes]]]:
        _check_coverage(covered, config)
        written.append(_write(quantized, parts, config, method, export, {"float": metrics_float, "int8": metrics_int8}))
        return [(a.format, a.target, a.path.name, _contents(a.path, team)) for a in written[0].artifacts]

    files = team.by_first(write_files)
    with tempfile.TemporaryDirectory() as folder:
        loaded = team.by_each(lambda: written[0].loaded if written else _received(files, Path(folder)))
        metrics = _metrics_of_files(quantized, parts, loaded, data)

    def report() -> QuantReport:
        found = _report(quantized, captured, parts, covered, written[0], metrics, config, method)
        found = replace(
            found,
            metrics_before=metrics_before,
            metrics_float=metrics_float,
            metrics_int8=metrics_int8,
            num_processes=team.size,
            run=run,
        )
        found.write(export.path)
        return found

    return team.by_first(report)


@dataclass(frozen=True)
class _Written:
    """What one process knows of the files: those that were written, loaded again, and timed.

    Attributes:
        artifacts: The files.
        formats: The formats that were asked for; the native one first.
        left_out: Format -> why it was not written.
        loaded: (format, target) -> the file, loaded.
        times: Milliseconds by format and target; see :func:`_times`.
    """

    artifacts: tuple[Artifact, ...]
    formats: tuple[FormatName, ...]
    left_out: dict[str, str]
    loaded: dict[tuple[str, str], Any]
    times: dict[str, float]


def _write(
    quantized: Quantized,
    parts: list[_Part],
    config: QuantConfig,
    method: Method,
    export: ExportConfig,
    metrics: dict[str, dict[str, float]],
) -> _Written:
    formats, left_out = resolve_formats(config, method, export)
    optional = formats[1:] if export.formats is None else ()
    artifacts, not_written = write(
        [part.program for part in parts],
        formats,
        export.path,
        optional,
        fastest=export.skip_slow,
        with_float=True,
        facts=Facts(metrics, class_labels(quantized.float_module)),
    )
    loaded = {(a.format, a.target): load(a.path) for a in artifacts}
    return _Written(artifacts, formats, left_out | not_written, loaded, _times(parts, artifacts, loaded))


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
    parts: list[_Part],
    covered: Coverage,
    written: _Written,
    metrics: dict[str, dict[str, float]],
    config: QuantConfig,
    method: Method,
) -> QuantReport:
    """The report, without the metrics of the models."""
    entries = _format_reports(parts, written, metrics)
    native = entries[written.formats[0]]
    resolved = parts[0].program.config
    notes = []
    if len(parts) > 1 or parts[0].program.name:
        notes.append("The module's own forward could not be captured around its targets: there is one file per target.")
    return QuantReport(
        method=method,
        config={**asdict(resolved), "targets": list(config.targets), "skip": list(config.skip)},
        targets=[name or "forward" for name in quantized.converted],
        metrics_before=None,
        metrics_float={},
        metrics_int8={},
        size_bytes_float=sum(_size_bytes(part.float_program) for part in parts),
        size_bytes_int8=native.size_bytes,
        latency_ms_float=sum(written.times[f"float/{part.program.name}"] for part in parts),
        latency_ms_int8=native.latency_ms,
        num_threads=torch.get_num_threads(),
        sqnr_db=min(_sqnr(part) for part in parts),
        coverage=covered.share,
        artifacts=_paths(written.artifacts),
        formats=entries,
        formats_left_out=written.left_out,
        kept=_kept(quantized),
        float_layers=_float_layers(quantized, captured, covered),
        fused=_fused(quantized),
        notes=notes,
    )


def _paths(artifacts: tuple[Artifact, ...]) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for artifact in artifacts:
        if artifact.target:
            paths.setdefault(artifact.format, {})[artifact.target] = artifact.path
        else:
            paths[artifact.format] = artifact.path
    return paths


def put_artifacts(module: Any, files: dict[str, Any]) -> None:
    """Let a LightningModule run reloaded files where they were taken from.

    Args:
        module: A float copy, from :func:`lightning_quant.evaluate.copy_of`. Changed in place.
        files: Target name -> (loaded file, interface); the name ``""`` is the module's own forward.
    """
    for name, (loaded, interface) in files.items():
        divert(module.get_submodule(name), ToGraph(loaded, interface, on_cpu=True))


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


def _times(parts: list[_Part], artifacts: tuple[Artifact, ...], loaded: dict[tuple[str, str], Any]) -> dict[str, float]:
    """Milliseconds of one sample: ``format/target``, ``format in float/target``, and ``float/target``."""
    calls: dict[str, Any] = {}
    for part in parts:
        name = part.program.name
        single = smaller(part.float_program, part.program.data, 1)
        frozen = freeze(part.float_program, smaller(part.float_program, part.program.data, 2))
        calls[f"float/{name}"] = lambda frozen=frozen, single=single: frozen(*single)
        for artifact in artifacts:
            if artifact.target == name:
                runner, in_float = loaded[artifact.format, name], artifact.in_float
                calls[f"{artifact.format}/{name}"] = lambda runner=runner, single=single: runner(*single)
                if in_float is not None:
                    calls[f"{artifact.format} in float/{name}"] = lambda run=in_float, single=single: run(*single)
    return latency_ms(calls)


def _metrics_of_files(
    quantized: Quantized, parts: list[_Part], loaded: dict[tuple[str, str], Any], data: ValidationData | None
) -> dict[str, dict[str, float]]:
    """Format -> the module's validation metrics with its files in place; all processes together."""
    interfaces = {part.program.name: part.interface for part in parts}
    metrics: dict[str, dict[str, float]] = {}
    for format_name in dict.fromkeys(name for name, _ in loaded):
        metrics[format_name] = {}
        if data is not None:
            twin = copy_of(quantized.float_module)
            put_artifacts(twin, {name: (loaded[format_name, name], where) for name, where in interfaces.items()})
            metrics[format_name] = evaluate(twin, data)
    return metrics


def _format_reports(
    parts: list[_Part], written: _Written, metrics: dict[str, dict[str, float]]
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
            left_float=tuple(_join(a.target, layer) for a in own for layer in a.left_float),
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


def _sqnr(part: _Part) -> float:
    with torch.no_grad(), engine(part.program.config.engine):
        return sqnr_db(part.float_program(*part.program.data), part.program.converted(*part.program.data))


def _size_bytes(module: nn.Module) -> int:
    tensors = {id(x): x for x in (*module.parameters(), *module.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _kept(quantized: Quantized) -> dict[str, str]:
    return {
        _join(name, kept): reason
        for name, graph in quantized.converted.items()
        for kept, reason in info(graph).kept.items()
    }


def _fused(quantized: Quantized) -> list[tuple[str, ...]]:
    return [
        tuple(f"{name}.{member}" if name else member for member in group.members)
        for name, graph in quantized.converted.items()
        for group in info(graph).fused
    ]


def _float_layers(quantized: Quantized, captured: Capture, covered: Coverage) -> dict[str, str]:
    """Every layer that stays float, and why.

    What runs inside of a TorchScript program runs under the name of the program. A row of that name says nothing where
    the float layers of the program are known by their own names.
    """
    found = dict(captured.float_layers)
    rows = [row for row in covered.rows if row.weighted and not row.int8 and row.name not in found]
    for name, graph in quantized.converted.items():
        if any(isinstance(part, torch.jit.ScriptModule) for part in graph.modules()):
            found |= {_join(name, layer): reason for layer, reason in info(graph).float_layers.items()}
            own = [row for row in rows if row.name == (name or "forward")]
            if len(own) <= sum(_is_within(layer, name) for layer in found):
                rows = [row for row in rows if row not in own]
    return found | {row.name: row.reason for row in rows}


def _is_within(name: str, module: str) -> bool:
    return not module or name.startswith(module + ".")


def _check_coverage(covered: Coverage, config: QuantConfig) -> None:
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


def _coverage(quantized: Quantized, captured: Capture, sample: Sample, parts: list[_Part]) -> Coverage:
    """Coverage of one batch through everything that the module runs, with the names that the user knows."""
    module = copy.deepcopy(quantized.module)
    if sample.data is not None:
        batch = sample.data
        found = coverage(module, (), run=lambda: evaluate(module, batch))
    else:
        rows = [row for part in parts for row in coverage(part.program.converted, part.program.data).rows]
        found = Coverage(tuple(rows))
    places = {
        child: name
        for name, graph in quantized.converted.items()
        for child, part in quantized.module.named_modules()
        if part is graph
    }
    known = {
        _join(name, layer): reason
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
