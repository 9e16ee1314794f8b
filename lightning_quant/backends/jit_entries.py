"""What of a TorchScript program is quantized: the qconfigs of its modules by name, as torch's passes are told.

A canonical graph gets a module for each operator that is to run in int8. A program that is not ours (scripted, or
traced where torch.fx cannot) is quantized by the kinds that its modules had.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.jit import ScriptModule
from torch.nn import functional as F

from lightning_quant._torch_ao import (
    FusedModule,
    QConfig,
    attach_node_meta,
    get_native_backend_config,
    swap_float_functional,
)
from lightning_quant._torch_ao import HistogramObserver as TorchHistogramObserver
from lightning_quant.backends import islands
from lightning_quant.backends.tracing import LAYER, Traced
from lightning_quant.config import Method, QuantConfig
from lightning_quant.errors import CaptureError, ConfigError
from lightning_quant.fusion import FusedGroup, fuse
from lightning_quant.observers import HistogramObserver
from lightning_quant.qconfig import (
    CONV_TRANSPOSES,
    CONVS,
    FLOAT_BY_DESIGN,
    RNNS,
    config_of_layer,
    layer_qconfig,
    qconfig_mapping,
)

#: Name of a module -> its qconfig; None: it stays float. A module without an entry has that of the one it is in.
Entries = dict[str, QConfig | None]

_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVS, *CONV_TRANSPOSES)


class QConfigs:
    """The qconfigs of one program.

    Torch.ao compiles an observer for each entry, and refuses a value that two entries observe with different objects:
    here they all have the same one.
    """

    def __init__(self, config: QuantConfig, method: Method) -> None:
        self.config = config
        self.method = method
        self._shared: dict[Any, ScriptModule] = {}

    def of(self, kind: type[nn.Module], *, name: str = "", narrow: bool = False) -> QConfig:
        """That of one more layer of this type, called ``name``; of any other operator, that of a linear layer."""
        config = config_of_layer(self.config, name)
        if self.method == "dynamic":
            made: Any = qconfig_mapping(config, "dynamic").object_type_qconfigs[nn.Linear]
        else:
            config = replace(config, reduce_range=True) if narrow else config
            made = layer_qconfig(config, self.method, kind)
        activation = self._compiled("activation", made.activation)
        # Modules with one qconfig share a type, to which torch.ao adds observers. Those that are never called would not
        # get any, and be read beyond their end.
        weight = copy.deepcopy(self._compiled((config.weight, narrow, kind in CONV_TRANSPOSES), made.weight))
        return QConfig(activation=lambda: activation, weight=lambda: weight)

    def _compiled(self, key: Any, observer: Callable[[], nn.Module]) -> ScriptModule:
        if key not in self._shared:
            made = observer()
            if isinstance(made, HistogramObserver):  # it calls NumPy, which cannot be compiled
                ends = {"quant_min": made.quant_min, "quant_max": made.quant_max}
                made = TorchHistogramObserver(dtype=made.dtype, qscheme=made.qscheme, **ends)
            self._shared[key] = torch.jit.script(made)
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


def marked(
    traced: Traced, qconfigs: QConfigs, *, narrow: Collection[str], between: bool, cautious: bool
) -> tuple[fx.GraphModule, tuple[FusedGroup, ...], Entries]:
    """The fused graph in which every int8 operator is a module, and the entries of these.

    Args:
        traced: Its graph is changed.
        qconfigs: What there is.
        narrow: Names of layers whose weights have 7 bits.
        between: Let operators between the layers run in int8 where that pays.
        cautious: Weights of scripted parts have 7 bits.
    """
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
                refuse_attention(module)
                prefix = f"{node.target}."
                inside = [name.removeprefix(prefix) for name in skip if name.startswith(prefix)]
                entries |= by_kind(
                    module,
                    qconfigs,
                    prefix=str(node.target),
                    skip=(*inside, *unknown_layers(module)),
                    narrow=dict(module.named_modules()) if cautious else (),
                )
                continue
            layer = module[0] if isinstance(module, FusedModule) else module
            if isinstance(layer, _LAYERS) and (qconfigs.method != "dynamic" or type(layer) is nn.Linear):
                name = str(node.target)
                settings = traced.origins.get(name, name)
                entries[name] = qconfigs.of(type(layer), name=settings, narrow=name in narrow)
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


def by_kind(
    program: Any,
    qconfigs: QConfigs,
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
            layer = (name if own else full) or LAYER
            if not own and config_of_layer(qconfigs.config, layer) is not qconfigs.config:
                raise ConfigError(
                    f"LayerConfig(name={layer!r}): it is part of a module that was scripted before, of which all "
                    "layers have one setting. Give it to QuantConfig(weight=...), or script the module with "
                    "jit='script'."
                )
            entries[full] = qconfigs.of(_BY_NAME[kinds[name]], name=layer if own else "", narrow=name in narrow)
        elif not dynamic and children and own and (not between or children & _NORMS):
            entries[full] = None  # sums that a norm reads stay float: see islands
        else:
            entries[full] = qconfigs.of(nn.Linear)  # of its functions, linear alone has a dynamic kernel
    return entries


def unknown_layers(program: nn.Module) -> dict[str, str]:
    """The layers of a ScriptModule that stay float, because kernels cannot be asked about them -> why.

    Its layers do not tell their settings. The kernels of fbgemm are right with 7 bits, but for those of transposed
    convolutions.
    """
    kinds = {name: getattr(part, "original_name", "") for name, part in program.named_modules()}
    transposed = {kind.__name__ for kind in CONV_TRANSPOSES}
    reason = "it was scripted before, and does not tell which int8 kernel would run it"
    return {name: reason for name, kind in kinds.items() if kind in transposed}


def refuse_attention(program: Any) -> None:
    """Keep a program with scripted attention from torch's pass.

    Raises:
        CaptureError: There is some: with torch 2.13 and 2.14 the pass ends the process (a segmentation fault).
    """
    kinds = {name: getattr(part, "original_name", "") for name, part in program.named_modules()}
    for name, kind in kinds.items():
        if kind == _ATTENTION:
            raise CaptureError(
                f"{name or 'it'} is a scripted {_ATTENTION}, on which torch's TorchScript graph mode ends the process. "
                "Use jit='trace', or backend='fx'"
            )


def recurrent_reasons(model: Any, method: Method) -> dict[str, str]:
    """Why the recurrent layers of a module or a program stay float."""
    reason = (
        "TorchScript graph mode quantizes Linear only dynamically; use backend='fx' or 'eager'"
        if method == "dynamic"
        else "TorchScript graph mode has no int8 kernel for recurrent layers; use backend='fx' or 'eager'"
    )
    kinds = {name: getattr(part, "original_name", type(part).__name__) for name, part in model.named_modules()}
    return {name: reason for name, kind in kinds.items() if kind in _RECURRENT}
