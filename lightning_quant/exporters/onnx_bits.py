"""Fewer than 8 bits in ONNX: weights as int4, and activations clamped to the smaller range of their integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

#: Integers of 4 bits.
LEAST, MOST = -8, 7
#: The first version of ONNX's operators with tensors of 4 bits, and of its files that hold them.
OPSET, IR_VERSION = 21, 10

_OPS = torch.ops.quantized_decomposed


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch's quantize operators are written, for ``torch.onnx.export(custom_translation_table=...)``.

    Its own translation saturates at the ends of the type, whatever ``quant_min`` and ``quant_max`` are.
    """
    from onnxscript import ir, onnx_opset

    op: Any = onnx_opset.opset18  # its types are those of values in a script, not of what it is made from

    def constant(value: int, dtype: int) -> Any:
        return op.Constant(value=ir.tensor(value, dtype=ir.DataType(dtype)))

    def quantize(input: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int) -> Any:
        integers = op.QuantizeLinear(input, scale, constant(zero_point, dtype))
        whole = np.iinfo(ir.DataType(dtype).numpy())
        if (quant_min, quant_max) == (whole.min, whole.max):
            return integers
        return op.Clip(integers, constant(quant_min, dtype), constant(quant_max, dtype))

    return {_OPS.quantize_per_tensor.default: quantize}


def has_small_weights(program: torch.export.ExportedProgram) -> bool:
    """Whether a weight of ``program`` lies in 4 bits."""
    tensors = (*program.state_dict.values(), *program.constants.values())
    return any(
        isinstance(x, torch.Tensor) and x.dtype is torch.int8 and x.dim() > 1 and fits(x.detach().cpu().numpy())
        for x in tensors
    )


def fits(integers: Any) -> bool:
    """Whether all integers of an array are from -8 to 7.

    >>> fits(np.array([-8, 7])), fits(np.array([8]))
    (True, False)
    """
    return bool(integers.size and integers.min() >= LEAST and integers.max() <= MOST)


def packed(integers: Any) -> Any:
    """Integers from -8 to 7, of any shape, as uint8, two in each: the first one in the lower four bits.

    >>> packed(np.array([1, -1, 7], np.int8)).tolist()
    [241, 7]
    """
    flat = integers.reshape(-1).astype(np.int8).view(np.uint8) & 0xF
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return flat[::2] | flat[1::2] << 4


def store_weights_in_4_bits(model: Any) -> None:
    """Store each weight whose integers are from -8 to 7 in 4 bits, with a cast to int8 behind it.

    Args:
        model: An ``onnx.ModelProto`` of opset 21 at least, where there is such a weight. Changed in place.

    ONNX Runtime computes the cast once, when it loads the file, and multiplies int8 from there on. A
    ``DequantizeLinear`` that reads int4 is computed in every call, and the layer behind it is in float then.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.INT8 or len(tensor.dims) < 2:
            continue
        if any(node.op_type != "DequantizeLinear" or node.input[0] != tensor.name for node in readers[tensor.name]):
            continue
        integers = numpy_helper.to_array(tensor)
        if not fits(integers):
            continue
        small = f"{tensor.name}_int4"
        casts.append(helper.make_node("Cast", [small], [tensor.name], f"{tensor.name}_cast", to=TensorProto.INT8))
        dims = list(tensor.dims)
        tensor.CopyFrom(helper.make_tensor(small, TensorProto.INT4, dims, packed(integers).tobytes(), raw=True))
    for cast in reversed(casts):
        graph.node.insert(0, cast)
    if casts:
        model.ir_version = max(model.ir_version, IR_VERSION)
