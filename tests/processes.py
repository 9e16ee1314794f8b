"""Several processes that talk to each other, as ranks of a training do."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def run(function: Callable[[int], Any], ranks: int, folder: Path, timeout_s: float = 240) -> list[Any]:
    """What ``function(rank)`` gives in each of so many processes, which are a gloo group on the CPU.

    Args:
        function: At module level, so that the processes can import it.
        ranks: How many.
        folder: Empty; the processes find each other there, so that no port is taken.
        timeout_s: Then they are ended, and it is an error.
    """
    context: Any = multiprocessing.spawn(_rank, (function, ranks, folder), nprocs=ranks, join=False)
    end = time.monotonic() + timeout_s
    try:
        while not context.join(timeout=max(0.0, end - time.monotonic())):  # raises what a process has raised
            if time.monotonic() >= end:
                raise TimeoutError(f"{function.__name__} on {ranks} ranks took more than {timeout_s} s")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, function: Callable[[int], Any], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
