"""Writing artifacts: what is the same for all formats.

A file is written beside its place, loaded again, compared with the program that it was written from on real input, and
only then moved to its name; if any file of an export fails, none of them appears.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, treespec_dumps

from lightning_quant.analysis.sqnr import float_tensors
from lightning_quant.backends.graph import engine
from lightning_quant.config import FormatName
from lightning_quant.errors import (
    ArtifactError,
    ConfigError,
    ExportError,
    MissingExtraError,
    QuantizationError,
    first_line,
)
from lightning_quant.exporters import aoti, onnx, openvino, pt2, skip_slow, torchscript
from lightning_quant.exporters.describing import (
    NO_FACTS,
    Facts,
    any_sizes,
    bits_of,
    metadata_of,
    metadata_of_part,
    shapes_of,
)
from lightning_quant.exporters.layouts import LAYOUTS, int8_layers, laid_out
from lightning_quant.exporters.program import Program, check_exportable
from lightning_quant.exporters.qdq import to_program
from lightning_quant.exporters.verification import first_difference, verify
from lightning_quant.runtime import Explicit, files_of, load

Exported = torch.export.ExportedProgram

SUFFIXES: dict[str, str] = {
    "torchscript": "ts", "onnx": "onnx", "openvino": "xml", "pt2": "pt2", "aoti": "aoti.pt2",
}  # fmt: skip
#: Format -> what writes an exported program. TorchScript is written from the converted model.
EXPORTERS: dict[str, Callable[[Exported, Path, dict[str, Any]], None]] = {
    "onnx": onnx.export,
    "openvino": openvino.export,
    "pt2": pt2.export,
    "aoti": aoti.export,
}

#: Formats whose runtime is timed with the float model too. AOTInductor takes half a minute to compile it.
RUN_FLOAT = ("onnx", "openvino")


@dataclass(frozen=True)
class Artifact:
    """A file that was written and checked.

    Attributes:
        format: torchscript, onnx, openvino, pt2 or aoti.
        target: Name of the target, ``""`` for the model's own forward.
        path: Where it is.
        size_bytes: Of the file, and of those that belong to it.
        sqnr_db: Of what the loaded file computes against the program that it was written from, on real input.
        left_float: Layers that this file alone computes in float, because its runtime is faster so here.
        in_float: The same program with no layer in int8, run by the same runtime; None: it was not asked for, or the
            runtime has none.
    """

    format: str
    target: str
    path: Path
    size_bytes: int
    sqnr_db: float
    left_float: tuple[str, ...] = ()
    in_float: nn.Module | None = None


class FormatError(ExportError):
    """A format cannot hold a program."""


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


def write(
    programs: list[Program],
    formats: tuple[FormatName, ...],
    directory: Path,
    optional: tuple[FormatName, ...] = (),
    *,
    fastest: tuple[int, ...] = (),
    with_float: bool = False,
    facts: Facts = NO_FACTS,
    tell: Callable[[str], object] = lambda text: None,
) -> tuple[tuple[Artifact, ...], dict[str, str]]:
    """Write each program in each format.

    Args:
        programs: One for each target.
        formats: Those to write.
        directory: Where.
        optional: Those of ``formats`` that nobody named: where one cannot hold a program, it is left out for all.
        fastest: Leave in float, in a file, what its runtime runs slower in int8 on this machine, with one of these
            numbers of samples. Empty: nothing.
        with_float: Give the same in float in the same runtime with each artifact, to be timed beside it.
        facts: For the metadata.
        tell: Called with what begins: ``Writing onnx``, ``Checking onnx``.

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
            writer = _Writer(program, fastest, with_float, facts, tell)
            for name in formats:
                if name in left_out:
                    continue
                try:
                    done.append(writer.write(name, artifact_path(partial, name, program.name)))
                except FormatError as error:
                    if name not in optional:
                        raise
                    left_out[name] = first_line(error).rstrip(".")
        moved = []
        for artifact in done:
            if artifact.format in left_out:
                continue
            final = directory / artifact.path.name
            for old, new in zip(files_of(artifact.path), files_of(final), strict=True):
                os.replace(old, new)
            moved.append(replace(artifact, path=final))
        return tuple(moved), left_out
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Writer:
    """Writes one program in any format. What formats have in common is made once."""

    def __init__(
        self, program: Program, fastest: tuple[int, ...], with_float: bool, facts: Facts, tell: Callable[[str], object]
    ) -> None:
        self.program = program
        self.fastest = fastest
        self.with_float = with_float
        self.facts = facts
        self.tell = tell
        #: One and two samples, each with the state behind them.
        self.single = program.of_size(1)
        self.double = program.of_size(2)
        output = self._run(program.converted)
        self.output = output[0] if program.state else output
        self._neutral: Exported | ExportError | None = None

    def neutral(self) -> Exported:
        """The neutral form as an exported program.

        Raises:
            ExportError: It cannot be one.
        """
        if self._neutral is None:
            # two samples: with one, exporters take the batch for a constant
            try:
                with engine(self.program.config.engine):
                    self._neutral = self._exported_program()
            except ExportError as error:
                self._neutral = error
        if isinstance(self._neutral, ExportError):
            raise self._neutral
        return self._neutral

    def _exported_program(self) -> Exported:
        count = len(self.program.data)
        return to_program(
            self.program.qdq(), self.double[:count], self.program.free_dims, self.double[count:],
            one_sample=self.program.one_sample,
        )  # fmt: skip

    def write(self, name: FormatName, path: Path) -> Artifact:
        """One checked file.

        Raises:
            FormatError: The format cannot hold the program.
            ExportError: The file computes something else.
        """
        label = f"{name} export of {self.program.name or 'forward'}"
        _check_outputs(label, self.output)
        self.tell(f"Writing {name}")
        try:
            with engine(self.program.config.engine):
                return self._torchscript(label, path) if name == "torchscript" else self._exported(label, name, path)
        except (MissingExtraError, _WrongFile):
            raise
        except QuantizationError as error:
            raise FormatError(str(error)) from error
        except OSError as error:  # a disk that is full, a folder that is gone: no reason to leave a format out
            raise ExportError(f"{label} failed: {error}. Look at the folder, or choose another one.") from error
        except Exception as error:
            raise FormatError(
                f"{label} failed: {type(error).__name__}: {error}. Leave the format out with "
                "ExportConfig(formats=...), or the part that cannot be exported with QuantConfig(skip=...)."
            ) from error

    def _timed(self) -> list[tuple[Any, ...]]:
        """What files are timed with: one tuple of inputs for each number of samples."""
        sizes = self.fastest[:1] if self.program.one_sample else self.fastest
        return [self.program.of_size(size) for size in sizes]

    def _run(self, module: nn.Module) -> Any:
        with torch.no_grad(), engine(self.program.config.engine):
            return module(*self.program.inputs)

    def _torchscript(self, label: str, path: Path) -> Artifact:
        source = self.program.converted
        left_float: tuple[str, ...] = ()
        in_float = self.program.in_float
        if self.fastest and in_float is not None and skip_slow.is_slower(
            torchscript.freeze(source, self.double), torchscript.freeze(in_float, self.double), self._timed()
        ):  # fmt: skip
            source, left_float = in_float, ("",)
        shapes = any_sizes(self.program)
        torchscript.export(source, self.double, path, self._metadata("torchscript", shapes, left_float))
        return self._checked(label, "torchscript", path, source, left_float, lambda needed: "")

    def _exported(self, label: str, name: FormatName, path: Path) -> Artifact:
        layout = LAYOUTS[name]
        neutral = self.neutral()
        left_float: tuple[str, ...] = ()

        def export(program: Exported, to: Path) -> nn.Module:
            EXPORTERS[name](program, to, self._metadata(name, shapes_of(program), left_float))
            return _reload(label, to)

        def export_part(part: Exported, folder: Path) -> nn.Module:
            to = folder / path.name
            EXPORTERS[name](part, to, metadata_of_part(self._metadata(name, shapes_of(part), left_float), part))
            return _reload(label, to)

        if self.fastest and name in skip_slow.FORMATS:
            left_float = skip_slow.search(
                neutral, layout, lambda program, folder: export(program, folder / path.name), self._timed(),
                whole=name in skip_slow.WHOLE,
            )  # fmt: skip
        program = laid_out(neutral, layout, left_float)
        EXPORTERS[name](program, path, self._metadata(name, shapes_of(program), left_float))

        def differs_at(needed: float) -> str:
            return first_difference(program, export_part, self.single, needed)

        artifact = self._checked(label, name, path, program.module(check_guards=False), left_float, differs_at)
        if not self.with_float or name not in RUN_FLOAT:
            return artifact
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            in_float = laid_out(neutral, layout, tuple(int8_layers(neutral)))
            return replace(artifact, in_float=export(in_float, Path(folder, path.name)))

    def _checked(
        self,
        label: str,
        name: str,
        path: Path,
        source: nn.Module,
        left_float: tuple[str, ...],
        differs_at: Callable[[float], str],
    ) -> Artifact:
        program = self.program
        self.tell(f"Checking {name}")
        try:
            figure = verify(
                label, _reload(label, path), source, self._calls(source),
                in_float=program.in_float, converted=program.converted,
                bits=bits_of(program.config, name)["activations"][0], differs_at=differs_at,
            )  # fmt: skip
        except ExportError as error:
            raise _WrongFile(str(error)) from error
        size = sum(file.stat().st_size for file in files_of(path))
        return Artifact(name, program.name, path, size, figure, left_float)

    def _calls(self, source: nn.Module) -> list[tuple[Any, ...]]:
        """What a file is compared on. One that ignores its state may be right in the first call alone."""
        calls = [self.program.inputs, self.single]
        if self.program.state:
            _, state = self._run(source)
            calls.append((*self.program.data, *state))
        return calls

    def _metadata(self, name: str, shapes: list[list[int | None]], left_float: tuple[str, ...]) -> dict[str, Any]:
        return metadata_of(self.program, self.output, name, shapes, left_float, self.facts)


class _WrongFile(ExportError):
    """A file was written, and computes something else."""


def _reload(label: str, path: Path) -> nn.Module:
    """The file; as a function of its data and its state, if it has any."""
    try:
        loaded = load(path)
        return Explicit(loaded) if loaded.state else loaded
    except ArtifactError as error:
        raise _WrongFile(f"{label}: the file that was just written cannot be loaded: {error}") from error


def _check_outputs(label: str, output: Any) -> None:
    leaves, spec = tree_flatten(output)
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise ExportError(
            f"{label}: forward returns {type(output).__name__} with {[type(x).__name__ for x in leaves]}; files hold "
            "tensors, and tuples, lists or dicts of them."
        )
    if not float_tensors(output):
        raise ExportError(
            f"{label}: forward returns integers only, in which one rounding can change everything, so that the file "
            "could not be compared. Return the scores, and take argmax outside of forward."
        )
    try:
        treespec_dumps(spec)
    except (NotImplementedError, TypeError) as error:
        raise ExportError(f"{label}: forward returns {type(output).__name__}; return a tuple or a dict.") from error
