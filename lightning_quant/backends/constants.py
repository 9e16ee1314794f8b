"""Nodes of a graph whose values depend on parameters and buffers alone, such as standardised weights."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from lightning_quant.qconfig import CONV_FUNCTIONS, CONV_TRANSPOSE_FUNCTIONS


def _constant(graph_module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether a node depends on parameters and buffers alone."""
    if node not in known:
        if node.op == "get_attr":
            known[node] = True
        elif node.op in ("call_function", "call_method", "call_module"):
            known[node] = all(_constant(graph_module, n, known) for n in node.all_input_nodes) and (
                bool(node.all_input_nodes) or node.op == "call_module"
            )
        else:
            known[node] = False
    return known[node]


def is_constant(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node depends on parameters and buffers alone."""
    return _constant(graph_module, node, {})


def value_of(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """What a node gives that depends on parameters and buffers alone."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: value_of(graph_module, n))
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(graph_module)
    if node.op == "call_module":
        return graph_module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def is_layer(node: fx.Node) -> bool:
    """Whether a node calls a function with weights."""
    return node.op == "call_function" and node.target in (F.linear, *CONV_FUNCTIONS, *CONV_TRANSPOSE_FUNCTIONS)


def fold_weights(graph_module: fx.GraphModule, is_reader: Callable[[fx.Node], bool] = is_layer) -> None:
    """Compute what functional layers compute from parameters alone (e.g. standardised weights), and store it.

    Args:
        graph_module: Changed in place.
        is_reader: The nodes whose inputs are looked at.
    """
    known: dict[fx.Node, bool] = {}
    folded = False
    for node in list(graph_module.graph.nodes):
        if not is_reader(node):
            continue
        first = 1 if is_layer(node) else 0
        for source in [x for x in (*node.args[first:], *node.kwargs.values()) if isinstance(x, fx.Node)]:
            if source.op == "get_attr" or not _constant(graph_module, source, known):
                continue
            with torch.no_grad():
                value = value_of(graph_module, source).detach().clone()
            name = f"folded_{source.name}"
            graph_module.register_buffer(name, value)
            with graph_module.graph.inserting_before(source):
                stored = graph_module.graph.get_attr(name)
            source.replace_all_uses_with(stored)
            known[stored] = folded = True
    if folded:
        _erase_unused(graph_module, known)


def _erase_unused(graph_module: fx.GraphModule, candidates: dict[fx.Node, bool]) -> None:
    for node in reversed(list(graph_module.graph.nodes)):
        if candidates.get(node) and not node.users:
            graph_module.graph.erase_node(node)
