"""The Lightning package under test: ``pytorch_lightning`` where it is installed, else ``lightning.pytorch``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_quant._roots import ROOTS

pl: Any = ROOTS[0]


def part(name: str) -> Any:
    """``part("callbacks")``: a subpackage of the root."""
    return import_module(f"{pl.__name__}.{name}")
