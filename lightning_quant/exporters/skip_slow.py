"""Which layers does a runtime run slower in int8? Measured on this machine, by files with some of them in float."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn

from lightning_quant.analysis.latency import latency_ms
from lightning_quant.exporters.layouts import Layout, int8_layers, laid_out

#: Formats with a runtime of their own. ``pt2`` is what others compile, and keeps everything.
FORMATS = ("onnx", "openvino", "aoti")
#: Of those, the ones that take so long to compile that only the whole is tried.
WHOLE = ("aoti",)
#: The layers are tried in this many groups of neighbours: at each border to float, a tensor is converted.
GROUPS = 6
#: What has to be gained: files that are as fast stay in int8.
GAIN = 0.02
#: Where all in int8 takes less than this share of the time of all in float, no group is tried: a dozen files would be
#: written for a few per cent.
CLEAR = 0.75

#: With so many samples that all in float takes longer, no group is tried: fewer samples tell the same sooner.
LONG_MS = 500.0

Export = Callable[[torch.export.ExportedProgram, Path], nn.Module]
#: What a call is timed with: one tuple of inputs for each number of samples, the smallest first.
Data = Sequence[tuple[Any, ...]]
Names = tuple[str, ...]
#: Milliseconds, one figure for each number of samples.
Times = tuple[float, ...]


def is_slower(one: Callable[..., Any], other: Callable[..., Any], data: Data) -> bool:
    """Whether ``one`` takes longer than ``other`` here, by more than the noise: with any of ``data``."""
    for inputs in data:
        times = latency_ms({"one": partial(one, *inputs), "other": partial(other, *inputs)})
        if times["other"] < times["one"] * (1 - GAIN):
            return True
    return False


def search(
    program: torch.export.ExportedProgram, layout: Layout | None, export: Export, data: Data, *, whole: bool = False
) -> Names:
    """The layers to leave in float, so that a file is as fast as this can make it: never slower than all in float.

    Groups of neighbouring layers are tried one at a time, from the faster of all in int8 and all in float; those that
    help are joined, and the result is measured against both. Where int8 is clearly faster, it is left at that. One file
    serves every number of samples: files are compared by the geometric mean of their times, and one that is slower than
    float with any of them is not taken.

    Args:
        program: In the neutral form.
        layout: Of the runtime.
        export: Writes a program into a folder, and loads the file.
        data: What is timed.
        whole: Try all in float, and no part of it.

    Returns:
        Names of layers, as of :func:`lightning_quant.exporters.layouts.int8_layers`. All of them: nothing is faster.
    """
    layers = tuple(int8_layers(laid_out(program, layout)))
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(program, layout, export, data, Path(folder))
        times = trial.times([(), layers])
        if not layers:
            return ()
        if whole:
            return layers if _is_slower(times[()], times[layers]) else ()
        if all(int8 < CLEAR * in_float for int8, in_float in zip(times[()], times[layers], strict=True)):
            return ()
        trial.data = [inputs for inputs, ms in zip(data, times[layers], strict=True) if ms < LONG_MS] or data[:1]
        from_float = geometric_mean(times[layers]) < geometric_mean(times[()])
        base = layers if from_float else ()
        groups = _split(layers, GROUPS)
        changed = {group: _toggled(layers, base, group) for group in groups}
        means = trial.means([base, *changed.values()])
        helping = [group for group in groups if means[changed[group]] < means[base] * (1 - GAIN / 2)]
        joined = _toggled(layers, base, tuple(name for group in helping for name in group))
        single = min(changed.values(), key=lambda names: means[names])
        trial.data = data
        times = trial.times(list(dict.fromkeys([(), layers, joined, single])))
    means = {names: geometric_mean(found) for names, found in times.items() if not _is_slower(found, times[layers])}
    best = min(means.values())
    # of those that are as fast, the one with the most in int8
    return min((names for names in means if means[names] <= best * (1 + GAIN)), key=len)


def _is_slower(one: Times, other: Times) -> bool:
    return any(b < a * (1 - GAIN) for a, b in zip(one, other, strict=True))


def _toggled(layers: Sequence[str], base: Sequence[str], group: Sequence[str]) -> Names:
    """``base`` with those of ``group`` the other way."""
    return tuple(name for name in layers if (name in base) != (name in group))


def _split(layers: Names, number: int) -> list[Names]:
    number = min(number, len(layers))
    ends = [round(len(layers) * k / number) for k in range(number + 1)]
    return [layers[start:end] for start, end in pairwise(ends)]


class _Trial:
    """Files with some layers in float, each written once."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        layout: Layout | None,
        export: Export,
        data: Data,
        folder: Path,
    ) -> None:
        self.program, self.layout, self.export, self.data, self.folder = program, layout, export, data, folder
        self.loaded: dict[Names, nn.Module] = {}

    def times(self, candidates: list[Names]) -> dict[Names, Times]:
        """The times of each set of layers in float; all measured in turns."""
        for names in candidates:
            if names not in self.loaded:
                folder = self.folder / str(len(self.loaded))
                folder.mkdir()
                self.loaded[names] = self.export(laid_out(self.program, self.layout, names), folder)
        found: list[dict[str, float]] = []
        for inputs in self.data:
            calls: dict[str, Callable[[], Any]] = {
                str(i): partial(self.loaded[names], *inputs) for i, names in enumerate(candidates)
            }
            found.append(latency_ms(calls, rounds=9, budget_s=1.0))
        return {names: tuple(times[str(i)] for times in found) for i, names in enumerate(candidates)}

    def means(self, candidates: list[Names]) -> dict[Names, float]:
        """The geometric mean of the times of each: by how much it is faster counts, with many samples as with few."""
        return {names: geometric_mean(times) for names, times in self.times(candidates).items()}
