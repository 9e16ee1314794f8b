"""How many of a file's layers run as int8 kernels? Counted in the graph that the runtime itself made of the file."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: Ends of the names of files whose runtimes show what they made of them.
SHOWN = (".onnx", ".xml", ".aoti.pt2")

#: ONNX Runtime: products of integers. The names are those of its contributed operators.
_ONNX_INT8 = (
    "QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QAttention",
)  # fmt: skip
_ONNX_FLOAT = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_ONNX_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
#: OpenVINO: types of layers in its executable graph.
_OPENVINO_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
#: AOTInductor: what its program in C++ calls.
_AOTI_CALL = re.compile(r"\baoti_torch_(?:cpu_|proxy_executor_)?(\w+)\(")
_AOTI_INT8 = re.compile(r"_?q(conv|linear)|_?int_mm")
_AOTI_FLOAT = re.compile(r"(mkldnn_)?_?(convolution|linear|addmm|baddbmm|bmm|mm)(_|$)")


@dataclass(frozen=True)
class Kernels:
    """What a runtime made of a file.

    Attributes:
        int8: Products (convolutions, matrix products) that multiply integers.
        floating: Those that multiply floats, of two activations too.
        conversions: Quantize and dequantize that stayed steps of their own.
        kinds: The runtime's name for a step -> how many there are.
    """

    int8: int
    floating: int
    conversions: int
    kinds: dict[str, int]


def kernels(path: Path) -> Kernels | None:
    """Count the steps of a file; None where its runtime does not show them.

    Args:
        path: An ``.onnx`` or ``.xml`` file, or a package of AOTInductor.

    Raises:
        ImportError: The runtime is not installed.
    """
    if not path.name.endswith(SHOWN):
        return None
    if path.suffix == ".pt2":
        return _of_aoti(path)
    return _of_onnx(path) if path.suffix == ".onnx" else _of_openvino(path)


def _of_onnx(path: Path) -> Kernels:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    counts = Counter(node.op_type for node in graph.node)

    def sum_of(names: tuple[str, ...]) -> int:
        return sum(counts[name] for name in names)

    return Kernels(sum_of(_ONNX_INT8), sum_of(_ONNX_FLOAT), sum_of(_ONNX_CONVERSIONS), dict(counts.most_common()))


def _of_openvino(path: Path) -> Kernels:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU")
    counts: Counter[str] = Counter()
    int8 = floating = conversions = 0
    for step in compiled.get_runtime_model().get_ops():
        facts: Any = step.get_rt_info()
        kind, precision = facts["layerType"].astype(str), facts["runtimePrecision"].astype(str)
        if kind in ("Const", "Constant", "Input", "Output"):
            continue
        counts[f"{kind} {precision}"] += 1
        if kind in _OPENVINO_PRODUCTS:
            int8 += precision in ("u8", "i8")
            floating += precision not in ("u8", "i8")
        conversions += kind in ("FakeQuantize", "Quantize")
    return Kernels(int8, floating, conversions, dict(counts.most_common()))


def _of_aoti(path: Path) -> Kernels:
    """By the calls in its program in C++, which fuses conversions with what is around them."""
    with zipfile.ZipFile(path) as archive:
        programs = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp")]
    calls = Counter(name for program in programs for name in _AOTI_CALL.findall(program))
    int8 = sum(count for name, count in calls.items() if _AOTI_INT8.match(name))
    floating = sum(count for name, count in calls.items() if _AOTI_FLOAT.match(name))
    return Kernels(int8, floating, 0, dict(calls.most_common()))
