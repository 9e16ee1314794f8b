"""The converted model as a frozen TorchScript file: torch's own int8 kernels, no Python needed to run it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant._torch_ao import quiet

METADATA_FILE = "lightning_quant.json"


def freeze(module: nn.Module, inputs: tuple[Any, ...]) -> torch.jit.ScriptModule:
    """``module`` traced on ``inputs`` and frozen: weights are constants, dead code is gone."""
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        # graphs have no branches on data; those that torch warns of are inside its own int8 recurrent layers
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(module.eval(), inputs, check_trace=False, strict=False)
        frozen: torch.jit.ScriptModule = torch.jit.freeze(traced)
    return frozen


def export(module: nn.Module, inputs: tuple[Any, ...], path: Path, metadata: dict[str, Any]) -> Path:
    """Write ``module`` to ``path``.

    Args:
        module: Converted, on the CPU; takes the data by position.
        inputs: Example data. The first dimension is free, as far as ``module`` computes with sizes and not with
            constants.
        path: Where to.
        metadata: JSON values, stored inside the file.
    """
    with quiet():
        torch.jit.save(freeze(module, inputs), str(path), _extra_files={METADATA_FILE: json.dumps(metadata)})
    return path
