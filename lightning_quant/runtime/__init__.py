"""load(path): any artifact back as a callable module, run by its own runtime. One module for each library that runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_quant.config import cpu_has_vnni
from lightning_quant.runtime.artifact import Artifact, Explicit
from lightning_quant.runtime.metadata import FORMAT_VERSION, METADATA_FILE, METADATA_KEY, files_of, read_metadata
from lightning_quant.runtime.of_onnx import load_onnx
from lightning_quant.runtime.of_openvino import load_openvino
from lightning_quant.runtime.of_torch import load_pt2, load_torchscript

__all__ = [
    "FORMAT_VERSION", "METADATA_FILE", "METADATA_KEY", "Artifact", "Explicit", "files_of", "load", "read_metadata",
]  # fmt: skip

_LOADERS: dict[str, Callable[[Path, dict[str, Any]], Artifact]] = {
    ".onnx": load_onnx,
    ".pt2": load_pt2,
    ".xml": load_openvino,
}


def load(path: str | Path) -> Artifact:
    """The model in a file that this package wrote. No code that is in a file is unpickled.

    A package of AOTInductor is compiled code, which runs: load one only from where you would run a program from.

    Args:
        path: A ``torchscript`` artifact, or one whose name ends in ``.onnx``, ``.xml`` (OpenVINO) or ``.pt2``
            (``torch.export`` or AOTInductor).

    Returns:
        A module on the CPU in eval mode, with ``metadata``. It takes the tensors that the original took, by position
        or by name, with any batch size, and gives what the original gave. What the original keeps in buffers from
        call to call, it keeps in ``state``.

    Raises:
        ArtifactError: There is no such file, it is truncated, or this package did not write it.
        MissingExtraError: The file's runtime is not installed.

    Warns:
        UserWarning: The file assumes int8 instructions that this CPU does not have, and will give wrong results.
    """
    path = Path(path)
    metadata = read_metadata(path)
    loaded = _LOADERS.get(path.suffix, load_torchscript)(path, metadata)
    _check_cpu(path, metadata)
    return loaded


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
