"""What a model returns from a linear layer is not rounded: int8 in, float out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Mlp, calibrated, decibels
from modules import digits, trained_mobile
from torch import nn
from torch.nn import functional as F

from lightning_quant import ExportConfig, QuantConfig, convert, coverage, export, load
from lightning_quant.backends import reference
from lightning_quant.backends.float_results import LinearToFloat

BACKENDS = ("fx", "eager")
#: Trained by eager mode, the result is rounded.
CASES = (("fx", "static"), ("fx", "qat"), ("eager", "static"))
ENGINES = torch.backends.quantized.supported_engines


class Net(nn.Module):
    """``function(self, x)`` with two linear layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def in_float(int8: nn.Module) -> list[str]:
    return [name for name, module in int8.named_modules() if isinstance(module, LinearToFloat)]


@pytest.mark.parametrize(("backend", "method"), CASES)
def test_logits_are_the_exact_product_of_integers(backend: Any, method: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(64, 8)
    int8 = convert(calibrated(model, x, method=method, config=QuantConfig(backend=backend, engine="x86")))
    (name,) = in_float(int8)
    layer: Any = int8.get_submodule(name)
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        found = int8(x)
    (given,) = seen
    assert given.dtype is torch.quint8
    integers = given.int_repr().numpy().astype(np.int64) - given.q_zero_point()
    weight, bias = layer.weight(), layer.bias().detach().numpy()
    sums = integers @ weight.int_repr().numpy().astype(np.int64).T
    expected = sums * (given.q_scale() * weight.q_per_channel_scales().numpy()) + bias
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6 * np.abs(expected).max())
    assert len(np.unique(found.numpy())) > 200  # of a grid of 8 bits, which has no more than 256 for 256 values
    assert coverage(int8, x).share == 1
    assert repr(layer).startswith("LinearToFloat(in_features=16, out_features=4, qscheme=torch.per_channel_affine")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda self, x: self.last(self.first(x)), ["last"]),
        (lambda self, x: self.last(self.first(x)).reshape(-1, 2, 2), ["last"]),
        (lambda self, x: {"logits": self.last(y := self.first(x)), "features": y}, ["last"]),
        (lambda self, x: (self.last(self.first(x)), self.first(x)), ["last", "first_call1"]),
        (lambda self, x: F.softmax(self.last(self.first(x)), -1), []),
        (lambda self, x: F.relu(self.last(F.relu(self.first(x)))), []),
    ],
    ids=["plain", "moved", "dict", "called twice", "softmax", "relu"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_which_layers(backend: Any, function: Any, expected: list[str]) -> None:
    model, x = Net(function).eval(), torch.randn(32, 8)
    prepared = calibrated(model, x, config=QuantConfig(backend=backend, engine="x86"))
    int8 = convert(prepared)
    assert in_float(int8) == expected

    def flat(found: Any) -> list[torch.Tensor]:
        return list(found.values()) if isinstance(found, dict) else list(found) if isinstance(found, tuple) else [found]

    for of_float, of_reference, of_int8 in zip(*(flat(m(x)) for m in (model, reference(prepared), int8)), strict=True):
        assert of_int8.dtype is torch.float32
        assert not of_int8.is_quantized
        assert decibels(of_float, of_int8) > 25
        assert decibels(of_reference, of_int8) > 35


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("engine", [e for e in ("qnnpack", "onednn") if e in ENGINES])
def test_other_engines_round_what_they_return(backend: Any, engine: Any) -> None:
    model, x = Mlp().eval(), torch.randn(64, 4)
    int8 = convert(calibrated(model, x, config=QuantConfig(backend=backend, engine=engine)))
    assert in_float(int8) == []
    assert len(torch.unique(int8(x))) <= 256


def test_eager_mode_trains_with_a_rounded_result() -> None:
    model, x = Mlp().eval(), torch.randn(64, 4)
    int8 = convert(calibrated(model, x, method="qat", config=QuantConfig(backend="eager", engine="x86")))
    assert in_float(int8) == []


@pytest.mark.parametrize(("backend", "method"), CASES)
def test_files_have_the_same(backend: Any, method: Any, tmp_path: Path) -> None:
    model, images = trained_mobile(1), digits()[0][1000:1064] / 16
    prepared = calibrated(model, images, method=method, config=QuantConfig(backend=backend))
    int8 = convert(prepared)
    paths = export(prepared, None, ExportConfig(directory=tmp_path, formats=("torchscript", "pt2", "onnx")), images)
    with torch.no_grad():
        expected = int8(images)
        for name, path in paths.items():
            found = load(path)(images)
            assert decibels(expected, found) > (100 if name == "torchscript" else 35)
            assert len(torch.unique(found)) > 500  # of 640
