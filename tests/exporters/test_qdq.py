"""The neutral form computes what the reference graph computes, bit for bit, from weights that are int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Mlp, Residual, calibrated, settle
from torch import nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, TensorSpec
from lightning_quant.backends import fx
from lightning_quant.backends.int8_weight import Int8Weight
from lightning_quant.config import Method
from lightning_quant.exporters import qdq
from lightning_quant.exporters.qdq import to_qdq


class Functional(nn.Module):
    def __init__(self, function: Any, *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.function(x, self.weight))


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (5, 4)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, dilation=2), (5, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (5, 3, 8, 8)),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=4), (5, 4, 8, 8)),
    "reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (5, 3, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (5, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (5, 3, 4, 4)),
    "F.linear": (lambda: Functional(F.linear, 3, 4), (5, 4)),
    "F.conv2d": (lambda: Functional(F.conv2d, 4, 3, 3, 3), (5, 3, 8, 8)),
    "mlp": (Mlp, (5, 4)),
    "residual": (Residual, (5, 3, 8, 8)),
}


def prepared_case(name: str, method: Method = "static", config: QuantConfig | None = None) -> tuple[Any, torch.Tensor]:
    make, shape = CASES[name]
    model = make()
    if name == "residual":
        settle(model)
    x = torch.randn(shape)
    return calibrated(model, x, method=method, config=config), x


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_reference_computes(name: str, method: Method) -> None:
    prepared, x = prepared_case(name, method)
    reference = fx.reference(prepared)
    before = {key: value.clone() for key, value in (*reference.named_parameters(), *reference.named_buffers())}
    neutral = to_qdq(reference)
    assert torch.equal(neutral(x), reference(x))
    after = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert torch.equal(qdq(prepared)(x), reference(x))


@pytest.mark.parametrize("name", CASES)
def test_no_float_copy_of_a_weight_is_left(name: str) -> None:
    prepared, _ = prepared_case(name)
    neutral = qdq(prepared)
    tensors = {**dict(neutral.named_parameters()), **dict(neutral.named_buffers())}
    int8 = [value for value in tensors.values() if value.dtype == torch.int8]
    weights = [p for p in prepared.parameters() if p.dim() > 1]
    assert sorted(tuple(x.shape) for x in int8) == sorted(tuple(p.shape) for p in weights)
    # what is float has one dimension: biases and scales
    assert all(value.dim() <= 1 for value in tensors.values() if value.dtype != torch.int8)
    assert not list(neutral.parameters())


@pytest.mark.parametrize(
    "spec", [TensorSpec(qscheme="per_tensor_symmetric"), TensorSpec(qscheme="per_channel_affine"), TensorSpec()]
)
@pytest.mark.parametrize("name", ["linear", "conv2d", "F.conv2d"])
def test_weights_of_every_scheme(name: str, spec: TensorSpec) -> None:
    prepared, x = prepared_case(name, config=QuantConfig(weight=spec))
    neutral = qdq(prepared)
    assert torch.equal(neutral(x), fx.reference(prepared)(x))
    for layer in neutral.modules():
        if isinstance(layer, Int8Weight):
            assert (layer.scalars is None) is (spec.qscheme != "per_tensor_symmetric")


def test_weights_are_those_of_the_layer_to_half_a_step() -> None:
    layer = nn.Linear(4, 3)
    prepared = calibrated(layer, torch.randn(5, 4))
    stored = next(m for m in qdq(prepared).modules() if isinstance(m, Int8Weight))
    assert stored.weight.dtype == torch.int8
    real = (stored.weight - stored.zero_point[:, None]) * stored.scale[:, None]
    # 2**-17: a value of at most 127 steps is divided and multiplied in float32
    assert ((real - layer.weight).abs() <= stored.scale[:, None] * (0.5 + 2.0**-17)).all()
    assert str(stored) == "Int8Weight(linear, weight=(3, 4))"
    assert torch.equal(stored.bias, layer.bias)
