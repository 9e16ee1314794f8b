"""Layers that people write themselves, of functions, parametrizations and products: int8 in one graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import calibrated, decibels
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_quant import convert, coverage, prepare
from lightning_quant.backends.graph import info, is_graph
from lightning_quant.config import Method

METHODS = pytest.mark.parametrize("method", ["static", "qat"])
WIDTH = 8


class SamePadding(nn.Conv2d):
    """The padding of TensorFlow, for any size of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sides = []
        for size, kernel, stride in ((x.shape[i + 2], self.kernel_size[i], self.stride[i]) for i in (1, 0)):
            total = max((-(size // -stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class SamePaddingByCeil(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.size()[-2:]
        down = max((math.ceil(height / self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
        right = max((math.ceil(width / self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
        x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class SamePaddingWhereNeeded(nn.Conv2d):
    """Asks whether there is anything to pad, which a trace cannot answer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = max(self.kernel_size[0] - x.shape[-1] % self.stride[0], 0)
        if total > 0:
            x = F.pad(x, [total // 2, total - total // 2] * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedByNorm(nn.Conv2d):
    """As timm writes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-5).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Transposed(Product):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.t()


class ProductAndBias(Product):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(x, self.weight) + self.bias


class Conv1D(ProductAndBias):
    """As transformers writes it: a linear layer for inputs of any number of dimensions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.size()[:-1] + (WIDTH,)  # noqa: RUF005 - it adds sizes, as transformers does
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


def between_convolutions(layer: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), layer, nn.ReLU(), nn.Conv2d(4, 4, 1))
    return model.eval(), torch.randn(8, 3, 10, 9)


def between_linears(layer: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), layer, nn.ReLU(), nn.Linear(WIDTH, 4))
    return model.eval(), torch.randn(64, WIDTH)


def assert_near(model: nn.Module, int8: nn.Module, x: torch.Tensor, enough: float = 25) -> None:
    with torch.no_grad():
        assert decibels(model(x), int8(x)) > enough


def settled(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """Spectral norms estimate while they are trained."""
    with torch.no_grad():
        for _ in range(20):
            model.train()(x)
    return model.eval(), x


OWN_LAYERS: dict[str, Any] = {
    "same padding": lambda: between_convolutions(SamePadding(4, 4, 3, stride=2)),
    "same padding, even": lambda: between_convolutions(SamePadding(4, 4, 2)),
    "same padding by ceil": lambda: between_convolutions(SamePaddingByCeil(4, 4, 3, stride=2)),
    "standardised": lambda: between_convolutions(Standardised(4, 4, 3, padding=1)),
    "standardised by norm": lambda: between_convolutions(StandardisedByNorm(4, 4, 3, padding=1, groups=2)),
    "weight norm": lambda: between_convolutions(parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))),
    "weight norm, linear": lambda: between_linears(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
    "spectral norm": lambda: settled(
        *between_convolutions(parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)))
    ),
    "spectral norm, linear": lambda: settled(*between_linears(parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))),
    "orthogonal": lambda: between_linears(parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))),
    "product": lambda: between_linears(Product()),
    "product and bias": lambda: between_linears(ProductAndBias()),
    "Conv1D": lambda: between_linears(Conv1D()),
    "Conv1D on sequences": lambda: (between_linears(Conv1D())[0], torch.randn(6, 5, WIDTH)),
}


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_own_layers_are_int8_in_one_graph(name: str) -> None:
    model, x = OWN_LAYERS[name]()
    prepared = calibrated(model, x)
    assert is_graph(prepared)
    assert info(prepared).kept == {}
    int8 = convert(prepared)
    assert coverage(int8, x).share == 1.0
    assert_near(model, int8, x)


@pytest.mark.parametrize("layer", [SamePadding, Standardised])
def test_own_layers_take_in_their_batch_norm(layer: type[nn.Conv2d]) -> None:
    own = nn.Sequential(layer(4, 4, 3, stride=2), nn.BatchNorm2d(4))
    model, x = settled(*between_convolutions(own))
    prepared = calibrated(model, x)
    assert is_graph(prepared)
    int8 = convert(prepared)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in int8.modules())
    assert_near(model, int8, x)


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_own_layers_are_trained(name: str) -> None:
    model, x = OWN_LAYERS[name]()
    prepared: Any = prepare(model, method="qat", example_inputs=x)
    assert is_graph(prepared)
    assert info(prepared).kept == {}
    prepared.train()(x).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.01 * parameter.grad)
    with torch.no_grad():
        for _ in range(40):  # ranges follow the weights
            prepared(x)
    prepared.eval()
    int8 = convert(prepared)
    assert coverage(int8, x).share == 1.0
    # of the weights as they are now
    assert decibels(model.eval()(x), int8(x)) > 25
    assert decibels(prepared(x), int8(x)) > 30


@METHODS
def test_sizes_other_than_those_of_the_example(method: Method) -> None:
    model, x = OWN_LAYERS["same padding"]()
    int8 = convert(calibrated(model, x, method=method))
    for size in ((2, 3, 7, 12), (1, 3, 10, 10)):
        x = torch.randn(size)
        assert int8(x).shape == model(x).shape
        assert_near(model, int8, x, 20)


@METHODS
def test_a_padding_that_asks_is_kept_with_its_reason(method: Method) -> None:
    model, x = between_convolutions(SamePaddingWhereNeeded(4, 4, 3))
    int8 = convert(calibrated(model, x, method=method))
    rows = coverage(int8, x, reasons=info(int8).kept).rows
    assert [(row.name, row.int8) for row in rows] == [("0", True), ("2", False), ("4", True)]
    assert "TraceError" in rows[1].reason
    assert_near(model, int8, x)


@METHODS
def test_a_product_with_a_transposed_parameter(method: Method) -> None:
    model, x = between_linears(Transposed())
    assert coverage(convert(calibrated(model, x, method=method)), x).share == 1.0
