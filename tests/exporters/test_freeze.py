"""Frozen TorchScript programs."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: 64 MB of weights, and how much more memory the process has after each of five programs.
PROGRAM = """
import ctypes
import gc
import torch
from torch import nn
from lightning_quant.exporters.torchscript import freeze
torch.set_num_threads(1)
MEGABYTES = []
for _ in range(5):
    {make}
    with torch.no_grad():
        for _ in range(3):
            program(torch.zeros(2, 4000))
    del program
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not in use
    MEGABYTES.append(int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6)
print(MEGABYTES[-1] - MEGABYTES[1])
"""
OURS = "program = freeze(nn.Linear(4000, 4000), (torch.zeros(2, 4000),))"
STOCK = "program = torch.jit.freeze(torch.jit.trace(nn.Linear(4000, 4000).eval(), torch.zeros(2, 4000)))"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="unavoidable: reads /proc")
@pytest.mark.parametrize(("make", "grows"), [(OURS, False), (STOCK, True)], ids=["ours", "stock"])
def test_a_program_that_is_gone_takes_its_weights_along(make: str, grows: bool) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(make=make)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # three programs of 64 MB; half of one for what allocators keep
    assert (float(done.stdout) > 150) == grows
    if not grows:
        assert float(done.stdout) < 32
