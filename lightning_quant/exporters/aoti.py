"""The neutral form compiled by AOTInductor for this CPU: run from Python or C++ without TorchScript."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_quant._torch_ao import quiet
from lightning_quant.errors import ExportError
from lightning_quant.native import BuildError, compiler

METADATA_KEY = "lightning_quant"


def export(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write ``program``, compiled, to ``path``, which ends in ``.pt2``.

    Args:
        program: From :func:`lightning_quant.exporters.qdq.to_program`.
        path: Where to.
        metadata: JSON values, stored inside the package.

    Raises:
        ExportError: There is no C++ compiler, or the program cannot be compiled.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    settings = {
        "freezing": True,  # weights are packed for the int8 kernels when it is compiled
        "aot_inductor.metadata": {METADATA_KEY: json.dumps(metadata)},
    }
    try:
        compiler()
        with quiet(), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except (BuildError, InvalidCxxCompiler) as error:
        raise ExportError(
            f"AOTInductor needs a C++ compiler: {error}. Install g++ or clang, or leave 'aoti' out of "
            "ExportConfig(formats=...)."
        ) from error
    except (InductorError, RuntimeError) as error:
        raise ExportError(f"AOTInductor cannot compile this model: {error}") from error
