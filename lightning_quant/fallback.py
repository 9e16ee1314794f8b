"""The search of :mod:`lightning_quant.tuning` on a LightningModule: the module's own validation loop decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning_quant.analysis.sensitivity import LayerSensitivity, Sensitivity, joined, measure
from lightning_quant.analysis.simulation import simulate_graph, simulation, switch
from lightning_quant.backends import inner_first
from lightning_quant.backends.graph import info, put
from lightning_quant.capture import Capture
from lightning_quant.config import Method, QuantConfig, near
from lightning_quant.correcting import correct
from lightning_quant.errors import ConfigError
from lightning_quant.evaluate import ValidationData, at_most, copy_of, evaluate
from lightning_quant.inputs import Sample
from lightning_quant.parts import Graphs, convert_module, empty_places, join
from lightning_quant.pipeline import calibrate, capture, prepare_graphs
from lightning_quant.placement import ToGraph, divert
from lightning_quant.tuning import STATE, Goal, History, Kind, Outcome, candidates, fingerprint, search, with_skips

#: Batches that sensitivity is measured on, of each dataloader.
BATCHES = 8


@dataclass(frozen=True)
class Task:
    """What is quantized, as :func:`lightning_quant.pipeline.deliver` takes it.

    Attributes:
        module: The float LightningModule. Not changed.
        sample: From :func:`lightning_quant.inputs.sample`.
        data: The validation batches.
        config: As the user gave it.
        method: dynamic or static.
        calibration_batches: How many are observed, of each process; None: all.
    """

    module: Any
    sample: Sample
    data: ValidationData
    config: QuantConfig
    method: Method
    calibration_batches: int | None = None


@dataclass(frozen=True)
class Tuned:
    """What :func:`within_bound` found, ready to be converted."""

    outcome: Outcome
    captured: Capture
    graphs: Graphs


def goal_of(
    owner: str,
    config: QuantConfig,
    *,
    max_drop: float | None,
    monitor: str | None,
    mode: Literal["min", "max"] | None,
    relative: bool,
    max_evaluations: int = 20,
    max_seconds: float | None = None,
) -> Goal | None:
    """The settings of a bound as a goal; None: there is no bound.

    Args:
        owner: Who takes these settings, for messages.
        config: What is quantized.
        max_drop: None: there is no bound. The others are those of :class:`Goal`.
        monitor: With ``max_drop`` alone, as those that follow.
        mode: The same.
        relative: The same.
        max_evaluations: The same.
        max_seconds: The same.

    Raises:
        ConfigError: They contradict each other, or the backend cannot.
    """
    if max_drop is None:
        if (monitor, mode, relative, max_seconds) != (None, None, False, None):
            raise ConfigError(
                f"{owner}(monitor=..., mode=..., relative=..., max_seconds=...) are settings of the search for layers "
                "to leave in float. Give max_drop=... as well, or leave them out."
            )
        return None
    if config.backend == "torchscript":
        raise ConfigError(
            f"{owner}(max_drop=...) with backend='torchscript': its graphs have no float form in which single layers "
            "could be quantized. Use backend='fx', 'eager' or 'pt2e'."
        )
    return Goal(
        monitor=monitor or "", max_drop=max_drop, mode=mode, relative=relative, max_evaluations=max_evaluations,
        max_seconds=max_seconds,
    )  # fmt: skip


def within_bound(
    task: Task,
    captured: Capture,
    graphs: Graphs,
    goal: Goal,
    metrics_float: dict[str, float],
    folder: Path,
    *,
    layers: Sensitivity | None = None,
) -> Tuned:
    """Leave layers in float until the goal is met. Of several processes, all have to call it.

    Args:
        task: What is quantized.
        captured: With the config of the task.
        graphs: Target name -> prepared graph, calibrated.
        goal: What has to hold.
        metrics_float: Of the float module.
        folder: Where the state of the search is kept.
        layers: From :func:`sensitivity_of`, if it is known already.

    Raises:
        ConfigError: The module does not log the metric.
    """
    if goal.monitor not in metrics_float:
        raise ConfigError(
            f"monitor={goal.monitor!r}: the module does not log it in validation. {near(goal.monitor, metrics_float)}"
        )
    reference = metrics_float[goal.monitor]
    settings = (task.config, task.method, task.calibration_batches, goal.monitor)
    team = task.data.team
    history = History(folder / STATE, fingerprint(task.module, *settings), reference, team)
    simulated = simulated_graphs(graphs)
    if not history.ordered:
        found = sensitivity_of(task, simulated) if layers is None else layers
        history.ordered = candidates(_named(found, task.module))
        history.write()
    prepared: dict[frozenset[str], tuple[Capture, Graphs]] = {frozenset(): (captured, graphs)}

    def value(left_float: frozenset[str], kind: Kind) -> float:
        if kind == "simulated":
            _switch(simulated, left_float)
            return evaluate(simulated_module(task.module, simulated), task.data)[goal.monitor]
        if left_float not in prepared:
            prepared[left_float] = prepare_again(task, left_float)
        return evaluate(convert_module(task.module, prepared[left_float][1]).module, task.data)[goal.monitor]

    names = [join(name, layer.name) for name, graph in simulated.items() for layer in simulation(graph).layers]
    outcome = search(goal, history, value, all_layers=names)
    chosen = frozenset(outcome.left_float)
    if chosen not in prepared:
        prepared[chosen] = prepare_again(task, chosen)
    return Tuned(outcome, *prepared[chosen])


def simulated_graphs(graphs: Graphs) -> Graphs:
    """Of calibrated graphs, those whose layers can be switched between float and int8."""
    return {name: simulate_graph(graph, empty_places(graph)) for name, graph in graphs.items()}


def sensitivity_of(task: Task, simulated: Graphs) -> Sensitivity:
    """What each layer of all graphs costs, on the first batches. Of several processes, all have to call it."""
    calls = record(task, simulated)
    return task.data.team.by_first(
        lambda: joined(measure(simulated[name], data, owner=name) for name, data in calls.items() if data)
    )


def _named(found: Sensitivity, module: Any) -> tuple[LayerSensitivity, ...]:
    """The layers with the submodules that can be skipped for them: what a function stands in has no name of its own."""
    return tuple(replace(layer, skip=submodule_of(module, layer.skip)) for layer in found.layers)


def submodule_of(module: Any, name: str) -> str:
    """``name``, or the nearest name around it that is one of a submodule."""
    names = {name for name, _ in module.named_modules(remove_duplicate=False)}
    while name and name not in names:
        name = name.rpartition(".")[0]
    return name


def prepare_again(task: Task, left_float: frozenset[str]) -> tuple[Capture, Graphs]:
    """Capture, prepare and calibrate with some submodules left in float."""
    return prepare_with(task, with_skips(task.config, left_float))


def prepare_with(task: Task, config: QuantConfig) -> tuple[Capture, Graphs]:
    """Capture, prepare and calibrate with another config than that of the task."""
    team = task.data.team
    captured = team.by_each(lambda: capture(task.module, task.sample, config, task.method))
    graphs = team.by_each(lambda: prepare_graphs(copy_of(task.module), captured, config, task.method))
    if task.method != "dynamic":
        data = at_most(task.data, task.calibration_batches)
        calibrate(task.module, graphs, data, batches=task.calibration_batches)
        graphs = correct(task.module, graphs, data, batches=task.calibration_batches, may_change_nothing=True)
    return captured, graphs


def simulated_module(module: Any, simulated: Graphs) -> Any:
    """A copy of ``module`` in which the targets run simulated graphs."""
    twin = copy_of(module)
    for name in inner_first(simulated):
        graph = simulated[name]
        for kept in info(graph).kept:
            put(graph, kept, twin.get_submodule(join(name, kept)))
        divert(twin.get_submodule(name), ToGraph(graph, info(graph).interface, on_cpu=True))
    return twin


def _switch(simulated: Graphs, left_float: frozenset[str]) -> None:
    for target, graph in simulated.items():
        on = [
            layer.name
            for layer in simulation(graph).layers
            if not _is_left(join(target, layer.skip) if layer.skip else target, left_float)
        ]
        switch(graph, on)


def _is_left(name: str, left_float: frozenset[str]) -> bool:
    return any(name == left or name.startswith(f"{left}.") for left in left_float)


def record(task: Task, simulated: Graphs) -> dict[str, list[tuple[Any, ...]]]:
    """Target -> what its graph is given in the first batches, in float. All layers are in float afterwards."""
    calls: dict[str, list[tuple[Any, ...]]] = {name: [] for name in simulated}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: calls[name].append(args)

    for graph in simulated.values():
        switch(graph, ())
    handles = [graph.register_forward_pre_hook(keep(name)) for name, graph in simulated.items()]
    try:
        evaluate(simulated_module(task.module, simulated), at_most(task.data, BATCHES))
    finally:
        for handle in handles:
            handle.remove()
    return calls
