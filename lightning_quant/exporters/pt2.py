"""The neutral form as a ``torch.export`` archive: read by torch, AOTInductor and ExecuTorch, without Python code."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_quant._torch_ao import quiet

METADATA_FILE = "lightning_quant.json"


def export(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write ``program`` to ``path``.

    Args:
        program: From :func:`lightning_quant.exporters.qdq.to_program`.
        path: Where to.
        metadata: JSON values, stored inside the file.
    """
    # by way of the memory: where the disk is full, torch's own writer ends the process
    buffer = io.BytesIO()
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.export")
        torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    path.write_bytes(buffer.getbuffer())
