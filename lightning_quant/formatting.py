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


def shown_ms(value: float) -> str:
    """In ms, with three digits at least behind zeros."""
    return f"{value:.2f} ms" if value >= 1 else f"{value:.3f} ms"


def shown_threads(number: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} thread{'s' * (number != 1)}"


def shown_shape(shape: list[int | None]) -> str:
    """As ``(*, 3, 224, 224)``; None is any size."""
    sizes = ["*" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def shown_share(value: float | None) -> str:
    """In per cent; nothing for None. What is small is not shown as nothing."""
    if not value:
        return "" if value is None else "0 %"
    return "< 0.01 %" if 0 < value < 1e-4 else f"{100 * value:.2f} %" if value < 0.1 else f"{100 * value:.1f} %"


def shown_count(value: int) -> str:
    """As ``4.1 G``, ``71.3 M``, ``512``."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.1f}{unit}"
    return str(value)
