"""What int8 costs each layer: how far its output is from float, and which values its ranges cut off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from lightning_quant.analysis.histograms import Spread, sampled, spread
from lightning_quant.analysis.layer_graph import graph_of, inner_layer
from lightning_quant.analysis.side_by_side import DEQUANTIZE, PER_CHANNEL, QUANTIZE, Graph, Sides, run_both
from lightning_quant.analysis.sqnr import float_tensors, sqnr_db
from lightning_quant.backends.embeddings import Table
from lightning_quant.backends.graph import engine, info, place_of
from lightning_quant.backends.hiding import clamp_of
from lightning_quant.backends.int8_weight import Int8Weight
from lightning_quant.backends.islands import is_weighted
from lightning_quant.backends.pt2e_folding import WEIGHTED, constants_of

#: Samples of a batch that are looked at: enough for every layer to see thousands of values.
SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer with weights, on one real batch.

    Attributes:
        name: As the user knows it.
        kind: ``Conv2d``, ``Linear``, ``LSTM``; of a function, its name.
        int8: Whether it computes with integers. None: it cannot be seen.
        alone_db: SQNR of its output where what it reads and its weight are rounded, and nothing before it: what this
            layer costs by itself. None: it cannot be seen, or the layer is float.
        sqnr_db: SQNR of its output where everything before it is in int8, too. None: it cannot be seen.
        weight_db: SQNR of its weight. None: it cannot be seen, or the layer is float.
        reads: The values that it reads, and the range to which they are rounded.
        weight: The values of its weight, and the range of its integers.
    """

    name: str
    kind: str
    int8: bool | None
    alone_db: float | None = None
    sqnr_db: float | None = None
    weight_db: float | None = None
    reads: Spread | None = None
    weight: Spread | None = None


def layers_of(
    prepared: fx.GraphModule,
    converted: nn.Module,
    data: tuple[Any, ...],
    *,
    kept: Mapping[str, tuple[nn.Module, nn.Module]] | None = None,
) -> tuple[LayerReport, ...]:
    """Every layer with weights of one graph, in the order in which they run.

    Args:
        prepared: From a backend's ``prepare``, calibrated or trained. Not changed. Of ``torchscript`` nothing can be
            seen, whose graphs are programs: see :func:`float_layers_of`.
        converted: The int8 graph of it.
        data: Real input, by position.
        kept: What ``prepared`` keeps -> what runs there in float, and in int8.

    Raises:
        CalibrationError: An observer saw no data.
    """
    known = info(prepared)
    with engine(known.config.engine):
        graph = graph_of(prepared, converted, dict(kept or {}))
        watcher = _Watcher(graph, known.origins)
        run_both(graph, data, watcher)
    return tuple(_merged(watcher.found))


def float_layers_of(module: nn.Module, run: Any) -> tuple[LayerReport, ...]:
    """Every layer with weights of a float module that runs: what it reads and its weight, and nothing of int8.

    Args:
        module: A float module.
        run: Called without arguments, to run ``module`` once.
    """
    found: list[LayerReport] = []

    def look(name: str, layer: Any, args: tuple[Any, ...]) -> None:
        read = float_tensors(args[:1])
        found.append(
            LayerReport(
                name=name,
                kind=type(layer).__name__,
                int8=None,
                reads=spread(read[0]) if read else None,
                weight=_of_weights(layer),
            )
        )

    kinds = (nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag)
    handles = [
        part.register_forward_pre_hook(lambda layer, args, name=name: look(name, layer, args))
        for name, part in module.named_modules()
        if not isinstance(part, torch.jit.ScriptModule) and (is_weighted(type(part)) or isinstance(part, kinds))
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_merged(found))


# ---- what is seen of it


class _Watcher:
    """Makes a :class:`LayerReport` of each layer of a graph that runs."""

    def __init__(self, graph: Graph, origins: Mapping[str, str]) -> None:
        self.graph = graph
        self.origins = origins
        self.modules = dict(graph.module.named_modules(remove_duplicate=False))
        self.constants = constants_of(graph.module)
        self.found: list[LayerReport] = []
        #: Where the output of a layer is looked at -> its place in ``found``.
        self.ends: dict[fx.Node, list[int]] = {}

    def __call__(self, node: fx.Node, args: tuple[Any, ...], sides: Sides) -> None:
        for index in self.ends.pop(node, ()):
            self.found[index] = replace(self.found[index], sqnr_db=_sqnr(sides.floating, sides.int8))
        made = self._of_module(node, args) if node.op == "call_module" else self._of_function(node, args)
        if made is None:
            return
        if made.int8 and sides.alone is not None:
            made = replace(made, alone_db=_sqnr(sides.floating, sides.alone))
        end = _end(node, self.modules)
        if end is node:
            made = replace(made, sqnr_db=_sqnr(sides.floating, sides.int8))
        else:
            self.ends.setdefault(end, []).append(len(self.found))
        self.found.append(made)

    def _of_module(self, node: fx.Node, args: tuple[Any, ...]) -> LayerReport | None:
        name = str(node.target)
        module = self.modules[name]
        shown = self.origins.get(name, name)
        if name in self.graph.layers:
            layer, weight = self.graph.layers[name], self.graph.float_weights[name]
            rounded = layer.dequantized()
            return LayerReport(
                name=shown, kind=_shown_function(layer.function), int8=True, weight_db=_sqnr(weight, rounded),
                reads=self._of_input(node.args[0], args[0]), weight=_of_weight(weight, rounded, _step_of(layer)),
            )  # fmt: skip
        table: Any = self.graph.floating.get(name, module)
        if isinstance(table, Table):
            return LayerReport(name=shown, kind="Embedding", int8=True, weight=spread(table.weight))
        inner, int8 = inner_layer(module), self.graph.int8.get(name)
        is_recurrent = isinstance(inner, (nn.RNNBase, nn.RNNCellBase))
        if not is_recurrent and not is_weighted(type(inner)):
            return None
        read = float_tensors(_floating(args[:1]))
        made = LayerReport(
            name=shown, kind=type(inner).__name__, int8=int8 is not None,
            reads=spread(read[0]) if read else None, weight=_of_weights(inner),
        )  # fmt: skip
        if int8 is None or is_recurrent:
            return made
        packed: Any = int8
        integers = packed.weight()
        rounded, step = integers.dequantize(), _step_of_integers(integers)
        weight = inner.weight
        return replace(made, weight_db=_sqnr(weight, rounded), weight=_of_weight(weight, rounded, step))

    def _of_function(self, node: fx.Node, args: tuple[Any, ...]) -> LayerReport | None:
        places = _data_and_weight(node, self.constants)
        if places is None:
            return None
        data, weight = (args[place] for place in places)
        source: Any = node.args[places[1]]
        is_int8 = source.target in DEQUANTIZE and data.alone is not None
        name = place_of(node) if isinstance(node.target, torch._ops.OpOverload) else node.name
        made = LayerReport(
            name=name, kind=_shown_function(node.target), int8=is_int8,
            reads=self._of_input(node.args[places[0]], data), weight=spread(weight.floating),
        )  # fmt: skip
        if not is_int8:
            return made
        step = self._step_at(source, weight.int8.dim())
        seen = _of_weight(weight.floating, weight.int8, step)
        return replace(made, weight_db=_sqnr(weight.floating, weight.int8), weight=seen)

    def _of_input(self, node: Any, sides: Sides) -> Spread | None:
        """The values that a layer reads, with the range of the integers that they are rounded to, where it is fixed."""
        while node.target not in DEQUANTIZE and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        if not isinstance(sides.floating, torch.Tensor):
            return None
        numbers = [self._value(x) for x in node.args[1:5]] if node.target in DEQUANTIZE else []
        if sides.alone is None or len(numbers) < 4 or any(x is None for x in numbers):
            return spread(sides.floating)
        scale, zero_point, least, most = (float(x) for x in numbers)
        found = spread(sides.floating, sides.alone, torch.tensor(scale))
        if found is None:
            return None
        return replace(found, clip_low=(least - zero_point) * scale, clip_high=(most - zero_point) * scale)

    def _step_at(self, dequantize: Any, dims: int) -> torch.Tensor:
        """The scale of each value of a weight that a node dequantizes."""
        scale = torch.as_tensor(self._value(dequantize.args[1]))
        if dequantize.target is not PER_CHANNEL:
            return scale
        return _along(scale, int(dequantize.args[3]), dims)

    def _value(self, argument: Any) -> Any:
        """A number, or a tensor that the graph has stored; None: it is computed."""
        if not isinstance(argument, fx.Node):
            return argument
        if argument.op != "get_attr":
            return None
        parent, _, child = str(argument.target).rpartition(".")
        return getattr(self.graph.module.get_submodule(parent), child)


def _data_and_weight(node: fx.Node, constants: frozenset[fx.Node]) -> tuple[int, int] | None:
    """The positions of the data and of the weight among the arguments of a function with a stored weight."""
    if node.op != "call_function" or not (node.target in WEIGHTED or is_weighted(node.target)):
        return None
    how = WEIGHTED.get(node.target)
    data, weight = (how.data, how.weight) if how is not None else (0, 1)
    if len(node.args) <= max(data, weight) or node.args[data] in constants or node.args[weight] not in constants:
        return None
    return data, weight


def _end(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """Where the output of a layer is looked at: behind what clamps it, and rounded as those that read it get it."""
    while node.users:
        reader = next(iter(node.users))
        is_pair = node.target in QUANTIZE and all(user.target in DEQUANTIZE for user in node.users)
        if not is_pair and len(node.users) > 1:
            break
        if reader.target not in QUANTIZE + DEQUANTIZE and clamp_of(reader, modules) is None:
            break
        node = reader
    return node


def _floating(args: Any) -> Any:
    return fx.node.map_aggregate(args, lambda x: x.floating if isinstance(x, Sides) else x)


def _shown_function(function: Any) -> str:
    """``conv_transpose2d``, of torch's functions or its operators, as ``ConvTranspose2d``."""
    name = function._schema.name.rpartition("::")[2] if hasattr(function, "_schema") else function.__name__
    return "".join(part.capitalize() for part in name.split("_"))


def _sqnr(reference: Any, other: Any) -> float | None:
    """None where there is nothing to compare. Of large tensors, of 65,536 values at the same places, drawn evenly.

    Of a normal error, its energy is then known to 0.6 %, and the SQNR to 0.03 dB.
    """
    pairs = [float_tensors(x) for x in (reference, other)]
    try:
        return sqnr_db(*([sampled(x) for x in tensors] for tensors in pairs))
    except ValueError:
        return None


def _of_weight(weight: torch.Tensor, rounded: torch.Tensor, step: torch.Tensor) -> Spread | None:
    found = spread(weight, rounded, step)
    if found is None:
        return None
    low, high = (float(x) for x in torch.aminmax(rounded))
    return replace(found, clip_low=low, clip_high=high)


def _of_weights(layer: Any) -> Spread | None:
    """Of a float layer, also of one with several weights."""
    weights = [p.detach().reshape(-1).float() for name, p in layer.named_parameters() if "weight" in name]
    return spread(torch.cat(weights)) if weights else None


def _along(scale: torch.Tensor, axis: int, dims: int) -> torch.Tensor:
    return scale.reshape([-1 if dim == axis else 1 for dim in range(dims)])


def _step_of(layer: Int8Weight) -> torch.Tensor:
    if layer.scalars is not None or layer.axis is None:
        return torch.tensor(layer.scalars[0] if layer.scalars else 1.0)
    return _along(layer.get_buffer("scale"), layer.axis, layer.get_buffer("weight").dim())


def _step_of_integers(weight: Any) -> torch.Tensor:
    """Of a weight of one of torch's int8 dtypes."""
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        return _along(weight.q_per_channel_scales().float(), weight.q_per_channel_axis(), weight.dim())
    return torch.tensor(weight.q_scale())


def _merged(found: list[LayerReport]) -> Iterator[LayerReport]:
    """One for each name: of a layer that runs more than once, the worst of its figures."""
    by_name: dict[str, LayerReport] = {}
    for layer in found:
        known = by_name.setdefault(layer.name, layer)
        alone, together = _least(known.alone_db, layer.alone_db), _least(known.sqnr_db, layer.sqnr_db)
        by_name[layer.name] = replace(known, alone_db=alone, sqnr_db=together)
    yield from by_name.values()


def _least(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
