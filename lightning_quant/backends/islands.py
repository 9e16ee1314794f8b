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
from lightning_quant.qconfig import CONV_FUNCTIONS, CONV_TRANSPOSE_FUNCTIONS, CONV_TRANSPOSES, CONVS, FLOAT_BY_DESIGN

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


def kind_of(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """The type of the module that ``node`` calls, or the function, or the name of the method."""
    return type(graph_module.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _is_weighted(kind: Any) -> bool:
    if kind in _WEIGHTED_FUNCTIONS:
        return True
    layers: Any = (nn.Linear, *CONVS, *CONV_TRANSPOSES, FusedModule)
    return isinstance(kind, type) and issubclass(kind, layers)


def float_nodes(
    graph_module: fx.GraphModule, config: BackendConfig, stays_float: Callable[[fx.Node], bool]
) -> list[fx.Node]:
    """The nodes that have an int8 kernel and are better left in float.

    Args:
        graph_module: Fused, before observers are placed. What moves data to readers of both kinds is doubled, because
            torch.ao lowers it for one kind and forgets the other.
        config: The operators that have int8 kernels.
        stays_float: Whether a layer with weights was left in float by the user.
    """
    while True:
        found, int8 = _decide(graph_module, config, stays_float)
        if not any([_double(graph_module, node, int8) for node in reversed(found)]):
            return found


def _double(graph_module: fx.GraphModule, node: fx.Node, int8: set[fx.Node]) -> bool:
    """Give the int8 readers of a float ``node`` that moves data a twin of it. Says whether there were any."""
    if not _in(kind_of(graph_module, node), _VIEWS):
        return False
    readers = [user for user in node.users if user in int8]
    if not readers:
        return False
    with graph_module.graph.inserting_after(node):
        twin = graph_module.graph.node_copy(node)
    twin.meta = dict(node.meta)
    for reader in readers:
        reader.replace_input_with(node, twin)
    return True


def _decide(
    graph_module: fx.GraphModule, config: BackendConfig, stays_float: Callable[[fx.Node], bool]
) -> tuple[list[fx.Node], set[fx.Node]]:
    """The nodes that could run in int8 and do not, and those that do."""
    able = {c.pattern for c in config.configs if not isinstance(c.pattern, tuple)}
    nodes = [node for node in graph_module.graph.nodes if node.op in ("call_function", "call_method", "call_module")]
    kinds = {node: kind_of(graph_module, node) for node in nodes}
    weighted = {node for node in nodes if _is_weighted(kinds[node]) and not stays_float(node)}
    between = {
        node
        for node in nodes
        if node not in weighted
        and _in(kinds[node], able)
        and not _in(kinds[node], FLOAT_BY_DESIGN)
        and not _is_weighted(kinds[node])
    }
    candidates = set(between)
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
