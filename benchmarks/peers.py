"""Post-training int8 of other tools, each as its own documentation makes it, from float models of one input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Batches in, batches out: what a tool made.
Model = Callable[[torch.Tensor], torch.Tensor]


def torch_fx(model: nn.Module, data: list[torch.Tensor]) -> Model:
    """FX graph mode with the default mapping of the x86 engine."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (data[0],))
    _show(prepared, data)
    made: Model = convert_fx(prepared)
    return made


def torchao_pt2e(model: nn.Module, data: list[torch.Tensor]) -> Model:
    """PT2E with the default configuration of the quantizer for inductor on x86."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    exported = torch.export.export(model, (data[0],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported.module(), quantizer)
    _show(prepared, data)
    made: Model = convert_pt2e(prepared)
    return made


def onnxruntime_quantizer(model: nn.Module, data: list[torch.Tensor], folder: Path) -> Model:
    """``quantize_static`` (QDQ, weights per channel), run by ONNX Runtime."""
    write_onnx(model, data[0], folder / "float.onnx")
    write_onnxruntime_int8(folder / "float.onnx", data, folder / "int8.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "int8.onnx"), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def nncf_quantizer(model: nn.Module, data: list[torch.Tensor]) -> Model:
    """``nncf.quantize`` with its defaults, run by OpenVINO."""
    import openvino

    quantized = nncf_int8(model, data)
    # what is not int8 is float32, as for the other tools
    compiled = openvino.Core().compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())


def write_onnx(model: nn.Module, x: torch.Tensor, path: Path) -> None:
    """The float model, of any batch size, with the input ``x``."""
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model, (x,), str(path), dynamo=True, input_names=["x"], external_data=False, dynamic_shapes=({0: batch},),
        verbose=False,
    )  # fmt: skip


def write_onnxruntime_int8(source: Path, data: list[torch.Tensor], path: Path) -> None:
    """Of the float file ``source``, preprocessed as ONNX Runtime asks for."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(data)

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.rest, None)
            return None if found is None else {"x": found.numpy()}

    processed = path.with_name("processed.onnx")
    quant_pre_process(str(source), str(processed))
    quantize_static(
        str(processed), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def nncf_int8(model: nn.Module, data: list[torch.Tensor], *, transformer: bool = False) -> Any:
    """The quantized OpenVINO model."""
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=data[0][:1])
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    arrays: list[Any] = [x.numpy() for x in data]
    return nncf.quantize(converted, nncf.Dataset(arrays), subset_size=len(arrays), model_type=kind)


def _show(prepared: Callable[[torch.Tensor], Any], data: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for x in data:
            prepared(x)
