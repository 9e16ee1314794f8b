"""Files that torch runs: TorchScript, ``torch.export`` archives and AOTInductor packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from lightning_quant._torch_ao import quiet
from lightning_quant.backends.graph import engine
from lightning_quant.errors import ArtifactError, last_line
from lightning_quant.runtime.archives import load_program
from lightning_quant.runtime.artifact import Artifact
from lightning_quant.runtime.metadata import is_aoti


class TorchScriptArtifact(Artifact):
    """A TorchScript file, run by torch's int8 kernels."""

    def __init__(self, program: torch.jit.ScriptModule, metadata: dict[str, Any]) -> None:
        super().__init__(metadata)
        self.program = program

    def compute(self, data: tuple[Any, ...], state: tuple[torch.Tensor, ...]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """See :meth:`Artifact.compute`."""
        try:
            with engine(self.metadata["config"]["engine"]):
                output = self.program(*data, *state)
        except RuntimeError as error:  # TorchScript's errors, of its interpreter and of the kernels
            given = [list(x.shape) for x in tree_flatten(data)[0] if isinstance(x, torch.Tensor)]
            raise ArtifactError(
                f"TorchScript cannot run inputs of the shapes {given}; the file was made with "
                f"{self.metadata['input_shapes']}, of which the first dimension is free: {last_line(error)}"
            ) from error
        return output if state else (output, ())


def load_torchscript(path: Path, metadata: dict[str, Any]) -> TorchScriptArtifact:
    """The program in a TorchScript file with this metadata.

    Raises:
        ArtifactError: It is damaged.
    """
    try:
        # weights are packed for the engine that is current while they are read
        with quiet(), engine(metadata["config"]["engine"]):
            program = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise ArtifactError(f"{path}: cannot be read as TorchScript, it is damaged or foreign: {error}") from error
    return TorchScriptArtifact(program, metadata).eval()


class Pt2Artifact(Artifact):
    """A ``torch.export`` archive, run by torch as float arithmetic between quantize and dequantize operators."""

    def __init__(self, program: nn.Module, metadata: dict[str, Any]) -> None:
        super().__init__(metadata)
        self.program = program

    def compute(self, data: tuple[Any, ...], state: tuple[torch.Tensor, ...]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """See :meth:`Artifact.compute`."""
        output = self.program(*data, *state)
        return output if state else (output, ())

    def train(self, mode: bool = True) -> Pt2Artifact:
        """Nothing follows a mode: torch's exported modules refuse ``train`` and ``eval``."""
        self.training = mode
        return self


def load_pt2(path: Path, metadata: dict[str, Any]) -> Artifact:
    """The program in an archive of ``torch.export``, or in a package of AOTInductor, with this metadata.

    Raises:
        ArtifactError: It is damaged, or it would run code.
    """
    try:
        if is_aoti(path):
            return _load_aoti(path, metadata)
        with quiet():
            program = load_program(path).module(check_guards=False)
    except ArtifactError:
        raise
    except Exception as error:  # torch raises whatever the part of the archive that is wrong makes it raise
        raise ArtifactError(
            f"{path}: cannot be read as a torch.export archive, it is damaged or foreign: {error}"
        ) from error
    return Pt2Artifact(program, metadata).eval()


class AotiArtifact(Artifact):
    """A package of AOTInductor: compiled code for the kind of CPU that it was made on."""

    def __init__(self, program: Any, metadata: dict[str, Any]) -> None:
        super().__init__(metadata)
        self.program = program

    def __deepcopy__(self, memo: dict[int, Any]) -> Artifact:
        """The compiled code is shared: it has no memory, and cannot be copied."""
        return self._like(AotiArtifact(self.program, self.metadata))

    def compute(self, data: tuple[Any, ...], state: tuple[torch.Tensor, ...]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """See :meth:`Artifact.compute`."""
        tensors = [x.contiguous() for x in tree_flatten((data, state))[0] if isinstance(x, torch.Tensor)]
        with torch.no_grad():
            return self._taken_apart(tree_flatten(self.program(*tensors))[0])


def _load_aoti(path: Path, metadata: dict[str, Any]) -> AotiArtifact:
    from torch._inductor import aoti_load_package

    with quiet():
        program = aoti_load_package(str(path))
    return AotiArtifact(program, metadata).eval()
