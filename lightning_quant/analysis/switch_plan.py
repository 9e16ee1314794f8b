"""Which switches of a simulated graph are on, where some of its layers are quantized.

That is what conversion would do with the others in ``skip``. A layer takes int8, and torch's int8 layers give int8 (of
``pt2e`` only what is read in int8 is rounded). What stands between two layers runs in int8 if all that it reads was
computed in int8 and all that reads it takes int8; what only moves data asks for the latter alone (see
:mod:`lightning_quant.backends.islands`). So one layer in float can take a whole chain of sums with it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import fx

from lightning_quant.backends import islands, pt2e_quantizer


@dataclass(frozen=True)
class Ends:
    """What gives the value that a rounding rounds, and what reads it.

    Attributes:
        given_by: Layers, by name.
        given_by_groups: Groups, by number.
        read_by: Layers.
        read_by_groups: Groups.
        read_in_float: Something else reads it: the output.
    """

    given_by: frozenset[str]
    given_by_groups: frozenset[int]
    read_by: frozenset[str]
    read_by_groups: frozenset[int]
    read_in_float: bool


@dataclass(frozen=True)
class Group:
    """Operators without weights that nothing is rounded between.

    Attributes:
        layers: Layers whose result they read directly, which they are then a part of.
        sources: Roundings that they read.
        results: Roundings that read them.
        moves: They give the values that they take.
        is_open: They read or give something that is not rounded.
    """

    layers: frozenset[str]
    sources: frozenset[str]
    results: frozenset[str]
    moves: bool
    is_open: bool


@dataclass(frozen=True)
class SwitchPlan:
    """The answer for any layers.

    Attributes:
        owners: Switch that is on with any of these layers: the layers and their weights.
        roundings: Rounding of an activation -> its ends.
        groups: What is between.
        takes_only: What is not read in int8 is not rounded.
    """

    owners: dict[str, frozenset[str]]
    roundings: dict[str, Ends]
    groups: tuple[Group, ...]
    takes_only: bool

    def on(self, quantized: Collection[str]) -> frozenset[str]:
        """The switches that are on where these layers are quantized."""
        chosen = frozenset(quantized)
        found = {name for name, layers in self.owners.items() if layers & chosen}
        int8 = self._int8_groups(chosen)
        for name, ends in self.roundings.items():
            if self._is_read_in_int8(ends, chosen, int8) or (
                not self.takes_only and self._is_int8(ends.given_by, ends.given_by_groups, chosen, int8)
            ):
                found.add(name)
        return frozenset(found)

    def _int8_groups(self, chosen: frozenset[str]) -> frozenset[int]:
        int8 = frozenset(
            number
            for number, group in enumerate(self.groups)
            if (group.layers <= chosen if group.layers else not group.is_open)
        )
        while True:
            rest = frozenset(number for number in int8 if self._stays(self.groups[number], chosen, int8))
            if rest == int8:
                return int8
            int8 = rest

    def _stays(self, group: Group, chosen: frozenset[str], int8: frozenset[int]) -> bool:
        if group.layers and not self.takes_only:
            return True  # it is a part of them
        for name in group.results:
            ends = self.roundings[name]
            if ends.read_in_float or not ends.read_by <= chosen or not ends.read_by_groups <= int8:
                return False
        ends_of = [self.roundings[name] for name in group.sources]
        return (
            bool(group.layers)
            or group.moves
            or all(self._is_int8(e.given_by, e.given_by_groups, chosen, int8) for e in ends_of)
        )

    def _is_int8(
        self, layers: frozenset[str], groups: frozenset[int], chosen: frozenset[str], int8: frozenset[int]
    ) -> bool:
        """Whether a value was computed in int8, not only moved."""
        if not (layers or groups) or not layers <= chosen or not groups <= int8:
            return False
        moving = [self.groups[number] for number in groups if self.groups[number].moves]
        sources = [self.roundings[name] for group in moving if not group.layers for name in group.sources]
        return all(self._is_int8(e.given_by, e.given_by_groups, chosen, int8) for e in sources)

    def _is_read_in_int8(self, ends: Ends, chosen: frozenset[str], int8: frozenset[int]) -> bool:
        groups = (number for number in ends.read_by_groups if not self.groups[number].layers)
        return bool(ends.read_by & chosen) or any(number in int8 for number in groups)


def plan(
    graph_module: fx.GraphModule,
    layers: dict[fx.Node, str],
    roundings: Collection[fx.Node],
    owners: dict[str, frozenset[str]],
    *,
    takes_only: bool,
) -> SwitchPlan:
    """Read the plan off a simulated graph.

    Args:
        graph_module: With a node for every switch.
        layers: Node of a layer -> its name.
        roundings: The nodes that round activations.
        owners: See :class:`SwitchPlan`.
        takes_only: See :class:`SwitchPlan`.
    """
    constant = {n for n in graph_module.graph.nodes if n.op == "get_attr" or (n.op != "placeholder" and _reads_none(n))}
    sizes = _sizes(graph_module, constant)
    between = [
        n for n in graph_module.graph.nodes
        if n.op.startswith("call") and n not in layers and n not in roundings and n not in sizes and n not in constant
    ]  # fmt: skip
    number = _components(between)
    groups = tuple(
        _group(graph_module, [n for n in between if number[n] == index], layers, roundings, {*sizes, *constant})
        for index in range(max(number.values(), default=-1) + 1)
    )
    ends = {str(node.target): _ends(node, layers, number, sizes) for node in roundings}
    made = SwitchPlan(owners, ends, groups, takes_only)
    # with everything on, nothing is off, whatever these rules have missed: it goes with its neighbours then
    missed = {str(node.target) for node in roundings} - made.on(frozenset(layers.values()))
    if not missed:
        return made
    near = {str(n.target): _near(n, layers) for n in roundings if str(n.target) in missed}
    return SwitchPlan(owners | near, ends, groups, takes_only)


def _reads_none(node: fx.Node) -> bool:
    return not node.all_input_nodes


def _sizes(graph_module: fx.GraphModule, constant: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes that compute with sizes of tensors and not with values."""
    found: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if not node.op.startswith("call"):
            continue
        asks = islands.asks_for_size(graph_module, node) or pt2e_quantizer.asks_for_size(node)
        inputs = [n for n in node.all_input_nodes if n not in constant]
        if asks or (inputs and all(n in found for n in inputs)):
            found.add(node)
    return found


def _components(nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """Numbers of the groups of nodes that read one another."""
    inside = set(nodes)
    number: dict[fx.Node, int] = {}
    count = 0
    for first in nodes:
        if first in number:
            continue
        waiting = [first]
        while waiting:
            node = waiting.pop()
            if node in number:
                continue
            number[node] = count
            waiting += [n for n in (*node.all_input_nodes, *node.users) if n in inside]
        count += 1
    return number


def _group(
    graph_module: fx.GraphModule,
    nodes: list[fx.Node],
    layers: dict[fx.Node, str],
    roundings: Collection[fx.Node],
    beside: Collection[fx.Node],
) -> Group:
    inside = set(nodes)
    read = {n for node in nodes for n in node.all_input_nodes if n not in inside and n not in beside}
    readers = {n for node in nodes for n in node.users if n not in inside and n not in beside}
    rounded = {n for n in (*read, *readers) if n in roundings}
    rest = {n for n in (*read, *readers) if n not in rounded and n not in layers}
    return Group(
        layers=frozenset(layers[n] for n in read if n in layers),
        sources=frozenset(str(n.target) for n in read if n in roundings),
        results=frozenset(str(n.target) for n in readers if n in roundings),
        moves=all(islands.moves(graph_module, n) or pt2e_quantizer.moves(n) for n in nodes),
        is_open=bool(rest) or any(n in layers for n in readers),
    )


def _ends(node: fx.Node, layers: dict[fx.Node, str], number: dict[fx.Node, int], sizes: Collection[fx.Node]) -> Ends:
    given, read = node.all_input_nodes, [n for n in node.users if n not in sizes]
    return Ends(
        given_by=frozenset(layers[n] for n in given if n in layers),
        given_by_groups=frozenset(number[n] for n in given if n in number),
        read_by=frozenset(layers[n] for n in read if n in layers),
        read_by_groups=frozenset(number[n] for n in read if n in number),
        read_in_float=any(n not in layers and n not in number for n in read),
    )


def _near(start: fx.Node, layers: dict[fx.Node, str]) -> frozenset[str]:
    """The layers that are reached from a node without passing another one, forwards or backwards."""
    found: set[str] = set()
    for forwards in (True, False):
        seen: set[Any] = {start}
        waiting = list(start.users if forwards else start.all_input_nodes)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in layers:
                found.add(layers[node])
            else:
                waiting += list(node.users if forwards else node.all_input_nodes)
    return frozenset(found)
