"""The ``lightning-quant`` command: each function is one, its parameters are the options."""

from __future__ import annotations

import json as _json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import CLI
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_quant import demo as _demo
from lightning_quant.analysis.comparison import Comparison, read_data
from lightning_quant.analysis.comparison import compare as _compare
from lightning_quant.analysis.kernels import SHOWN, kernels
from lightning_quant.config import LayerConfig, QuantConfig, TensorSpec
from lightning_quant.custom import load_class
from lightning_quant.errors import ArtifactError, MissingExtraError, QuantizationError
from lightning_quant.formatting import shown_bytes, shown_db, shown_number, shown_shape, shown_threads
from lightning_quant.from_checkpoint import export_checkpoint
from lightning_quant.runtime import files_of, load, read_metadata


def demo(directory: str = "demo_quantized", epochs: int = 4, seed: int = 0) -> None:
    """Quantize a small network on scikit-learn's digits, after and while training, and compare it with float.

    Args:
        directory: Where the files go.
        epochs: Of each training.
        seed: Of weights and order.
    """
    _demo.run(directory, epochs, seed)


def inspect(file: str, json: bool = False, full: bool = False) -> None:
    """Print what a file says of itself: format, versions, settings, inputs, outputs, metrics.

    Args:
        file: A file that this package wrote, of any format.
        json: Print the metadata alone, as JSON. Needs no runtime.
        full: Print all settings, and not only those that differ from the defaults.
    """
    path = Path(file)
    metadata = read_metadata(path)
    if json:
        sys.stdout.write(_json.dumps(metadata, indent=2) + "\n")
        return
    console = Console()
    _print_table(console, str(path), ("", ""), _facts(path, metadata))
    settings = _settings(metadata["config"], full)
    if settings:
        title = "settings" if full else "settings that differ from the defaults"
        _print_table(console, title, ("setting", "value"), settings)
    inputs = zip(
        metadata["tensors"],
        map(shown_shape, metadata["shapes"]),
        map(shown_shape, metadata["input_shapes"]),
        metadata["input_dtypes"],
        strict=True,
    )
    _print_table(console, "inputs (*: any size)", ("name", "shape", "exported with", "dtype"), inputs)
    outputs = zip(metadata["outputs"], metadata["output_dtypes"], strict=True)
    _print_table(console, "outputs", ("name", "dtype"), outputs)
    if state := metadata.get("state"):
        rows = [(e["name"], shown_shape(e["shape"]), e["dtype"], e["input"], e["output"]) for e in state]
        _print_table(console, "state", ("buffer", "shape", "dtype", "input", "output"), rows)
    if metadata["metrics"]:
        title = "metrics of the model"
        _print_table(console, title, ("", *metadata["metrics"]), _metrics(metadata["metrics"]), right=True)
    if metadata["left_float"]:
        names = ", ".join(name or "everything" for name in metadata["left_float"])
        console.print(f"in float in this file, because its runtime is faster so: {names}", markup=False)
    if path.name.endswith(SHOWN):
        console.print(_kernels(path), markup=False)


def compare(
    first: str,
    second: str,
    data: str | None = None,
    batch_size: int | None = None,
    min_sqnr: float | None = None,
) -> None:
    """Run two files on the same data: what they compute, how fast, and how large they are.

    Args:
        first: The reference.
        second: The other file, with the same inputs and outputs.
        data: Arrays in a file: .npz (by the names of the inputs), .npy (one input) or .pt. Default: random numbers.
        batch_size: Samples for each call. Default: 1, or as many as a file was made for.
        min_sqnr: Fail, with exit status 1, where an output of the second file has a lower SQNR in dB.
    """
    tensors = None if data is None else read_data(data, read_metadata(first))
    found = _compare(first, second, tensors, batch_size=batch_size)
    _print_comparison(first, second, found)
    if min_sqnr is not None and found.sqnr_db < min_sqnr:
        raise ArtifactError(
            f"{second}: {shown_db(found.sqnr_db)} against {first}, and --min-sqnr asks for {min_sqnr:g} dB."
        )


def export(
    checkpoint: str,
    *,
    model: str,
    data: str | None = None,
    directory: str | None = None,
    formats: list[str] | None = None,
) -> None:
    """Write the int8 files and the report of a quantization-aware training again, from its checkpoint alone.

    Args:
        checkpoint: Saved by a Trainer with QuantizationAwareTraining.
        model: Import path of the LightningModule, e.g. my_package.MyModule.
        data: Import path of a LightningDataModule, for metrics.
        directory: Where the files go. Default: as in training.
        formats: Which files, e.g. [torchscript,onnx]. Default: as in training.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:  # as python -m does
        sys.path.insert(0, os.getcwd())
    export_checkpoint(
        checkpoint,
        load_class(model, f"--model {model}"),
        datamodule=None if data is None else load_class(data, f"--data {data}"),
        directory=directory,
        formats=formats,
    ).print()


COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "export": export,
    "inspect": inspect,
    "compare": compare,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; errors of this package are shown without a traceback."""
    try:
        CLI(COMMANDS, args=_spelled(sys.argv[1:] if args is None else args))
    except QuantizationError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _spelled(args: Sequence[str]) -> list[str]:
    """The arguments as jsonargparse takes them: options have underscores, as parameters do, and flags a value."""
    flags = {
        f"--{name}" for command in COMMANDS.values() for name, kind in get_type_hints(command).items() if kind is bool
    }
    spelled = []
    for arg in args:
        if arg.startswith("--"):
            option, equals, value = arg.partition("=")
            option = "--" + option[2:].replace("-", "_")
            arg = f"{option}=true" if option in flags and not equals else option + equals + value
        spelled.append(arg)
    return spelled


# ---- what is shown


def _print_table(console: Console, title: str, head: Sequence[str], rows: Any, right: bool = False) -> None:
    """A table below its title; ``right``: all columns but the first are figures. Without a head, it has none."""
    table = Table(show_header=any(head))
    for number, text in enumerate(head):
        table.add_column(text, justify="right" if right and number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)


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
    usual = dict(_flat(_json.loads(_json.dumps(asdict(QuantConfig())))))
    usual |= {f"layers[].{field.name}": field.default for field in fields(LayerConfig)}
    spec = _flat(asdict(TensorSpec()))
    usual |= {f"layers[].{kind}.{name}": value for kind in ("activation", "weight") for name, value in spec}
    found = [(name, value, re.sub(r"\[\d+\]", "[]", name)) for name, value in _flat(config)]
    return [(name, _json.dumps(value)) for name, value, key in found if full or key not in usual or value != usual[key]]


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


def _kernels(path: Path) -> str:
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


def _print_comparison(first: str, second: str, found: Comparison) -> None:
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
    _print_table(console, f"{second} against {first}, {samples}", head, outputs, right=True)
    title = f"one call with a batch of {found.batch_size}, {shown_threads(found.num_threads)}"
    rows = [
        (name, f"{latency:.3f} ms", shown_bytes(size))
        for name, latency, size in zip((first, second), found.latency_ms, found.size_bytes, strict=True)
    ]
    _print_table(console, title, ("file", "latency", "size"), rows, right=True)
    if found.random:
        console.print(
            "The data was random, and not what the ranges were taken from: these figures say little of real data. "
            "Give some with --data FILE.",
            markup=False,
        )
