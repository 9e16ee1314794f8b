"""Writing artifacts: one module per file format, and what is the same for all of them.

A file is written beside its place, loaded again, compared with the program that it was written from on real input, and
only then moved to its name; if any file of an export fails, none of them appears.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx as torch_fx
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, treespec_dumps

from lightning_quant import backends
from lightning_quant._torch_ao import quiet
from lightning_quant.analysis.sqnr import float_tensors, sqnr_db
from lightning_quant.arguments import Captured, Interface, Positional, signature_of, with_batch
from lightning_quant.backends.graph import Prepared, engine, info, is_graph
from lightning_quant.config import ExportConfig, FormatName, Method, QuantConfig, resolve_formats
from lightning_quant.errors import (
    ArtifactError,
    ConfigError,
    ExportError,
    MissingExtraError,
    QuantizationError,
    first_line,
)
from lightning_quant.exporters import onnx, pt2, torchscript
from lightning_quant.exporters.qdq import to_qdq
from lightning_quant.runtime import FORMAT_VERSION, load
from lightning_quant.structures import Setting, described

SUFFIXES: dict[str, str] = {"torchscript": "ts", "onnx": "onnx", "pt2": "pt2"}
_EXPORTERS: dict[str, Callable[[nn.Module, tuple[Any, ...], Path, dict[str, Any]], Path]] = {
    "torchscript": torchscript.export,
    "onnx": onnx.export,
    "pt2": pt2.export,
}
#: Formats that are made from the neutral form; the others from the converted model.
_FROM_QDQ = ("onnx", "pt2")
#: Below this a file does not compute what it was written from (lowerings that were silently wrong gave 2 to 10 dB).
MIN_SQNR_DB = 25.0
#: A network that amplifies single roundings may differ by as much as it differs from itself, and a margin; not by more.
AMPLIFICATION_MARGIN_DB = 6.0
LEAST_SQNR_DB = 10.0


@dataclass(frozen=True)
class Program:
    """What one file computes, in the forms from which files are written. Both take the data by position.

    Attributes:
        name: Of the target; ``""`` if the file is the model's own forward.
        converted: With torch's int8 kernels.
        qdq: In the neutral form. Called only if a format needs it.
        data: Real input.
        interface: How a call of the model becomes the data.
        config: Resolved.
        method: dynamic, static or qat.
        opaque: It runs Python code that no trace has seen, and may decide by the data.
        free_dims: For each input, the dimensions besides the batch whose sizes vary.
    """

    name: str
    converted: nn.Module
    qdq: Callable[[], nn.Module]
    data: tuple[Any, ...]
    interface: Interface
    config: QuantConfig
    method: Method
    opaque: bool = False
    free_dims: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Artifact:
    """A file that was written and checked.

    Attributes:
        format: torchscript, onnx or pt2.
        target: Name of the target, ``""`` for the model's own forward.
        path: Where it is.
        size_bytes: Of the file.
        sqnr_db: Of what the loaded file computes against the program that it was written from, on real input.
    """

    format: str
    target: str
    path: Path
    size_bytes: int
    sqnr_db: float


def check_writable(directory: Path) -> None:
    """Make the folder and try to write in it.

    Raises:
        ConfigError: It is not a folder, or nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".lightning-quant-"):
            pass
    except OSError as error:
        raise ConfigError(
            f"ExportConfig(directory={str(directory)!r}): cannot write there: {error}. Choose another folder."
        ) from error


def artifact_path(directory: Path, format_name: str, target: str) -> Path:
    """``model.ts``, or ``model.<target>.ts`` where the file is one of several targets."""
    middle = f".{target}" if target else ""
    return directory / f"model{middle}.{SUFFIXES[format_name]}"


class FormatError(ExportError):
    """A format cannot hold a program."""


def write(
    programs: list[Program], formats: tuple[FormatName, ...], directory: Path, optional: tuple[FormatName, ...] = ()
) -> tuple[tuple[Artifact, ...], dict[str, str]]:
    """Write each program in each format.

    Args:
        programs: One for each target.
        formats: Those to write.
        directory: Where.
        optional: Those of ``formats`` that nobody named: where one cannot hold a program, it is left out for all.

    Returns:
        The files, and the formats that were left out with their reasons.

    Raises:
        ExportError: A file could not be written, or computes something else than its program. No file was replaced.
    """
    check_writable(directory)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    left_out: dict[str, str] = {}
    try:
        done: list[Artifact] = []
        for program in programs:
            check_exportable(program)
            qdq = program.qdq() if any(name in _FROM_QDQ for name in formats) else None
            for name in formats:
                source = program.converted if name not in _FROM_QDQ or qdq is None else qdq
                path = artifact_path(partial, name, program.name)
                if name in left_out:
                    continue
                try:
                    done.append(_write_one(program, source, name, path))
                except FormatError as error:
                    if name not in optional:
                        raise
                    left_out[name] = first_line(error).rstrip(".")
        moved = []
        for artifact in done:
            if artifact.format in left_out:
                continue
            final = directory / artifact.path.name
            os.replace(artifact.path, final)
            moved.append(Artifact(artifact.format, artifact.target, final, artifact.size_bytes, artifact.sqnr_db))
        return tuple(moved), left_out
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_exportable(program: Program) -> None:
    """See whether the program decides by its data: a file would have the decisions of the example for good.

    Raises:
        ExportError: It does, or ``torch.export`` cannot tell.
    """
    if not program.opaque:
        return
    source = program.qdq() if program.method != "dynamic" else program.converted
    try:
        with quiet(), torch.no_grad():
            torch.export.export(source.eval(), with_batch(program.data, 2), strict=False)
    except Exception as error:  # torch.export's own errors, and those of the code that it runs
        reason = str(error).strip().split("\n")[0]
        raise ExportError(
            f"{program.name or 'forward'}: a file cannot hold it, because its code decides by the values of its data, "
            f"or does what torch.export cannot follow: {type(error).__name__}: {reason}"
        ) from error


def smaller(module: nn.Module, data: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """:func:`with_batch`; or ``data``, where ``module`` cannot run on that: bags and their offsets are no batch."""
    cut = with_batch(data, size)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module(*cut)
    except Exception:  # whatever torch or the user's code raises
        return data
    return cut


def _write_one(program: Program, source: nn.Module, name: str, path: Path) -> Artifact:
    label = f"{name} export of {program.name or 'forward'}"
    with torch.no_grad(), engine(program.config.engine):
        expected = source(*program.data)
    leaves, spec = tree_flatten(expected)
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise ExportError(
            f"{label}: forward returns {type(expected).__name__} with {[type(x).__name__ for x in leaves]}; files hold "
            "tensors, and tuples, lists or dicts of them."
        )
    if not float_tensors(expected):
        raise ExportError(
            f"{label}: forward returns integers only, in which one rounding can change everything, so that the file "
            "could not be compared. Return the scores, and take argmax outside of forward."
        )
    try:
        output_spec = treespec_dumps(spec)
    except (NotImplementedError, TypeError) as error:
        raise ExportError(f"{label}: forward returns {type(expected).__name__}; return a tuple or a dict.") from error
    metadata = {
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__,
        "lightning_quant": _version(),
        "format": name,
        "method": program.method,
        "config": asdict(program.config),
        "target": program.name,
        "inputs": list(program.interface.inputs),
        "parameters": {
            name: described(s) for name, s in program.interface.structures.items() if not isinstance(s, Setting)
        },
        "input_shapes": [list(x.shape) for x in tree_flatten(program.data)[0] if isinstance(x, torch.Tensor)],
        "input_dtypes": [str(x.dtype) for x in tree_flatten(program.data)[0] if isinstance(x, torch.Tensor)],
        "output_spec": output_spec,
        "free_dims": [list(dims) for dims in program.free_dims],
    }
    # two samples: with one, exporters take the batch for a constant
    try:
        with engine(program.config.engine):
            _EXPORTERS[name](source, smaller(source, program.data, 2), path, metadata)
    except MissingExtraError:
        raise
    except QuantizationError as error:
        raise FormatError(str(error)) from error
    except Exception as error:
        raise FormatError(
            f"{label} failed: {type(error).__name__}: {error}. Leave the format out with "
            "ExportConfig(formats=...), or the part that cannot be exported with QuantConfig(skip=...)."
        ) from error
    figure = _verify(label, path, source, expected, program)
    return Artifact(name, program.name, path, path.stat().st_size, figure)


def _verify(label: str, path: Path, source: nn.Module, expected: Any, program: Program) -> float:
    """SQNR of the file on real input; the batch of the data, and one sample."""
    try:
        loaded = load(path)
    except ArtifactError as error:
        raise ExportError(f"{label}: the file that was just written cannot be loaded: {error}") from error
    with torch.no_grad(), engine(program.config.engine):
        single = smaller(source, program.data, 1)
        pairs = [(expected, loaded(*program.data)), (source(*single), loaded(*single))]
        figures = [sqnr_db(ours, theirs) for ours, theirs in pairs]
        if min(figures) < MIN_SQNR_DB:
            own = min(_own_sqnr_db(source, data) for data in (program.data, single))
            needed = max(LEAST_SQNR_DB, min(MIN_SQNR_DB, own - AMPLIFICATION_MARGIN_DB))
            if min(figures) < needed:
                raise ExportError(
                    f"{label}: the file computes something else than the model that it was written from: "
                    f"{min(figures):.1f} dB, where at least {needed:.0f} dB are needed. It was not kept. Leave the "
                    "format out with ExportConfig(formats=...), or find the layer with QuantConfig(skip=...)."
                )
    return figures[0]


def _own_sqnr_db(source: nn.Module, data: tuple[Any, ...]) -> float:
    """SQNR of a program against itself when its float sums are rounded otherwise, as in another runtime.

    The last bit decides now and then to which integer a value is rounded, and a network with random weights amplifies
    one such step from layer to layer.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of GPUs
    with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        stack.callback(torch._C._set_mkldnn_enabled, enabled)
        torch.manual_seed(0)
        nudged = tree_map(
            lambda x: (
                x * (1 + 1e-6 * torch.randn_like(x)) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            ),
            data,
        )
        other = source(*nudged)
    return sqnr_db(source(*data), other)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-quant")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def qdq(prepared: nn.Module, kept: dict[str, nn.Module] | None = None) -> torch_fx.GraphModule:
    """The neutral form of a prepared graph; ``kept`` as for a backend's ``reference``."""
    return to_qdq(backends.reference_graph(prepared, kept))


def export(
    prepared: nn.Module,
    config: QuantConfig | None = None,
    export_config: ExportConfig | None = None,
    example_inputs: Any = None,
) -> dict[str, Path]:
    """Convert a calibrated or trained model, write it in each format, and check each file.

    Args:
        prepared: From :func:`lightning_quant.prepare`, after calibration or training.
        config: None, or the one that ``prepared`` was prepared with.
        export_config: Default: ``ExportConfig()``.
        example_inputs: Real input: files are compared on it. A tensor, a tuple of positional or a dict of keyword
            arguments.

    Returns:
        Format -> file.

    Raises:
        ConfigError: A format that the backend cannot write, or a folder that cannot be written.
        CalibrationError: An observer saw no data.
        ExportError: A file computes something else than the model, or the model does what no file can hold.
    """
    if example_inputs is None:
        raise ConfigError("export(example_inputs=None): give real input; every file is compared with the model on it.")
    export_config = export_config or ExportConfig()
    converted = backends.convert(prepared, config)
    infos = [info(module) for module in converted.modules() if is_graph(module)]
    formats, _ = resolve_formats(infos[0].config, infos[0].method, export_config)
    call = backends.as_call(example_inputs)
    whole = is_graph(converted) or isinstance(converted, Captured)
    interface = infos[0].interface if whole else Interface.of(signature_of(prepared), call)
    program = Program(
        "",
        _positional(converted, interface),
        lambda: _positional(backends.each_graph(prepared, config, qdq), interface),
        interface.flatten(call.args, call.keywords),
        interface,
        one_config(infos),
        infos[0].method,
        opaque=not whole or any(known.kept for known in infos),
    )
    artifacts, _ = write([program], formats, export_config.path)
    return {artifact.format: artifact.path for artifact in artifacts}


def _positional(model: nn.Module, interface: Interface) -> nn.Module:
    """``model`` as a function of its data by position."""
    if isinstance(model, Captured):
        return model.graph
    return model if is_graph(model) else Positional(model, interface)


def one_config(infos: list[Prepared]) -> QuantConfig:
    """The config of a file that holds several graphs: with the engine that is right for all of them."""
    engines = {known.config.engine for known in infos}
    return (
        next((known.config for known in infos if known.config.engine == "fbgemm"), infos[0].config)
        if len(engines) > 1
        else infos[0].config
    )
