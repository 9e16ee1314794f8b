"""The neutral form compiled by AOTInductor for this CPU: run from Python or C++ without TorchScript."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.errors import ExportError
from lightning_quant.exporters import aoti_compiler
from lightning_quant.native import BuildError, compiler
from lightning_quant.structures import all_same

log = logging.getLogger(__name__)

#: Below this a package with int8 kernels is compiled again without them. Sums of integers differ in the last bits only.
LEAST_DB = 25.0
#: How much of the compiler's words an error tells.
LAST_LINES = 3


class _Failed(Exception):
    """The compiler gave up."""


def export(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write ``program``, compiled, to ``path``, which ends in ``.pt2``.

    With torchao installed the package multiplies integers wherever its patterns match. Where that fails or computes
    something else than ``program``, it is compiled without them, and a warning says so.

    Args:
        program: From :func:`lightning_quant.exporters.qdq.to_program`; its example inputs are run.
        path: Where to.
        metadata: JSON values, stored inside the package.

    Raises:
        ExportError: There is no C++ compiler, or the program cannot be compiled.
    """
    try:
        compiler()
    except BuildError as error:
        raise _no_compiler(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="lightning_quant_") as folder:
        source, described = Path(folder, "program.pt2"), Path(folder, "metadata.json")
        torch.export.save(program, source)
        described.write_text(json.dumps(metadata), encoding="utf8")
        why = _with_int8_kernels(program, source, path, described)
        if why is None:
            return
        log.warning("%s: %s. It is compiled without int8 kernels: it runs slower.", path.name, why)
        try:
            _compile(source, path, described, int8_kernels=False)
        except _Failed as error:
            raise ExportError(f"AOTInductor cannot compile this model: {error}") from error


def _with_int8_kernels(program: torch.export.ExportedProgram, source: Path, path: Path, described: Path) -> str | None:
    """Compile with torchao's patterns; why the package cannot be used, or None if it can."""
    if any(_is_narrow(node) for node in program.graph.nodes):
        return "activations have fewer than 8 bits, to which torchao's int8 kernels do not clamp"
    if find_spec("torchao") is None:
        return "torchao is not installed (pip install 'lightning-quant[pt2e]')"
    try:
        _compile(source, path, described, int8_kernels=True)
    except _Failed as error:
        return f"torchao's int8 kernels cannot be compiled for this model ({error})"
    from torch._inductor import aoti_load_package

    args, kwargs = program.example_inputs
    with torch.no_grad():
        expected = program.module(check_guards=False)(*args, **kwargs)
        own, own_named = copy.deepcopy((args, kwargs))
        figure = sqnr_db(expected, aoti_load_package(str(path))(*own, **own_named))
    if not all_same((args, kwargs), (own, own_named)):
        return "torchao's int8 kernels overwrite the inputs of this model"
    if figure >= LEAST_DB:
        return None
    return f"torchao's int8 kernels compute something else for this model ({figure:.1f} dB)"


def _is_narrow(node: torch.fx.Node) -> bool:
    """Whether ``node`` quantizes to fewer integers than its type has."""
    if node.target is not torch.ops.quantized_decomposed.quantize_per_tensor.default:
        return False
    _, _, _, least, most, dtype = node.args
    assert isinstance(dtype, torch.dtype)
    return (least, most) != (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def _compile(source: Path, path: Path, described: Path, *, int8_kernels: bool) -> None:
    command = (sys.executable, "-m", aoti_compiler.__name__)
    arguments = (str(source), str(path), str(described), "yes" if int8_kernels else "no")
    done = subprocess.run((*command, *arguments), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if any("InvalidCxxCompiler" in line for line in lines):
        raise _no_compiler("none was found")
    raise _Failed(" ".join(lines[-LAST_LINES:]) or f"exit status {done.returncode}")


def _no_compiler(why: str) -> ExportError:
    return ExportError(
        f"AOTInductor needs a C++ compiler: {why}. Install g++ or clang, or leave 'aoti' out of "
        "ExportConfig(formats=...)."
    )
