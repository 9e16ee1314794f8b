"""What all corrections do: record what the graphs of a prepared model are given, change a copy, observe again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from lightning_quant import observers
from lightning_quant._torch_ao import quiet
from lightning_quant.backends import as_call
from lightning_quant.backends.graph import Correction, info, is_graph, sees_weights, with_info
from lightning_quant.backends.graph import observers as observers_of
from lightning_quant.config import MAKING_UP, CorrectionName
from lightning_quant.devices import device_of
from lightning_quant.errors import CaptureError, ConfigError

#: What a graph is given, one tuple for each batch.
Calls = list[tuple[Any, ...]]


def changed(prepared: nn.Module, batches: Iterable[Any], change: Callable[[fx.GraphModule, Calls], None]) -> nn.Module:
    """A copy of what :func:`lightning_quant.prepare` gave, in which each graph is changed in place.

    Args:
        prepared: Not changed.
        batches: Inputs, each a tensor, a tuple of positional or a dict of keyword arguments.
        change: Given a graph, and what it is given in the batches, both on the CPU.

    Returns:
        The copy, on the device of ``prepared``.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        ConfigError: There is no batch; ``prepared`` is on several devices.
    """
    names = graphs_of(prepared)
    calls = recorded(prepared, names, batches)
    device = device_of(prepared)
    twin = copy.deepcopy(prepared).cpu()
    for name in names:
        if calls[name]:
            graph_module = twin.get_submodule(name)
            assert isinstance(graph_module, fx.GraphModule)  # what a backend prepares is one
            change(graph_module, calls[name])
    return twin.to(device)


def changed_without_data(prepared: nn.Module, change: Callable[[fx.GraphModule], None]) -> nn.Module:
    """As :func:`changed`, for what needs no inputs.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        ConfigError: ``prepared`` is on several devices.
    """
    names = graphs_of(prepared)
    device = device_of(prepared)
    twin = copy.deepcopy(prepared).cpu()
    for name in names:
        graph_module = twin.get_submodule(name)
        assert isinstance(graph_module, fx.GraphModule)
        change(graph_module)
    return twin.to(device)


def graphs_of(prepared: nn.Module) -> list[str]:
    """The names of the graphs in what :func:`lightning_quant.prepare` gave, one at the least.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
    """
    names = [name for name, module in prepared.named_modules() if is_graph(module)]
    if not names:
        raise CaptureError(f"{type(prepared).__name__} was not made by lightning_quant.prepare: prepare it first.")
    return names


def recorded(prepared: nn.Module, names: Iterable[str], batches: Iterable[Any]) -> dict[str, Calls]:
    """Name of each graph -> what it is given in float. ``prepared`` is not changed: a copy runs."""
    twin = copy.deepcopy(prepared).cpu()
    calls: dict[str, Calls] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: calls[name].append(tree_map(_kept, args))

    for name in calls:
        twin.get_submodule(name).register_forward_pre_hook(keep(name))
    with torch.no_grad(), quiet():
        for batch in batches:
            call = as_call(batch)
            args, keywords = tree_map(_on_cpu, (call.args, call.keywords))
            twin(*args, **keywords)
    if not any(calls.values()):
        raise ConfigError("batches=...: there is no batch. Give some of the data that it was calibrated on.")
    return calls


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _kept(value: Any) -> Any:
    # a copy: the graph may change what it is given
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def begin_again(graph_module: nn.Module) -> None:
    """Let the observers of activations forget what they have seen.

    Raises:
        ConfigError: A user's own observer cannot.
    """
    for name, module in observers_of(graph_module).items():
        if sees_weights(graph_module, name):
            continue
        observer: Any = module
        if observers.is_histogram(observer):
            observers.complete(observer, observer.search, observer.percentile)
        elif hasattr(observer, "reset_min_max_vals"):
            observer.reset_min_max_vals()
        elif not type(observer).__module__.startswith(("torch.", "torchao.", "lightning_quant.")):
            raise ConfigError(
                f"{type(observer).__name__} has seen activations that are about to change, and has no "
                "reset_min_max_vals by which it would begin again. Define it, or leave out the correction."
            )


def observe_again(graph_module: nn.Module, calls: Calls) -> None:
    """Take the ranges of activations from ``calls`` alone: the weights in front of them have changed."""
    begin_again(graph_module)
    with torch.no_grad(), quiet():
        for call in calls:
            graph_module(*tree_map(_kept, call))


def refuse_second(
    graph_module: nn.Module, name: CorrectionName, *, may_follow: tuple[CorrectionName, ...] = ()
) -> None:
    """Refuse to make up for errors of rounding where another correction has done it.

    Behind it the graph in float is no longer the float model.

    Args:
        graph_module: Prepared.
        name: Of the correction.
        may_follow: Those that it can follow none the less.

    Raises:
        ConfigError: One did.
    """
    made = (one.name for one in info(graph_module).corrected if one.name in MAKING_UP and one.name not in may_follow)
    done = next(made, None)
    if done is not None:
        raise ConfigError(
            f"{name}: {done} made up for errors of rounding already, and {name} would take what it did for an error. "
            "Give what was not corrected so."
        )


def note(graph_module: nn.Module, name: CorrectionName, changes: int, of: str) -> None:
    """Write down what a correction did to a graph, for the report.

    Args:
        graph_module: Prepared.
        name: Of the correction.
        changes: How many.
        of: Of what, in the plural.
    """
    known = info(graph_module)
    with_info(graph_module, replace(known, corrected=(*known.corrected, Correction(name, changes, of))))
