"""The neutral form as a ``torch.export`` archive: read by torch, AOTInductor and ExecuTorch, without Python code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant._torch_ao import quiet
from lightning_quant.errors import ExportError
from lightning_quant.exporters.onnx import Variadic, dynamic_shapes

METADATA_FILE = "lightning_quant.json"


def export(module: nn.Module, inputs: tuple[Any, ...], path: Path, metadata: dict[str, Any]) -> Path:
    """Write ``module`` to ``path``, with a free batch dimension.

    Args:
        module: In the neutral form (:mod:`lightning_quant.exporters.qdq`); takes the data by position.
        inputs: Example data with at least two samples: the first dimension of every tensor that has as many rows as
            the first one becomes the batch.
        path: Where to.
        metadata: JSON values, stored inside the file. ``free_dims`` are the dimensions besides the batch whose sizes
            vary.

    Raises:
        ExportError: The model cannot be exported with a free batch dimension.
    """
    batch = torch.export.Dim("batch", min=1)
    shapes = dynamic_shapes(inputs, batch, metadata["free_dims"])
    try:
        with quiet(), warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", module="torch.export")
            program = torch.export.export(Variadic(module).eval(), inputs, dynamic_shapes=(shapes,), strict=False)
            torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})
    except RuntimeError as error:  # torch.export's own errors, and those of the operators that it runs
        raise ExportError(
            f"torch.export cannot capture the model with a free batch dimension: {error}\nLeave the part that it names "
            "out with QuantConfig(targets=...), or leave 'pt2' out of ExportConfig(formats=...)."
        ) from error
    return path
