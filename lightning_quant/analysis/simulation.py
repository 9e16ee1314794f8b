"""A prepared graph in float arithmetic, in which each layer can be quantized or float: nothing is converted again.

It is made from the reference graph of the backend, which has explicit quantize and dequantize operators. Each pair of
them becomes a ``Rounding`` that can be switched, each layer a ``SwitchedLayer`` that has its weight in float and
rounded. With everything on it computes what the reference graph computes, with everything off the float model.

Which pairs belong to a layer is said by :mod:`lightning_quant.analysis.switch_plan`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_quant._torch_ao import RECURRENT_MODULES, FusedModule
from lightning_quant.analysis.switch_plan import SwitchPlan, plan
from lightning_quant.analysis.switches import DynamicRounding, Rounding, Switched, SwitchedLayer, SwitchedWeight
from lightning_quant.backends import convert_graph, each_graph, graph_with_float_weights
from lightning_quant.backends.embeddings import Table
from lightning_quant.backends.graph import info, place_of, put, with_info
from lightning_quant.backends.int8_weight import int8_weight
from lightning_quant.backends.rewriting import Opaque
from lightning_quant.errors import CaptureError

_OPS = torch.ops.quantized_decomposed
_QUANTIZE = (_OPS.quantize_per_tensor.default, _OPS.quantize_per_tensor.tensor, _OPS.quantize_per_channel.default)
_DEQUANTIZE = (
    _OPS.dequantize_per_tensor.default, _OPS.dequantize_per_tensor.tensor, _OPS.dequantize_per_channel.default,
)  # fmt: skip
_CHOOSE = (_OPS.choose_qparams.tensor, _OPS.choose_qparams_symmetric.tensor)
_META = "lightning_quant simulation"
#: Float layers whose int8 form takes the ranges of activations at run time.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class SimulatedLayer:
    """A layer that can be quantized alone.

    Attributes:
        name: In the graph. A module that is called in several ways is several layers.
        skip: The submodule of the float model that ``QuantConfig(skip=...)`` would name; ``""``: there is none.
        kind: Its class, or its operator.
        nodes: Names of the nodes that compute it.
    """

    name: str
    skip: str
    kind: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Simulation:
    """What is known of a simulated graph.

    Attributes:
        layers: In the order in which they run.
        plan: Which switches (names of submodules) are on, where some of the layers are quantized.
    """

    layers: tuple[SimulatedLayer, ...]
    plan: SwitchPlan


def simulate(prepared: nn.Module) -> nn.Module:
    """A copy of what :func:`lightning_quant.prepare` gave, in eval mode on the CPU, with simulated graphs, all float.

    Args:
        prepared: Not changed. Its observers have seen data.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        CalibrationError: An observer saw no data.
        ExportError: It was prepared by ``backend="torchscript"``, whose graphs have no float arithmetic.
    """
    return each_graph(prepared, None, simulate_graph)


def simulate_graph(prepared: Any, kept: dict[str, nn.Module] | None = None) -> fx.GraphModule:
    """One prepared graph as one that can be switched; see :func:`switch`.

    Args:
        prepared: Of one target. Not changed.
        kept: What stands in the places of the modules that it keeps. Default: copies of them.
    """
    known = info(prepared)
    graph_module, floats = graph_with_float_weights(prepared, kept)
    graph_module = fx.GraphModule(graph_module, graph_module.graph)
    _switch_modules(graph_module, prepared, kept, floats)
    _switch_pairs(graph_module)
    _without_in_place(graph_module, tuple(known.kept))
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.delete_all_unused_submodules()
    graph_module.meta[_META] = _simulation(graph_module, known.origins, takes_only=known.config.backend == "pt2e")
    with_info(graph_module, known)
    for parameter in graph_module.parameters():
        parameter.requires_grad_(False)
    return graph_module.eval()


def is_simulated(module: nn.Module) -> bool:
    """Whether ``module`` is a graph that :func:`simulate_graph` gave."""
    return isinstance(module.__dict__.get("meta", {}).get(_META), Simulation)


def simulation(graph_module: nn.Module) -> Simulation:
    """What is known of a simulated graph."""
    found: Simulation = graph_module.__dict__["meta"][_META]
    return found


def switch(graph_module: nn.Module, quantized: Collection[str]) -> None:
    """Let the layers of these names run quantized, and all others in float."""
    switch_to(graph_module, switched_on(graph_module, quantized))


def switch_to(graph_module: nn.Module, on: Collection[str]) -> None:
    """Let these switches be on, and all others off."""
    for name in switches(graph_module):
        part: Any = graph_module.get_submodule(name)
        part.enabled = name in on


def switched_on(graph_module: nn.Module, quantized: Collection[str]) -> frozenset[str]:
    """The switches that are on where the layers of these names are quantized."""
    return simulation(graph_module).plan.on(quantized)


def switches(graph_module: nn.Module) -> tuple[str, ...]:
    """The names of all of them."""
    plan = simulation(graph_module).plan
    return tuple({**plan.owners, **plan.roundings})


# ---- making it


def _switch_modules(
    graph_module: fx.GraphModule, prepared: Any, kept: dict[str, nn.Module] | None, floats: dict[str, torch.Tensor]
) -> None:
    """Layers with weights, and modules that have an int8 form of their own."""
    known = info(prepared)
    names = dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    int8: Any = None
    for name in names:
        module: Any = graph_module.get_submodule(name)
        if (layer := int8_weight(module)) is not None:
            own: Any = module[0] if isinstance(module, nn.Sequential) else module
            weight = floats[name] if name in floats else own.weight
            put(graph_module, name, SwitchedLayer(layer, weight, type(own).__name__))
            continue
        before = _module_of(prepared, name)
        if before is None or name in known.kept:
            continue
        now = module
        if isinstance(before, RECURRENT) and known.method != "dynamic":  # in a neutral form they stay float
            int8 = convert_graph(prepared, kept) if int8 is None else int8
            now = int8.get_submodule(name)
        has_own = name in known.swapped or isinstance(before, Table) or isinstance(now, RECURRENT_MODULES)
        if has_own or (known.method == "dynamic" and _is_linear(before) and type(now) is not type(before)):
            put(graph_module, name, Switched(_in_float(before), now, _kind(before)))


def _in_float(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module).eval()
    if isinstance(twin, Table):
        twin.fake_quantize = False
    return twin


def _is_linear(module: nn.Module) -> bool:
    return isinstance(next(iter(module.children())) if isinstance(module, FusedModule) else module, nn.Linear)


def _kind(module: nn.Module) -> str:
    if isinstance(module, Table):
        return "EmbeddingBag" if module.reading.is_bag else "Embedding"
    if isinstance(module, Opaque):
        return _kind(module.module)
    if isinstance(module, FusedModule):
        return _kind(next(iter(module.children())))
    return type(module).__name__


def _module_of(prepared: nn.Module, name: str) -> nn.Module | None:
    try:
        return prepared.get_submodule(name)
    except AttributeError:
        return None


def _switch_pairs(graph_module: fx.GraphModule) -> None:
    graph = graph_module.graph
    constants = _constants(graph)
    number = 0
    for node in list(graph.nodes):
        if node.target not in _DEQUANTIZE:
            continue
        quantize: Any = node.args[0]
        if not isinstance(quantize, fx.Node) or quantize.target not in _QUANTIZE:
            raise CaptureError(f"{node.format_node()} dequantizes what no operator of the graph has quantized.")
        source: Any = quantize.args[0]
        if source in constants:
            floating = _value(graph_module, source)
            holder = str(source.target).rpartition(".")[0] if source.op == "get_attr" else ""
            part: nn.Module = SwitchedWeight(floating, _value(graph_module, node), holder)
            inputs: tuple[Any, ...] = ()
        else:
            part, inputs = _rounding(quantize), (source,)
        name = f"_switch_{number}"
        number += 1
        graph_module.add_submodule(name, part)
        with graph.inserting_before(node):
            switched = graph.call_module(name, inputs)
        switched.meta = dict(node.meta)
        node.replace_all_uses_with(switched)
        graph.erase_node(node)


def _rounding(quantize: fx.Node) -> nn.Module:
    arguments: Any = quantize.args  # of one operator: what they are is known
    _, scale, zero_point, low, high, _ = arguments
    if quantize.target is _OPS.quantize_per_tensor.default:
        return Rounding(float(scale), int(zero_point), int(low), int(high))
    choose: Any = scale.args[0] if isinstance(scale, fx.Node) and scale.args else None
    if not isinstance(choose, fx.Node) or choose.target not in _CHOOSE:
        raise CaptureError(f"{quantize.format_node()}: this way of rounding an activation cannot be simulated.")
    return DynamicRounding(choose.target, tuple(choose.args[1:]), (int(low), int(high)))


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are the same in every call."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and inputs and all(n in found for n in inputs)):
            found.add(node)
    return found


def _value(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "get_attr":
        value: Any = graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _value(graph_module, n))
    with torch.no_grad():
        function: Any = node.target
        return function(*args, **kwargs)


def _without_in_place(graph_module: fx.GraphModule, kept: tuple[str, ...]) -> None:
    """Activations of a copy that give a tensor of their own, so that one pass can begin where another one is."""
    for name, module in graph_module.named_modules():
        if getattr(module, "inplace", False) is True and not f"{name}.".startswith(tuple(f"{k}." for k in kept)):
            module.inplace = False
    for node in graph_module.graph.nodes:
        if node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}


# ---- which switches are a layer's


def _simulation(graph_module: fx.GraphModule, origins: dict[str, str], *, takes_only: bool) -> Simulation:
    parts: dict[fx.Node, Any] = {
        node: graph_module.get_submodule(str(node.target))
        for node in graph_module.graph.nodes
        if node.op == "call_module"
    }
    layers: dict[fx.Node, tuple[str, str, str]] = {}  # name, skip, kind
    owners: dict[str, frozenset[str]] = {}
    for node, part in parts.items():
        if isinstance(part, (SwitchedLayer, Switched)):
            name = str(node.target)
            layers[node] = (name, origins.get(name, name), part.kind)
            owners[name] = frozenset({name})
    constants = {node for node, part in parts.items() if type(part) is SwitchedWeight}
    known = constants | _constants(graph_module.graph)
    for node in constants:
        found = _readers(node, known)
        for layer in found:
            place, holder = place_of(layer), parts[node].holder
            # a function of a module on the weight of another one inside of it, as attention has it
            place = holder if holder.startswith(place) else place
            kind = str(layer.target).rpartition("aten.")[2].partition(".")[0]
            layers[layer] = (place or layer.name, place, kind)
        owners[str(node.target)] = frozenset(layers[layer][0] for layer in found)
    roundings = [node for node, part in parts.items() if isinstance(part, (Rounding, DynamicRounding))]
    names = {node: name for node, (name, _, _) in layers.items()}
    made = plan(graph_module, names, roundings, owners, takes_only=takes_only)
    return Simulation(_in_order(graph_module.graph, layers), made)


def _in_order(graph: fx.Graph, layers: dict[fx.Node, tuple[str, str, str]]) -> tuple[SimulatedLayer, ...]:
    found: dict[str, SimulatedLayer] = {}
    for node in graph.nodes:
        if node in layers:
            name, skip, kind = layers[node]
            before = found[name].nodes if name in found else ()
            found[name] = SimulatedLayer(name, skip, kind, (*before, node.name))
    return tuple(found.values())


def _readers(weight: fx.Node, constants: Collection[fx.Node]) -> set[fx.Node]:
    """The layers that read a stored weight, moved or not."""
    found: set[fx.Node] = set()
    waiting = list(weight.users)
    moved = {weight}
    while waiting:
        node = waiting.pop()
        if all(n in constants or n in moved for n in node.all_input_nodes):
            moved.add(node)
            waiting.extend(node.users)
        else:
            found.add(node)
    return found


def macs_of(weight: torch.Tensor, kind: str, given: torch.Tensor, output: Any) -> int:
    """Multiply-accumulates of one call of a layer: outputs times what each of them reads, as ``coverage`` counts."""
    if "transpose" in kind.lower():
        return given.numel() * math.prod(weight.shape[1:])
    if kind in ("mm", "matmul", "addmm"):
        return int(output.numel()) * weight.shape[-2]
    return int(output.numel()) * math.prod(weight.shape[1:])
