"""Many passes over a simulated graph that begin alike: each branches off where it begins to differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten, tree_map

from lightning_quant.analysis.simulation import macs_of, simulation, switch_to, switched_on, switches
from lightning_quant.analysis.sqnr import Power
from lightning_quant.analysis.switches import SwitchedLayer, SwitchedWeight

#: On fewer rows than these the order of the layers is a matter of luck.
_LEAST_ROWS = 8
#: What a pass with rounding costs, of a float pass: each activation is read and written once more.
_ROUNDED = 1.6
#: Multiply-accumulates that take about as long as one value that is written. It only says how much data is used.
_MACS_PER_VALUE = 16
#: Nets that amplify the last bits of float sums by much stay above it, outputs of other data do not.
_SAME_DB = 50.0


class Runner:
    """Runs a simulated graph node by node, from any node on."""

    def __init__(self, graph_module: Any) -> None:
        self.module = graph_module
        self.nodes: list[fx.Node] = list(graph_module.graph.nodes)
        self.parts = {n: graph_module.get_submodule(str(n.target)) for n in self.nodes if n.op == "call_module"}
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.last: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            users = [self.place[user] for user in node.users]
            self.last.setdefault(max(users, default=self.place[node]), []).append(node)
        known = set(switches(graph_module))
        self.switches = {
            str(n.target): self.place[n] for n in reversed(self.nodes) if str(n.target) in known
        }  # the first call of each
        self.layers = {n: layer.name for layer in simulation(graph_module).layers for n in layer.nodes}
        self.changes_inputs = False

    def start(self, data: tuple[Any, ...]) -> dict[fx.Node, Any]:
        """The values of the inputs."""
        places = [node for node in self.nodes if node.op == "placeholder"]
        if self.changes_inputs:
            data = _cloned(data)
        given: list[Any] = [*data, *(node.args[0] for node in places[len(data) :] if node.args)]
        return dict(zip(places, given, strict=True))

    def step(self, values: dict[fx.Node, Any], number: int) -> None:
        """Run one node, and forget what no later one reads."""
        node = self.nodes[number]
        if node.op != "placeholder":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = self.called(node, args, kwargs)
        for dead in self.last.get(number, ()):
            if dead.op != "output":
                values.pop(dead, None)

    def called(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """What a node gives for these arguments."""
        target: Any = node.target
        if node.op == "call_module":
            return self.parts[node](*args, **kwargs)
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "output":
            return args[0]
        value: Any = self.module
        for part in str(target).split("."):
            value = getattr(value, part)
        return value

    def finish(self, values: dict[fx.Node, Any], number: int) -> Any:
        """Run from a node to the output."""
        for later in range(number, len(self.nodes)):
            self.step(values, later)
        return values[self.nodes[-1]]

    def branching(
        self,
        data: tuple[Any, ...],
        quantized: Collection[str],
        variants: dict[str, set[str]],
        outputs: dict[str, Any],
        visit: Callable[[fx.Node, dict[fx.Node, Any]], None] | None = None,
    ) -> Any:
        """One pass with the layers ``quantized``, and one for each variant from where it begins to differ.

        Args:
            data: The inputs.
            quantized: Names of layers.
            variants: Key -> names of the layers that are quantized in it.
            outputs: What each variant gives is put here, by its key.
            visit: Called in front of each layer of the pass itself, with its node and the values that are there.

        Returns:
            The output of the pass itself.
        """
        base = switched_on(self.module, quantized)
        starts: dict[int, list[str]] = {}
        on = {key: switched_on(self.module, names) for key, names in variants.items()}
        for key, theirs in on.items():
            first = min((self.switches[name] for name in base ^ theirs), default=len(self.nodes) - 1)
            starts.setdefault(0 if self.changes_inputs else first, []).append(key)
        switch_to(self.module, base)
        values = self.start(data)
        for number, node in enumerate(self.nodes):
            for key in starts.get(number, ()):
                switch_to(self.module, on[key])
                outputs[key] = self.finish(self.start(data) if self.changes_inputs else dict(values), number)
                switch_to(self.module, base)
            if visit is not None and node.name in self.layers:
                visit(node, values)
            self.step(values, number)
        return values[self.nodes[-1]]

    def data_of(self, node: fx.Node) -> fx.Node | None:
        """The activation that a layer reads."""
        inputs = [
            n for n in node.all_input_nodes if n.op != "get_attr" and type(self.parts.get(n)) is not SwitchedWeight
        ]
        return inputs[0] if inputs else None

    def weight_of(self, node: fx.Node) -> SwitchedWeight | None:
        """Its weight, where it is stored as one and read as it is."""
        own = self.parts.get(node)
        if isinstance(own, SwitchedLayer):
            return own
        return next((p for n in node.all_input_nodes if type(p := self.parts.get(n)) is SwitchedWeight), None)

    def kind_of(self, node: fx.Node) -> str:
        """The kind of a layer."""
        name = self.layers[node.name]
        return next(layer.kind for layer in simulation(self.module).layers if layer.name == name)


# ---- how much of the data is used


def part_of(runner: Runner, calls: list[tuple[Any, ...]], passes: float) -> list[tuple[Any, ...]]:
    """As much of the data as ``passes`` float passes over all of it allow."""
    output, costs, runner.changes_inputs = _costs(runner, calls[0])
    total = sum(costs) or 1.0
    behind = _behind(costs)
    everything = {layer.name for layer in simulation(runner.module).layers}
    wanted = 0.0
    for name in everything:
        for base, names, factor in (((), {name}, 1.0), (everything, everything - {name}, _ROUNDED)):
            different = switched_on(runner.module, base) ^ switched_on(runner.module, names)
            first = min((runner.switches[s] for s in different), default=len(costs) - 1)
            wanted += factor * behind[0 if runner.changes_inputs else first] / total
    # the float pass looks at every layer, which costs about three more
    share = min(1.0, passes / (wanted + 4 + _ROUNDED))
    number = share * len(calls)
    if number >= 1:
        return [calls[round(i * len(calls) / int(number))] for i in range(int(number))]
    rows = rows_of(calls[0])
    if rows is None:
        return calls[:1]
    part = _firstrows_of(calls[0], min(rows, max(_LEAST_ROWS, int(rows * number))))
    small = runner.finish(runner.start(_cloned(part)), 0)
    return [part] if _are_the_same(small, output) else calls[:1]


def _costs(runner: Runner, data: tuple[Any, ...]) -> tuple[Any, list[float], bool]:
    """What the graph gives, about what each node costs, and whether one of them changes what it is given."""
    values, costs, changes = runner.start(_cloned(data)), [], False
    for number, node in enumerate(runner.nodes):
        # they are held, so that their versions can be asked for afterwards
        before = [(x, x._version) for n in node.all_input_nodes for x in _tensors(values[n])]
        read = runner.data_of(node) if node.name in runner.layers else None
        given = None if read is None else values.get(read)
        runner.step(values, number)
        changes = changes or any(x._version != version for x, version in before)
        output = values.get(node, None)
        cost = float(sum(x.numel() for x in _tensors(output)))
        stored = runner.weight_of(node) if node.name in runner.layers else None
        if stored is not None and isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor):
            cost += macs_of(stored.weight(False), runner.kind_of(node), given, output) / _MACS_PER_VALUE
        costs.append(cost if node.op.startswith("call") else 0.0)
    return values[runner.nodes[-1]], costs, changes


def _cloned(data: tuple[Any, ...]) -> tuple[Any, ...]:
    copied: tuple[Any, ...] = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, data)
    return copied


def _behind(costs: list[float]) -> list[float]:
    sums = [0.0]
    for cost in reversed(costs):
        sums.append(sums[-1] + cost)
    return sums[:0:-1]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor))


def rows_of(data: Any) -> int | None:
    """The first dimension, where all tensors have the same."""
    sizes = {x.shape[0] if x.dim() else None for x in _tensors(data)}
    return sizes.pop() if len(sizes) == 1 else None


def _firstrows_of(data: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    part: tuple[Any, ...] = tree_map(lambda x: x[:count] if isinstance(x, torch.Tensor) else x, data)
    return part


def _are_the_same(part: Any, whole: Any) -> bool:
    """Whether the first rows of an output do not depend on the others, but for the last bits of float sums."""
    found = Power()
    for a, b in zip(_tensors(part), _tensors(whole), strict=True):
        if a.dim() == 0 or a.shape[1:] != b.shape[1:]:
            return False
        found.add(b[: a.shape[0]], a)
    return found.sqnr_db > _SAME_DB
