"""Nodes of a prepared graph that do not run, and come back before it is converted.

Conversion reads layers, activations and observers one by one. To run all of them costs passes over memory that change
nothing, or worse: an observer in front of a ReLU6 widens the range of what is behind it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant import qat_modules
from lightning_quant._torch_ao import is_observer
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
    """A node with one input that was taken out of a graph."""

    op: str
    target: Any
    name: str
    arguments: tuple[Any, ...]  # after the input
    keywords: dict[str, Any]
    meta: dict[str, Any]


def hide(node: fx.Node) -> None:
    """Take ``node`` out of its graph: its one user, which has no other input, reads the input of ``node``."""
    (user,) = node.users
    (source,) = node.all_input_nodes
    meta = dict(node.meta)
    before = meta.pop(_HIDDEN, ())
    hidden = _Hidden(node.op, node.target, node.name, tuple(node.args[1:]), dict(node.kwargs), meta)
    user.meta[_HIDDEN] = (*before, hidden, *user.meta.get(_HIDDEN, ()))
    user.replace_input_with(node, source)
    node.graph.erase_node(node)


def restore(graph_module: fx.GraphModule) -> None:
    """Put back all nodes that were hidden."""
    graph = graph_module.graph
    for user in list(graph.nodes):
        chain = user.meta.pop(_HIDDEN, ())
        if not chain:
            continue
        (source,) = user.all_input_nodes
        last = source
        with graph.inserting_before(user):
            for hidden in chain:
                last = graph.create_node(
                    hidden.op, hidden.target, (last, *hidden.arguments), dict(hidden.keywords), hidden.name
                )
                last.meta.update(hidden.meta)
        user.replace_input_with(source, last)
    graph_module.recompile()


def hide_observers(prepared: fx.GraphModule) -> None:
    """Hide the observer in front of a clamp, where the same one stands behind it.

    Integers saturate: a layer whose result is quantized to the range behind the clamp clamps by itself. With the values
    before the clamp in the range, 8 bits would be spent on what is cut off.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    node: Any
    for node in list(prepared.graph.nodes):
        if _clamp_of(node, modules) is None:
            continue
        before = _called(node.args[0], modules)
        after = [_called(user, modules) for user in node.users]
        if is_observer(before) and any(module is before for module in after) and len(node.args[0].users) == 1:
            hide(node.args[0])
    prepared.recompile()


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
        clamp = _clamp_of(source, modules)
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


def _clamp_of(node: Any, modules: dict[str, nn.Module]) -> tuple[float, float] | None:
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
