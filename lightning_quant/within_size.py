"""Weights of 4 bits in the layers where they cost least, until the files are as small as was asked for.

Files of ONNX and OpenVINO store weights of 4 bits and fewer in 4 bits. What else is in a file is seen by writing it.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_quant.analysis.bit_costs import BitCosts, bit_costs
from lightning_quant.backends.weighted import weighted_layers
from lightning_quant.capture import Capture
from lightning_quant.config import ExportConfig, FormatName, LayerConfig, Method, QuantConfig, TensorSpec
from lightning_quant.config import resolve_formats as formats_of_export
from lightning_quant.errors import ConfigError
from lightning_quant.exporters import Facts, write
from lightning_quant.fallback import Task, Tuned, prepare_with, record, simulated_graphs, submodule_of
from lightning_quant.figures import class_labels
from lightning_quant.formatting import shown_bytes
from lightning_quant.parts import Graphs, convert_module, join, parts_of
from lightning_quant.qconfig import WEIGHTED
from lightning_quant.report import QuantReport
from lightning_quant.tuning import described
from lightning_quant.tuning.bit_widths import WeightCosts, choose_bits
from lightning_quant.tuning.size import bytes_of

log = logging.getLogger(__name__)

#: Formats whose files store weights of 4 bits in 4.
SMALL: tuple[FormatName, ...] = ("onnx", "openvino")
#: What is tried besides the bits that a layer has. With 3 or 2 no file is smaller.
FEW = 4
#: How often files are written until what is in them besides weights is known.
_ROUNDS = 4
#: For the metrics, which are not known yet when a file is tried.
_ROOM = 1024


@dataclass(frozen=True, kw_only=True)
class SizeOutcome:
    """What a search for bits ended with.

    Attributes:
        max_size: What was asked for.
        formats: Whose files have to be as small.
        entries: Of ``QuantConfig.layers``, those that were added.
        bits: Submodule -> bits of its weights, where these are fewer than before.
    """

    max_size: str
    formats: tuple[FormatName, ...]
    entries: tuple[LayerConfig, ...] = ()
    bits: Mapping[str, int]

    def config(self, given: QuantConfig) -> QuantConfig:
        """The one that gives the result without the search."""
        return replace(given, layers=(*given.layers, *self.entries))


@dataclass(frozen=True)
class Fitted:
    """What :func:`within_size` found, ready to be converted."""

    outcome: SizeOutcome
    captured: Capture
    graphs: Graphs


def check_max_size(
    max_size: str, config: QuantConfig, method: Method, export: ExportConfig, max_drop: float | None
) -> None:
    """Refuse a bound that nothing could be done for.

    Raises:
        ConfigError: It is no size, or contradicts another setting.
    """
    bytes_of(max_size)
    shown = f"max_size={max_size!r}"
    if max_drop is not None:
        raise ConfigError(
            f"{shown} and max_drop={max_drop!r}: one makes files smaller, the other larger, and either could undo what "
            "the other needs. Give max_size, take tuned_config, and give that as config with max_drop."
        )
    if method == "dynamic":
        raise ConfigError(f"{shown} with method='dynamic': its files store weights in 8 bits. Use method='static'.")
    if export.skip_slow:
        raise ConfigError(
            f"{shown} with ExportConfig(skip_slow=True): layers that a runtime runs slower in int8 are stored in "
            "float, in 32 bits. Leave out one of the two."
        )
    if not _formats(config, method, export):
        raise ConfigError(
            f"{shown}: of the files that are to be written none stores weights in fewer than 8 bits. Let formats have "
            f"{' or '.join(map(repr, SMALL))}, with backend='fx', 'eager' or 'pt2e'."
        )


def _formats(config: QuantConfig, method: Method, export: ExportConfig) -> tuple[FormatName, ...]:
    formats, _ = formats_of_export(config, method, export)
    return tuple(name for name in formats if name in SMALL)


def within_size(task: Task, captured: Capture, graphs: Graphs, max_size: str, export: ExportConfig) -> Fitted:
    """Give layers weights of 4 bits until files are as small as asked for. Of several processes, all have to call it.

    The noise of the output is the least that there is at this size, as far as noises of layers add up. Where all
    weights of 4 bits are not enough, that is what is given: the size of the files that are delivered decides.

    Args:
        task: What is quantized.
        captured: With the config of the task.
        graphs: Target name -> prepared graph, calibrated.
        max_size: Of the files of one format.
        export: Which files.
    """
    team = task.data.team
    formats = _formats(task.config, task.method, export)
    limit = bytes_of(max_size) - _ROOM
    found = Fitted(SizeOutcome(max_size=max_size, formats=formats, bits={}), captured, graphs)
    size = team.by_first(partial(_size, task, found))
    if size <= limit:
        return found
    costs = _costs(task, captured, graphs)
    budget = limit - (size - sum(max(layer.sizes.values()) for layer in costs))
    for _ in range(_ROUNDS):
        before = found.outcome.bits
        chosen = choose_bits(costs, budget)
        bits = {name: FEW for name, width in chosen.items() if width == FEW}
        if bits == before:  # there is nothing left to be made smaller
            break
        outcome = replace(found.outcome, bits=bits, entries=_entries(task.config, captured, chosen))
        found = Fitted(outcome, *prepare_with(task, outcome.config(task.config)))
        size = team.by_first(partial(_size, task, found))
        if size <= limit:
            break
        budget -= size - limit
    return found


def _size(task: Task, found: Fitted) -> int:
    """Bytes of the files of the format that takes the most, by writing them."""
    quantized = convert_module(task.module, found.graphs)
    programs = [part.program for part in parts_of(quantized, task.sample, found.captured)]
    with tempfile.TemporaryDirectory() as folder:
        artifacts, _ = write(
            programs, found.outcome.formats, Path(folder), facts=Facts({}, class_labels(quantized.float_module))
        )
    return max(sum(a.size_bytes for a in artifacts if a.format == name) for name in found.outcome.formats)


def _costs(task: Task, captured: Capture, graphs: Graphs) -> list[WeightCosts]:
    """Submodules whose weights may have fewer bits, with what these take and cost."""
    simulated = simulated_graphs(graphs)
    calls = record(task, simulated)

    def measured() -> list[WeightCosts]:
        rows: dict[str, list[tuple[BitCosts, int]]] = {}
        for name, graph in graphs.items():
            layers = weighted_layers(graph)
            given = {layer.name: _bits(layer.quantization) for layer in layers}
            widths = sorted({FEW, *(bits for bits in given.values() if bits)})
            for cost in bit_costs(simulated[name], layers, calls[name], widths):
                place = submodule_of(task.module, join(name, cost.skip) if cost.skip else name)
                rows.setdefault(place, []).append((cost, given[cost.name]))
        return [_together(place, own) for place, own in rows.items() if _can_be_named(task.module, place, rows)]

    found: list[WeightCosts] = task.data.team.by_first(measured)
    return [layer for layer in found if FEW in layer.sizes and len(layer.sizes) > 1]


def _bits(how: Any) -> int:
    """Of integers up to a largest one; 0: they are floats."""
    return 0 if how is None else int(how.quant_max).bit_length() + 1


def _together(name: str, rows: Sequence[tuple[BitCosts, int]]) -> WeightCosts:
    """Layers that one name stands for, which have the bits that they are given, or few."""
    given = max(bits for _, bits in rows)
    if min(bits for _, bits in rows) <= FEW:
        return WeightCosts(name=name, sizes={given: 0}, noises={given: 0.0})
    weights = [cost.weights for cost, _ in rows]
    return WeightCosts(
        name=name,
        sizes={given: sum(weights), FEW: sum((count + 1) // 2 for count in weights)},
        noises={
            given: sum(cost.noises[bits] for cost, bits in rows),
            FEW: sum(cost.noises[FEW] for cost, _ in rows),
        },
    )


def _can_be_named(module: Any, name: str, known: Mapping[str, Any]) -> bool:
    """Whether an entry of this name speaks of no layer but those that were measured."""
    if not name:
        return False
    inside = module.get_submodule(name).named_modules(prefix=name)
    return all(n == name or n in known for n, part in inside if isinstance(part, WEIGHTED))


def _entries(config: QuantConfig, captured: Capture, chosen: Mapping[str, int]) -> tuple[LayerConfig, ...]:
    """What ``QuantConfig.layers`` says of them, with all else that it said of them before."""
    few = [name for name, width in chosen.items() if width == FEW]
    # what stays as it is needs an entry where that of a module around it would speak of it
    others = [n for n in chosen if n not in few and any(n.startswith(f"{around}.") for around in few)]
    entries = []
    for name in (*few, *others):
        known = captured.layers.get(name, LayerConfig(name=name, dtype="int8"))
        weight = known.weight or config.weight
        weight = replace(weight, bits=FEW) if name in few else weight
        entries.append(LayerConfig(name=name, activation=known.activation, weight=weight))
    return tuple(entries)


def size_described(outcome: SizeOutcome, report: QuantReport) -> tuple[dict[str, Any], str]:
    """The result for a report, and in words: the files that were delivered decide whether the bound is met."""
    sizes = {name: report.formats[name].size_bytes for name in outcome.formats if name in report.formats}
    name, size = max(sizes.items(), key=lambda item: item[1], default=("", 0))
    met = bool(sizes) and size <= bytes_of(outcome.max_size)
    found = {
        "max_size": outcome.max_size,
        "format": name,
        "size_bytes": size,
        "is_met": met,
        "bits": dict(outcome.bits),
        "layers": [asdict(entry) for entry in outcome.entries],
    }
    names = ", ".join(outcome.bits)
    which = f"Weights of {FEW} bits: {names}." if names else "No layer has fewer bits for it."
    again = " Without a search: the config of callback.tuned_config." if names else ""
    if met:
        return found, f"Files of at most {outcome.max_size}: {name} has {shown_bytes(size)}. {which}{again}"
    text = (
        f"THE BOUND IS NOT MET: files of at most {outcome.max_size} were asked for, and {name} has "
        f"{shown_bytes(size)}, with weights of {FEW} bits wherever there can be. {which}{again} Allow more (max_size), "
        "or take a smaller network."
    )
    return found, text


def amended(report: QuantReport, found: Tuned | Fitted | None) -> QuantReport:
    """The report with what a search has found, by the files and metrics that were delivered. A miss is a warning."""
    if found is None:
        return report
    if isinstance(found, Fitted):
        record, text = size_described(found.outcome, report)
    else:
        record, text = described(found.outcome, report.metrics_int8)
    if not record["is_met"]:
        log.warning("%s", text)
    return replace(report, search=record, notes=[*report.notes, text])


def with_layers(config: QuantConfig, entries: Sequence[Mapping[str, Any]]) -> QuantConfig:
    """``config`` with the entries of a record of :func:`size_described`."""
    return replace(config, layers=(*config.layers, *(_entry(dict(entry)) for entry in entries)))


def _entry(values: dict[str, Any]) -> LayerConfig:
    specs = {key: None if values[key] is None else TensorSpec(**values[key]) for key in ("activation", "weight")}
    return LayerConfig(**{**values, **specs})
