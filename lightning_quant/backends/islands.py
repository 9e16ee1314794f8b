"""Which operators between the layers with weights run in int8, and which in float.

A layer with weights takes its inputs in int8. What stands between two of them may do so too: it saves a pass over
memory, and costs one more rounding. It pays where the data is in int8 anyhow, before and after. A residual stream that
a layer norm reads, the gate of a GELU, the sum of a float and an int8 value stay float: there the rounding saves
nothing, and adds up from block to block.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant._torch_ao import BackendConfig, FusedModule
from lightning_quant.qconfig import (
    CONV_FUNCTIONS,
    CONV_TRANSPOSE_FUNCTIONS,
    CONV_TRANSPOSES,
    CONVS,
    FLOAT_BY_DESIGN,
    RNNS,
)

_WEIGHTED_FUNCTIONS = (F.linear, *CONV_FUNCTIONS, *CONV_TRANSPOSE_FUNCTIONS)

#: They ask for a size, not for values.
_NEUTRAL = (getattr, "size", "dim", "numel", len, "stride", "ndimension", "is_contiguous", "get_device")

#: They give the values that they take, somewhere else: no rounding.
_VIEWS = (
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk,
    torch.split, torch.narrow, torch.stack, torch.repeat_interleave, torch.movedim, torch.clone, operator.getitem,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.pad, F.dropout, F.relu, F.pixel_shuffle, F.pixel_unshuffle,
    F.channel_shuffle, torch.relu, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
    "flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "narrow", "contiguous",
    "view", "expand", "expand_as", "repeat", "repeat_interleave", "movedim", "clone", "detach", "detach_", "relu",
    "relu_", "squeeze_", "unsqueeze_", "resize_", "shape",
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.ReLU, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle,
)  # fmt: skip


_MEANS = (torch.mean, "mean")
_ADAPTIVE = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d,
)  # fmt: skip

#: They change what they are given, draw numbers, or have a kernel of their own.
_NOT_TWICE = (
    F.relu, torch.relu, nn.ReLU, "relu", "relu_", "detach_", "squeeze_", "unsqueeze_", "resize_", F.dropout,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip


def kind_of(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """The type of the module that ``node`` calls, or the function, or the name of the method."""
    return type(graph_module.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def asks_for_size(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` reads what a tensor is, and none of its values."""
    return node.op != "output" and _in(kind_of(graph_module, node), _NEUTRAL)


def moves(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` gives the values that it takes."""
    return _in(kind_of(graph_module, node), _VIEWS)


def is_weighted(kind: Any) -> bool:
    """Whether ``kind`` is a linear or (transposed) convolution layer, fused or not, or the function of one."""
    if kind in _WEIGHTED_FUNCTIONS:
        return True
    layers: Any = (nn.Linear, *CONVS, *CONV_TRANSPOSES, FusedModule)
    return isinstance(kind, type) and issubclass(kind, layers)


def float_nodes(
    graph_module: fx.GraphModule,
    config: BackendConfig,
    stays_float: Callable[[fx.Node], bool],
    *,
    none: bool = False,
) -> list[fx.Node]:
    """The nodes that have an int8 kernel and are better left in float.

    Args:
        graph_module: Fused, before observers are placed. Changed: what moves data to readers of both kinds is doubled,
            and :func:`in_float` stands between float operators and int8 readers.
        config: The operators that have int8 kernels.
        stays_float: Whether a layer with weights was left in float by the user.
        none: All of them.
    """
    patterns = {c.pattern for c in config.configs if not isinstance(c.pattern, tuple)}

    def able(node: fx.Node) -> bool:
        return _in(kind_of(graph_module, node), patterns)

    found, int8 = divide(graph_module, able, stays_float, none=none)
    for node in list(graph_module.graph.nodes):
        if node.op in ("call_function", "call_method", "call_module") and node not in int8 and able(node):
            _set_apart(graph_module, node, int8)
    return found


def divide(
    graph_module: fx.GraphModule,
    able: Callable[[fx.Node], bool],
    stays_float: Callable[[fx.Node], bool],
    *,
    none: bool = False,
) -> tuple[list[fx.Node], set[fx.Node]]:
    """The nodes that could run in int8 and are better left in float, and those that run in int8.

    Args:
        graph_module: Fused, before observers are placed. Changed: what moves data to readers of both kinds is doubled.
        able: Whether there is an int8 kernel for what a node calls.
        stays_float: Whether a layer with weights was left in float by the user.
        none: Nothing but layers with weights runs in int8.
    """
    found, int8 = _decide(graph_module, able, stays_float, none)
    # a twin has int8 readers alone, so that the next round finds it in int8 and gives it none
    while not none and any([_double(graph_module, node, int8) for node in reversed(found)]):
        found, int8 = _decide(graph_module, able, stays_float, none)
    averages = {node for node in int8 if _narrows(graph_module, node)}
    return found + [node for node in graph_module.graph.nodes if node in averages], int8 - averages


def _narrows(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether ``node`` averages all there is of a channel, and nothing else reads what it averages.

    Such averages are in a small part of the range of the values, and torch's int8 kernels leave them in all of it. In
    float, between a dequantize and a quantize, they have a range of their own: at the end of a network, where they are
    few. What is read by something else, too, is the large input of a gate, which has to be dequantized for that alone.
    """
    kind = kind_of(graph_module, node)
    given = node.args[1] if len(node.args) > 1 else None
    if _in(kind, _MEANS):
        narrows = node.kwargs.get("dim", given) is not None
    elif _in(kind, _ADAPTIVE):
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        size: Any = getattr(module, "output_size", node.kwargs.get("output_size", given))
        narrows = {*size} == {1} if isinstance(size, (tuple, list)) else size == 1
    else:
        return False
    readers = [user for user in node.all_input_nodes[0].users if not asks_for_size(graph_module, user)]
    return narrows and readers == [node]


def _double(graph_module: fx.GraphModule, node: fx.Node, int8: set[fx.Node]) -> bool:
    """Give the int8 readers of a float ``node`` that moves data a twin of it. Says whether there were any."""
    kind = kind_of(graph_module, node)
    readers = [user for user in node.users if user in int8]
    if not readers or not _in(kind, _VIEWS) or _in(kind, _NOT_TWICE):
        return False
    with graph_module.graph.inserting_after(node):
        twin = graph_module.graph.node_copy(node)
    twin.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, twin)
    return True


def in_float(x: Any) -> Any:
    """``x``. Torch.ao takes all between dequantize and quantize into int8, asked or not, but does not see past this."""
    return x


def _set_apart(graph_module: fx.GraphModule, node: fx.Node, int8: set[fx.Node]) -> None:
    """Let the int8 readers of a float ``node`` read it through :func:`in_float`."""
    readers = [user for user in node.users if user in int8]
    if not readers:
        return
    with graph_module.graph.inserting_after(node):
        apart = graph_module.graph.call_function(in_float, (node,))
    apart.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, apart)


def drop_marks(graph_module: fx.GraphModule) -> None:
    """Take :func:`in_float` out of a converted graph, where it has done its work."""
    for node in list(graph_module.graph.nodes):
        if node.target is in_float:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _decide(
    graph_module: fx.GraphModule,
    able: Callable[[fx.Node], bool],
    stays_float: Callable[[fx.Node], bool],
    none: bool,
) -> tuple[list[fx.Node], set[fx.Node]]:
    """The nodes that could run in int8 and do not, and those that do."""
    nodes = [node for node in graph_module.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    kinds = {node: kind_of(graph_module, node) for node in nodes}
    weighted = {node for node in nodes if is_weighted(kinds[node]) and not stays_float(node)}
    between = {
        node
        for node in nodes
        if node not in weighted
        and able(node)
        and not _in(kinds[node], (*FLOAT_BY_DESIGN, *RNNS))
        and not is_weighted(kinds[node])
    }
    candidates = set() if none else {node for node in between if _has_kernel(node, kinds[node])}
    while True:
        int8 = weighted | candidates
        rest = {
            node
            for node in candidates
            if _all_readers_are(node, int8, kinds) and (_in(kinds[node], _VIEWS) or _all_sources_are(node, int8, kinds))
        }
        if rest == candidates:
            return [node for node in nodes if node in between and node not in candidates], int8
        candidates = rest


def _has_kernel(node: fx.Node, kind: Any) -> bool:
    """Torch.ao's table has operators for which there are no int8 kernels, or wrong ones."""
    if node.op == "call_module" and isinstance(kind, type) and issubclass(kind, nn.PReLU):
        return False  # it multiplies in too few bits
    if node.target is not F.interpolate:
        return True
    mode = node.args[3] if len(node.args) > 3 else node.kwargs.get("mode", "nearest")
    return mode in ("nearest", "nearest-exact")


def _in(kind: Any, group: Any) -> bool:
    try:
        return kind in group
    except TypeError:  # not hashable: no operator of torch
        return False


def _all_readers_are(node: fx.Node, int8: set[fx.Node], kinds: dict[fx.Node, Any]) -> bool:
    readers = [user for user in node.users if not _in(kinds.get(user), _NEUTRAL)]
    return bool(readers) and all(user in int8 for user in readers)


def _all_sources_are(node: fx.Node, int8: set[fx.Node], kinds: dict[fx.Node, Any]) -> bool:
    """Whether all data that ``node`` reads was computed in int8, not only moved."""
    pending, seen = list(node.all_input_nodes), set()
    while pending:
        source = pending.pop()
        if source in seen or _in(kinds.get(source), _NEUTRAL):
            continue
        seen.add(source)
        if source not in int8:
            return False
        if _in(kinds.get(source), _VIEWS):
            pending += source.all_input_nodes
    return True
