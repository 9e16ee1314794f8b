"""Multiply-accumulates, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Mlp, Residual, calibrated, settle
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_quant import QuantConfig, convert, coverage
from lightning_quant.analysis.coverage import Coverage, LayerRow
from lightning_quant.config import Method


class Lambda(nn.Module):
    def __init__(self, function: Any, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


#: model, input shape, multiply-accumulates: outputs times the inputs that each of them sees (transposed: inputs times
#: the outputs that each of them reaches).
CASES: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4), 2 * 3 * 4),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (2, 4), 2 * 3 * 4),
    "linear on a sequence": (lambda: nn.Linear(4, 3), (2, 5, 4), 2 * 5 * 3 * 4),
    "linear without bias on a sequence": (lambda: nn.Linear(4, 3, bias=False), (2, 5, 4), 2 * 5 * 3 * 4),
    "F.linear": (lambda: Lambda(lambda self, x: F.linear(x, self.w), w=weight(3, 4)), (2, 4), 2 * 3 * 4),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), (2, 3, 8), 2 * 5 * 6 * (3 * 3)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1, stride=2), (2, 3, 8, 8), 2 * 5 * 4 * 4 * (3 * 3 * 3)),
    "conv2d 5 x 1": (lambda: nn.Conv2d(3, 5, (5, 1)), (1, 3, 8, 8), 5 * 4 * 8 * (3 * 5)),
    "dilated": (lambda: nn.Conv2d(3, 5, 3, dilation=2), (1, 3, 8, 8), 5 * 4 * 4 * (3 * 9)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (1, 6, 5, 5), 4 * 3 * 3 * (3 * 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (1, 6, 5, 5), 6 * 3 * 3 * 9),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 3 * 8 * (2 * 8)),
    "F.conv2d": (lambda: Lambda(lambda self, x: F.conv2d(x, self.w), w=weight(5, 3, 2, 2)), (1, 3, 4, 4), 5 * 9 * 12),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 2, stride=2), (2, 3, 4, 4), 2 * 3 * 16 * (5 * 4)),
    "grouped transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 5), 4 * 5 * (3 * 3)),
    "two calls": (lambda: Lambda(lambda self, x: self.fc(self.fc(x)), fc=nn.Linear(4, 4)), (2, 4), 2 * 2 * 16),
    "never called": (lambda: Lambda(lambda self, x: self.a(x), a=nn.Linear(4, 3), b=nn.Linear(4, 9)), (2, 4), 24),
}


@pytest.mark.parametrize("name", CASES)
def test_a_float_model(name: str) -> None:
    make, shape, macs = CASES[name]
    found = coverage(make(), torch.randn(shape))
    assert sum(row.macs for row in found.rows) == macs
    assert found.share == 0
    assert {row.reason for row in found.rows} == {"no int8 kernel was placed for it"}


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("name", CASES)
def test_an_int8_model_has_the_same_number(name: str, method: Method) -> None:
    make, shape, macs = CASES[name]
    x = torch.randn(shape)
    found = coverage(convert(calibrated(make(), x, method=method)), x)
    assert sum(row.macs for row in found.rows) == macs
    assert found.share == 1
    assert {row.reason for row in found.rows} == {""}
    assert all("quantized::" in row.op or "onednn::" in row.op for row in found.rows)


# ---- recurrent layers

#: Each step of each layer and direction multiplies its input and its state by the weights of every gate.
RECURRENT: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "LSTM": (lambda: nn.LSTM(4, 6), (5, 3, 4), 15 * 4 * 6 * (4 + 6)),
    "two layers": (lambda: nn.LSTM(4, 6, num_layers=2), (5, 3, 4), 15 * 4 * 6 * ((4 + 6) + (6 + 6))),
    "bidirectional": (
        lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True),
        (3, 5, 4),
        15 * 2 * 4 * 6 * ((4 + 6) + (12 + 6)),
    ),
    "GRU": (lambda: nn.GRU(4, 6), (5, 3, 4), 15 * 3 * 6 * (4 + 6)),
    "LSTMCell": (lambda: nn.LSTMCell(4, 6), (3, 4), 3 * 4 * 6 * (4 + 6)),
    "GRUCell": (lambda: nn.GRUCell(4, 6), (3, 4), 3 * 3 * 6 * (4 + 6)),
    "RNNCell": (lambda: nn.RNNCell(4, 6), (3, 4), 3 * 6 * (4 + 6)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str) -> None:
    make, shape, macs = RECURRENT[name]
    model, x = make(), torch.randn(shape)
    found = coverage(model, x)
    assert [(row.macs, row.int8) for row in found.rows] == [(macs, False)]
    found = coverage(convert(calibrated(model, x, method="dynamic")), x)
    assert [(row.macs, row.int8) for row in found.rows] == [(macs, True)]


def test_a_recurrent_layer_without_an_int8_kernel() -> None:
    found = coverage(nn.RNN(4, 6), torch.randn(5, 3, 4))
    assert [(row.op, row.macs) for row in found.rows] == [("RNN", 15 * 6 * (4 + 6))]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projected_lstm() -> None:
    found = coverage(nn.LSTM(4, 6, proj_size=2), torch.randn(5, 3, 4))
    # the state is what was projected, and the projection multiplies as well
    assert [row.macs for row in found.rows] == [15 * (4 * 6 * (4 + 2) + 6 * 2)]


def test_a_packed_sequence_has_only_its_steps() -> None:
    packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 2, 1]))
    found = coverage(nn.LSTM(4, 6), (packed,))
    assert [row.macs for row in found.rows] == [8 * 4 * 6 * (4 + 6)]


def test_attention() -> None:
    found = coverage(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(3, 5, 8))
    # projections to queries, keys and values, and back; then two linear layers
    assert sum(row.macs for row in found.rows if row.weighted) == 15 * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 16)
    # scores and their product with the values: 3 samples, 2 heads of 4, 5 positions
    assert sum(row.macs for row in found.rows if not row.weighted) == 3 * 2 * 5 * 5 * (4 + 4)


def test_bilinear() -> None:
    found = coverage(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4)))
    assert [(row.macs, row.weighted) for row in found.rows] == [(2 * 3 * 4 * 5, True)]


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_products_of_activations_are_rows_of_their_own(dims: int) -> None:
    model = Lambda(lambda self, x: self.fc(x) @ x.transpose(-1, -2), fc=nn.Linear(4, 4))
    found = coverage(model, torch.randn(*(2,) * (dims - 2), 3, 4))
    batch = 2 ** (dims - 2)
    layer, product = found.rows
    assert (layer.macs, layer.weighted) == (batch * 3 * 16, True)
    assert (product.macs, product.weighted) == (batch * 3 * 3 * 4, False)
    assert product.reason == "a product of two activations: float by design"
    assert found.share == 0


# ---- shares, names and reasons


def test_the_share_of_a_model_in_parts() -> None:
    model, x = Mlp(), torch.randn(2, 4)
    found = coverage(
        convert(calibrated(model, x, config=QuantConfig(skip=("second",)))), x, reasons={"second": "left float"}
    )
    assert found.rows == (
        LayerRow("first", found.rows[0].op, 2 * 24, True),
        LayerRow("second", "aten::addmm", 2 * 18, False, "left float"),
    )
    assert found.share == pytest.approx(24 / (24 + 18))


def test_a_reason_is_that_of_the_layer_or_its_parent() -> None:
    model = nn.Sequential(Mlp(), nn.Linear(3, 2), nn.Linear(2, 2))
    found = coverage(model, torch.randn(2, 4), reasons={"0": "skipped", "1": "unknown", "10": "another"})
    assert [(row.name, row.reason) for row in found.rows] == [
        ("0.first", "skipped"),
        ("0.second", "skipped"),
        ("1", "unknown"),
        ("2", "no int8 kernel was placed for it"),
    ]


@pytest.mark.parametrize("method", ["static", "qat"])
def test_names_are_those_of_the_model(method: Method) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = settle(Residual())
    expected = ["stem", *(f"blocks.{b}.conv{c}" for b in (0, 1) for c in (1, 2)), "fc"]
    assert [row.name for row in coverage(model, x).rows] == expected
    int8 = coverage(convert(calibrated(model, x, method=method)), x)
    assert [row.name for row in int8.rows] == expected
    assert int8.share == 1


def test_a_model_without_layers() -> None:
    assert coverage(nn.ReLU(), torch.ones(1)) == Coverage(())
    assert Coverage(()).share == 0


def test_another_thing_can_be_run() -> None:
    model, x = Mlp(), torch.randn(2, 4)
    assert len(coverage(model, (), run=lambda: (model(x), model(x))).rows) == 4


def test_coverage_leaves_no_hooks() -> None:
    model = Mlp()
    coverage(model, torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        coverage(model, torch.randn(2, 9))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
