"""What fewer bits for the weights of each layer do to the output: nothing is prepared or converted again.

As in :mod:`.sensitivity`, one float pass branches off at each layer, once for every number of bits, with the weights of
this layer alone rounded, and ends with the noise that this is of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from lightning_quant.analysis.branching import Runner, part_of
from lightning_quant.analysis.simulation import simulation, switch, switch_to
from lightning_quant.analysis.sqnr import Power
from lightning_quant.analysis.switches import SwitchedWeight
from lightning_quant.backends.graph import engine, info
from lightning_quant.backends.weighted import WeightedLayer, WeightQuantization
from lightning_quant.balanced import best_shares

#: About how many float passes over the data it may cost, as :func:`lightning_quant.sensitivity` takes.
PASSES = 8.0


@dataclass(frozen=True, kw_only=True)
class BitCosts:
    """One layer.

    Attributes:
        name: In the graph.
        skip: The submodule of the float model that has it, as ``SimulatedLayer`` says it.
        weights: How many it has.
        noises: Bits -> noise of the output over its signal, where only these weights are rounded to so many.
    """

    name: str
    skip: str
    weights: int
    noises: dict[int, float]


def with_bits(how: WeightQuantization, bits: int) -> WeightQuantization:
    """The same range in other integers: symmetric ones for symmetric ones, with a zero point for others."""
    before = how.quant_max - how.quant_min
    largest = 2 ** (bits - 1) - 1
    least = -largest if how.quant_min == -how.quant_max else -largest - 1
    steps = largest - least
    zero_point = torch.round((how.zero_point - how.quant_min) * (steps / before)) + least
    return WeightQuantization(
        scale=how.scale * (before / steps),
        zero_point=zero_point.long(),
        quant_min=least,
        quant_max=largest,
        axis=how.axis,
    )


def in_bits(layer: WeightedLayer, bits: int) -> WeightQuantization:
    """How the weight of a layer would be rounded if it were prepared with so many bits.

    Args:
        layer: Its weight is rounded to integers.
        bits: 2 to 8.
    """
    how = layer.quantization
    assert how is not None
    balance = layer.balance
    if balance is None:
        return with_bits(how, bits)
    assert how.axis is not None
    found = with_bits(replace(how, scale=how.scale / balance), bits)
    return replace(found, scale=found.scale * best_shares(layer.weight.movedim(how.axis, 0).flatten(1), found.scale))


def bit_costs(
    graph_module: Any, layers: Sequence[WeightedLayer], calls: list[tuple[Any, ...]], bits: Sequence[int]
) -> tuple[BitCosts, ...]:
    """The layers of one simulated graph whose weights are rounded, in the order in which they run.

    Args:
        graph_module: From :func:`lightning_quant.analysis.simulation.simulate_graph`. As it was, afterwards.
        layers: Of the prepared graph that it was made from.
        calls: Its inputs in float, one tuple for each batch.
        bits: Numbers of bits that are tried.
    """
    runner = Runner(graph_module)
    known = {node: layer for layer in layers if layer.quantization is not None for node in layer.nodes}
    tried = [
        _Tried(node.name, known[node.name], str(place.target), part)
        for node in runner.nodes
        if node.name in runner.layers and node.name in known and known[node.name].nodes[0] == node.name
        for place, part in _weights(runner, node)
    ]
    found = {(one.node, width): Power() for one in tried for width in bits}
    switch(graph_module, ())
    with torch.no_grad(), engine(info(graph_module).config.engine):
        for data in part_of(runner, calls, PASSES / max(1, len(bits))):
            _measure(runner, data, tried, bits, found)
    switch(graph_module, ())
    skips = {layer.name: layer.skip for layer in simulation(graph_module).layers}
    return tuple(
        BitCosts(
            name=one.layer.name,
            skip=skips[runner.layers[one.node]],
            weights=one.layer.weight.numel(),
            noises={width: _noise(found[one.node, width]) for width in bits},
        )
        for one in tried
    )


@dataclass(frozen=True)
class _Tried:
    """A layer: its first node, and the switch of its weight."""

    node: str
    layer: WeightedLayer
    switch: str
    part: SwitchedWeight


def _weights(runner: Runner, node: fx.Node) -> list[tuple[fx.Node, SwitchedWeight]]:
    """Where the weight of a layer is: at its own node, or at one that it reads."""
    return [(n, p) for n in (node, *node.all_input_nodes) if isinstance(p := runner.parts.get(n), SwitchedWeight)]


def _noise(power: Power) -> float:
    return power.noise / power.signal if power.signal else 0.0


def _measure(
    runner: Runner,
    data: tuple[Any, ...],
    tried: list[_Tried],
    bits: Sequence[int],
    found: dict[tuple[str, int], Power],
) -> None:
    """One float pass, with a branch for each layer and number of bits."""
    outputs: dict[tuple[str, int], Any] = {}
    values = runner.start(data)
    for number in range(len(runner.nodes)):
        for one in (one for one in tried if runner.switches[one.switch] == number):
            before: Any = one.part.rounded
            switch_to(runner.module, {one.switch})
            for width in bits:
                one.part.rounded = in_bits(one.layer, width).rounded(one.layer.weight)
                again = runner.start(data) if runner.changes_inputs else dict(values)
                outputs[one.node, width] = runner.finish(again, 0 if runner.changes_inputs else number)
            one.part.rounded = before
            switch_to(runner.module, ())
        runner.step(values, number)
    expected = values[runner.nodes[-1]]
    for key, output in outputs.items():
        found[key].add(expected, output)
