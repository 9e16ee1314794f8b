"""ONNX files, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from lightning_quant.errors import ArtifactError, MissingExtraError
from lightning_quant.runtime.artifact import Artifact


class OnnxArtifact(Artifact):
    """An ONNX file, run by ONNX Runtime on the CPU with torch's number of threads."""

    def __init__(self, session: Any, metadata: dict[str, Any]) -> None:
        super().__init__(metadata)
        self.session = session
        self.input_names = [value.name for value in session.get_inputs()]

    def __deepcopy__(self, memo: dict[int, Any]) -> Artifact:
        """The session is shared: it has no memory, and cannot be copied."""
        return self._like(OnnxArtifact(self.session, self.metadata))

    def compute(self, data: tuple[Any, ...], state: tuple[torch.Tensor, ...]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """See :meth:`Artifact.compute`."""
        tensors = [x for x in tree_flatten((data, state))[0] if isinstance(x, torch.Tensor)]
        feed = {name: x.detach().cpu().numpy() for name, x in zip(self.input_names, tensors, strict=True)}
        return self._taken_apart([torch.from_numpy(np.asarray(x)) for x in self.session.run(None, feed)])


def load_onnx(path: Path, metadata: dict[str, Any]) -> OnnxArtifact:
    """The model in an ONNX file, with its metadata.

    Raises:
        ArtifactError: It is damaged, or ONNX Runtime does not know its opset.
        MissingExtraError: onnxruntime is not installed.
    """
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
        if "opset" in str(error):
            raise ArtifactError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} does not know the opset of this file: {error}\n"
                "Update it: pip install -U onnxruntime"
            ) from error
        raise ArtifactError(f"{path}: cannot be read as ONNX, it is damaged or foreign: {error}") from error
    return OnnxArtifact(session, metadata).eval()
