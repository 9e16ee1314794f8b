"""How far a metric may be off because the validation data is a sample."""

from __future__ import annotations

import math
import re

#: Names of metrics that are shares of samples which were right or wrong, each with one look at it.
_SHARES = re.compile(r"(?:^|[^a-z])(?:acc|accuracy|top_?\d+|hit_?rate|error_?rate)(?:$|[^a-z])", re.IGNORECASE)


def standard_error(name: str, value: float, samples: int | None) -> float | None:
    """The standard error of a share of right samples, ``sqrt(p * (1 - p) / n)`` (the binomial distribution's).

    It holds where each of the samples is right or wrong, independently of the others: for an accuracy that is averaged
    over samples. That of a loss, of a mean over classes or over pixels cannot be known from the value.

    Args:
        name: Of the metric; only one that says that it is an accuracy has an error.
        value: The share, 0 to 1. At the ends the formula says nothing: it would be no error at all.
        samples: How many there were; None: it is not known.

    Returns:
        In the unit of ``value``; None where it cannot be known.

    >>> standard_error("val_acc", 0.9, 900)
    0.01
    >>> standard_error("val_loss", 0.9, 900) is None
    True
    """
    if not samples or not 0 < value < 1 or not _SHARES.search(name):
        return None
    return math.sqrt(value * (1 - value) / samples)
