"""What ONNX Runtime needs beyond the layout: gates in integers."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from models import calibrated, decibels
from torch import nn

from lightning_quant import ExportConfig, QuantConfig, convert, export, load
from lightning_quant.analysis.kernels import kernels


class Gated(nn.Module):
    """A convolution, an activation that is a product with a gate, and a convolution."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(3, 8, 3), act, nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)))


def write(model: nn.Module, x: torch.Tensor, folder: Path) -> tuple[Path, nn.Module]:
    prepared = calibrated(model.eval(), x, config=QuantConfig(reduce_range=False))
    return export(prepared, None, ExportConfig(directory=folder, formats=("onnx",)), x)["onnx"], prepared


def has_gates_in_integers(path: Path) -> bool:
    return any("gate_scale" in tensor.name for tensor in onnx.load(path).graph.initializer)


@pytest.mark.parametrize(
    ("act", "steps"),
    [
        (nn.SiLU(), {"QLinearSigmoid": 1, "QLinearMul": 1}),
        (nn.Hardswish(), {"HardSigmoid": 1, "QLinearMul": 1}),
    ],
    ids=["silu", "hardswish"],
)
def test_products_with_gates_are_steps_of_integers(act: nn.Module, steps: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Gated(act).eval(), 3 * torch.randn(64, 3, 9, 9)
    path, _ = write(model, x, tmp_path)
    onnx.checker.check_model(str(path))
    found = kernels(path)
    assert found is not None
    assert has_gates_in_integers(path)
    assert found.kinds["QLinearConv"] == 2
    assert {kind: found.kinds.get(kind, 0) for kind in steps} == steps
    assert "Mul" not in found.kinds
    with torch.no_grad():
        assert decibels(model(x), load(path)(x)) > 32


def test_a_gate_that_is_read_in_float_stays(tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.first(x)
            gate = torch.sigmoid(y)
            return self.last(y * gate), gate.exp()

    x = torch.randn(16, 3, 9, 9)
    path, _ = write(Other().eval(), x, tmp_path)
    assert not has_gates_in_integers(path)


class SqueezeExcite(nn.Module):
    """As in EfficientNet: an activation that is pooled, and multiplied with what comes of that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        gate = self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))
        return self.last(x * gate.sigmoid())


def test_squeeze_and_excitation_is_all_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = SqueezeExcite().eval(), 3 * torch.randn(64, 3, 9, 9)
    path, prepared = write(model, x, tmp_path)
    found = kernels(path)
    assert found is not None
    assert found.kinds["QLinearConv"] == 4
    assert found.kinds["QLinearGlobalAveragePool"] == 1
    assert found.kinds["QLinearMul"] == found.kinds["QLinearSigmoid"] == 2
    assert not {"Mul", "Sigmoid", "ReduceMean", "GlobalAveragePool"} & set(found.kinds)
    with torch.no_grad():
        assert decibels(model(x), load(path)(x)) > 30
        assert decibels(convert(prepared)(x), load(path)(x)) > 38


@pytest.mark.parametrize(("dims", "keepdim"), [((2,), True), ((1, 2), True), ((2, 3), False)])
def test_other_means_stay_what_they_are(dims: tuple[int, ...], keepdim: bool, tmp_path: Path) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.LazyLinear(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x).mean(dims, keepdim=keepdim))

    torch.manual_seed(0)
    model, x = Mean(), torch.randn(64, 3, 9, 9)
    model(x)
    path, _ = write(model, x, tmp_path)
    assert "GlobalAveragePool" not in {node.op_type for node in onnx.load(path).graph.node}
    with torch.no_grad():
        assert decibels(model(x), load(path)(x)) > 30
