"""The neutral form as an ONNX file with QuantizeLinear and DequantizeLinear nodes, which every ONNX runtime reads."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant._torch_ao import quiet
from lightning_quant.errors import ExportError, MissingExtraError

METADATA_KEY = "lightning_quant"


def export(module: nn.Module, inputs: tuple[Any, ...], path: Path, metadata: dict[str, Any]) -> Path:
    """Write ``module`` to ``path``, with a free batch dimension.

    Args:
        module: In the neutral form (:mod:`lightning_quant.exporters.qdq`); takes the data by position.
        inputs: Example data with at least two samples: the first dimension of every tensor that has as many rows as
            the first one becomes the batch.
        path: Where to.
        metadata: JSON values, stored in the file's ``metadata_props``. ``inputs`` are the names of the inputs,
            ``free_dims`` the dimensions besides the batch whose sizes vary.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: The model cannot be exported with a free batch dimension, or the file is not valid ONNX.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise MissingExtraError(str(error.name), "onnx", "format 'onnx'") from error

    batch = torch.export.Dim("batch", min=1)
    shapes = dynamic_shapes(inputs, batch, metadata["free_dims"])
    try:
        with quiet(), _quiet_exporter(), torch.no_grad():
            program = torch.export.export(Variadic(module).eval(), inputs, dynamic_shapes=(shapes,), strict=False)
            names = _flat_names(metadata["inputs"], inputs)
            written = torch.onnx.export(program, (), dynamo=True, input_names=names, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch.onnx cannot write this model: {error}") from error
    except RuntimeError as error:  # torch.export's own errors, and those of the operators that it runs
        raise ExportError(
            f"torch.export cannot capture the model with a free batch dimension: {error}\nLeave the part that it names "
            "out with QuantConfig(targets=...), or leave 'onnx' out of ExportConfig(formats=...)."
        ) from error
    assert written is not None  # as it is with dynamo=True
    written.save(str(path))
    model = onnx.load(str(path))
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces of the machine that exported
    prop = model.metadata_props.add()
    prop.key, prop.value = METADATA_KEY, json.dumps(metadata)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the ONNX file is not valid: {error}") from error
    onnx.save(model, str(path))
    return path


class Variadic(nn.Module):
    """One signature for every program, so that the shapes of its inputs can be said in one way."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *data: Any) -> Any:
        """What the program gives."""
        return self.module(*data)


class _quiet_exporter:
    """Keep the exporter's remarks on its own progress from the user."""

    def __enter__(self) -> None:
        self.loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.filterwarnings("ignore", module="onnxscript")
        warnings.filterwarnings("ignore", module="torch.onnx")

    def __exit__(self, *error: Any) -> None:
        self.warnings.__exit__(*error)
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)


def dynamic_shapes(inputs: tuple[Any, ...], batch: Any, free_dims: list[list[int]]) -> Any:
    """``inputs`` with ``{0: batch}`` for each tensor with as many rows as the first one, ``None`` for others.

    Args:
        inputs: Example data.
        batch: A dimension of ``torch.export``.
        free_dims: For each input, other dimensions that are free; empty: none are.
    """
    from torch.utils._pytree import tree_flatten, tree_map

    tensors = [x for x in tree_flatten(inputs)[0] if isinstance(x, torch.Tensor) and x.dim()]
    size = tensors[0].shape[0] if tensors else 0

    def shape(x: Any) -> Any:
        return {0: batch} if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == size else None

    shapes = tuple(tree_map(shape, inputs))
    for number, dims in enumerate(free_dims):
        if dims and isinstance(inputs[number], torch.Tensor):
            free = {dim: torch.export.Dim.AUTO for dim in dims if dim or not shapes[number]}
            shapes = (*shapes[:number], {**free, **(shapes[number] or {})}, *shapes[number + 1 :])
    return shapes


def _flat_names(names: list[str], inputs: tuple[Any, ...]) -> list[str]:
    """One name per tensor: the parameter's, numbered where the parameter is a container."""
    from torch.utils._pytree import tree_flatten

    flat: list[str] = []
    for name, value in zip(names, inputs, strict=True):
        count = len([x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor)])
        flat.extend([name] if count == 1 else [f"{name}_{i}" for i in range(count)])
    return flat
