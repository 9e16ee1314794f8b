"""The converted model as a frozen TorchScript file: torch's own int8 kernels, no Python needed to run it."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant._torch_ao import quiet

METADATA_FILE = "lightning_quant.json"


def freeze(module: nn.Module, inputs: tuple[Any, ...]) -> torch.jit.ScriptModule:
    """``module`` traced on ``inputs`` and frozen: weights are constants, dead code is gone.

    Int8 weights are packed for ``torch.backends.quantized.engine``.
    """
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        # graphs have no branches on data; those that torch warns of are inside its own int8 recurrent layers
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        # torch asks each module, metrics among them, for all of its properties
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        traced = torch.jit.trace(module.eval(), inputs, check_trace=False, strict=False)
        frozen: torch.jit.ScriptModule = torch.jit.freeze(_on_its_own(traced))
    return frozen


def _on_its_own(traced: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """The same program, compiled apart from all others.

    What Python traces is compiled into one unit for the whole process, which keeps the constants of every frozen
    program for good: the weights of each model, again for each file. What is loaded has a unit of its own.
    """
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    try:
        loaded: torch.jit.ScriptModule = torch.jit.load(buffer)
    except RuntimeError:
        # torch's conversion of programs writes "dequantize" of a tuple, which it reads only once that is frozen
        return traced
    return loaded.eval()


def export(module: nn.Module, inputs: tuple[Any, ...], path: Path, metadata: dict[str, Any]) -> Path:
    """Write ``module`` to ``path``.

    Args:
        module: Converted, on the CPU; takes the data by position.
        inputs: Example data. The first dimension is free, as far as ``module`` computes with sizes and not with
            constants.
        path: Where to.
        metadata: JSON values, stored inside the file.
    """
    # by way of the memory: where the disk is full, torch's own writer ends the process
    buffer = io.BytesIO()
    with quiet():
        torch.jit.save(freeze(module, inputs), buffer, _extra_files={METADATA_FILE: json.dumps(metadata)})
    path.write_bytes(buffer.getbuffer())
    return path
