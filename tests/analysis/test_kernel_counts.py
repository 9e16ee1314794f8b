"""How many kernels multiply integers: counted in graphs of which that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, Residual, calibrated, settle
from torch import nn

from lightning_quant import ExportConfig, QuantConfig, export
from lightning_quant.analysis.kernels import Kernels, kernels

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
CONFIG = QuantConfig(reduce_range=False)


def files(model: nn.Module, x: torch.Tensor, folder: Path, formats: Any = ("onnx", "openvino")) -> dict[str, Kernels]:
    prepared = calibrated(model.eval(), x, config=CONFIG)
    paths = export(prepared, None, ExportConfig(directory=folder, formats=formats), x)
    found = {name: kernels(path) for name, path in paths.items()}
    assert all(value is not None for value in found.values())
    return found  # type: ignore[return-value]


def test_a_convnet(tmp_path: Path) -> None:
    found = files(settle(Residual()), torch.randn(8, 3, 8, 8), tmp_path)
    for value in found.values():
        assert (value.int8, value.floating) == (6, 0)  # five convolutions and a linear layer
    assert found["onnx"].kinds["QLinearConv"] == 5
    assert found["onnx"].kinds["QGemm"] == 1
    assert found["onnx"].conversions == sum(
        found["onnx"].kinds.get(name, 0) for name in ("QuantizeLinear", "DequantizeLinear")
    )
    assert found["openvino"].kinds["Convolution u8"] == 5
    assert found["openvino"].kinds["FullyConnected u8"] == 1
    assert found["openvino"].conversions == 1  # of the input


def _onnx_file(path: Path, *nodes: Any, initializers: dict[str, Any], shape: tuple[int, ...]) -> Path:
    """A float ONNX graph, which no exporter wrote."""
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        list(nodes), "graph", [value("x", 1, list(shape))], [value("y", 1, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def test_a_float_graph_by_hand(tmp_path: Path) -> None:
    helper = pytest.importorskip("onnx").helper
    weights = {"w": torch.randn(4, 3, 3, 3).numpy(), "v": torch.randn(6, 2).numpy()}
    path = _onnx_file(
        tmp_path / "float.onnx",
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("MatMul", ["c", "v"], ["y"]),
        initializers=weights,
        shape=(1, 3, 8, 8),
    )
    found = kernels(path)
    assert (found.int8, found.floating, found.conversions) == (0, 2, 0)
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.convert_model(str(path)), str(tmp_path / "float.xml"), compress_to_fp16=False)
    found = kernels(tmp_path / "float.xml")
    assert (found.int8, found.floating, found.conversions) == (0, 2, 0)
    assert sum(count for kind, count in found.kinds.items() if kind.startswith("Convolution")) == 1
    assert not any(kind.endswith((" u8", " i8")) for kind in found.kinds)


def test_products_of_two_activations_count(tmp_path: Path) -> None:
    helper = pytest.importorskip("onnx").helper
    path = _onnx_file(
        tmp_path / "product.onnx", helper.make_node("MatMul", ["x", "x"], ["y"]), initializers={}, shape=(2, 4, 4)
    )
    assert kernels(path) == Kernels(0, 1, 0, {"MatMul": 1})


def test_layers_in_float_are_counted_as_such(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    x = torch.randn(8, 4)
    prepared = calibrated(Half().eval(), x, config=QuantConfig(reduce_range=False, skip=("second",)))
    paths = export(prepared, None, ExportConfig(directory=tmp_path, formats=("onnx", "openvino")), x)
    for path in paths.values():
        found = kernels(path)
        assert (found.int8, found.floating) == (1, 1)


@pytest.mark.parametrize("name", ["torchscript", "pt2"])
def test_runtimes_that_show_nothing(name: Any, tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    paths = export(calibrated(Mlp().eval(), x), None, ExportConfig(directory=tmp_path, formats=(name,)), x)
    assert kernels(paths[name]) is None
