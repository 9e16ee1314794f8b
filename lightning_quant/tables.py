"""What the command shows on the console of files and of comparisons."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_quant.analysis.comparison import Comparison
from lightning_quant.analysis.kernels import SHOWN, kernels
from lightning_quant.config import LayerConfig, QuantConfig, TensorSpec
from lightning_quant.errors import MissingExtraError
from lightning_quant.formatting import shown_bytes, shown_db, shown_number, shown_shape, shown_threads
from lightning_quant.runtime import files_of, load


def print_table(console: Console, title: str, head: Sequence[str], rows: Any, right: bool = False) -> None:
    """A table below its title; ``right``: all columns but the first are figures. Without a head, it has none."""
    table = Table(show_header=any(head))
    for number, text in enumerate(head):
        table.add_column(text, justify="right" if right and number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def print_file(path: Path, metadata: dict[str, Any], full: bool) -> None:
    """What a file says of itself; ``full``: with the settings that are the defaults."""
    console = Console()
    print_table(console, str(path), ("", ""), _facts(path, metadata))
    settings = _settings(metadata["config"], full)
    if settings:
        title = "settings" if full else "settings that differ from the defaults"
        print_table(console, title, ("setting", "value"), settings)
    inputs = zip(
        metadata["tensors"],
        map(shown_shape, metadata["shapes"]),
        map(shown_shape, metadata["input_shapes"]),
        metadata["input_dtypes"],
        strict=True,
    )
    print_table(console, "inputs (*: any size)", ("name", "shape", "exported with", "dtype"), inputs)
    outputs = zip(metadata["outputs"], metadata["output_dtypes"], strict=True)
    print_table(console, "outputs", ("name", "dtype"), outputs)
    if state := metadata.get("state"):
        kept = [(e["name"], shown_shape(e["shape"]), e["dtype"], e["input"], e["output"]) for e in state]
        print_table(console, "state", ("buffer", "shape", "dtype", "input", "output"), kept)
    if metadata["metrics"]:
        title = "metrics of the model"
        print_table(console, title, ("", *metadata["metrics"]), _metrics(metadata["metrics"]), right=True)
    if metadata["left_float"]:
        names = ", ".join(name or "everything" for name in metadata["left_float"])
        console.print(f"in float in this file, because its runtime is faster so: {names}", markup=False)
    if path.name.endswith(SHOWN):
        console.print(_shown_kernels(path), markup=False)


def _facts(path: Path, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    files = [file for file in files_of(path) if file.is_file()]
    missing = [file.name for file in files_of(path) if not file.is_file()]
    labels = metadata["class_labels"]
    facts = {
        "format": metadata["format"],
        "method": metadata["method"],
        "target": metadata["target"] or "forward",
        "written by": f"lightning_quant {metadata['lightning_quant']}, torch {metadata['torch']}",
        "size": shown_bytes(sum(file.stat().st_size for file in files)),
        "weights": f"{', '.join(missing)} is not beside it" if missing else "",
        "class labels": "" if labels is None else ", ".join(map(str, labels)),
    }
    return [(name, value) for name, value in facts.items() if value]


def _settings(config: dict[str, Any], full: bool) -> list[tuple[str, str]]:
    """``("activation.observer", "percentile")`` of each setting; without ``full``, of those that differ."""
    usual = dict(_flat(json.loads(json.dumps(asdict(QuantConfig())))))
    usual |= {f"layers[].{field.name}": field.default for field in fields(LayerConfig)}
    spec = _flat(asdict(TensorSpec()))
    usual |= {f"layers[].{kind}.{name}": value for kind in ("activation", "weight") for name, value in spec}
    found = [(name, value, re.sub(r"\[\d+\]", "[]", name)) for name, value in _flat(config)]
    return [(name, json.dumps(value)) for name, value, key in found if full or key not in usual or value != usual[key]]


def _flat(values: dict[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """``("layers[0].weight.dtype", "auto")``: the values inside of containers, with their names."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{above}{name}.")
        elif isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
            found += _flat({f"{name}[{i}]": part for i, part in enumerate(value)}, above)
        else:
            found.append((above + name, value))
    return found


def _metrics(metrics: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    names = sorted({name for values in metrics.values() for name in values})
    return [(name, *(shown_number(values.get(name)) for values in metrics.values())) for name in names]


def _shown_kernels(path: Path) -> str:
    """What the file's runtime makes of it, where it is installed."""
    try:
        load(path)  # says what is wrong with a file that cannot be run
        found = kernels(path)
    except MissingExtraError as error:
        return f"int8 kernels: {error}"
    except ImportError as error:
        return f"int8 kernels: the package {error.name!r} is not installed"
    assert found is not None  # as it is for these files
    return (
        f"int8 kernels: {found.int8} of {found.int8 + found.floating} (convolutions and matrix products). Quantize and "
        f"dequantize that stayed steps of their own: {found.conversions}"
    )


def print_comparison(first: str, second: str, found: Comparison) -> None:
    """What two files compute, how fast, and how large they are."""
    console = Console()
    outputs = [
        (
            output.name,
            "" if output.sqnr_db is None else shown_db(output.sqnr_db),
            f"{output.max_abs_difference:.4g}",
            "" if output.agreement is None else f"{100 * output.agreement:.2f} %",
        )
        for output in found.outputs
    ]
    samples = f"{found.samples} sample{'s' * (found.samples != 1)}"
    head = ("output", "SQNR", "largest difference", "agreement")
    print_table(console, f"{second} against {first}, {samples}", head, outputs, right=True)
    title = f"one call with a batch of {found.batch_size}, {shown_threads(found.num_threads)}"
    rows = [
        (name, f"{latency:.3f} ms", shown_bytes(size))
        for name, latency, size in zip((first, second), found.latency_ms, found.size_bytes, strict=True)
    ]
    print_table(console, title, ("file", "latency", "size"), rows, right=True)
    if found.random:
        console.print(
            "The data was random, and not what the ranges were taken from: these figures say little of real data. "
            "Give some with --data FILE.",
            markup=False,
        )
