"""Writing artifacts: one module per file format, and :mod:`.writing` for what is the same for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx as torch_fx
from torch import nn

from lightning_quant import backends
from lightning_quant.arguments import Captured, Interface, Positional, signature_of
from lightning_quant.backends.graph import info, is_graph
from lightning_quant.backends.initial import initial_of
from lightning_quant.config import ExportConfig, QuantConfig, resolve_formats
from lightning_quant.errors import ConfigError
from lightning_quant.exporters.describing import Facts
from lightning_quant.exporters.program import Program, check_exportable, one_config, smaller
from lightning_quant.exporters.qdq import to_qdq
from lightning_quant.exporters.state import StateError, with_explicit_state
from lightning_quant.exporters.verification import MIN_SQNR_DB
from lightning_quant.exporters.writing import Artifact, check_writable, files_of, write

__all__ = [
    "MIN_SQNR_DB", "Artifact", "Facts", "Program", "StateError", "check_exportable", "check_writable", "export",
    "files_of", "one_config", "qdq", "smaller", "with_explicit_state", "write",
]  # fmt: skip


def qdq(prepared: nn.Module, kept: dict[str, nn.Module] | None = None) -> torch_fx.GraphModule:
    """The neutral form of a prepared graph; ``kept`` as for a backend's ``reference``."""
    return to_qdq(backends.reference_graph(prepared, kept))


def export(
    prepared: nn.Module,
    config: QuantConfig | None = None,
    export_config: ExportConfig | None = None,
    example_inputs: Any = None,
) -> dict[str, Path]:
    """Convert a calibrated or trained model, write it in each format, and check each file.

    Args:
        prepared: From :func:`lightning_quant.prepare`, after calibration or training.
        config: None, or the one that ``prepared`` was prepared with.
        export_config: Default: ``ExportConfig()``.
        example_inputs: Real input: files are compared on it. A tensor, a tuple of positional or a dict of keyword
            arguments.

    Returns:
        Format -> file.

    Raises:
        ConfigError: A format that the backend cannot write, or a folder that cannot be written.
        CalibrationError: An observer saw no data.
        ExportError: A file computes something else than the model, or the model does what no file can hold.
    """
    if example_inputs is None:
        raise ConfigError("export(example_inputs=None): give real input; every file is compared with the model on it.")
    export_config = export_config or ExportConfig()
    converted = backends.convert(prepared, config)
    infos = [info(module) for module in converted.modules() if is_graph(module)]
    formats, _ = resolve_formats(infos[0].config, infos[0].method, export_config)
    call = backends.as_call(example_inputs)
    whole = is_graph(converted) or isinstance(converted, Captured)
    interface = infos[0].interface if whole else Interface.of(signature_of(prepared), call)
    program = Program(
        "",
        _positional(converted, interface),
        lambda: _positional(backends.each_graph(prepared, config, qdq), interface),
        interface.flatten(call.args, call.keywords),
        interface,
        one_config(infos),
        infos[0].method,
        opaque=not whole or any(known.kept for known in infos),
    )
    if initial_of(prepared) is not None:
        program = with_explicit_state(program)
    fastest = export_config.batch_sizes if export_config.skip_slow else ()
    artifacts, _ = write([program], formats, export_config.path, fastest=fastest)
    return {artifact.format: artifact.path for artifact in artifacts}


def _positional(model: nn.Module, interface: Interface) -> nn.Module:
    """``model`` as a function of its data by position."""
    if isinstance(model, Captured):
        return model.graph
    return model if is_graph(model) else Positional(model, interface)
