"""The neutral form as OpenVINO IR: ``model.xml`` with the graph, and ``model.bin`` with the weights beside it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_quant._torch_ao import quiet
from lightning_quant.errors import ExportError, MissingExtraError
from lightning_quant.exporters import onnx
from lightning_quant.exporters.onnx_bits import fits, packed
from lightning_quant.exporters.openvino_rewrites import rewrite

METADATA_KEY = "lightning_quant"


def export(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write ``program`` to ``path``, which ends in ``.xml``, and its weights to the file of that name in ``.bin``.

    Args:
        program: From :func:`lightning_quant.exporters.qdq.to_program`.
        path: Where to.
        metadata: JSON values, stored in the file's ``rt_info``. ``tensors`` and ``outputs`` are the names of its inputs
            and outputs.

    Raises:
        MissingExtraError: openvino, or onnx, by way of which it is written, is not installed.
        ExportError: The program cannot be written.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(str(error.name), "openvino", "format 'openvino'") from error
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        between = Path(folder, "model.onnx")
        model = onnx.to_model(program, metadata, between)
        _leave_out_zero_points(model)
        import onnx as onnx_library

        onnx_library.save(model, str(between))
        try:
            with quiet():
                converted = openvino.convert_model(str(between))
        except RuntimeError as error:  # OpenVINO's own errors
            raise ExportError(f"OpenVINO cannot read this model: {error}") from error
        rewrite(converted)
        stored = _store_weights_in_4_bits(converted)  # to be kept: constants read its memory
        converted.set_rt_info(json.dumps(metadata), [METADATA_KEY])
        # not in half precision: the rest of the model is what it is in the program
        openvino.save_model(converted, str(path), compress_to_fp16=False)
        del stored


def _store_weights_in_4_bits(model: Any) -> list[Any]:
    """Store each int8 weight whose integers are from -8 to 7 in 4 bits, with a conversion to int8 behind it.

    OpenVINO computes the conversion once, when it compiles the model, and multiplies int8 from there on. What it
    dequantizes from 4 bits itself is multiplied in float.

    Returns:
        The memory of what is stored.
    """
    import openvino
    from openvino import opset13

    memory: list[Any] = []
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_output_element_type(0) != openvino.Type.i8:
            continue
        integers = node.get_data()
        if integers.ndim < 2 or not fits(integers):
            continue
        memory.append(packed(integers))
        stored = openvino.Tensor(memory[-1], openvino.Shape(integers.shape), openvino.Type.i4)
        wide = opset13.convert(opset13.constant(stored), openvino.Type.i8)
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(wide.output(0))
    return memory


def _leave_out_zero_points(model: Any) -> None:
    """Take the zero points off weights, where they are 0.

    The zero points of layers with as many channels are one tensor in the file. OpenVINO subtracts them from each weight
    at run time then, and multiplies in float: half of the linear layers of a vision transformer.
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in stored:
            continue
        zero_point = stored.get(node.input[2])
        if zero_point is not None and not numpy_helper.to_array(zero_point).any():
            del node.input[2]
