"""Which layers does a runtime run slower in int8? Measured on this machine, by files with some of them in float."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
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

Export = Callable[[torch.export.ExportedProgram, Path], nn.Module]


def is_slower(one: Callable[..., Any], other: Callable[..., Any], data: tuple[Any, ...]) -> bool:
    """Whether ``one`` takes longer than ``other`` here, by more than the noise."""
    times = latency_ms({"one": lambda: one(*data), "other": lambda: other(*data)})
    return times["other"] < times["one"] * (1 - GAIN)


def search(
    program: torch.export.ExportedProgram,
    layout: Layout | None,
    export: Export,
    data: tuple[Any, ...],
    *,
    whole: bool = False,
) -> tuple[str, ...]:
    """The layers to leave in float, so that a file is as fast as this can make it: never slower than all in float.

    Groups of neighbouring layers are tried one at a time, from the faster of all in int8 and all in float; those that
    help are joined, and the result is measured against both. Where int8 is clearly faster, it is left at that.

    Args:
        program: In the neutral form.
        layout: Of the runtime.
        export: Writes a program into a folder, and loads the file.
        data: What is timed: one sample.
        whole: Try all in float, and no part of it.

    Returns:
        Names of layers, as of :func:`lightning_quant.exporters.layouts.int8_layers`. All of them: nothing is faster.
    """
    layers = tuple(int8_layers(laid_out(program, layout)))
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(program, layout, export, data, Path(folder))
        times = trial.times([(), layers])
        if not layers or whole:
            return layers if times[layers] < times[()] * (1 - GAIN) else ()
        if times[()] < CLEAR * times[layers]:
            return ()
        from_float = times[layers] < times[()]
        base = layers if from_float else ()
        groups = _split(layers, GROUPS)
        changed = {group: _toggled(layers, base, group) for group in groups}
        times = trial.times([base, *changed.values()])
        helping = [group for group in groups if times[changed[group]] < times[base] * (1 - GAIN / 2)]
        joined = _toggled(layers, base, tuple(name for group in helping for name in group))
        single = min(changed.values(), key=lambda names: times[names])
        times = trial.times(list(dict.fromkeys([(), layers, joined, single])))
    best = min(times, key=lambda names: times[names])
    # of those that are as fast, the one with the most in int8
    return min((names for names in times if times[names] <= times[best] * (1 + GAIN)), key=len)


def _toggled(layers: Sequence[str], base: Sequence[str], group: Sequence[str]) -> tuple[str, ...]:
    """``base`` with those of ``group`` the other way."""
    return tuple(name for name in layers if (name in base) != (name in group))


def _split(layers: tuple[str, ...], number: int) -> list[tuple[str, ...]]:
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
        data: tuple[Any, ...],
        folder: Path,
    ) -> None:
        self.program, self.layout, self.export, self.data, self.folder = program, layout, export, data, folder
        self.loaded: dict[tuple[str, ...], nn.Module] = {}

    def times(self, candidates: list[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        """Milliseconds of one sample, of each set of layers in float; all measured in turns."""
        for names in candidates:
            if names not in self.loaded:
                folder = self.folder / str(len(self.loaded))
                folder.mkdir()
                self.loaded[names] = self.export(laid_out(self.program, self.layout, names), folder)
        calls: dict[str, Callable[[], Any]] = {
            str(i): partial(self.loaded[names], *self.data) for i, names in enumerate(candidates)
        }
        found = latency_ms(calls, rounds=9, budget_s=1.0)
        return {names: found[str(i)] for i, names in enumerate(candidates)}
