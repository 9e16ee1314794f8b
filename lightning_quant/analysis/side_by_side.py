"""One graph in float and in int8 at once, node by node, so that every layer can be compared on the same data.

The graph is a reference graph: float arithmetic between quantize and dequantize operators. In float these give what
they take, and layers compute with their float weights; in int8 they round. A third value is that of a layer *alone*:
what it reads and its weight are rounded, and nothing before it is. That is what leaving the layer in float would save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from lightning_quant.backends.int8_weight import Int8Weight

_OPS = torch.ops.quantized_decomposed
QUANTIZE = (_OPS.quantize_per_tensor.default, _OPS.quantize_per_tensor.tensor, _OPS.quantize_per_channel.default)
#: Dequantizes with one scale for each channel.
PER_CHANNEL = _OPS.dequantize_per_channel.default
DEQUANTIZE = (_OPS.dequantize_per_tensor.default, _OPS.dequantize_per_tensor.tensor, PER_CHANNEL)


@dataclass(frozen=True)
class Sides:
    """The value of a node three times.

    Attributes:
        floating: In float.
        int8: With everything before it in int8.
        alone: With the nearest layer before it in int8, and all before that in float; None: nothing was rounded.
    """

    floating: Any
    int8: Any
    alone: Any = None


@dataclass(frozen=True)
class Graph:
    """What is run.

    Attributes:
        module: The graph.
        float_weights: Module of a layer -> its float weight, where ``layers`` has it with one in int8.
        layers: Module -> the same with its weight in int8.
        floating: Module -> what runs in its place in float.
        int8: Module -> what runs in its place in int8, where that takes and gives floats and has its ranges inside.
    """

    module: fx.GraphModule
    float_weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    layers: Mapping[str, Int8Weight] = field(default_factory=dict)
    floating: Mapping[str, nn.Module] = field(default_factory=dict)
    int8: Mapping[str, nn.Module] = field(default_factory=dict)


#: Called after each node with the sides of its arguments and of its value.
Watcher = Callable[[fx.Node, tuple[Any, ...], Sides], None]


def run_both(graph: Graph, data: tuple[Any, ...], watch: Watcher) -> Any:
    """Run a graph on ``data``.

    Args:
        graph: Its modules are run as they are: give copies in eval mode.
        data: By position. Not changed.
        watch: Called for each node that computes something. Values are dropped after their last use.

    Returns:
        The output in float and in int8, as :class:`Sides`.
    """
    given = [Sides(_cloned(x), _cloned(x)) for x in data]
    with torch.no_grad():
        return _Both(graph, watch).run(*given)


class _Both(fx.Interpreter):
    def __init__(self, graph: Graph, watch: Watcher) -> None:
        super().__init__(graph.module)
        self.graph_of = graph
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "placeholder":
            return self.placeholder(str(n.target), args, kwargs)
        if n.op == "get_attr":
            value = self.get_attr(str(n.target), args, kwargs)
            return Sides(value, value)
        if n.op == "output":
            return Sides(_side(args[0], "floating"), _side(args[0], "int8"))
        if n.target in QUANTIZE or n.target in DEQUANTIZE:
            result = self._rounding(n, args, kwargs)
        elif n.op == "call_module":
            result = self._module(str(n.target), args, kwargs)
        else:
            result = self._each(lambda a, k: getattr(self, n.op)(n.target, a, k), args, kwargs)
        self.watch(n, args, result)
        return result

    def _rounding(self, n: fx.Node, args: tuple[Any, ...], kwargs: Any) -> Sides:
        call: Any = n.target
        floating, int8 = args[0].floating, call(*_side(args, "int8"), **_side(kwargs, "int8"))
        if not floating.is_floating_point():  # integers that are stored
            return Sides(call(*_side(args, "floating"), **_side(kwargs, "floating")), int8)
        if n.target in QUANTIZE:  # here what is alone begins
            return Sides(floating, int8, call(*_side(args, "floating"), **_side(kwargs, "floating")))
        alone = (args[0].alone, *_side(args[1:], "floating"))
        # a copy: what reads it may change it in place
        return Sides(floating.clone(), int8, call(*alone, **_side(kwargs, "floating")))

    def _module(self, name: str, args: tuple[Any, ...], kwargs: Any) -> Sides:
        graph = self.graph_of
        if name in graph.layers:
            layer, weight = graph.layers[name], graph.float_weights[name]
            int8 = self._each(lambda a, k: layer(*a, **k), args, kwargs)
            return Sides(layer.compute(args[0].floating, weight), int8.int8, int8.alone)
        module = self.fetch_attr(name)
        in_float, in_int8 = graph.floating.get(name, module), graph.int8.get(name, module)
        alone = None  # first: what it takes from float, another side may change in place
        if name in graph.int8:
            alone = in_int8(*_cloned(_side(args, "floating")), **_cloned(_side(kwargs, "floating")))
        elif _is_rounded((args, kwargs)):
            alone = in_int8(*_side(args, "alone"), **_side(kwargs, "alone"))
        floating = in_float(*_side(args, "floating"), **_side(kwargs, "floating"))
        return Sides(floating, in_int8(*_side(args, "int8"), **_side(kwargs, "int8")), alone)

    def _each(self, call: Callable[[Any, Any], Any], args: tuple[Any, ...], kwargs: Any) -> Sides:
        """``call`` on each side. Alone first: what it takes from float, another side may change in place."""
        alone = call(_side(args, "alone"), _side(kwargs, "alone")) if _is_rounded((args, kwargs)) else None
        floating = call(_side(args, "floating"), _side(kwargs, "floating"))
        return Sides(floating, call(_side(args, "int8"), _side(kwargs, "int8")), alone)


def _map(value: Any, change: Callable[[Sides], Any]) -> Any:
    return fx.node.map_aggregate(value, lambda x: change(x) if isinstance(x, Sides) else x)


def _side(value: Any, name: str) -> Any:
    """The arguments of one side. What was not rounded is taken from float, as a copy."""
    if name == "alone":
        return _map(value, lambda x: _cloned(x.floating) if x.alone is None else x.alone)
    return _map(value, lambda x: getattr(x, name))


def _is_rounded(value: Any) -> bool:
    found: list[Sides] = []
    _map(value, found.append)
    return any(x.alone is not None for x in found)


def _cloned(value: Any) -> Any:
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value)
