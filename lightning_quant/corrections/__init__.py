"""Corrections after calibration: each a function from a prepared model to a prepared model, by the paper that it cites.

They change weights, biases and ranges of a copy, and nothing about how it is converted. In which order they are applied
is said here, whatever order a config names them in: what moves weights and ranges comes first, and what corrects the
rest of the error last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from lightning_quant.backends.graph import info, is_graph
from lightning_quant.config import CorrectionName
from lightning_quant.corrections.analytic_bias import analytic_bias_correction, check_changed, correct_known
from lightning_quant.corrections.bias import bias_correction
from lightning_quant.corrections.equalization import cross_layer_equalization
from lightning_quant.corrections.gptq import gptq
from lightning_quant.corrections.ranges import choose_ranges
from lightning_quant.corrections.rounding import adaround
from lightning_quant.corrections.smoothing import smoothquant
from lightning_quant.errors import CaptureError, ConfigError

__all__ = [
    "CORRECTIONS",
    "MOVES_RANGES",
    "adaround",
    "analytic_bias_correction",
    "apply",
    "bias_correction",
    "check_changed",
    "choose_ranges",
    "correct",
    "cross_layer_equalization",
    "gptq",
    "smoothquant",
]

#: Takes a prepared model (which may be a single graph) and inputs, and gives a changed copy.
Correction = Callable[[nn.Module, list[Any]], nn.Module]

#: Name -> function, in the order in which they are applied.
CORRECTIONS: Mapping[CorrectionName, Correction] = MappingProxyType(
    {
        "cross_layer_equalization": cross_layer_equalization,
        "smoothquant": smoothquant,
        "choose_ranges": choose_ranges,
        "adaround": adaround,
        "gptq": gptq,
        "analytic_bias_correction": correct_known,
        "bias_correction": bias_correction,
    }
)
#: Those after which activations have to be observed again. They come first.
MOVES_RANGES: tuple[CorrectionName, ...] = ("cross_layer_equalization", "smoothquant")


def correct(prepared: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """A copy with the corrections of the config that ``prepared`` was prepared with.

    Args:
        prepared: From :func:`lightning_quant.prepare` for ``static``, calibrated. Not changed.
        batches: Some of the data that it was calibrated on: inputs, each a tensor, a tuple of positional or a dict of
            keyword arguments. After an equalization activations are observed again on them, and on nothing else.

    Raises:
        CaptureError: ``prepared`` does not come from ``prepare``.
        CalibrationError: An observer saw no data.
        ConfigError: The config has no corrections, or they were made already; or as the corrections raise it.

    >>> import torch
    >>> from lightning_quant import QuantConfig, convert, prepare
    >>> data = torch.randn(16, 4)
    >>> config = QuantConfig(corrections=("bias_correction",))
    >>> prepared = prepare(nn.Linear(4, 2), config, method="static", example_inputs=data)
    >>> _ = prepared(data)
    >>> convert(correct(prepared, [data]))(data).shape
    torch.Size([16, 2])
    """
    graphs = [module for module in prepared.modules() if is_graph(module)]
    if not graphs:
        raise CaptureError(f"{type(prepared).__name__} was not made by lightning_quant.prepare: prepare it first.")
    names = info(graphs[0]).config.corrections
    if not names:
        raise ConfigError(
            "correct(prepared): its config has no corrections. Prepare with QuantConfig(corrections=(...)), or call "
            "one of lightning_quant.corrections by its name."
        )
    if info(graphs[0]).corrected:
        done = ", ".join(one.name for one in info(graphs[0]).corrected)
        raise ConfigError(f"correct(prepared): it was corrected already ({done}). Give what prepare gave.")
    corrected = apply(prepared, list(batches), names)
    check_changed(module for module in corrected.modules() if is_graph(module))
    return corrected


def apply(prepared: nn.Module, batches: list[Any], names: Iterable[CorrectionName]) -> nn.Module:
    """A copy with the corrections ``names``, in the order of :data:`CORRECTIONS`.

    Raises:
        ConfigError: There is no such correction; or as the corrections raise it.
    """
    wanted = tuple(names)
    for name in wanted:
        if name not in CORRECTIONS:
            raise ConfigError(f"corrections={wanted!r}: {name!r} is not one of {', '.join(CORRECTIONS)}. Leave it out.")
    for name, function in CORRECTIONS.items():
        if name in wanted:
            prepared = function(prepared, batches)
    return prepared
