"""Kernels of our own, compiled when first used. Without a compiler there are none, and torch's run instead."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("lightning_quant")

#: Set it to 0, and torch's kernels run even where ours could.
SWITCH = "LIGHTNING_QUANT_NATIVE"
#: Folder of the compiled kernels. Default: ``lightning_quant`` in the user's folder of caches.
CACHE = "LIGHTNING_QUANT_CACHE"

SOURCE = Path(__file__).with_name("kernels.c")

#: No contraction: a product and a sum are rounded one after the other, as torch's kernels do.
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

#: Function -> types of its arguments; each is there once for each of ``DTYPES``.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "range": (_POINTER, _SIZE, _POINTER, _POINTER, _INT),
    "per_tensor": (*[_POINTER] * 3, _SIZE, _POINTER, _INT, *[_POINTER] * 4, _INT),
    "per_channel": (*[_POINTER] * 3, *[_SIZE] * 3, _POINTER, _INT, *[_POINTER] * 4, _INT),
    "gradient": (*[_POINTER] * 3, _SIZE, _INT),
    "count": (_POINTER, _SIZE, _SIZE, ctypes.c_uint32, _POINTER, _INT),
}
_VOID = ("range", "gradient")
#: What the kernels take.
DTYPES = (torch.float32, torch.bfloat16)


class Grid(ctypes.Structure):
    """How floats become integers; the struct of the same name in ``kernels.c``."""

    _fields_ = (
        ("quant_min", ctypes.c_int32),
        ("quant_max", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("middle", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("averaging", ctypes.c_float),
        ("least", ctypes.c_float),
        ("most", ctypes.c_float),
    )


class Histogram(ctypes.Structure):
    """Where a histogram is kept; the struct of the same name in ``kernels.c``."""

    _fields_ = (
        ("counts", _POINTER),
        ("zeros", _POINTER),
        ("low", _POINTER),
        ("high", _POINTER),
        ("exponent", _POINTER),
        ("half", ctypes.c_int64),
    )


class Kernels:
    """The functions of ``kernels.c``, each with ``[dtype]``: those of a tensor of that dtype."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for name, types in _SIGNATURES.items():
            functions = {}
            for dtype in DTYPES:
                function = getattr(library, f"lq_{name}_{str(dtype).removeprefix('torch.')}")
                function.argtypes, function.restype = types, None if name in _VOID else ctypes.c_int
                functions[dtype] = function
            setattr(self, name, functions)

    range: dict[torch.dtype, Any]
    per_tensor: dict[torch.dtype, Any]
    per_channel: dict[torch.dtype, Any]
    gradient: dict[torch.dtype, Any]
    count: dict[torch.dtype, Any]


@functools.cache
def kernels() -> Kernels | None:
    """The kernels, compiled once for a machine; None where they cannot be. Why is then logged, once in a process."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return Kernels(build(compiler(), cache_folder()))
    except (BuildError, OSError) as error:
        log.warning(
            "fake quantize runs on torch's kernels, with which training takes up to twice as long: %s. Install gcc or "
            "clang, or name a C compiler in the environment variable CC. To use torch's kernels without this message, "
            "set %s=0.",
            error,
            SWITCH,
        )
        return None


class BuildError(Exception):
    """The kernels could not be compiled; the text says why, without a full stop."""


def compiler() -> Sequence[str]:
    """The command of the C compiler: that of ``CC``, else the first of the usual ones that is there.

    Raises:
        BuildError: There is none.
    """
    named = os.environ.get("CC")
    if named:
        command = named.split()
        if shutil.which(command[0]) is None:
            raise BuildError(f"CC={named!r} is not there")
        return command
    for name in ("gcc", "clang", "cc"):
        if shutil.which(name):
            return (name,)
    raise BuildError("no C compiler was found")


def cache_folder() -> Path:
    """Where compiled kernels are kept. Made if it is not there; one of this process alone, if it cannot be."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE) or Path(caches) / "lightning_quant")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="lightning_quant_"))


def build(command: Sequence[str], folder: Path) -> Path:
    """Compile the kernels for this machine, unless that has been done.

    Args:
        command: The compiler.
        folder: Where the result is kept, under a name that tells source, compiler and processor apart.

    Raises:
        BuildError: The compiler failed.
    """
    threads = _openmp_library()
    key = hashlib.sha256()
    for part in (SOURCE.read_text("utf8"), " ".join(command), _output([*command, "--version"]), _processor(), threads):
        key.update(str(part).encode())
    path = folder / f"kernels_{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    failures = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unit, library = Path(scratch, "kernels.o"), Path(scratch, "kernels.so")
        # the best first: for this very processor, with torch's own threads
        for machine in (["-march=native"], ["-mcpu=native"], []):
            for openmp, linked in ((["-fopenmp"], [threads]), (["-fopenmp-simd"], []), ([], [])):
                if openmp == ["-fopenmp"] and threads is None:
                    continue
                try:
                    _output([*command, *_FLAGS, *machine, *openmp, "-c", str(SOURCE), "-o", str(unit)])
                    # a second OpenMP beside torch's would have threads of its own, so that it is not -fopenmp here
                    _output([*command, "-shared", str(unit), "-o", str(library), *map(str, linked), "-lm"])
                    ctypes.CDLL(str(library))
                except (BuildError, OSError) as error:
                    failures.append(str(error))
                    continue
                os.replace(library, path)  # whole, whoever else is doing the same
                return path
    raise BuildError(failures[0])


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    except subprocess.CalledProcessError as error:
        text = error.stderr.strip().splitlines()
        raise BuildError(f"{command[0]} failed ({text[0] if text else f'exit status {error.returncode}'})") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed ({error})") from error


def _processor() -> str:
    """What tells processors apart for which a compiler may choose different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf8").splitlines()
    except OSError:
        return f"{sys.platform} {os.uname().machine}" if hasattr(os, "uname") else sys.platform
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _openmp_library() -> str | None:
    """The OpenMP library that torch has loaded, whose threads are then shared; None where that is not known."""
    try:
        maps = Path("/proc/self/maps").read_text("utf8").splitlines()
    except OSError:
        return None
    names = ("libgomp", "libomp", "libiomp")
    paths = {path for line in maps if Path(path := line.split()[-1]).name.startswith(names)}
    # other packages may have brought their own
    packages = Path(torch.__file__).resolve().parents[1]
    of_torch = {path for path in paths if {packages / "torch", packages / "torch.libs"} & set(Path(path).parents)}
    found = sorted(of_torch) or sorted(paths)
    return found[0] if len(found) == 1 else None
