"""The ``lightning-quant`` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jsonargparse import CLI

from lightning_quant import demo as _demo
from lightning_quant.custom import load_class
from lightning_quant.errors import QuantizationError
from lightning_quant.from_checkpoint import export_checkpoint


def demo(directory: str = "demo_quantized", epochs: int = 4, seed: int = 0) -> None:
    """Quantize a small network on scikit-learn's digits, after and while training, and compare it with float.

    Args:
        directory: Where the files go.
        epochs: Of each training.
        seed: Of weights and order.
    """
    _demo.run(directory, epochs, seed)


def export(
    checkpoint: str,
    *,
    model: str,
    data: str | None = None,
    directory: str | None = None,
    formats: list[str] | None = None,
) -> None:
    """Write the int8 files and the report of a quantization-aware training again, from its checkpoint alone.

    Args:
        checkpoint: Saved by a Trainer with QuantizationAwareTraining.
        model: Import path of the LightningModule, e.g. my_package.MyModule.
        data: Import path of a LightningDataModule, for metrics.
        directory: Where the files go. Default: as in training.
        formats: Which files, e.g. [torchscript,onnx]. Default: as in training.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:  # as python -m does
        sys.path.insert(0, os.getcwd())
    export_checkpoint(
        checkpoint,
        load_class(model, f"--model {model}"),
        datamodule=None if data is None else load_class(data, f"--data {data}"),
        directory=directory,
        formats=formats,
    ).print()


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; errors of this package are shown without a traceback."""
    try:
        CLI({"demo": demo, "export": export}, args=list(args) if args is not None else None)
    except QuantizationError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0
