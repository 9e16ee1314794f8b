"""load(path): any artifact back as a callable module, run by its own runtime."""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_loads

from lightning_quant._torch_ao import quiet
from lightning_quant.backends.graph import engine
from lightning_quant.config import cpu_has_vnni
from lightning_quant.errors import ArtifactError, MissingExtraError
from lightning_quant.structures import collect

#: What is written into every file. Files of a later version are refused, earlier ones are read.
FORMAT_VERSION = 1
METADATA_FILE = "lightning_quant.json"
METADATA_KEY = "lightning_quant"


def load(path: str | Path) -> nn.Module:
    """The model in a file that this package wrote.

    Args:
        path: A ``torchscript`` artifact, or one whose name ends in ``.onnx`` or ``.pt2``.

    Returns:
        A module on the CPU in eval mode, with ``metadata``. It takes the tensors that the original took, by position
        or by name, with any batch size, and gives what the original gave.

    Raises:
        ArtifactError: There is no such file, it is truncated, or this package did not write it.
        MissingExtraError: The file's runtime is not installed.

    Warns:
        UserWarning: The file assumes int8 instructions that this CPU does not have, and will give wrong results.
    """
    path = Path(path)
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file.")
    loader = {".onnx": _load_onnx, ".pt2": _load_pt2}.get(path.suffix, _load_torchscript)
    loaded = loader(path)
    _check_cpu(path, loaded.metadata)
    return loaded


def _metadata(path: Path, text: str | bytes | None) -> dict[str, Any]:
    if not text:
        raise ArtifactError(
            f"{path}: not written by lightning_quant (it has no metadata). Load it with its own runtime."
        )
    metadata: dict[str, Any] = json.loads(text)
    version = metadata["format_version"]
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format version {version}, and this lightning_quant reads up to {FORMAT_VERSION}. "
            "Update it: pip install -U lightning-quant"
        )
    return metadata


def _check_cpu(path: Path, metadata: dict[str, Any]) -> None:
    config = metadata["config"]
    if config["engine"] != "qnnpack" and not config["reduce_range"] and not cpu_has_vnni():
        warnings.warn(
            f"{path}: was quantized with reduce_range=False, for CPUs with VNNI instructions. This CPU has none: its "
            f"int8 "
            "sums saturate, and results are wrong. Quantize again with QuantConfig(reduce_range=True).",
            UserWarning,
            stacklevel=3,
        )


class _Loaded(nn.Module):
    """What every loaded artifact has: its metadata, and its inputs by name."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        super().__init__()
        self.metadata = metadata

    def _ordered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        names: list[str] = self.metadata["inputs"]
        parameters: dict[str, Any] = self.metadata["parameters"]
        containers = any(not isinstance(x, torch.Tensor) for x in (*args, *kwargs.values()))
        if containers and len(args) <= len(parameters) and kwargs.keys() <= parameters.keys():
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            try:
                return tuple(x for name, part in parameters.items() for x in collect(part, given.get(name)))
            except KeyError as error:
                raise ArtifactError(f"this artifact takes {', '.join(names)}; {error} is missing.") from None
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        unknown, missing = [k for k in kwargs if k not in names], [name for name in names if name not in values]
        twice = set(names[: len(args)]) & kwargs.keys()
        if len(args) > len(names) or unknown or missing or twice:
            raise ArtifactError(
                f"this artifact takes {', '.join(names)}; it was given {len(args)} positional and "
                f"{sorted(kwargs)} keyword arguments."
            )
        return tuple(values[name] for name in names)


class TorchScriptArtifact(_Loaded):
    """A TorchScript file, run by torch's int8 kernels."""

    def __init__(self, program: torch.jit.ScriptModule, metadata: dict[str, Any]) -> None:
        super().__init__(metadata)
        self.program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for its inputs, by position or by name."""
        with engine(self.metadata["config"]["engine"]):
            return self.program(*self._ordered(args, kwargs))


def _load_torchscript(path: Path) -> TorchScriptArtifact:
    extra = {METADATA_FILE: ""}
    try:
        metadata = _metadata_in_archive(path)
        # weights are packed for the engine that is current while they are read
        with quiet(), engine(metadata["config"]["engine"]):
            program = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    except (RuntimeError, zipfile.BadZipFile) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: cannot be read as TorchScript, it is damaged or foreign: {error}") from error
    return TorchScriptArtifact(program, metadata).eval()


def _metadata_in_archive(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"extra/{METADATA_FILE}")]
        return _metadata(path, archive.read(names[0]) if names else None)


class Pt2Artifact(_Loaded):
    """A ``torch.export`` archive, run by torch as float arithmetic between quantize and dequantize operators."""

    def __init__(self, program: nn.Module, metadata: dict[str, Any]) -> None:
        super().__init__(metadata)
        self.program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for its inputs, by position or by name."""
        return self.program(*self._ordered(args, kwargs))

    def train(self, mode: bool = True) -> Pt2Artifact:
        """Nothing follows a mode: torch's exported modules refuse ``train`` and ``eval``."""
        self.training = mode
        return self


def _load_pt2(path: Path) -> Pt2Artifact:
    try:
        with zipfile.ZipFile(path) as archive:
            # of an archive that was cut off, zipfile finds one that was stored in it
            if not any(name.endswith("archive_format") for name in archive.namelist()):
                raise zipfile.BadZipFile("it has no archive_format")
        metadata = _metadata_in_archive(path)
        with quiet():
            program = torch.export.load(path).module(check_guards=False)
    except ArtifactError:
        raise
    except Exception as error:  # torch raises whatever the part of the archive that is wrong makes it raise
        raise ArtifactError(
            f"{path}: cannot be read as a torch.export archive, it is damaged or foreign: {error}"
        ) from error
    return Pt2Artifact(program, metadata).eval()


class OnnxArtifact(_Loaded):
    """An ONNX file, run by ONNX Runtime on the CPU with torch's number of threads."""

    def __init__(self, session: Any, metadata: dict[str, Any]) -> None:
        super().__init__(metadata)
        self.session = session
        self.input_names = [value.name for value in session.get_inputs()]

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxArtifact:
        """The session is shared: it has no state, and cannot be copied."""
        return OnnxArtifact(self.session, self.metadata).train(self.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for its inputs, by position or by name."""
        tensors = [x for x in tree_flatten(self._ordered(args, kwargs))[0] if isinstance(x, torch.Tensor)]
        feed = {name: x.detach().cpu().numpy() for name, x in zip(self.input_names, tensors, strict=True)}
        flat = [torch.from_numpy(x) for x in self.session.run(None, feed)]
        return tree_unflatten(flat, treespec_loads(self.metadata["output_spec"]))


def _load_onnx(path: Path) -> OnnxArtifact:
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as states
    except ImportError as error:
        raise MissingExtraError(str(error.name), "onnx", f"loading {path.name}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (states.Fail, states.InvalidArgument, states.InvalidGraph, states.InvalidProtobuf) as error:
        raise ArtifactError(f"{path}: cannot be read as ONNX, it is damaged or foreign: {error}") from error
    metadata = _metadata(path, session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))
    return OnnxArtifact(session, metadata).eval()
