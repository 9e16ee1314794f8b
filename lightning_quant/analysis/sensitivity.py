"""What quantizing each layer does to the output, and what would help.

For every layer two passes are needed, one with only this layer quantized and one with all but it. Neither is run from
its beginning: a pass over the graph is stopped at each layer, and branches off from there with the values that it has.
The branches take part of the data only, so many rows of it that all together cost about ``passes`` float passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from lightning_quant.analysis.branching import Runner, part_of, rows_of
from lightning_quant.analysis.remedies import Observed, observed, remedy
from lightning_quant.analysis.simulation import (
    Switched,
    SwitchedWeight,
    is_simulated,
    macs_of,
    simulate,
    simulation,
    switch,
)
from lightning_quant.analysis.sqnr import Power
from lightning_quant.backends import as_call
from lightning_quant.backends.graph import engine, info
from lightning_quant.errors import ConfigError
from lightning_quant.formatting import shown_db

#: About how many float passes over the data it may cost.
PASSES = 8.0


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
        """For the console, the most harmful layer first.

        Args:
            limit: Of more layers, so many are shown. None: all.
        """
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
        """Show the table.

        Args:
            console: Where. None: on the terminal.
        """
        (console or Console()).print(self.table())


def _shown_range(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3g} .. {ends[1]:.3g}"


def _shown_channels(channels: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, channels[:4]))
    return f"{shown}, ... ({len(channels)})" if len(channels) > 4 else shown


def sensitivity(prepared: nn.Module, batches: Iterable[Any], *, passes: float = PASSES) -> Sensitivity:
    """Measure what quantizing each layer of a calibrated model does to its output.

    Nothing is converted again for a layer: see ``lightning_quant.analysis.simulation``. Where a model is quantized
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
    calls = recorded_calls(model, batches)
    if not any(calls.values()):
        raise ConfigError(
            "sensitivity(batches=...): there is no batch. Give some of the data that it was calibrated on."
        )
    owners = {name: info(graph).interface.owner for name, graph in graphs.items()}
    return joined(measure(graphs[n], data, owner=owners[n], passes=passes) for n, data in calls.items() if data)


def joined(parts: Iterable[Sensitivity]) -> Sensitivity:
    """The layers of several graphs as one result."""
    found = list(parts)
    return Sensitivity(
        layers=tuple(layer for part in found for layer in part.layers),
        sqnr_db=min(part.sqnr_db for part in found),
        rows=max(part.rows for part in found),
    )


def recorded_calls(model: nn.Module, batches: Iterable[Any]) -> dict[str, list[tuple[Any, ...]]]:
    """Name of each simulated graph of ``model`` -> what it is given, one tuple for each call.

    Args:
        model: From :func:`lightning_quant.analysis.simulation.simulate`. It runs as it is switched.
        batches: Inputs of ``model``, as :func:`sensitivity` takes them.
    """
    graphs = {name: part for name, part in model.named_modules() if is_simulated(part)}
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in graphs}
    with torch.no_grad(), _recording(graphs, calls):
        for batch in batches:
            call = as_call(batch)
            model(*call.args, **call.keywords)
    return calls


class _recording:
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
    runner = Runner(graph_module)
    result = _Measured(names)
    switch(graph_module, ())
    with torch.no_grad(), engine(info(graph_module).config.engine):
        used = part_of(runner, calls, passes) if names else []
        for data in used:
            _measure_call(runner, data, result)
    switch(graph_module, ())
    layers = tuple(_layer(layer, result, graph_module, owner) for layer in simulation(graph_module).layers)
    return Sensitivity(layers=layers, sqnr_db=result.all.sqnr_db, rows=sum(rows_of(data) or 1 for data in used))


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


def _measure_call(runner: Runner, data: tuple[Any, ...], result: _Measured) -> None:
    """Two passes, one in float and one rounded, each with a branch for every layer."""
    names = list(result.only)
    outputs: dict[str, Any] = {}

    def look(node: fx.Node, values: dict[fx.Node, Any]) -> None:
        _look_at(runner, node, values, result)

    expected = runner.branching(data, (), {name: {name} for name in names}, outputs, look)
    for name, output in outputs.items():
        result.only[name].add(expected, output)
    outputs.clear()
    everything = set(names)
    result.all.add(expected, runner.branching(data, everything, {n: everything - {n} for n in names}, outputs))
    for name, output in outputs.items():
        result.all_but[name].add(expected, output)


def _look_at(runner: Runner, node: fx.Node, values: dict[fx.Node, Any], result: _Measured) -> None:
    """Note what a layer is given in the float pass, and what it makes of it with its input or its weight rounded."""
    name = runner.layers[node.name]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    source = runner.data_of(node)
    output = runner.called(node, args, kwargs)
    stored = runner.weight_of(node)
    given = values[source] if source is not None else None
    if source is None or stored is None or not isinstance(given, torch.Tensor) or not isinstance(output, torch.Tensor):
        result.macs[name] += _macs_of_module(runner.parts.get(node), given)
        return
    seen = result.seen.setdefault(name, Observed())
    weight = stored.weight(False)
    kind = runner.kind_of(node)
    result.macs[name] += macs_of(weight, kind, given, output)
    stored.enabled = True
    weight_rounded = _again(runner, node, values)
    stored.enabled = False
    seen.weight_error.add(output, weight_rounded)
    rounding: Any = runner.parts.get(source)
    if rounding is not None and hasattr(rounding, "enabled") and not isinstance(rounding, SwitchedWeight | Switched):
        rounding.enabled = True
        seen.input_error.add(output, _again(runner, node, {**values, source: rounding(given)}))
        rounding.enabled = False
    else:
        rounding = None
    observed(seen, given, weight, kind, rounding)


def _again(runner: Runner, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    for read in node.all_input_nodes:
        if isinstance(runner.parts.get(read), SwitchedWeight) and type(runner.parts[read]) is SwitchedWeight:
            values = {**values, read: runner.parts[read]()}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return runner.called(node, args, kwargs)


def _macs_of_module(part: Any, given: Any) -> int:
    """Of recurrent and dynamically quantized layers."""
    from lightning_quant.analysis.coverage import module_macs

    return module_macs(part.off, given) if isinstance(part, Switched) else 0
