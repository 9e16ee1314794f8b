"""TorchScript graph mode: torch's passes over a traced or scripted program place observers and int8 kernels.

What is traced is the canonical graph of :mod:`lightning_quant.backends.tracing`, in which every operator that is to
run in int8 is a module of its own, because these passes know modules by name and nothing smaller. A program that is not
ours (scripted, or traced where torch.fx cannot) is quantized by the kinds of its modules.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.jit import ScriptModule

from lightning_quant._torch_ao import (
    convert_dynamic_jit,
    convert_jit,
    prepare_dynamic_jit,
    prepare_jit,
)
from lightning_quant.arguments import Call
from lightning_quant.backends import kernels
from lightning_quant.backends.graph import (
    CannotRun,
    Feasible,
    Prepared,
    engine,
    info,
    try_out,
    twin_of,
    unseen_error,
    with_info,
    working,
)
from lightning_quant.backends.jit_entries import (
    Entries,
    QConfigs,
    by_kind,
    marked,
    recurrent_reasons,
    refuse_attention,
    unknown_layers,
)
from lightning_quant.backends.scripting import TRACED, Program, script_module, trace_module, trace_program
from lightning_quant.backends.tracing import trace
from lightning_quant.config import Method, QuantConfig, resolve
from lightning_quant.errors import CalibrationError, CaptureError, ExportError
from lightning_quant.qconfig import (
    largest_weight,
)
from lightning_quant.scripted import program_of


def check(model: nn.Module, call: Call, method: Method, config: QuantConfig) -> Feasible:
    """Prepare, run, convert and run ``model`` once, to see that it can be done.

    Args:
        model: Not changed. It may be a ScriptModule.
        call: One call of ``model.forward``.
        method: dynamic or static.
        config: ``skip`` are names of its submodules.

    Raises:
        CaptureError: ``model`` cannot be captured as one program.
    """
    between = True
    try:
        prepared, _ = try_out(lambda: prepare(model, config, method, call), _converted, call)
    except CannotRun:
        # an operator between the layers has no kernel for what it is given
        between = False
        prepared, _ = try_out(lambda: prepare(model, config, method, call, between=False), _converted, call)
    return Feasible(info(prepared).kept, between=between)


def prepare(model: nn.Module, config: QuantConfig, method: Method, example: Call, *, between: bool = True) -> Program:
    """A TorchScript program of ``model`` with observers at its int8 tensors (static) or marks at its layers (dynamic).

    Args:
        model: Keeps its structure, buffers and mode. It may be a ScriptModule, which is taken as it is.
        config: ``skip`` are names of submodules of ``model``; ``jit`` says how the program is made.
        method: dynamic or static.
        example: One call of ``model.forward``.
        between: Let operators between the layers run in int8 where that pays.

    Raises:
        CaptureError: ``model`` cannot be traced or scripted, or a trace would keep a decision for good.
    """
    asked, config = config, resolve(config)
    model = program_of(model)
    with working(config):
        plan = _of_graph if config.jit == "trace" and not isinstance(model, ScriptModule) else _of_modules
        try:
            made = plan(_twin(model), asked, config, method, example, between)
        except _NotOneGraph:
            made = _of_modules(_twin(model), asked, config, method, example, between)
        insert = prepare_dynamic_jit if method == "dynamic" else prepare_jit
        with engine(made.known.config.engine):
            script = insert(made.program.script, made.entries)
    return with_info(_with_script(made.program, script), made.known)


def _with_script(program: Any, script: ScriptModule) -> Program:
    """``program`` with another script in it."""
    return Program(script, program.interface, program.inputs, program.output).eval()


def _twin(model: nn.Module) -> nn.Module:
    with torch.no_grad():  # else the parameters in a copy of a ScriptModule have a history
        twin = twin_of(model, share=False).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    return twin


@dataclass(frozen=True)
class _Made:
    """A float program, what is known of it, and what of it is quantized."""

    program: Program
    known: Prepared
    entries: Entries


class _NotOneGraph(CaptureError):
    """Torch.fx gives no graph of it that is complete."""


def _of_graph(
    model: nn.Module, asked: QuantConfig, config: QuantConfig, method: Method, example: Call, between: bool
) -> _Made:
    try:
        traced = trace(model, example)
    except CaptureError as error:
        raise _NotOneGraph(str(error)) from error
    graph_module = traced.graph_module
    for name, reason in traced.kept.items():
        # a layer of torch.nn that is the target itself is kept without a reason
        if reason and not isinstance(graph_module.get_submodule(name), ScriptModule):
            raise _NotOneGraph(f"{name}: {reason}")
    narrow: frozenset[str] = frozenset()
    if method != "dynamic":
        if any(isinstance(part, ScriptModule) for part in graph_module.modules()):
            config = _careful(config)
        plan = kernels.plan(graph_module, config, largest_weight(config), config.skip)
        config = kernels.with_engine(config, plan)
        traced = replace(traced, float_layers=traced.float_layers | plan.float_layers)
        narrow = plan.narrow if asked.reduce_range is None else narrow
    graph_module, groups, entries = marked(
        traced,
        QConfigs(config, method),
        narrow=narrow,
        between=between,
        cautious=asked.reduce_range is None and config.engine != "qnnpack",
    )
    try:
        program = trace_program(graph_module, traced.interface, example)
    except CaptureError as error:
        raise _NotOneGraph(str(error)) from error
    known = Prepared(
        config=config,
        method=method,
        interface=traced.interface,
        replaced=traced.replaced,
        fused=groups,
        float_layers=traced.float_layers | recurrent_reasons(graph_module, method),
    )
    return _Made(program, known, {"": None, **{f"{TRACED}.{name}": entry for name, entry in entries.items()}})


def _of_modules(
    model: nn.Module, asked: QuantConfig, config: QuantConfig, method: Method, example: Call, between: bool
) -> _Made:
    scripted = config.jit == "script" or isinstance(model, ScriptModule)
    plan = kernels.Plan(config.engine, frozenset(), {})
    if method != "dynamic":
        plan = _plan_of_modules(model, config)
        config = kernels.with_engine(config, plan)
    program, interface = (script_module if scripted else trace_module)(model, example)
    prefix = "" if scripted else f"{TRACED}.module"
    root: Any = dict(program.script.named_modules())[prefix]
    if scripted:
        refuse_attention(root)
    entries = by_kind(
        root,
        QConfigs(config, method),
        prefix=prefix,
        skip=(*config.skip, *plan.float_layers),
        narrow=plan.narrow if asked.reduce_range is None else (),
        between=between,
        own=not isinstance(model, ScriptModule),
    )
    known = Prepared(
        config=config,
        method=method,
        interface=interface,
        replaced=_parts_of(model),
        float_layers=plan.float_layers | recurrent_reasons(root, method),
    )
    return _Made(program, known, entries)


def _parts_of(model: nn.Module) -> tuple[str, ...]:
    if isinstance(model, ScriptModule):
        return ("script",)  # of the ScriptedChild that stands for it
    parts = (model.named_children(), model.named_parameters(recurse=False), model.named_buffers(recurse=False))
    return tuple(name for group in parts for name, _ in group)


def _plan_of_modules(model: nn.Module, config: QuantConfig) -> kernels.Plan:
    if isinstance(model, ScriptModule):
        careful = _careful(config)
        names = [name for name, _ in model.named_modules()] if careful.engine != "qnnpack" else ()
        return kernels.Plan(careful.engine, frozenset(names), unknown_layers(model))
    return kernels.plan_modules(model, config, largest_weight(config), config.skip)


def _careful(config: QuantConfig) -> QuantConfig:
    """``config`` with the engine whose kernels are right for layers that cannot be asked about."""
    return replace(config, engine="fbgemm") if config.engine == "x86" else config


# ---- int8


def convert(prepared: nn.Module, kept: dict[str, nn.Module] | None = None) -> Program:
    """The int8 program, with weights packed for the engine of the config. ``prepared`` is unchanged.

    With ``debug``, weights stay attributes of the program, and quantize and dequantize stand around float operators.

    Args:
        prepared: From :func:`prepare`.
        kept: Nothing is kept by this backend.

    Raises:
        CalibrationError: An observer saw no data.
    """
    # the ranges of dynamic weights are taken while they are converted
    if info(prepared).method != "dynamic" and (unseen := _unseen(prepared)):
        if len(unseen) < len(_observers(prepared)):
            raise CalibrationError(
                f"{len(unseen)} observers saw no data (the first: {unseen[0]}), others did: they stand in a branch "
                "that no calibration data took, and there are no ranges to quantize it with. Calibrate with data that "
                "takes every branch, or leave the part with the branch in float with QuantConfig(skip=...)."
            )
        raise unseen_error(unseen)
    return _converted(prepared)


def _converted(prepared: nn.Module) -> Program:
    known = info(prepared)
    twin: Any = copy.deepcopy(prepared).cpu().eval()
    finish = convert_dynamic_jit if known.method == "dynamic" else convert_jit
    with working(known.config):
        script = finish(twin.script, debug=known.config.debug)
    for part in script.modules():
        part.__dict__.pop("training", None)
        if not part._c.hasattr("training"):  # a finished program has no modes left, and Lightning asks for them
            part._c._register_attribute("training", torch._C.BoolType.get(), False)
    return with_info(_with_script(twin, script), known)


def _unseen(prepared: Any) -> list[str]:
    """The observers of a prepared program that saw no data. TorchScript keeps their buffers, not their classes."""
    return [name for name, low in _observers(prepared).items() if low.numel() == 0 or bool(torch.isinf(low).any())]


def _observers(prepared: Any) -> dict[str, torch.Tensor]:
    """Name of each observer -> the least value that it saw."""
    return {
        name: module.min_val
        for name, module in prepared.script.named_modules()
        if name.rpartition(".")[2].startswith("_observer_") and hasattr(module, "min_val")
    }


def reference(prepared: nn.Module, kept: dict[str, nn.Module] | None = None) -> fx.GraphModule:
    """There is none: torch's passes know no neutral form.

    Raises:
        ExportError: Always.
    """
    raise ExportError(
        "backend='torchscript' writes TorchScript files only: its graphs have no form that other formats are made "
        "from. Use backend='fx' or 'eager' for ONNX."
    )


def with_float_weights(
    prepared: nn.Module, kept: dict[str, nn.Module] | None = None
) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
    """There is none.

    Raises:
        ExportError: Always.
    """
    raise ExportError(
        "backend='torchscript': its graphs have no float form in which single layers could be quantized. Use "
        "backend='fx', 'eager' or 'pt2e' to see what each layer costs."
    )
