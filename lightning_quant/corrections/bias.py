"""Bias correction: what rounding does to the mean of each channel is taken off the bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
https://arxiv.org/abs/1906.04721, section 4.2 and appendix D: ``E[y] - E[y_q]`` of each output channel is added to the
bias, layer after layer, each with what was corrected before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from lightning_quant.analysis.branching import Runner
from lightning_quant.analysis.simulation import simulate_graph, simulation, switch
from lightning_quant.analysis.switches import SwitchedLayer
from lightning_quant.backends.graph import engine, info
from lightning_quant.backends.weighted import WeightedLayer, weighted_layers
from lightning_quant.corrections.recording import Calls, changed, note, refuse_second


def bias_correction(prepared: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """A copy in which the mean of what each layer gives is that of the float model, on ``batches``.

    Both models run once, side by side, all batches at a time: about two float passes, and the activations of one layer
    of all batches in memory. A layer that is called more than once, and one that has no place for a bias (a product of
    matrices), stays as it is.

    Args:
        prepared: From :func:`lightning_quant.prepare` for ``static``, by ``fx``, ``eager`` or ``pt2e``; its observers
            have seen data. Not changed: the copy has other biases, and biases where there were none.
        batches: Inputs, each a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        CalibrationError: An observer saw no data.
        ConfigError: There is no batch; another correction made up for errors of rounding already; the method or the
            backend is another one.
    """
    return changed(prepared, batches, correct_biases)


@dataclass(frozen=True)
class Reached:
    """A layer in front of which the float model and the quantized one stand, with all batches.

    Attributes:
        layer: Of the prepared graph.
        number: Of its node, in both runners.
        floats: Runs everything in float.
        rounded: Runs everything rounded, with what was corrected so far.
        runs: Of each batch, the values of either that are still read.
    """

    layer: WeightedLayer
    number: int
    floats: Runner
    rounded: Runner
    runs: list[tuple[dict[fx.Node, Any], dict[fx.Node, Any]]]


def correct_biases(graph_module: fx.GraphModule, calls: Calls) -> None:
    """Change the biases of one graph."""
    refuse_second(graph_module, "bias_correction")
    note(graph_module, "bias_correction", match_means(graph_module, calls), "layers")


def match_means(
    graph_module: fx.GraphModule, calls: Calls, visit: Callable[[Reached], None] = lambda reached: None
) -> int:
    """Let each layer of a graph have the mean of the float model, from the first to the last. Gives how many do.

    Args:
        graph_module: Its biases are changed.
        calls: What it is given.
        visit: Called in front of each of these layers, before its bias is changed. It may change the layer's weight, in
            the graph and in ``Reached.rounded``.
    """
    layers = weighted_layers(graph_module)
    by_node = {name: layer for layer in layers for name in layer.nodes}
    by_name = {layer.name: layer for layer in layers}
    floats, rounded = (simulate_graph(graph_module) for _ in range(2))
    switch(rounded, [layer.name for layer in simulation(rounded).layers])
    correctable: dict[str, WeightedLayer] = {}
    for simulated in simulation(rounded).layers:
        for name in simulated.nodes:
            layer = by_node.get(name) if info(graph_module).config.backend == "pt2e" else by_name.get(simulated.name)
            once = layer is not None and len(layer.nodes) == 1 and (name in by_node or len(simulated.nodes) == 1)
            if layer is not None and once and layer.can_have_bias:
                correctable[name] = layer
    with torch.no_grad(), engine(info(graph_module).config.engine):
        shifts = _shifts(Runner(floats), Runner(rounded), calls, correctable, visit)
    for name, shift in shifts.items():
        layer = correctable[name]
        before = layer.bias
        layer.set_bias(shift if before is None else before + shift.to(before.device))
    return len(shifts)


def _shifts(
    floats: Runner,
    rounded: Runner,
    calls: Calls,
    correctable: dict[str, WeightedLayer],
    visit: Callable[[Reached], None],
) -> dict[str, torch.Tensor]:
    """Node of each layer -> ``(output channels,)``, what its bias lacks."""
    runs = [(floats.start(_cloned(call)), rounded.start(_cloned(call))) for call in calls]
    found: dict[str, torch.Tensor] = {}
    for number, node in enumerate(rounded.nodes):
        layer = correctable.get(node.name)
        if layer is None:
            for values, values_q in runs:
                floats.step(values, number)
                rounded.step(values_q, number)
            continue
        reached = Reached(layer, number, floats, rounded, runs)
        visit(reached)
        found[node.name] = _shift(reached)
    return found


def _shift(reached: Reached) -> torch.Tensor:
    """What the bias of a layer lacks. Both passes go on behind the layer, with that bias."""
    layer, number, floats, rounded = reached.layer, reached.number, reached.floats, reached.rounded
    total, count = torch.zeros(layer.output_channels, dtype=torch.float64), 0
    outputs = []
    for values, values_q in reached.runs:
        y, y_q = _before_activation(floats, number, values), _before_activation(rounded, number, values_q)
        axis = layer.channel_axis(y)
        error = (y - y_q).transpose(axis, -1).reshape(-1, layer.output_channels).double()
        total, count = total + error.sum(0), count + error.shape[0]
        outputs.append((y, y_q, axis))
    shift = (total / max(count, 1)).float()
    for (values, values_q), (y, y_q, axis) in zip(reached.runs, outputs, strict=True):
        along = [1] * y_q.dim()
        along[axis] = -1
        values[floats.nodes[number]] = _after(floats, number, y)
        values_q[rounded.nodes[number]] = _after(rounded, number, y_q + shift.to(y_q.dtype).reshape(along))
        for runner, kept in ((floats, values), (rounded, values_q)):
            for dead in runner.last.get(number, ()):
                kept.pop(dead, None)
    return shift


def _before_activation(runner: Runner, number: int, values: dict[fx.Node, Any]) -> torch.Tensor:
    node = runner.nodes[number]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    part = runner.parts.get(node)
    if isinstance(part, SwitchedLayer):
        given: Any = args[0]
        return part.layer.before_activation(given, part.weight(part.enabled))
    found: torch.Tensor = runner.called(node, args, kwargs)
    return found


def _after(runner: Runner, number: int, value: torch.Tensor) -> torch.Tensor:
    part = runner.parts.get(runner.nodes[number])
    after = part.layer.after if isinstance(part, SwitchedLayer) else None
    found: torch.Tensor = value if after is None else after(value)
    return found


def _cloned(call: tuple[Any, ...]) -> tuple[Any, ...]:
    copied: tuple[Any, ...] = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, call)
    return copied
