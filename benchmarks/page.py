"""Write docs/benchmarks.md: run the benchmarks of training and calibration, each in a process of its own."""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Made by `make bench`. Ratios of one run on 2 threads: contestants take turns, and each figure is the median over the
rounds of a time by that of the float network in the same round. glibc's allocator is told to keep freed memory
(`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`), as a long training on a CPU should: otherwise a third of a step
may go to getting it back, for float as for the others.
"""
TRAINING = """## Training

Time of a step (forward, backward, SGD with momentum) by that of float, batch 16, 96x96, random weights; and memory:
all tensors at the peak of a step, by float's. *torch FX*: `prepare_qat_fx` with the default mapping of `x86`.
*torchao PT2E*: `prepare_qat_pt2e` with the `X86InductorQuantizer`. *NNCF*: the model that `nncf.quantize` gives.
"""
CALIBRATION = """## Calibration

Time of a pass with histogram observers by that of the float network, batch 16, 96x96, random weights. The last two
columns are whole quantizations of 304 images, from the float network to the quantized one, by the time of as many float
passes.
"""


def processor() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(script: str, *arguments: str) -> str:
    """What a benchmark writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.md"
        command = [sys.executable, Path(__file__).with_name(script), *arguments, "--markdown", path]
        subprocess.run(command, check=True)
        return path.read_text(encoding="utf8")


def main() -> None:
    """Run both and write the page."""
    versions = f"torch {torch.__version__}, torchao {version('torchao')}, NNCF {version('nncf')}"
    head = f"{HEAD}\n{processor()}, `{torch.backends.cpu.get_cpu_capability()}`, {versions}.\n\n"
    parts = [head, TRAINING, "\n", table("training.py"), "\n", CALIBRATION, "\n", table("calibration.py")]
    PAGE.write_text("".join(parts), encoding="utf8")


if __name__ == "__main__":
    main()
