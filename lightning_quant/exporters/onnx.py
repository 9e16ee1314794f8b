"""The neutral form as an ONNX file with QuantizeLinear and DequantizeLinear nodes, which every ONNX runtime reads."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_quant._torch_ao import quiet
from lightning_quant.errors import ExportError, MissingExtraError
from lightning_quant.exporters.onnx_bits import OPSET, has_small_weights, store_weights_in_4_bits, translations
from lightning_quant.exporters.onnx_operators import Quick
from lightning_quant.exporters.onnx_simplify import simplify
from lightning_quant.runtime.state import tensor_names

METADATA_KEY = "lightning_quant"


def export(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Write ``program`` to ``path``.

    Args:
        program: From :func:`lightning_quant.exporters.qdq.to_program`.
        path: Where to.
        metadata: JSON values, stored in the file's ``metadata_props``. ``tensors`` and ``outputs`` are the names of its
            inputs and outputs, and those in ``state`` come behind them.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: The program cannot be written as ONNX, or the file is not valid.
    """
    model = to_model(program, metadata, path, opset=OPSET if has_small_weights(program) else None)
    _store_biases_as_integers(model)
    _quantize_gates(model)
    _pool_globally(model)
    store_weights_in_4_bits(model)
    import onnx

    prop = model.metadata_props.add()
    prop.key, prop.value = METADATA_KEY, json.dumps(metadata)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the ONNX file is not valid: {error}") from error
    onnx.save(model, str(path))


def to_model(
    program: torch.export.ExportedProgram, metadata: dict[str, Any], scratch: Path, opset: int | None = None
) -> Any:
    """``program`` as an ``onnx.ModelProto`` without metadata.

    Args:
        program: From :func:`lightning_quant.exporters.qdq.to_program`.
        metadata: As of :func:`export`.
        scratch: A file to write on the way.
        opset: The version of ONNX's operators. None: what torch.onnx writes.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
        ExportError: The program cannot be written as ONNX.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise MissingExtraError(str(error.name), "onnx", f"format {metadata['format']!r}") from error

    names, outputs = tensor_names(metadata)
    try:
        with quiet(), _quiet_exporter(), torch.no_grad():
            written = torch.onnx.export(
                Quick.of(program), (), dynamo=True, input_names=names, output_names=outputs, verbose=False,
                custom_translation_table=translations(), opset_version=opset, optimize=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch.onnx cannot write this model: {error}") from error
    assert written is not None  # as it is with dynamo=True
    simplify(written.model)
    written.save(str(scratch))
    model = onnx.load(str(scratch))
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces of the machine that exported
    return model


#: They move values of one scale, and ONNX Runtime moves the integers instead.
_MOVING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool")


def _store_biases_as_integers(model: Any) -> None:
    """Give each ``Gemm`` that writes floats its bias in the integers of its sums, as int32 with the product of scales.

    ONNX Runtime has an int8 kernel for one only then. Where a Gemm's output is quantized, it does so by itself.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}

    def scale_of(name: str) -> Any:
        source = made_by.get(name)
        while source is not None and source.op_type in _MOVING:
            source = made_by.get(source.input[0])
        if source is None or source.op_type != "DequantizeLinear" or source.input[1] not in stored:
            return None
        return numpy_helper.to_array(stored[source.input[1]]).astype(np.float64)

    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type != "Gemm" or len(node.input) < 3 or node.input[2] not in stored or node.output[0] in quantized:
            continue
        of_data, of_weight = (scale_of(name) for name in node.input[:2])
        scaled = any(attribute.name in ("alpha", "beta") and attribute.f != 1 for attribute in node.attribute)
        if of_data is None or of_weight is None or scaled:
            continue
        scale = of_data * of_weight
        integers = np.rint(numpy_helper.to_array(stored[node.input[2]]) / scale)
        if np.abs(integers).max() > np.iinfo(np.int32).max:
            continue
        name = f"{node.name}_bias"
        new = {
            f"{name}_integers": integers.astype(np.int32),
            f"{name}_scale": scale.astype(np.float32),
            f"{name}_zero_point": np.zeros(scale.shape, np.int32),
        }
        model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in new.items())
        dequantize = helper.make_node("DequantizeLinear", [*new], [name], f"{name}_dequantize", axis=0)
        model.graph.node.insert(index, dequantize)
        model.graph.node[index + 1].input[2] = name


#: 0 to 1 in 8 bits: what a sigmoid gives, by its definition. 1 is a value of its own, as it is where a gate is open.
GATE_SCALE = 1 / 255


def _quantize_gates(model: Any) -> None:
    """Put a pair of quantize and dequantize behind each sigmoid that is multiplied with integers into integers.

    SiLU, hard swish and squeeze-and-excitation are such products. ONNX Runtime has int8 kernels for the sigmoid and for
    the product, and takes them where all that they read and write is quantized. Else it dequantizes all of it.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    _write_out_hard_swish(model)
    made_by = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def is_of(name: str, kind: str) -> bool:
        return name in made_by and made_by[name].op_type == kind

    def in_integers(gate: str, product: Any) -> bool:
        others = [name for name in product.input if name != gate]
        behind = [node.op_type for node in readers.get(product.output[0], ())]
        is_product = product.op_type == "Mul" and len(others) == 1 and is_of(others[0], "DequantizeLinear")
        return is_product and behind == ["QuantizeLinear"]

    scale, zero_point = (f"{METADATA_KEY}.gate_{what}" for what in ("scale", "zero_point"))
    found = False
    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type not in ("Sigmoid", "HardSigmoid") or not is_of(node.input[0], "DequantizeLinear"):
            continue
        products = readers.get(node.output[0], [])
        if not products or not all(in_integers(node.output[0], product) for product in products):
            continue
        gate, integers, rounded = node.output[0], f"{node.name}_quantized", f"{node.name}_rounded"
        for product in products:
            product.input[list(product.input).index(gate)] = rounded
        qparams = [scale, zero_point]
        pair = (
            helper.make_node("QuantizeLinear", [gate, *qparams], [integers], f"{node.name}_quantize"),
            helper.make_node("DequantizeLinear", [integers, *qparams], [rounded], f"{node.name}_dequantize"),
        )
        for behind, new in enumerate(pair, 1):
            model.graph.node.insert(index + behind, new)
        found = True
    if found:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(GATE_SCALE, np.float32), scale))
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(0, np.uint8), zero_point))


def _write_out_hard_swish(model: Any) -> None:
    """As the product that it is by ONNX's definition: ONNX Runtime takes it apart too late for its int8 product."""
    from onnx import helper

    dequantized = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type != "HardSwish" or node.input[0] not in dequantized:
            continue
        gate = f"{node.name}_gate"
        product = helper.make_node("Mul", [node.input[0], gate], list(node.output), node.name)
        opened = helper.make_node("HardSigmoid", [node.input[0]], [gate], gate, alpha=1 / 6, beta=0.5)
        model.graph.node.remove(node)
        model.graph.node.insert(index, product)
        model.graph.node.insert(index, opened)


def _pool_globally(model: Any) -> None:
    """Say ``GlobalAveragePool`` where the mean of integers over all places of an image is made integers again.

    It is the same by ONNX's definition, and ONNX Runtime has an int8 kernel for it alone.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)

    for index, node in enumerate(graph.node):
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in stored:
            continue
        data, axes = node.input
        rank = ranks.get(data, 0)
        places = sorted(axis % rank for axis in numpy_helper.to_array(stored[axes]).tolist()) if rank > 2 else []
        keeps = not any(attribute.name == "keepdims" and attribute.i == 0 for attribute in node.attribute)
        in_integers = data in dequantized and readers.get(node.output[0]) == ["QuantizeLinear"]
        if keeps and in_integers and places == list(range(2, rank)):
            pool = helper.make_node("GlobalAveragePool", [data], list(node.output), node.name)
            graph.node[index].CopyFrom(pool)


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
