"""The neutral form as a ``torch.export`` archive: read by torch, AOTInductor and ExecuTorch, without Python code."""

from __future__ import annotations

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
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.export")
        torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})
