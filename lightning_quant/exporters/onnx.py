"""The neutral form as an ONNX file with QuantizeLinear and DequantizeLinear nodes, which every ONNX runtime reads."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_quant._torch_ao import quiet
from lightning_quant.errors import ExportError, MissingExtraError

METADATA_KEY = "lightning_quant"


def export(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write ``program`` to ``path``.

    Args:
        program: From :func:`lightning_quant.exporters.qdq.to_program`.
        path: Where to.
        metadata: JSON values, stored in the file's ``metadata_props``. ``tensors`` and ``outputs`` are the names of its
            inputs and outputs.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: The program cannot be written as ONNX, or the file is not valid.
    """
    model = to_model(program, metadata, path)
    import onnx

    prop = model.metadata_props.add()
    prop.key, prop.value = METADATA_KEY, json.dumps(metadata)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the ONNX file is not valid: {error}") from error
    onnx.save(model, str(path))


def to_model(program: torch.export.ExportedProgram, metadata: dict[str, Any], scratch: Path) -> Any:
    """``program`` as an ``onnx.ModelProto`` without metadata.

    Args:
        program: From :func:`lightning_quant.exporters.qdq.to_program`.
        metadata: As of :func:`export`.
        scratch: A file to write on the way.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: The program cannot be written as ONNX.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise MissingExtraError(str(error.name), "onnx", f"format {metadata['format']!r}") from error

    names, outputs = metadata["tensors"], metadata["outputs"]
    try:
        with quiet(), _quiet_exporter(), torch.no_grad():
            written = torch.onnx.export(
                program, (), dynamo=True, input_names=names, output_names=outputs, verbose=False
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch.onnx cannot write this model: {error}") from error
    assert written is not None  # as it is with dynamo=True
    written.save(str(scratch))
    model = onnx.load(str(scratch))
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces of the machine that exported
    return model


class _quiet_exporter:
    """Keep the exporter's remarks on its own progress from the user."""

    def __enter__(self) -> None:
        self.loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.filterwarnings("ignore", module="onnxscript")
        warnings.filterwarnings("ignore", module="torch.onnx")

    def __exit__(self, *error: Any) -> None:
        self.warnings.__exit__(*error)
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)
