"""Two passes over a simulated graph side by side, in float and quantized, that halt at each layer with a weight.

All batches are taken up to a layer, then the layer is given a new weight, and they go on with it: what a layer reads
comes from the layers before it as they were left. Each batch is held only where layers begin, where least is alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from lightning_quant.analysis.branching import Runner
from lightning_quant.analysis.simulation import simulation, switch_to, switched_on

#: What the values of all batches may take while they are held.
_HELD_BYTES = 3 * 2**29


@dataclass
class Pair:
    """One batch on its way, by the nodes whose values are still read.

    Attributes:
        floating: With everything in float.
        quantized: With everything rounded.
    """

    floating: dict[fx.Node, Any]
    quantized: dict[fx.Node, Any]


def layer_by_layer(
    runner: Runner,
    floats: list[tuple[Any, ...]],
    quantized: list[tuple[Any, ...]],
    visit: Callable[[fx.Node, list[Pair]], None],
) -> None:
    """Run both passes to the last layer.

    Args:
        runner: Of a simulated graph.
        floats: What the graph is given in float, one tuple for each batch.
        quantized: What it is given where everything before it is quantized.
        visit: Called in front of each layer, with its node and all batches. It may change the layer's rounded weight.
    """
    everything = switched_on(runner.module, [layer.name for layer in simulation(runner.module).layers])
    runner.changes_inputs = True  # both passes begin with the same tensors: each has a copy
    chosen = _that_fit(runner, floats)
    pairs = [Pair(runner.start(floats[i]), runner.start(quantized[i])) for i in chosen]
    try:
        for first, last in _stretches(runner):
            for pair in pairs:
                for on, values in ((frozenset[str](), pair.floating), (everything, pair.quantized)):
                    switch_to(runner.module, on)
                    for number in range(first, last):
                        runner.step(values, number)
            visit(runner.nodes[last], pairs)
    finally:
        switch_to(runner.module, ())


def _stretches(runner: Runner) -> Iterator[tuple[int, int]]:
    """From a layer to the next one."""
    first = 0
    for number, node in enumerate(runner.nodes):
        if node.name in runner.layers:
            yield first, number
            first = number


def _that_fit(runner: Runner, calls: list[tuple[Any, ...]]) -> list[int]:
    """Which batches are taken: all, or so many that their values can be held, from all over the data."""
    values = runner.start(calls[0])
    most = 1
    switch_to(runner.module, ())
    for first, last in _stretches(runner):
        for number in range(first, last):
            runner.step(values, number)
        most = max(most, _bytes(values))
    count = max(1, min(len(calls), _HELD_BYTES // (2 * most)))
    return [i * len(calls) // count for i in range(count)]


def _bytes(values: dict[fx.Node, Any]) -> int:
    held = [value for node, value in values.items() if node.op != "get_attr"]
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in tree_flatten(held)[0]
        if isinstance(x, torch.Tensor)
    }
    return sum(storages.values())
