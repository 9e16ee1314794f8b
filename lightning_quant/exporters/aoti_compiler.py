"""A program of its own, which compiles one ``torch.export`` file with AOTInductor.

In a process of its own because torchao teaches inductor its int8 kernels for a whole process and for good: the user's
``torch.compile`` is left as it was, and what the user's process registered has no part in the file.

    python -m lightning_quant.exporters.aoti_compiler PROGRAM PACKAGE METADATA yes|no
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import torch

# the first registers torch.ops.quantized_decomposed
from lightning_quant._torch_ao import quiet, register_int8_kernels

METADATA_KEY = "lightning_quant"


def compile_file(program: Path, package: Path, metadata: str, *, int8_kernels: bool) -> None:
    """Compile for this CPU.

    Args:
        program: Written by ``torch.export.save``.
        package: Where to; ends in ``.pt2``.
        metadata: JSON, stored inside the package.
        int8_kernels: Let oneDNN multiply integers, by the patterns of torchao. Else floats are multiplied.
    """
    from torch._inductor import aoti_compile_and_package

    if int8_kernels:
        register_int8_kernels()
    settings = {
        "freezing": True,  # weights are packed for the int8 kernels when it is compiled
        "aot_inductor.metadata": {METADATA_KEY: metadata},
    }
    with torch.no_grad():
        aoti_compile_and_package(torch.export.load(program), package_path=str(package), inductor_configs=settings)


def main() -> None:
    """Read the arguments of the command line."""
    program, package, metadata, int8_kernels = sys.argv[1:]
    logging.disable(logging.WARNING)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile_file(Path(program), Path(package), Path(metadata).read_text("utf8"), int8_kernels=int8_kernels == "yes")


if __name__ == "__main__":
    main()
