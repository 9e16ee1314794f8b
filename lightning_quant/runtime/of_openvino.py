"""OpenVINO IR, run by OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten

from lightning_quant.errors import ArtifactError, MissingExtraError
from lightning_quant.runtime.artifact import Artifact

#: How many sets of input shapes a file is compiled for. Calls with further ones run a program of any shape, which takes
#: up to twice as long: each compiled program has weights of its own.
SHAPES = 4

_Shapes = tuple[tuple[int, ...], ...]
#: Stands for all shapes: no file has no input.
ANY: _Shapes = ()


class OpenVinoArtifact(Artifact):
    """An OpenVINO file, run on the CPU with torch's number of threads, compiled for each of the first shapes it meets.

    Attributes:
        model: The ``openvino.Model``.
    """

    def __init__(self, model: Any, metadata: dict[str, Any]) -> None:
        super().__init__(metadata)
        self.model = model
        self._requests: dict[tuple[int, _Shapes], Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Artifact:
        """What was read and compiled is shared: it has no memory."""
        twin = OpenVinoArtifact(self.model, self.metadata)
        twin._requests = self._requests
        return self._like(twin)

    def compute(self, data: tuple[Any, ...], state: tuple[torch.Tensor, ...]) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """See :meth:`Artifact.compute`."""
        tensors = [x for x in tree_flatten((data, state))[0] if isinstance(x, torch.Tensor)]
        arrays = [np.asarray(x.detach().cpu().numpy(), order="C") for x in tensors]
        request = self._request(tuple(array.shape for array in arrays))
        results = request.infer(arrays, share_inputs=True)
        return self._taken_apart([torch.from_numpy(np.array(results[output])) for output in request.model_outputs])

    def _request(self, shapes: _Shapes) -> Any:
        """What runs inputs of these shapes."""
        threads = torch.get_num_threads()
        known = self._requests
        if (threads, shapes) not in known and len(known) >= SHAPES:
            shapes = ANY
        if (threads, shapes) not in known:
            known[threads, shapes] = self._compiled(shapes, threads)
        return known[threads, shapes]

    def _compiled(self, shapes: _Shapes, threads: int) -> Any:
        import openvino

        model = self.model
        if shapes != ANY and model.is_dynamic():
            model = self.model.clone()
            model.reshape(dict(zip(range(len(shapes)), map(openvino.PartialShape, shapes), strict=True)))
        compiled = openvino.Core().compile_model(
            model, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        )
        return compiled.create_infer_request()


def load_openvino(path: Path, metadata: dict[str, Any]) -> OpenVinoArtifact:
    """The model in an ``.xml`` file with this metadata, and with its weights in the ``.bin`` file beside it.

    Raises:
        ArtifactError: It is damaged, or its weights are missing.
        MissingExtraError: openvino is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(str(error.name), "openvino", f"loading {path.name}") from error
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise ArtifactError(f"{path}: its weights, {weights.name}, are not beside it. Copy both files.")
    try:
        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # the files may be replaced while the model is in use
        model = core.read_model(str(path), str(weights))
    except RuntimeError as error:
        raise ArtifactError(f"{path}: cannot be read as OpenVINO IR, it is damaged or foreign: {error}") from error
    return OpenVinoArtifact(model, metadata).eval()
