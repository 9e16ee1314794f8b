"""What quantizing each layer does to the output, and what would help.

For every layer two passes are needed, one with only this layer quantized and one with all but it. Neither is run from
its beginning: a pass over the graph is stopped at each layer, and branches off from there with the values that it has.
The branches take part of the data only, so many rows of it that all together cost about ``passes`` float passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_quant.analysis.remedies import Observed, observed, remedy
from lightning_quant.analysis.simulation import (
    Switched,
    SwitchedLayer,
    SwitchedWeight,
    is_simulated,
    macs_of,
    simulate,
    simulation,
    switch,
    switched_on,
)
from lightning_quant.analysis.sqnr import Power
from lightning_quant.backends import as_call
from lightning_quant.backends.graph import engine, info
from lightning_quant.errors import CaptureError, ConfigError
from lightning_quant.formatting import shown_db

#: About how many float passes over the data it may cost.
PASSES = 8.0
#: On fewer rows than these the order of the layers is a matter of luck.
_LEAST_ROWS = 8
#: What a pass with rounding costs, of a float pass: each activation is read and written once more.
_ROUNDED = 1.6
#: Multiply-accumulates that take about as long as one value that is written. It only says how much data is used.
_MACS_PER_VALUE = 16
#: Nets that amplify the last bits of float sums by much stay above it, outputs of other data do not.
_SAME_DB = 50.0


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """One layer.

    Attributes:
        name: In the model; what is called in several ways has a name for each of them.
        skip: What ``QuantConfig(skip=...)`` has to name to leave it in float; ``""``: no submodule stands for it alone.
        kind: Its class, or its operator.
        macs: Multiply-accumulates of one call, of the data that was used.
        sqnr_only_db: Of the output, where only this layer is quantized. Low: it costs much.
        sqnr_all_but_db: Of the output, where all layers but this one are. High: without it, all would be well.
        sqnr_weight_db: Of what the layer gives, where only its weight is rounded; None: not known.
        sqnr_input_db: The same, where only its input is rounded.
        input_range: Least and largest value that it was given, in float; None: it is given no floats.
        kept_range: Those of them that are not clipped; None: its input is not rounded to a range of its own.
        outlier_channels: Channels of its input whose values are far larger than those of most others.
        remedy: What fits, in words; empty: it costs nothing to speak of.
    """

    name: str
    skip: str
    kind: str
    macs: int
    sqnr_only_db: float
    sqnr_all_but_db: float
    sqnr_weight_db: float | None
    sqnr_input_db: float | None
    input_range: tuple[float, float] | None
    kept_range: tuple[float, float] | None
    outlier_channels: tuple[int, ...]
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Every quantized layer of a model, in the order in which they run.

    Attributes:
        layers: The layers.
        sqnr_db: Of the output with all of them quantized; of several graphs, the lowest.
        rows: Rows of the data (the first dimension of the first input) on which the layers were measured.
    """

    layers: tuple[LayerSensitivity, ...]
    sqnr_db: float
    rows: int

    @property
    def worst_first(self) -> tuple[LayerSensitivity, ...]:
        """The layers by what they cost, the most harmful one first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.sqnr_only_db))

    def table(self, limit: int | None = None) -> Table:
        """For the console, the most harmful layer first; of many layers, ``limit`` of them."""
        title = f"what each layer costs: all in int8 give {shown_db(self.sqnr_db)}"
        table = Table(title=title, title_justify="left")
        numbers = ("multiply-accumulates", "only it in int8", "all but it", "input", "kept")
        for head in ("layer", "kind", *numbers, "outlier channels", "what may help"):
            table.add_column(head, justify="right" if head in numbers else "left", overflow="fold")
        total = sum(layer.macs for layer in self.layers) or 1
        for layer in self.worst_first[:limit]:
            table.add_row(
                layer.name, layer.kind, f"{100 * layer.macs / total:.1f} %", shown_db(layer.sqnr_only_db),
                shown_db(layer.sqnr_all_but_db), _shown_range(layer.input_range), _shown_range(layer.kept_range),
                _shown_channels(layer.outlier_channels), layer.remedy,
            )  # fmt: skip
        return table

    def print(self, console: Console | None = None) -> None:
        """Show the table."""
        (console or Console()).print(self.table())


def _shown_range(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3g} .. {ends[1]:.3g}"


def _shown_channels(channels: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, channels[:4]))
    return f"{shown}, ... ({len(channels)})" if len(channels) > 4 else shown


def sensitivity(prepared: nn.Module, batches: Iterable[Any], *, passes: float = PASSES) -> Sensitivity:
    """Measure what quantizing each layer of a calibrated model does to its output.

    Nothing is converted again for a layer: see :mod:`lightning_quant.analysis.simulation`. Where a model is quantized
    in several graphs, the output is that of the graph that has the layer.

    Args:
        prepared: From :func:`lightning_quant.prepare`, by any backend but ``torchscript``, for any method; its
            observers have seen data. Not changed.
        batches: Inputs, each a tensor, a tuple of positional or a dict of keyword arguments.
        passes: About how many float passes over ``batches`` it may cost. The layers are measured on as many rows as
            that allows, and on eight rows at least (one batch, where rows depend on each other).

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        CalibrationError: An observer saw no data.
        ConfigError: There is no batch, or ``passes`` is not above 0.
        ExportError: It was prepared by ``backend="torchscript"``.

    >>> from lightning_quant import prepare
    >>> data = torch.randn(8, 4)
    >>> prepared = prepare(nn.Linear(4, 2), method="static", example_inputs=data)
    >>> _ = prepared(data)
    >>> [layer.kind for layer in sensitivity(prepared, [data]).layers]
    ['Linear']
    """
    if not passes > 0:
        raise ConfigError(f"sensitivity(passes={passes!r}): give a number above 0.")
    model = simulate(prepared)
    graphs = {name: part for name, part in model.named_modules() if is_simulated(part)}
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in graphs}
    with torch.no_grad(), _recording(graphs, calls):
        for batch in batches:
            call = as_call(batch)
            model(*call.args, **call.keywords)
    if not any(calls.values()):
        raise ConfigError("sensitivity(batches=...): there is no batch. Give some of the data that it was calibrated on.")
    found = [measure(graphs[name], data, owner=name, passes=passes) for name, data in calls.items() if data]
    return joined(found)


def joined(parts: Iterable[Sensitivity]) -> Sensitivity:
    """The layers of several graphs as one result."""
    found = list(parts)
    return Sensitivity(
        layers=tuple(layer for part in found for layer in part.layers),
        sqnr_db=min(part.sqnr_db for part in found),
        rows=max(part.rows for part in found),
    )


class _recording:  # noqa: N801 - it is used as a verb
    """Keep what graphs are given."""

    def __init__(self, graphs: dict[str, Any], calls: dict[str, list[tuple[Any, ...]]]) -> None:
        self.graphs, self.calls = graphs, calls

    def __enter__(self) -> None:
        def keep(name: str) -> Callable[..., None]:
            return lambda _, args: self.calls[name].append(args)

        self.handles = [graph.register_forward_pre_hook(keep(name)) for name, graph in self.graphs.items()]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


# ---- one graph


def measure(graph_module: Any, calls: list[tuple[Any, ...]], *, owner: str = "", passes: float = PASSES) -> Sensitivity:
    """The layers of one simulated graph.

    Args:
        graph_module: From :func:`lightning_quant.analysis.simulation.simulate_graph`.
        calls: Its inputs, one tuple for each batch.
        owner: Name of the submodule that it stands for.
        passes: See :func:`sensitivity`.
    """
    names = [layer.name for layer in simulation(graph_module).layers]
    runner = _Runner(graph_module)
    result = _Measured(names)
    switch(graph_module, ())
    with torch.no_grad(), engine(info(graph_module).config.engine):
        used = _part_of(runner, calls, passes) if names else []
        for data in used:
            _measure_call(runner, data, result)
    switch(graph_module, ())
    layers = tuple(_layer(layer, result, graph_module, owner) for layer in simulation(graph_module).layers)
    return Sensitivity(layers=layers, sqnr_db=result.all.sqnr_db, rows=sum(_rows(data) or 1 for data in used))


class _Measured:
    """What was summed up so far."""

    def __init__(self, names: Iterable[str]) -> None:
        self.all = Power()
        self.only = {name: Power() for name in names}
        self.all_but = {name: Power() for name in names}
        self.macs = dict.fromkeys(self.only, 0)
        self.seen: dict[str, Observed] = {}


def _layer(layer: Any, result: _Measured, graph_module: Any, owner: str) -> LayerSensitivity:
    seen = result.seen.get(layer.name, Observed())
    only, all_but = result.only[layer.name].sqnr_db, result.all_but[layer.name].sqnr_db
    prefix = f"{owner}." if owner else ""
    return LayerSensitivity(
        name=f"{prefix}{layer.name}",
        skip=f"{prefix}{layer.skip}" if layer.skip else owner,
        kind=layer.kind,
        macs=result.macs[layer.name],
        sqnr_only_db=only,
        sqnr_all_but_db=all_but,
        sqnr_weight_db=seen.weight_error.sqnr_db if seen.weight_error.signal else None,
        sqnr_input_db=seen.input_error.sqnr_db if seen.input_error.signal else None,
        input_range=seen.input_range,
        kept_range=seen.kept_range,
        outlier_channels=seen.outlier_channels,
        remedy=remedy(layer.kind, only, result.all.sqnr_db, seen, info(graph_module).method),
    )


def _measure_call(runner: _Runner, data: tuple[Any, ...], result: _Measured) -> None:
    """Two passes, one in float and one rounded, each with a branch for every layer."""
    names = list(result.only)
    outputs: dict[str, Any] = {}
    expected = runner.branching(data, (), {name: {name} for name in names}, outputs, result)
    for name, output in outputs.items():
        result.only[name].add(expected, output)
    outputs.clear()
    everything = set(names)
    result.all.add(expected, runner.branching(data, everything, {n: everything - {n} for n in names}, outputs, None))
    for name, output in outputs.items():
        result.all_but[name].add(expected, output)


class _Runner:
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
        self.switches = {
            str(n.target): self.place[n] for n in reversed(self.nodes) if str(n.target) in self._owners
        }  # the first call of each
        self.layers = {n: layer.name for layer in simulation(graph_module).layers for n in layer.nodes}
        self.changes_inputs = False

    @property
    def _owners(self) -> dict[str, frozenset[str]]:
        return simulation(self.module).owners

    def start(self, data: tuple[Any, ...]) -> dict[fx.Node, Any]:
        """The values of the inputs."""
        places = [node for node in self.nodes if node.op == "placeholder"]
        if self.changes_inputs:
            data = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, data)
        given: list[Any] = [*data, *(node.args[0] for node in places[len(data) :] if node.args)]
        return dict(zip(places, given, strict=True))

    def step(self, values: dict[fx.Node, Any], number: int) -> None:
        """Run one node, and forget what no later one reads."""
        node = self.nodes[number]
        if node.op != "placeholder":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = self._called(node, args, kwargs)
        for dead in self.last.get(number, ()):
            if dead.op != "output":
                values.pop(dead, None)

    def _called(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
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
        result: _Measured | None,
    ) -> Any:
        """One pass with the layers ``quantized``, and one for each variant from where it begins to differ.

        Args:
            data: The inputs.
            quantized: Names of layers.
            variants: Key -> names of the layers that are quantized in it.
            outputs: What each variant gives is put here, by its key.
            result: Where to note what the layers are given; None: nowhere.

        Returns:
            The output of the pass itself.
        """
        base = switched_on(self.module, quantized)
        starts: dict[int, list[str]] = {}
        for key, names in variants.items():
            different = base ^ switched_on(self.module, names)
            first = min((self.switches[name] for name in different), default=len(self.nodes) - 1)
            starts.setdefault(0 if self.changes_inputs else first, []).append(key)
        switch(self.module, quantized)
        values = self.start(data)
        for number, node in enumerate(self.nodes):
            for key in starts.get(number, ()):
                switch(self.module, variants[key])
                outputs[key] = self.finish(self.start(data) if self.changes_inputs else dict(values), number)
                switch(self.module, quantized)
            if result is not None and node.name in self.layers:
                self._look_at(node, values, result)
            self.step(values, number)
        return values[self.nodes[-1]]

    # ---- looking at one layer

    def _look_at(self, node: fx.Node, values: dict[fx.Node, Any], result: _Measured) -> None:
        """Note what a layer is given in the float pass, and what it makes of it with its input or its weight rounded."""
        name = self.layers[node.name]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        source = self.data_of(node)
        output = self._called(node, args, kwargs)
        stored = self.weight_of(node)
        given = values[source] if source is not None else None
        if stored is None or not isinstance(given, torch.Tensor) or not isinstance(output, torch.Tensor):
            result.macs[name] += _macs_of_module(self.parts.get(node), given)
            return
        seen = result.seen.setdefault(name, Observed())
        weight = stored.weight(False)
        kind = self.kind_of(node)
        result.macs[name] += macs_of(weight, kind, given, output)
        stored.enabled = True
        weight_rounded = self._again(node, values)
        stored.enabled = False
        seen.weight_error.add(output, weight_rounded)
        rounding: Any = self.parts.get(source)  # type: ignore[arg-type]
        if rounding is not None and hasattr(rounding, "enabled") and not isinstance(rounding, SwitchedWeight | Switched):
            rounding.enabled = True
            seen.input_error.add(output, self._again(node, {**values, source: rounding(given)}))  # type: ignore[dict-item]
            rounding.enabled = False
        else:
            rounding = None
        observed(seen, given, weight, kind, rounding)

    def _again(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        for read in node.all_input_nodes:
            if isinstance(self.parts.get(read), SwitchedWeight) and type(self.parts[read]) is SwitchedWeight:
                values = {**values, read: self.parts[read]()}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return self._called(node, args, kwargs)

    def data_of(self, node: fx.Node) -> fx.Node | None:
        """The activation that a layer reads."""
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr" and type(self.parts.get(n)) is not SwitchedWeight]
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


def _macs_of_module(part: Any, given: Any) -> int:
    """Of recurrent and dynamically quantized layers."""
    from lightning_quant.analysis.coverage import module_macs

    return module_macs(part.off, given) if isinstance(part, Switched) else 0


# ---- how much of the data is used


def _part_of(runner: _Runner, calls: list[tuple[Any, ...]], passes: float) -> list[tuple[Any, ...]]:
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
    rows = _rows(calls[0])
    if rows is None:
        return calls[:1]
    part = _first_rows(calls[0], min(rows, max(_LEAST_ROWS, int(rows * number))))
    small = runner.finish(runner.start(part), 0)
    return [part] if _are_the_same(small, output) else calls[:1]


def _costs(runner: _Runner, data: tuple[Any, ...]) -> tuple[Any, list[float], bool]:
    """What the graph gives, about what each node costs, and whether one of them changes what it is given."""
    values, costs, changes = runner.start(data), [], False
    for number, node in enumerate(runner.nodes):
        before = [(x, x._version) for n in node.all_input_nodes for x in _tensors(values[n])]
        given = values.get(runner.data_of(node)) if node.name in runner.layers else None  # type: ignore[arg-type]
        kept = {n: values[n] for n in node.all_input_nodes}
        runner.step(values, number)
        changes = changes or any(x._version != version for x, version in before)
        output = values.get(node, None)
        cost = float(sum(x.numel() for x in _tensors(output)))
        stored = runner.weight_of(node) if node.name in runner.layers else None
        if stored is not None and isinstance(given, torch.Tensor) and isinstance(output, torch.Tensor):
            cost += macs_of(stored.weight(False), runner.kind_of(node), given, output) / _MACS_PER_VALUE
        del kept
        costs.append(cost if node.op.startswith("call") else 0.0)
    return values[runner.nodes[-1]], costs, changes


def _behind(costs: list[float]) -> list[float]:
    sums = [0.0]
    for cost in reversed(costs):
        sums.append(sums[-1] + cost)
    return sums[:0:-1]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    return (x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor))


def _rows(data: Any) -> int | None:
    """The first dimension, where all tensors have the same."""
    sizes = {x.shape[0] if x.dim() else None for x in _tensors(data)}
    return sizes.pop() if len(sizes) == 1 else None


def _first_rows(data: tuple[Any, ...], count: int) -> tuple[Any, ...]:
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
