"""What files a quantized module becomes: one for its own forward, or one for each target; each as a program."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_quant._roots import root_of
from lightning_quant.arguments import Call, Captured, Interface, Positional, signature_of
from lightning_quant.backends import assemble, convert_graph, inner_first
from lightning_quant.backends.graph import info, put
from lightning_quant.backends.tracing import trace_around
from lightning_quant.capture import Capture, record_calls
from lightning_quant.errors import CaptureError, ExportError
from lightning_quant.evaluate import copy_of
from lightning_quant.exporters import (
    Program,
    StateError,
    check_exportable,
    one_config,
    qdq,
    with_explicit_state,
)
from lightning_quant.inputs import Sample, recorded_forward
from lightning_quant.placement import ToGraph, divert, graft, plain_train
from lightning_quant.structures import shape_of

Graphs = dict[str, nn.Module]


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
    converted = {name: convert_graph(graph, empty_places(graph)) for name, graph in graphs.items()}
    float_module = copy_of(module)
    int8 = copy_of(module)
    for name in inner_first(converted):
        graph = converted[name]
        known = info(graph)
        for kept in known.kept:
            put(graph, kept, int8.get_submodule(join(name, kept)))
        # what is kept stays where it is as well: code outside of the graph may look into it
        replaced = tuple(part for part in known.replaced if part not in known.kept)
        graft(int8.get_submodule(name), graph, known.interface, replaced)
    plain_train(int8)
    return Quantized(int8.eval(), converted, graphs, float_module)


def empty_places(graph: nn.Module) -> dict[str, nn.Module]:
    """Nothing in the places of what a prepared graph keeps: it is put there afterwards."""
    return {name: _Vacant() for name in info(graph).kept}


class _Vacant(nn.Module):
    """The place of what a graph keeps. Not an ``nn.Identity``: torch.ao would hand int8 through it."""


def join(name: str, child: str) -> str:
    """The name of a child of the module ``name``, where ``""`` is the model itself."""
    return f"{name}.{child}" if name else child


@dataclass(frozen=True)
class Part:
    """One file: the program that it is written from, its float twin, and how a call becomes its inputs.

    ``refused`` says of a file of one target why there is none of more, if that is because of what it would carry from
    call to call.
    """

    program: Program
    float_program: nn.Module
    interface: Interface
    refused: str = ""


def parts_of(quantized: Quantized, sample: Sample, captured: Capture) -> list[Part]:
    """One part for the module's own forward if a file can hold it and it reaches every target, else one per target."""
    module = quantized.float_module
    names = outermost(quantized.converted)
    refused = ""
    call = recorded_forward(sample.recordings, module)
    if names != ("",) and call is not None and type(module).forward is not root_of(module).LightningModule.forward:
        try:
            part = _around(quantized, names, call) or _whole(quantized, call)
        except StateError as error:
            part, refused = None, str(error)
        if part is not None:
            return [part]
    parts: list[Part] = []
    pending = list(names)
    while pending:
        name = pending.pop(0)
        try:
            part = _single(quantized, captured, name)
            check_exportable(part.program)
            parts.append(part)
        except ExportError as error:
            refused = refused or (str(error) if isinstance(error, StateError) else "")
            inside = {n: g for n, g in quantized.converted.items() if n != name and n.startswith(join(name, ""))}
            pending = [*outermost(inside), *pending]
    if refused and not parts:
        raise StateError(refused)
    return [replace(part, refused=refused) for part in parts]


def _exportable(make: Callable[[], Program], interface: Interface) -> Part | None:
    """The part of a module's own forward; None, if it is one that no file can hold.

    Raises:
        StateError: It cannot because of what it carries from call to call.
    """
    try:
        program = make()
        check_exportable(program)
    except StateError:
        raise
    except ExportError:
        return None
    return _part(program, interface)


def _part(program: Program, interface: Interface) -> Part:
    assert program.in_float is not None
    return Part(program, program.in_float, interface)


def outermost(graphs: Iterable[str]) -> tuple[str, ...]:
    """The targets that are not inside of another one."""
    names = list(graphs)
    return tuple(n for n in names if not any(n != other and f"{n}.".startswith(join(other, "")) for other in names))


def _in_qdq(quantized: Quantized) -> tuple[Any, Graphs]:
    """A copy of the module with its targets in the neutral form, and those graphs."""
    module = copy_of(quantized.float_module)
    graphs: Graphs = {name: qdq(graph, empty_places(graph)) for name, graph in quantized.prepared.items()}
    assemble(module, graphs, {name: info(graph) for name, graph in quantized.prepared.items()})
    return module, graphs


def _around(quantized: Quantized, names: tuple[str, ...], call: Call) -> Part | None:
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

    return _exportable(
        lambda: _program(
            "",
            filled(quantized.converted),
            lambda: filled(_in_qdq(quantized)[1]),
            interface,
            call,
            quantized,
            in_float=around,
        ),
        interface,
    )


def _whole(quantized: Quantized, call: Call) -> Part | None:
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
    return _exportable(
        lambda: _program(
            "",
            Positional(quantized.module, interface),
            lambda: Positional(_in_qdq(quantized)[0], interface),
            interface,
            call,
            quantized,
            opaque=True,
            in_float=Positional(quantized.float_module, interface),
        ),
        interface,
    )


def _single(quantized: Quantized, captured: Capture, name: str) -> Part:
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
    return _part(replace(program, free_dims=target.free_dims), known.interface)


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
    program = Program(
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
    return with_explicit_state(program)


def put_artifacts(module: Any, files: dict[str, Any]) -> None:
    """Let a LightningModule run reloaded files where they were taken from.

    Args:
        module: A float copy, from :func:`lightning_quant.evaluate.copy_of`. Changed in place.
        files: Target name -> (loaded file, interface); the name ``""`` is the module's own forward.
    """
    for name, (loaded, interface) in files.items():
        divert(module.get_submodule(name), ToGraph(loaded, interface, on_cpu=True))
