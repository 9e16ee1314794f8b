"""How do two files differ on the same data? In what they compute, in time and in size."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from lightning_quant.analysis.latency import latency_ms
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.errors import ArtifactError, ConfigError, first_line
from lightning_quant.formatting import shown_shape
from lightning_quant.runtime import Artifact, files_of, load

#: How many samples of random data are compared.
RANDOM_SAMPLES = 16

Data = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class OutputComparison:
    """One output of both files, over all samples.

    Attributes:
        name: Of the output.
        sqnr_db: Of the second file's against the first file's; None: it holds integers.
        max_abs_difference: The largest difference of two values; infinite where one of them alone is NaN or infinite.
        agreement: Share of the rows with the same largest class (argmax of the last dimension), 0 to 1, of an output
            like scores: of 2 or 3 dimensions and more than one class. Of integers, share of equal values. None: it is
            neither.
    """

    name: str
    sqnr_db: float | None
    max_abs_difference: float
    agreement: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two files on the same data. Pairs are of the first file and the second one.

    Attributes:
        outputs: One for each tensor that the files give.
        latency_ms: Median time of one call with ``batch_size`` samples, measured in turns.
        size_bytes: Of the files.
        samples: How many samples both have computed.
        batch_size: Samples for each call.
        num_threads: Torch's threads while timing.
        random: The data was random: both files then see what they were not made for, and figures say little.
    """

    outputs: tuple[OutputComparison, ...]
    latency_ms: tuple[float, float]
    size_bytes: tuple[int, int]
    samples: int
    batch_size: int
    num_threads: int
    random: bool

    @property
    def sqnr_db(self) -> float:
        """The lowest of all outputs."""
        return min((x.sqnr_db for x in self.outputs if x.sqnr_db is not None), default=math.inf)


def compare(
    first: str | Path, second: str | Path, data: Sequence[torch.Tensor] | None = None, *, batch_size: int | None = None
) -> Comparison:
    """Run two files of this package, of any formats, on the same data.

    Args:
        first: The reference.
        second: The other file. It has the inputs and outputs of ``first``.
        data: The tensors of the inputs in order, ``(samples, ...)``; from :func:`read_data`, say. None: 16 samples of
            standard normal numbers of the shapes that ``first`` was exported with.
        batch_size: Samples for each call, at least 1. None: as many as a file takes that was made for one number of
            them, else 1. Inputs with different first dimensions are no batch, and are given as they are, in one call.

    Raises:
        ArtifactError: The inputs or outputs of the files differ, the data does not fit, or a file cannot be loaded.
        ConfigError: There is no data, and an input holds integers; or ``batch_size`` cannot be.
        MissingExtraError: The runtime of a file is not installed.
    """
    paths = (Path(first), Path(second))
    files = (load(paths[0]), load(paths[1]))
    _check_inputs(paths, files)
    given = _random(paths[0], files[0], batch_size) if data is None else tuple(data)
    calls = _batches(given, files, batch_size)
    for file in files:
        for call in calls:
            file.ordered(call, {})  # both refuse what one of them does not take, before either runs
    outputs = [_run(path, file, calls) for path, file in zip(paths, files, strict=True)]
    found = tuple(_outputs(paths, files, outputs))
    turns = {"first": lambda: files[0](*calls[0]), "second": lambda: files[1](*calls[0])}
    times = latency_ms(turns, rounds=15, budget_s=1.0)
    return Comparison(
        outputs=found,
        latency_ms=(times["first"], times["second"]),
        size_bytes=(_size(paths[0]), _size(paths[1])),
        samples=sum(_rows(call) for call in calls),
        batch_size=_rows(calls[0]),
        num_threads=torch.get_num_threads(),
        random=data is None,
    )


def read_data(path: str | Path, metadata: dict[str, Any]) -> Data:
    """The inputs of a file, from a file of arrays. Nothing in it is unpickled but tensors and containers of them.

    Args:
        path: ``.npz`` (arrays by the names of the inputs), ``.npy`` (one input) or ``.pt`` (a tensor, a tuple or list
            of tensors in the order of the inputs, or a dict by their names).
        metadata: Of the file that takes the inputs.

    Returns:
        One tensor for each input, in order.

    Raises:
        ConfigError: It cannot be read, or does not have these inputs.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"data {path}: no such file.")
    if path.suffix not in (".npz", ".npy", ".pt"):
        raise ConfigError(f"data {path}: give an .npz, .npy or .pt file.")
    try:
        content = _tensors(path) if path.suffix == ".pt" else _arrays(path)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, TypeError) as error:
        raise ConfigError(f"data {path}: cannot be read: {first_line(error)}") from error
    names: list[str] = metadata["tensors"]
    if isinstance(content, torch.Tensor):
        content = [content]
    if isinstance(content, dict):
        if content.keys() != set(names):
            raise ConfigError(
                f"data {path}: has {', '.join(map(str, content))}; the inputs are called {', '.join(names)}. Give each "
                "input by its name, and nothing else."
            )
        content = [content[name] for name in names]
    if not isinstance(content, (list, tuple)) or not all(isinstance(x, torch.Tensor) for x in content):
        raise ConfigError(f"data {path}: give a tensor, a tuple or list of tensors, or a dict of tensors by name.")
    if len(content) != len(names):
        raise ConfigError(f"data {path}: has {len(content)} tensors; the inputs are {len(names)}: {', '.join(names)}.")
    return tuple(content)


def _tensors(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # of an older format, or garbage, for which torch has no error of its own
        raise ValueError("torch.save did not write it")
    return torch.load(path, weights_only=True, map_location="cpu")


def _arrays(path: Path) -> torch.Tensor | dict[str, torch.Tensor]:
    with path.open("rb") as file:
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return torch.from_numpy(content)
        return {name: torch.from_numpy(content[name]) for name in content.files}


# ---- inputs


def _check_inputs(paths: tuple[Path, Path], files: tuple[Artifact, Artifact]) -> None:
    """Both take the same data.

    Raises:
        ArtifactError: They do not.
    """
    a, b = (file.metadata for file in files)
    for path, metadata in zip(paths, (a, b), strict=True):
        if metadata["inputs"] != metadata["tensors"]:
            raise ArtifactError(f"{path}: takes packed sequences, which files of data cannot hold.")
    same = a["inputs"] == b["inputs"] and a["input_dtypes"] == b["input_dtypes"]
    if not same or not all(map(_alike, a["shapes"], b["shapes"])):
        raise ArtifactError(
            f"{paths[0]} and {paths[1]} take different inputs, and cannot be compared: {_shown_inputs(a)} against "
            f"{_shown_inputs(b)}."
        )


def _alike(a: list[int | None], b: list[int | None]) -> bool:
    """Whether some tensor fits both shapes."""
    return len(a) == len(b) and all(m == n or m is None or n is None for m, n in zip(a, b, strict=True))


def _shown_inputs(metadata: dict[str, Any]) -> str:
    inputs = zip(metadata["inputs"], metadata["shapes"], metadata["input_dtypes"], strict=True)
    return ", ".join(f"{name} {shown_shape(shape)} {dtype}" for name, shape, dtype in inputs)


def _random(path: Path, file: Artifact, batch_size: int | None) -> Data:
    """Standard normal data: full batches of the recorded shapes.

    Raises:
        ConfigError: An input holds integers.
    """
    metadata = file.metadata
    for name, dtype in zip(metadata["inputs"], metadata["input_dtypes"], strict=True):
        if dtype not in ("torch.float32", "torch.float64", "torch.float16", "torch.bfloat16"):
            raise ConfigError(
                f"{path}: its input {name} holds {dtype}, for which random numbers mean nothing. Give data: "
                "compare(..., data), or --data FILE."
            )
    shapes: list[list[int]] = metadata["input_shapes"]
    if len({tuple(shape[:1]) for shape in shapes if shape}) == 1:
        size = batch_size or _fixed_batch((file,)) or 1
        rows = math.ceil(RANDOM_SAMPLES / max(1, size)) * size
        shapes = [[rows, *shape[1:]] if shape else [] for shape in shapes]
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator).to(getattr(torch, dtype.removeprefix("torch.")))
        for shape, dtype in zip(shapes, metadata["input_dtypes"], strict=True)
    )


def _fixed_batch(files: Sequence[Artifact]) -> int | None:
    """The number of samples that a file was made for, where it takes no other."""
    sizes = [shape[0] for file in files for shape in file.metadata["shapes"] if shape and shape[0] is not None]
    return sizes[0] if sizes else None


def _batches(data: Data, files: tuple[Artifact, Artifact], batch_size: int | None) -> list[Data]:
    """The data, cut along its first dimension.

    Raises:
        ConfigError: It is empty, or cannot be cut.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: give at least 1.")
    rows = {x.shape[0] for x in data if x.dim()}
    if 0 in rows:
        raise ConfigError("the data has no samples.")
    if len(rows) != 1:
        if batch_size is not None:
            sizes = ", ".join(map(str, sorted(rows))) or "none"
            raise ConfigError(
                f"batch_size={batch_size}: the inputs have different first dimensions ({sizes}), so that they cannot "
                "be cut into batches. Leave it out: all is given in one call."
            )
        return [data]
    fixed = _fixed_batch(files)
    size, total = batch_size or fixed or 1, rows.pop()
    if fixed is not None and total % size:
        raise ConfigError(f"the data has {total} samples, and a file takes {fixed} in each call. Give a multiple.")
    return [tuple(x[start : start + size] if x.dim() else x for x in data) for start in range(0, total, size)]


def _rows(call: Data) -> int:
    return next((x.shape[0] for x in call if x.dim()), 1)


# ---- outputs


def _run(path: Path, file: Artifact, calls: list[Data]) -> list[list[torch.Tensor]]:
    """For each output, what each call gives.

    Raises:
        ArtifactError: The runtime refuses the data.
    """
    try:
        with torch.inference_mode():
            found = [tree_flatten(file(*call))[0] for call in calls]
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return [list(batches) for batches in zip(*found, strict=True)]


def _outputs(
    paths: tuple[Path, Path], files: tuple[Artifact, Artifact], outputs: list[list[list[torch.Tensor]]]
) -> list[OutputComparison]:
    ours, theirs = (file.metadata["outputs"] for file in files)
    shapes = [[[tuple(x.shape) for x in batches] for batches in one] for one in outputs]
    if ours != theirs or shapes[0] != shapes[1]:
        shown = [
            ", ".join(f"{name} {of[0]}" for name, of in zip(names, own, strict=True))
            for names, own in zip((ours, theirs), shapes, strict=True)
        ]
        raise ArtifactError(
            f"{paths[0]} and {paths[1]} give different outputs, and cannot be compared: {shown[0]} against {shown[1]}."
        )
    return [compare_output(name, a, b) for name, a, b in zip(ours, *outputs, strict=True)]


def compare_output(name: str, reference: list[torch.Tensor], other: list[torch.Tensor]) -> OutputComparison:
    """One output of two files.

    Args:
        name: Its name.
        reference: What each call of the first file gives.
        other: The same of the second file, of the same shapes and dtypes.
    """
    floating = reference[0].is_floating_point()
    return OutputComparison(
        name=name,
        sqnr_db=sqnr_db(reference, other) if floating else None,
        max_abs_difference=max(map(_max_abs_difference, reference, other)),
        agreement=_agreement(reference, other),
    )


def _max_abs_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(difference.max()) if difference.numel() else 0.0


def _agreement(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float | None:
    first = reference[0]
    if first.is_floating_point():
        if first.dim() not in (2, 3) or first.shape[-1] < 2:
            return None
        reference, other = ([x.argmax(-1) for x in batches] for batches in (reference, other))
    equal = torch.cat([(a == b).reshape(-1) for a, b in zip(reference, other, strict=True)])
    return float(equal.double().mean()) if equal.numel() else None


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in files_of(path))
