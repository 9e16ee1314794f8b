"""TorchScript graph mode: torch's passes over a traced or scripted program place observers and int8 kernels.

What is traced is the canonical graph of :mod:`lightning_quant.backends.tracing`, in which every operator that is to
run in int8 is a module of its own, because these passes know modules by name and nothing smaller. A program that is not
ours (scripted, or traced where torch.fx cannot) is quantized by the kinds of its modules.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.jit import ScriptModule
from torch.nn import functional as F

from lightning_quant._torch_ao import (
    FusedModule,
    QConfig,
    attach_node_meta,
    convert_dynamic_jit,
    convert_jit,
    get_native_backend_config,
    prepare_dynamic_jit,
    prepare_jit,
    swap_float_functional,
)
from lightning_quant.arguments import Call, Interface
from lightning_quant.backends import islands, kernels
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
from lightning_quant.backends.scripting import TRACED, Program, script_module, trace_module, trace_program
from lightning_quant.backends.tracing import Traced, trace
from lightning_quant.config import Method, QuantConfig, resolve
from lightning_quant.errors import CalibrationError, CaptureError, ExportError
from lightning_quant.fusion import FusedGroup, fuse
from lightning_quant.qconfig import (
    CONV_TRANSPOSES,
    CONVS,
    FLOAT_BY_DESIGN,
    RNNS,
    layer_qconfig,
    qconfig_mapping,
    weight_range,
)
from lightning_quant.scripted import program_of

#: Name of a module -> its qconfig; None: it stays float. A module without an entry has that of the one it is in.
Entries = dict[str, QConfig | None]

_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVS, *CONV_TRANSPOSES)


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


class _QConfigs:
    """The qconfigs of one program.

    Torch.ao compiles an observer for each entry, and refuses a value that two entries observe with different objects:
    here they all have the same one.
    """

    def __init__(self, config: QuantConfig, method: Method) -> None:
        self.config = config
        self.method = method
        self._shared: dict[Any, ScriptModule] = {}

    def of(self, kind: type[nn.Module], *, narrow: bool = False) -> QConfig:
        """That of one more layer of this type; of any other operator, that of a linear layer."""
        if self.method == "dynamic":
            made: Any = qconfig_mapping(self.config, "dynamic").object_type_qconfigs[nn.Linear]
        else:
            config = replace(self.config, reduce_range=True) if narrow else self.config
            made = layer_qconfig(config, self.method, kind)
        activation = self._compiled("activation", made.activation)
        # Modules with one qconfig share a type, to which torch.ao adds observers. Those that are never called would not
        # get any, and be read beyond their end.
        weight = copy.deepcopy(self._compiled(("weight", narrow, kind in CONV_TRANSPOSES), made.weight))
        return QConfig(activation=lambda: activation, weight=lambda: weight)

    def _compiled(self, key: Any, observer: Callable[[], nn.Module]) -> ScriptModule:
        if key not in self._shared:
            self._shared[key] = torch.jit.script(observer())
        return self._shared[key]


# ---- the canonical graph


class Operator(nn.Module):
    """One operator of a graph as a module, so that it has a name: torch.ao's passes are told what to do by name."""

    def __init__(self, target: Any, *, relu: bool = False) -> None:
        super().__init__()
        self.target = target
        self.relu = relu

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function, or the method of the first argument, and then a ReLU if there is one."""
        if isinstance(self.target, str):
            output = getattr(args[0], self.target)(*args[1:], **kwargs)
        else:
            output = self.target(*args, **kwargs)
        return F.relu(output) if self.relu else output


#: Operators of which torch has a kernel with a ReLU in it, and the ReLUs.
_WITH_RELU = (operator.add, torch.add, operator.iadd, operator.mul, torch.mul, operator.imul)
_RELUS = (nn.ReLU, F.relu, torch.relu, "relu")


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
        plan = kernels.plan(graph_module, config, weight_range(config)[1], config.skip)
        config = kernels.with_engine(config, plan)
        traced = replace(traced, float_layers=traced.float_layers | plan.float_layers)
        narrow = plan.narrow if asked.reduce_range is None else narrow
    graph_module, groups, entries = _marked(traced, _QConfigs(config, method), narrow, between)
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
        float_layers=traced.float_layers | _recurrent_reasons(graph_module, method),
    )
    return _Made(program, known, {"": None, **{f"{TRACED}.{name}": entry for name, entry in entries.items()}})


def _marked(
    traced: Traced, qconfigs: _QConfigs, narrow: frozenset[str], between: bool
) -> tuple[fx.GraphModule, tuple[FusedGroup, ...], Entries]:
    """The fused graph in which every int8 operator is a module, and the entries of these."""
    graph_module = traced.graph_module
    skip = qconfigs.config.skip
    out = {*skip, *traced.float_layers, *(name for name, origin in traced.origins.items() if origin in skip)}
    scopes = traced.scopes

    def left_out(node: fx.Node) -> bool:
        place = str(node.target) if node.op == "call_module" else scopes.get(node.name, ("",))[0]
        return any(place == name or place.startswith(name + ".") for name in out)

    groups: tuple[FusedGroup, ...] = ()
    floats: Collection[fx.Node] = ()
    able: set[Any] = set()
    if qconfigs.method != "dynamic":
        table = get_native_backend_config()
        able = {c.pattern for c in table.configs if not isinstance(c.pattern, tuple)}
        swap_float_functional(graph_module)
        attach_node_meta(graph_module)
        graph_module, groups = fuse(graph_module, table, qconfigs.method)
        floats = islands.float_nodes(graph_module, table, left_out, none=not between)
    entries: Entries = {}
    followed: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(list(graph_module.graph.nodes)):
        if node.op not in ("call_function", "call_method", "call_module") or node in followed.values():
            continue
        if node.target is islands.in_float:
            node.target = torch.positive  # gives what it is given, and no pass of torch.ao sees past it
            continue
        if left_out(node) or node in floats:
            continue
        kind = islands.kind_of(graph_module, node)
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, ScriptModule):
                entries |= _by_kind(module, qconfigs, prefix=str(node.target))
                continue
            layer = module[0] if isinstance(module, FusedModule) else module
            if isinstance(layer, _LAYERS) and (qconfigs.method != "dynamic" or type(layer) is nn.Linear):
                entries[str(node.target)] = qconfigs.of(type(layer), narrow=str(node.target) in narrow)
                continue
        if not _in(kind, able) or _in(kind, (*FLOAT_BY_DESIGN, *RNNS)):
            continue
        name = str(node.target)
        if node.op != "call_module":
            name = f"operator_{number}"
            readers = list(node.users)
            if (
                _in(kind, _WITH_RELU)
                and len(readers) == 1
                and readers[0] not in floats
                and _in(islands.kind_of(graph_module, readers[0]), _RELUS)
            ):
                followed[node] = readers[0]
            graph_module.add_submodule(name, Operator(node.target, relu=node in followed))
            node.op, node.target = "call_module", name
        entries[name] = qconfigs.of(nn.Linear)
    for node, relu in followed.items():
        relu.replace_all_uses_with(node)
        graph_module.graph.erase_node(relu)
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module, groups, entries


def _in(kind: Any, group: Collection[Any]) -> bool:
    try:
        return kind in group
    except TypeError:  # not hashable: no operator of torch
        return False


# ---- programs by the kinds of their modules

_BY_NAME: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in _LAYERS}
_RECURRENT = frozenset(kind.__name__ for kind in (*RNNS, nn.RNN))
#: Compiled code runs it as one operator, which has no int8 kernel.
_ATTENTION = "MultiheadAttention"
_FLOAT = {_ATTENTION} | _RECURRENT | {kind.__name__ for kind in FLOAT_BY_DESIGN if isinstance(kind, type)}
_NORMS = frozenset({"LayerNorm", "GroupNorm"})


def _of_modules(
    model: nn.Module, asked: QuantConfig, config: QuantConfig, method: Method, example: Call, between: bool
) -> _Made:
    scripted = config.jit == "script" or isinstance(model, ScriptModule)
    plan = kernels.Plan(config.engine, frozenset(), {})
    if method != "dynamic":
        plan = _plan_of_modules(model, config)
        config = kernels.with_engine(config, plan)
        if isinstance(model, ScriptModule) and asked.reduce_range is None:
            config = replace(config, reduce_range=config.engine != "qnnpack")
    program, interface = (script_module if scripted else trace_module)(model, example)
    prefix = "" if scripted else f"{TRACED}.module"
    root: Any = dict(program.script.named_modules())[prefix]
    _refuse_attention(root, scripted)
    entries = _by_kind(
        root,
        _QConfigs(config, method),
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
        float_layers=plan.float_layers | _recurrent_reasons(root, method),
    )
    return _Made(program, known, entries)


def _parts_of(model: nn.Module) -> tuple[str, ...]:
    if isinstance(model, ScriptModule):
        return ("script",)  # of the ScriptedChild that stands for it
    parts = (model.named_children(), model.named_parameters(recurse=False), model.named_buffers(recurse=False))
    return tuple(name for group in parts for name, _ in group)


def _by_kind(
    program: Any,
    qconfigs: _QConfigs,
    *,
    prefix: str = "",
    skip: Collection[str] = (),
    narrow: Collection[str] = (),
    between: bool = True,
    own: bool = False,
) -> Entries:
    """The entries of a program, by the types that its modules had before they were compiled.

    Args:
        program: What has these modules.
        qconfigs: What there is.
        prefix: Its name in the program that is prepared.
        skip: Names of modules in it that stay float.
        narrow: Names of layers in it whose weights have 7 bits.
        between: Let operators between the layers run in int8.
        own: We compiled it, each module to a type of its own. Else modules of one class have one type, and torch.ao
            copies each type once for each qconfig: those with the same one need children with the same ones.
    """
    dynamic = qconfigs.method == "dynamic"
    entries: Entries = {"": None} if prefix else {}
    kinds = {name: getattr(part, "original_name", "") for name, part in program.named_modules()}
    whole = [*skip, *(name for name, kind in kinds.items() if kind in _FLOAT)]
    for name, part in program.named_modules():
        full = ".".join(x for x in (prefix, name) if x)
        children = {getattr(child, "original_name", "") for child in part.children()}
        if any(not w or name == w or name.startswith(w + ".") for w in whole):
            entries[full] = None
        elif kinds[name] in _BY_NAME and (not dynamic or kinds[name] == "Linear"):
            entries[full] = qconfigs.of(_BY_NAME[kinds[name]], narrow=name in narrow)
        elif not dynamic and children and own and (not between or children & _NORMS):
            entries[full] = None  # sums that a norm reads stay float: see islands
        else:
            entries[full] = qconfigs.of(nn.Linear)  # of its functions, linear alone has a dynamic kernel
    return entries


def _plan_of_modules(model: nn.Module, config: QuantConfig) -> kernels.Plan:
    if isinstance(model, ScriptModule):
        # Its layers do not tell their settings, so that kernels cannot be asked about them. Those of fbgemm are right
        # with 7 bits, but for transposed convolutions.
        kinds = {name: getattr(part, "original_name", "") for name, part in model.named_modules()}
        transposed = {kind.__name__ for kind in CONV_TRANSPOSES}
        reason = "it was scripted before, and does not tell which int8 kernel would run it"
        floats = {name: reason for name, kind in kinds.items() if kind in transposed}
        return kernels.Plan("fbgemm" if config.engine == "x86" else config.engine, frozenset(), floats)
    return kernels.plan_modules(model, config, weight_range(config)[1], config.skip)


def _refuse_attention(program: Any, scripted: bool) -> None:
    kinds = {name: getattr(part, "original_name", "") for name, part in program.named_modules()}
    for name, kind in kinds.items():
        if kind == _ATTENTION and scripted:
            raise CaptureError(
                f"{name or 'it'} is a scripted {_ATTENTION}, on which torch's TorchScript graph mode ends the process. "
                "Use jit='trace', or backend='fx'"
            )


def _recurrent_reasons(model: Any, method: Method) -> dict[str, str]:
    """Why the recurrent layers of a module or a program stay float."""
    reason = (
        "TorchScript graph mode quantizes Linear only dynamically; use backend='fx' or 'eager'"
        if method == "dynamic"
        else "TorchScript graph mode has no int8 kernel for recurrent layers; use backend='fx' or 'eager'"
    )
    kinds = {name: getattr(part, "original_name", type(part).__name__) for name, part in model.named_modules()}
    return {name: reason for name, kind in kinds.items() if kind in _RECURRENT}


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


__all__ = ["Interface", "check", "convert", "prepare", "reference"]
