"""One architecture through static quantization, and what is left of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from architectures import Architecture
from torch import nn

from lightning_quant import ExportConfig, QuantConfig, convert, coverage, export, load, prepare
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.config import FormatName

#: The files that are written.
FORMATS: tuple[FormatName, ...] = ("onnx", "openvino")
CALIBRATION_BATCHES = 4
BATCH = 8
#: Forward passes in training mode. Random networks amplify: with batch norms settled to the last per cent, one rounding
#: in an early layer of a deep one changes every output, in int8 by whatever tool, and nothing can be told from it.
SETTLING_STEPS = 10


@dataclass(frozen=True)
class Row:
    """What was measured of one architecture; the times are in seconds."""

    entry: Architecture
    sqnr_db: float
    coverage: float
    prepare_s: float
    convert_s: float


@dataclass(frozen=True)
class Files:
    """The SQNR of each file of one architecture against the float network, in dB, by its format."""

    entry: Architecture
    sqnr_db: dict[str, float]


def call(model: nn.Module, inputs: Any) -> Any:
    """``model`` on positional or keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def settled(entry: Architecture, inputs: Callable[[int], Any] | None = None) -> nn.Module:
    """The float network with random weights, its batch norms settled and no layer that is zero at birth.

    Args:
        entry: The architecture.
        inputs: What its batch norms settle on, given the batch size; None: noise.
    """
    torch.manual_seed(0)
    model = entry.build()
    with torch.no_grad():
        for parameter in model.parameters():
            # zero-initialised heads, tokens and scales give the same output for every input
            if parameter.dim() >= 2 and not parameter.any():
                parameter.normal_(std=0.02)
        for module in model.modules():
            # the residual scale of a network that begins as the identity
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and not module.weight.any():
                module.weight.fill_(0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = 0.1  # torch's own; ports of TensorFlow's networks have 0.01, and would settle nowhere
    model.train()
    with torch.no_grad():
        for _ in range(SETTLING_STEPS):
            call(model, (inputs or entry.inputs)(16))
    return model.eval()


def measure(entry: Architecture, config: QuantConfig | None = None) -> Row:
    """Prepare, calibrate on noise, convert, and compare on other noise."""
    config = config or QuantConfig()
    model = settled(entry)
    example = entry.inputs(2)
    start = time.perf_counter()
    prepared = prepare(model, config, method="static", example_inputs=example)
    prepared_at = time.perf_counter()
    with torch.no_grad():
        for _ in range(CALIBRATION_BATCHES):
            call(prepared, entry.inputs(BATCH))
    calibrated_at = time.perf_counter()
    converted = convert(prepared)
    done_at = time.perf_counter()
    fresh = entry.inputs(BATCH)
    with torch.no_grad():
        figure = sqnr_db(call(model, fresh), call(converted, fresh))
    share = coverage(converted, (), run=lambda: call(converted, example)).share
    return Row(entry, figure, share, prepared_at - start, done_at - calibrated_at)


def calibrated(entry: Architecture) -> tuple[nn.Module, nn.Module]:
    """The float network, and the prepared one after calibration on noise."""
    model = settled(entry)
    prepared = prepare(model, method="static", example_inputs=entry.inputs(2))
    with torch.no_grad():
        for _ in range(CALIBRATION_BATCHES):
            call(prepared, entry.inputs(BATCH))
    return model, prepared


def files(entry: Architecture) -> Files:
    """Write the files that there are of ``entry``, and compare them on other noise."""
    model, prepared = calibrated(entry)
    formats = tuple(name for name in FORMATS if name not in entry.without)
    fresh = entry.inputs(BATCH)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = export(prepared, None, ExportConfig(directory=folder, formats=formats), fresh) if formats else {}
        expected = call(model, fresh)
        data = {k: x for k, x in fresh.items() if isinstance(x, torch.Tensor)} if isinstance(fresh, dict) else fresh
        return Files(entry, {name: sqnr_db(expected, call(load(path), data)) for name, path in paths.items()})
