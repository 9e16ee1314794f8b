"""Nodes of a prepared graph that do not run, and come back before it is converted.

Conversion reads layers, activations and observers one by one. To run all of them costs passes over memory that change
nothing, or worse: an observer in front of a ReLU6 widens the range of what is behind it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant import qat_modules
from lightning_quant._torch_ao import is_fake_quantize, is_observer
from lightning_quant.fake_quantize import is_ours

_HIDDEN = "lightning_quant hidden"
_ATEN = torch.ops.aten
_RELU, _RELU6, _HARDTANH_DEFAULT = (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)

#: Functions that clamp between two arguments.
_HARDTANH = (F.hardtanh, F.hardtanh_, _ATEN.hardtanh.default, _ATEN.hardtanh_.default)
#: Functions and methods that clamp -> the range, where no argument says it.
_FUNCTIONS: dict[Any, tuple[float, float]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), _RELU),
    **dict.fromkeys((_ATEN.relu.default, _ATEN.relu_.default), _RELU),
    **dict.fromkeys((F.relu6, _ATEN.relu6.default, _ATEN.relu6_.default), _RELU6),
    **dict.fromkeys(_HARDTANH, _HARDTANH_DEFAULT),
}


@dataclass(frozen=True)
class _Hidden:
    """A node that was taken out of a graph, and where it stood. Other nodes are named: in a copy they are others.

    Attributes:
        source: Its one input.
        arguments: Those after the input.
        before: The node in front of which it stood.
        readers: Node that read it -> at which places of :func:`_inputs`.
    """

    op: str
    target: Any
    name: str
    source: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    meta: dict[str, Any]
    before: str
    readers: dict[str, tuple[int, ...]]


def hide(node: fx.Node) -> None:
    """Take ``node`` out of its graph: what reads it reads its one input instead, which is its first argument.

    The record lies in the metadata of the graph's output, which is there in all graphs and in their copies.

    Raises:
        ValueError: ``node`` has other inputs.
    """
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.all_input_nodes != [source] or source in _inputs(node)[1:]:
        raise ValueError(f"{node.format_node()} cannot be hidden: its first argument has to be its only input.")
    readers = {
        user.name: tuple(place for place, read in enumerate(_inputs(user)) if read is node) for user in node.users
    }
    hidden = _Hidden(
        op=node.op,
        target=node.target,
        name=node.name,
        source=source.name,
        arguments=tuple(node.args[1:]),
        keywords=dict(node.kwargs),
        meta=dict(node.meta),
        before=node.next.name,
        readers=readers,
    )
    output = node.graph.output_node()
    output.meta[_HIDDEN] = (*output.meta.get(_HIDDEN, ()), hidden)
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def restore(graph_module: fx.GraphModule) -> None:
    """Put back all nodes that were hidden, the last one first, so that each finds the graph that it was taken from."""
    graph = graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    for hidden in reversed(graph.output_node().meta.pop(_HIDDEN, ())):
        with graph.inserting_before(nodes[hidden.before]):
            arguments = (nodes[hidden.source], *hidden.arguments)
            node = graph.create_node(hidden.op, hidden.target, arguments, dict(hidden.keywords), hidden.name)
        node.meta.update(hidden.meta)
        nodes[hidden.name] = node
        for name, places in hidden.readers.items():
            _read(nodes[name], places, node)
    graph_module.recompile()


def hidden_between(source: fx.Node, reader: fx.Node) -> str | None:
    """What the hidden node calls that ``reader`` would read in the place of ``source``; None: there is none."""
    hidden: tuple[_Hidden, ...] = source.graph.output_node().meta.get(_HIDDEN, ())
    return next((str(one.target) for one in hidden if one.source == source.name and reader.name in one.readers), None)


def redirect(source: fx.Node, to: fx.Node, readers: Collection[fx.Node]) -> None:
    """Let ``readers`` read ``to`` where they read ``source``, also through hidden nodes, whose readers are among them.

    Args:
        source: Node of the graph.
        to: Another one, in front of what hidden nodes stood in front of.
        readers: Those that change.
    """
    output = source.graph.output_node()
    names = {reader.name for reader in readers}
    output.meta[_HIDDEN] = tuple(
        replace(one, source=to.name) if one.source == source.name and one.readers.keys() <= names else one
        for one in output.meta.get(_HIDDEN, ())
    )
    source.replace_all_uses_with(to, delete_user_cb=lambda user: user in readers)


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments of ``node``, each as often as it is read."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _read(user: fx.Node, places: tuple[int, ...], node: fx.Node) -> None:
    """Let the inputs of ``user`` at these places of :func:`_inputs` be ``node``."""
    place = itertools.count()
    user.args, user.kwargs = fx.node.map_arg(
        (user.args, user.kwargs), lambda read: node if next(place) in places else read
    )


def hide_weight_observers(prepared: fx.GraphModule, names: Collection[str]) -> None:
    """Hide the observers ``names``, which have seen the weights that they stand at: these are the same in all passes.

    Fake quantizes stay: they change what they are given.
    """
    for node in list(prepared.graph.nodes):
        if node.op != "call_module" or node.target not in names:
            continue
        if not is_fake_quantize(prepared.get_submodule(str(node.target))):
            hide(node)
    prepared.recompile()


def hide_observers(prepared: fx.GraphModule) -> None:
    """Hide the observer in front of a clamp, where the same one stands behind it; let others see what is clamped.

    Integers saturate: a layer whose result is quantized to the range behind the clamp clamps by itself. With the values
    before the clamp in the range, 8 bits would be spent on what is cut off.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    calls = Counter(id(_called(node, modules)) for node in prepared.graph.nodes)
    node: Any
    for node in list(prepared.graph.nodes):
        limits = clamp_of(node, modules)
        before: Any = None if limits is None else _called(node.args[0], modules)
        if limits is None or not is_observer(before) or len(node.args[0].users) != 1:
            continue
        if any(_called(user, modules) is before for user in node.users):
            hide(node.args[0])
        elif calls[id(before)] == 1 and len(node.args[0].args[0].users) == 1:
            _let_see_clamped(before, limits)
    prepared.recompile()


def _let_see_clamped(observer: Any, limits: tuple[float, float], *, new: bool = False) -> None:
    """``new``: what it sees is in memory of its own, which nothing else reads."""
    if is_ours(observer):
        observer.clamp = max(observer.clamp[0], limits[0]), min(observer.clamp[1], limits[1])
    elif not is_fake_quantize(observer):
        observer.register_forward_pre_hook(functools.partial(_clamped, limits, new))


def clamp_observed(graph_module: fx.GraphModule) -> None:
    """As :func:`hide_observers`, for layers whose observer is a part of them: let it see, and give, what is clamped."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    calls = Counter(id(_called(node, modules)) for node in graph_module.graph.nodes)
    node: Any
    for node in graph_module.graph.nodes:
        limits = clamp_of(node, modules)
        if limits is None or len(node.args[0].users) != 1:
            continue
        layer = _called(node.args[0], modules)
        observer: Any = getattr(layer, "activation_post_process", None)
        if is_observer(observer) and not is_fake_quantize(observer) and calls[id(layer)] == 1:
            _let_see_clamped(observer, limits, new=_has_weight(layer))


def _has_weight(layer: Any) -> bool:
    """Whether a layer, or the first of fused ones, computes: others may give what they were given."""
    first = layer[0] if isinstance(layer, nn.Sequential) else layer
    return isinstance(getattr(first, "weight", None), torch.Tensor)


def _clamped(
    limits: tuple[float, float], new: bool, observer: nn.Module, args: tuple[torch.Tensor]
) -> tuple[torch.Tensor]:
    if new and not torch.is_grad_enabled():
        return (args[0].clamp_(*limits),)  # no copy of every activation
    return (args[0].clamp(*limits),)


def count_sharing(prepared: fx.GraphModule) -> None:
    """Tell each fake quantize of ours how many tensors share it."""
    modules = dict(prepared.named_modules(remove_duplicate=False))
    calls: list[Any] = [_called(node, modules) for node in prepared.graph.nodes]
    counts = Counter(id(module) for module in calls)
    for module in calls:
        if is_ours(module):
            module.sharing.calls_per_forward = counts[id(module)]


def move_clamps(prepared: fx.GraphModule) -> None:
    """Let fake quantizes clamp while they round: hide ReLUs and their like in front of them.

    That saves a pass over memory forward and one backward, and the tensor that each of them keeps for its gradient.
    """
    modules: dict[str, Any] = dict(prepared.named_modules(remove_duplicate=False))
    calls: dict[int, list[fx.Node]] = {}
    node: Any  # arguments of nodes have no type
    for node in prepared.graph.nodes:
        calls.setdefault(id(_called(node, modules)), []).append(node)
    for node in list(prepared.graph.nodes):
        rounding: Any = _called(node, modules)
        if not is_ours(rounding) or rounding.sharing.calls_per_forward != 1:
            continue
        source: Any = node.args[0]
        if len(source.users) != 1:
            continue
        layer = _called(source, modules)
        clamp = clamp_of(source, modules)
        if isinstance(layer, qat_modules.WITH_RELU):
            if len(calls[id(layer)]) == 1:
                layer.clamps = False
                rounding.clamp = (0.0, math.inf)
        # what changes its input in place is seen by all that read it
        elif clamp is not None and len(source.args[0].users) == 1:
            rounding.clamp = clamp
            hide(source)
    prepared.recompile()


def move_relus(prepared: nn.Module) -> None:
    """As :func:`move_clamps`, for layers whose fake quantize is a part of them that is called by a hook."""
    for layer in prepared.modules():
        rounding: Any = getattr(layer, "activation_post_process", None)
        if isinstance(layer, qat_modules.WITH_RELU) and is_ours(rounding):
            layer.clamps = False
            rounding.clamp = (0.0, math.inf)


def _called(node: Any, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def clamp_of(node: Any, modules: dict[str, nn.Module]) -> tuple[float, float] | None:
    """``(least, most)`` of a node that clamps its one input; None for any other."""
    if len(node.all_input_nodes) != 1 or not isinstance(node.args[0] if node.args else None, fx.Node):
        return None
    module: Any = _called(node, modules)
    if type(module) is nn.ReLU:
        return 0.0, math.inf
    if type(module) in (nn.ReLU6, nn.Hardtanh):
        return float(module.min_val), float(module.max_val)
    if node.op in ("call_function", "call_method") and node.target in _FUNCTIONS:
        least, most = _FUNCTIONS[node.target]
        least = node.kwargs.get("min_val", node.args[1] if len(node.args) > 1 else least)
        most = node.kwargs.get("max_val", node.args[2] if len(node.args) > 2 else most)
        if node.target not in _HARDTANH:
            return _FUNCTIONS[node.target]
        if isinstance(least, (int, float)) and isinstance(most, (int, float)):
            return float(least), float(most)
    return None
