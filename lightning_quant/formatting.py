"""Figures as text, the same in reports and on the console."""

from __future__ import annotations

import math


def shown_number(value: float | None) -> str:
    """With four digits behind the point; nothing for None."""
    return "" if value is None else f"{value:.4f}"


def shown_bytes(value: int) -> str:
    """In kB, from 100 kB on in MB, of 1000 and 1000000 bytes."""
    return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def shown_db(value: float) -> str:
    """In dB; ``exact`` where there is no noise."""
    return "exact" if value == math.inf else f"{value:.1f} dB"


def shown_threads(number: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} thread{'s' * (number != 1)}"


def shown_shape(shape: list[int | None]) -> str:
    """As ``(*, 3, 224, 224)``; None is any size."""
    sizes = ["*" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
