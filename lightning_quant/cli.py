"""The ``lightning-quant`` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import CLI

from lightning_quant import demo as _demo
from lightning_quant.errors import QuantizationError


def demo(directory: str = "demo_quantized", epochs: int = 4, seed: int = 0) -> None:
    """Quantize a small network on scikit-learn's digits, after and while training, and compare it with float.

    Args:
        directory: Where the files go.
        epochs: Of each training.
        seed: Of weights and order.
    """
    _demo.run(directory, epochs, seed)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; errors of this package are shown without a traceback."""
    try:
        CLI({"demo": demo}, args=list(args) if args is not None else None, as_positional=False)
    except QuantizationError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
