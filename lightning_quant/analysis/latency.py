"""How long one call takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def latency_ms(calls: dict[str, Callable[[], Any]], *, rounds: int = 5, budget_s: float = 0.4) -> dict[str, float]:
    """The median time of each call in milliseconds, with torch's current number of threads.

    The calls take turns, round by round, so that a machine which slows down does so for all of them.

    Args:
        calls: Name -> a function without arguments.
        rounds: How often each gets its turn, after one warm-up turn.
        budget_s: Roughly how long the turns of one call take together.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats: dict[str, int] = {}
    with torch.inference_mode():
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            once = max(time.perf_counter() - start, 1e-6)
            repeats[name] = max(1, min(50, int(budget_s / rounds / once)))
        for _ in range(rounds):
            for name, call in calls.items():
                for _ in range(repeats[name]):
                    start = time.perf_counter()
                    call()
                    times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(values) for name, values in times.items()}
