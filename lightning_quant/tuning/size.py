"""A bound on the size of a file: ``"1.5 MB"``."""

from __future__ import annotations

import re

from lightning_quant.errors import ConfigError

_UNITS = {"B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}


def bytes_of(max_size: str) -> int:
    """A number and its unit, as bytes.

    Raises:
        ConfigError: It is something else, or not above 0.

    >>> bytes_of("1.5 MB"), bytes_of("2KiB")
    (1500000, 2048)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", max_size) if isinstance(max_size, str) else None
    found = 0 if match is None else int(float(match[1]) * _UNITS.get(match[2], 0))
    if found <= 0:
        raise ConfigError(
            f"max_size={max_size!r}: give a number and a unit, {', '.join(_UNITS)}, such as '1.5 MB': the size of a "
            "file."
        )
    return found
