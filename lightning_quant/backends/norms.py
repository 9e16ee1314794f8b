"""Where a prepared graph multiplies each channel of an activation by a stored number: the affine of a normalization."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_quant.backends.constants import value_of
from lightning_quant.backends.graph import info
from lightning_quant.backends.stored_weights import stored

_ATEN = torch.ops.aten
#: Operator of an exported graph -> positions of what its channels are multiplied by, and of what is added.
_OPERATORS: dict[Any, tuple[int, ...]] = {_ATEN.layer_norm.default: (2, 3), _ATEN.rms_norm.default: (2,)}
#: A product with a stored vector: an RMS norm that a model writes out ends in one.
_PRODUCTS = (operator.mul, torch.mul, _ATEN.mul.Tensor)


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm with an affine, or a product with a stored vector. Channels are the last dimension.

    Attributes:
        graph_module: That has it.
        node: Name of the node that gives the result.
        channels: How many.
        module: Name of the module with ``weight`` and ``bias``; ``""``: they are read from ``tensors``.
        tensors: Names of the nodes that give the stored vectors.
    """

    graph_module: fx.GraphModule
    node: str
    channels: int
    module: str = ""
    tensors: tuple[str, ...] = ()

    def vectors(self) -> tuple[torch.Tensor, ...]:
        """What it multiplies by, and what it adds; not to be changed in place."""
        if self.module:
            return tuple(value.detach() for value in self._of_module().values())
        nodes = {node.name: node for node in self.graph_module.graph.nodes}
        return tuple(value_of(self.graph_module, nodes[name]).detach() for name in self.tensors)

    def set_vectors(self, vectors: Sequence[torch.Tensor]) -> None:
        """Store others, in the order of :meth:`vectors`."""
        if self.module:
            for name, vector in zip(self._of_module(), vectors, strict=True):
                # another object: a copy of the graph may share the one that is there
                part: Any = nn.Parameter(vector.clone(), requires_grad=False)
                setattr(self.graph_module.get_submodule(self.module), name, part)
            return
        nodes = {node.name: node for node in self.graph_module.graph.nodes}
        for name, vector in zip(self.tensors, vectors, strict=True):
            node = nodes[name]
            target = stored(self.graph_module, str(node.target), self.node, name, vector)
            if len(node.users) == 1:
                node.target = target
                continue
            with self.graph_module.graph.inserting_before(node):
                own = self.graph_module.graph.get_attr(target)
            own.meta.update(node.meta)
            nodes[self.node].replace_input_with(node, own)
        self.graph_module.recompile()

    def scale_outputs(self, factor: torch.Tensor) -> None:
        """Multiply what it gives: ``factor`` is ``(channels,)``."""
        self.set_vectors([_times(vector, factor) for vector in self.vectors()])

    def _of_module(self) -> dict[str, torch.Tensor]:
        module = self.graph_module.get_submodule(self.module)
        found = {name: getattr(module, name, None) for name in ("weight", "bias")}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _times(value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (value.detach().double() * factor.to(value.device)).to(value.dtype)


def norms(graph_module: fx.GraphModule) -> tuple[Norm, ...]:
    """Those of a graph that run once, in the order in which they run."""
    nodes = list(graph_module.graph.nodes)
    calls = [str(node.target) for node in nodes if node.op == "call_module"]
    kept = info(graph_module).kept
    found = []
    for node in nodes:
        if node.op == "call_module" and str(node.target) not in kept and calls.count(str(node.target)) == 1:
            module: Any = graph_module.get_submodule(str(node.target))
            weight = module.weight if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else None
            if weight is not None and weight.dim() == 1:
                found.append(Norm(graph_module, node.name, weight.numel(), module=str(node.target)))
        elif node.op == "call_function" and (vectors := _vectors(graph_module, node)):
            channels = value_of(graph_module, vectors[0]).numel()
            found.append(Norm(graph_module, node.name, channels, tensors=tuple(x.name for x in vectors)))
    return tuple(found)


def _vectors(graph_module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """What gives the stored vectors of a node; none, where one of them is something else."""
    if node.target in _OPERATORS:
        given = [node.args[at] for at in _OPERATORS[node.target] if len(node.args) > at]
        given = [x for x in given if x is not None]
    elif node.target in _PRODUCTS:
        given = [x for x in node.args if isinstance(x, fx.Node) and x.op == "get_attr"]
        given = given if len(given) == 1 else []
    else:
        return []
    nodes = [x for x in given if isinstance(x, fx.Node) and x.op == "get_attr"]
    vectors = all(value_of(graph_module, x).dim() == 1 for x in nodes)
    scales = bool(nodes) and (node.target in _PRODUCTS or nodes[0] is node.args[2])
    return nodes if vectors and scales and len(nodes) == len(given) else []
