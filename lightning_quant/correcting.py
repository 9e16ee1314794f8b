"""Corrections after calibration on a LightningModule: the data is that of its own validation loop.

The first batches are recorded as they reach each target. Of several processes rank 0 corrects, with its share of the
data, and the others make the same changes, to the bit; ranges are observed again by all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_quant.backends.graph import info
from lightning_quant.config import CorrectionName
from lightning_quant.corrections import MOVES_RANGES, apply, check_changed
from lightning_quant.corrections.recording import Calls, begin_again
from lightning_quant.corrections.sending import Changes, changes_of, make
from lightning_quant.evaluate import ValidationData, at_most, copy_of, evaluate
from lightning_quant.parts import Graphs
from lightning_quant.pipeline import calibrate
from lightning_quant.placement import Observed, divert
from lightning_quant.progress import SILENT, Progress

#: Batches that are recorded, of each dataloader.
BATCHES = 8
#: Rows of them that are kept, in whole batches: a correction has the activations of a layer of all of them in memory.
ROWS = 512


def correct(
    module: Any,
    graphs: Graphs,
    data: ValidationData,
    *,
    batches: int | None = None,
    progress: Progress = SILENT,
    may_change_nothing: bool = False,
) -> Graphs:
    """The graphs with the corrections of the config that they were prepared with. Of several processes, all call it.

    Args:
        module: The float LightningModule. Not changed.
        graphs: Target name -> prepared graph, calibrated. Changed in place, where there are corrections.
        data: The validation batches.
        batches: How many of them were observed, of each process; None: all.
        progress: Where lines show the steps.
        may_change_nothing: A correction that finds nothing to change is no error: where a search has left layers in
            float, they may have been all that it was for.

    Raises:
        ConfigError: As the corrections raise it.
    """
    names = next((info(graph).config.corrections for graph in graphs.values()), ())
    if not names:
        return graphs
    first = tuple(name for name in names if name in MOVES_RANGES)
    calls = _recorded(module, graphs, data, batches)
    if first:
        _make(graphs, calls, first, data, progress)
        for graph in graphs.values():
            begin_again(graph)
        calibrate(module, graphs, at_most(data, batches), batches=batches, progress=progress)
    rest = tuple(name for name in names if name not in first)
    if rest:
        _make(graphs, calls, rest, data, progress)
    if not may_change_nothing:
        check_changed(graphs.values())
    return graphs


def _make(
    graphs: Graphs, calls: dict[str, Calls], names: tuple[CorrectionName, ...], data: ValidationData, progress: Progress
) -> None:
    def found() -> dict[str, Changes]:
        return {
            name: changes_of(apply(graph, list(calls[name]), names)) for name, graph in graphs.items() if calls[name]
        }

    with progress.step("Correcting", None):
        for name, changes in data.team.by_first(found).items():
            make(graphs[name], changes)


def _recorded(module: Any, graphs: Graphs, data: ValidationData, batches: int | None) -> dict[str, Calls]:
    """Target -> what its graph is given in the first batches, in float."""
    calls: dict[str, Calls] = {name: [] for name in graphs}
    twin = copy_of(module)
    for name, graph in graphs.items():
        divert(twin.get_submodule(name), Observed(_Recorder(calls[name]), info(graph).interface))
    count = BATCHES if batches is None else min(batches, BATCHES)
    evaluate(twin, at_most(data, count))
    return {name: _few(found) for name, found in calls.items()}


class _Recorder(nn.Module):
    """Keeps what it is given."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.keep: Callable[[tuple[Any, ...]], None] = calls.append

    def forward(self, *args: Any) -> None:
        """Copies, because the module may change them."""
        self.keep(tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else copy.copy(x), args))


def _few(calls: Calls) -> Calls:
    """The first whole batches that have no more than ``ROWS`` rows together, one at the least."""
    kept: Calls = []
    rows = 0
    for call in calls:
        first = next((x for x in tree_flatten(call)[0] if isinstance(x, torch.Tensor) and x.dim()), None)
        rows += 1 if first is None else first.shape[0]
        if kept and rows > ROWS:
            break
        kept.append(call)
    return kept
