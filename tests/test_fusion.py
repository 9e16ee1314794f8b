"""Groups that run as one kernel follow the data, not the order in which modules were registered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Residual, calibrated, decibels, settle
from torch import nn
from torch.nn import functional as F

from lightning_quant import convert
from lightning_quant.backends.graph import info
from lightning_quant.config import Method

PARTS = {
    "conv": lambda: nn.Conv2d(3, 3, 3, padding=1),
    "bn": lambda: nn.BatchNorm2d(3),
    "act": lambda: nn.ReLU(),
    "other": lambda: nn.Conv2d(3, 3, 1),
    "norm": lambda: nn.BatchNorm2d(3),
}


def model_of(forward: Any, order: tuple[str, ...] = tuple(PARTS)) -> nn.Module:
    """A module with the parts registered in this order."""
    model: nn.Module = type("Model", (nn.Module,), {"forward": forward})()
    for name in order:
        model.add_module(name, PARTS[name]())
    return model


def groups(model: nn.Module, method: Method, shape: tuple[int, ...] = (4, 3, 8, 8)) -> list[str]:
    prepared = calibrated(settle(model, shape), torch.randn(shape), method=method)
    return [str(group) for group in info(prepared).fused]


def check_accuracy(model: nn.Module, method: Method) -> None:
    x = torch.randn(16, 3, 8, 8)
    model = settle(model, x.shape)
    expected = model(x)
    prepared = calibrated(model, x, method=method)
    assert decibels(expected, prepared(x)) > 25
    assert decibels(expected, convert(prepared)(x)) > 25


STRAIGHT = lambda self, x: self.other(self.act(self.bn(self.conv(x))))  # noqa: E731
METHODS = pytest.mark.parametrize("method", ["static", "qat"])


@METHODS
@pytest.mark.parametrize("order", [tuple(PARTS), tuple(reversed(PARTS)), ("bn", "other", "norm", "conv", "act")])
def test_the_order_of_registration_does_not_matter(method: Method, order: tuple[str, ...]) -> None:
    assert groups(model_of(STRAIGHT, order), method) == ["conv + bn + act"]
    check_accuracy(model_of(STRAIGHT, order), method)


@METHODS
@pytest.mark.parametrize(
    "forward",
    [
        # registered beside each other, and not connected
        lambda self, x: self.conv(x) + self.bn(x),
        # another operator in between
        lambda self, x: self.bn(torch.sigmoid(self.conv(x))),
        # the batch norm comes first
        lambda self, x: self.conv(self.bn(x)),
    ],
    ids=["side by side", "not adjacent", "the other way round"],
)
def test_what_is_not_connected_is_never_joined(method: Method, forward: Any) -> None:
    assert groups(model_of(forward), method) == []
    check_accuracy(model_of(forward), method)


@METHODS
@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: (lambda y: self.bn(y) + y)(self.conv(x)), []),
        (lambda self, x: (lambda y: self.act(y) + y)(self.bn(self.conv(x))), ["conv + bn"]),
        (lambda self, x: (lambda y: self.bn(y) + self.norm(y))(self.conv(x)), []),
    ],
    ids=["conv", "bn", "two batch norms"],
)
def test_a_value_that_something_else_reads_stays(method: Method, forward: Any, expected: list[str]) -> None:
    assert groups(model_of(forward), method) == expected
    check_accuracy(model_of(forward), method)


@METHODS
def test_functions_are_fused_as_modules_are(method: Method) -> None:
    found = groups(model_of(lambda self, x: F.relu(self.bn(self.conv(x)))), method)
    assert len(found) == 1
    assert found[0].startswith("conv + bn + relu")


@METHODS
def test_the_groups_of_a_network_in_the_order_of_the_data(method: Method) -> None:
    found = groups(Residual(), method)
    assert found[0].startswith("stem + bn + relu")
    assert "blocks.0.conv1 + blocks.0.bn1 + blocks.0.relu" in found
    # the sum is in between: the second ReLU belongs to it
    assert "blocks.1.conv2 + blocks.1.bn2" in found
    assert [g.split(" + ")[0] for g in found if "conv" in g] == [
        f"blocks.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)
    ]


@METHODS
@pytest.mark.parametrize(
    ("layers", "shape", "expected"),
    [
        ((nn.Linear(4, 4), nn.ReLU()), (8, 4), ["0 + 1"]),
        ((nn.Linear(4, 4), nn.BatchNorm1d(4)), (8, 4), ["0 + 1"]),
        ((nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU()), (8, 4, 6), ["0 + 1 + 2"]),
        ((nn.Conv3d(2, 2, 1), nn.BatchNorm3d(2), nn.ReLU()), (8, 2, 3, 3, 3), ["0 + 1 + 2"]),
        ((nn.ConvTranspose2d(3, 4, 2), nn.Dropout(), nn.BatchNorm2d(4)), (8, 3, 4, 4), []),
    ],
    ids=["linear-relu", "linear-bn", "conv1d", "conv3d", "transposed with something in between"],
)
def test_each_kind_of_layer(method: Method, layers: Any, shape: tuple[int, ...], expected: list[str]) -> None:
    assert groups(nn.Sequential(*layers), method, shape) == expected


def test_a_transposed_convolution_takes_its_batch_norm_in_when_calibrated() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    found = groups(model, "static", (4, 3, 5, 5))
    assert len(found) == 1
    assert found[0].startswith("0 + 1")
