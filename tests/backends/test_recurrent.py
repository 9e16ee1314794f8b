"""Classes derived from recurrent layers: the layer inside runs in int8 as a plain one would."""

from __future__ import annotations

import copy
from abc import ABC
from pathlib import Path
from typing import Any

import pytest
import torch
from models import calibrated, decibels
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_quant import CaptureError, ExportConfig, convert, coverage, export, load, prepare
from lightning_quant._torch_ao import RECURRENT_MODULES
from lightning_quant.backends import recurrent
from lightning_quant.backends.graph import info
from lightning_quant.backends.recurrent import expose_recurrent
from lightning_quant.config import Method

METHODS = pytest.mark.parametrize("method", ["dynamic", "static", "qat"])


class OwnForward(nn.LSTM):
    """Does something before and something after."""

    def forward(self, x: torch.Tensor, hx: Any = None) -> Any:
        outputs, state = super().forward(torch.relu(x), hx)
        return torch.tanh(outputs) * 2, state


class OwnBase(OwnForward):
    """Two steps away from torch's class."""

    def forward(self, x: torch.Tensor, hx: Any = None) -> Any:
        return super().forward(x + 1, hx)


class NoForward(nn.GRU):
    """Only builds itself in another way."""

    def __init__(self, width: int) -> None:
        super().__init__(8, width, num_layers=2, bidirectional=True, batch_first=True)
        self.start = nn.Parameter(torch.zeros(4, 1, width))


class WithStart(NoForward):
    """Learns the state that it begins with."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x, self.start.expand(-1, x.shape[0], -1).contiguous())


class Cell(nn.LSTMCell):
    def forward(self, x: torch.Tensor, hx: Any = None) -> Any:
        hidden, cell = super().forward(x[:, 0], hx)
        return torch.stack([hidden, hidden * 2], 1), cell


LAYERS: dict[str, Any] = {
    "own forward": lambda: OwnForward(8, 16, batch_first=True),
    "own base": lambda: OwnBase(8, 16, num_layers=2, batch_first=True),
    "no forward": lambda: NoForward(8),
    "own Parameter": lambda: WithStart(8),
    "cell": lambda: Cell(8, 16),
}


class Model(nn.Module):
    """Takes ``(N, length, 8)``; gives ``(N, length, 4)`` and a state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, *more: Any) -> Any:
        outputs, state = self.layer(x, *more)
        return self.fc(outputs), state


def recurrent_rows(int8: nn.Module, *data: Any) -> list[tuple[str, bool]]:
    return [(row.name, row.int8) for row in coverage(int8, data).rows if row.name.startswith("layer")]


@METHODS
@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_inside_is_int8(name: str, method: Method) -> None:
    model, x = Model(LAYERS[name]()).eval(), torch.randn(5, 6, 8)
    kind, keys = type(model.layer), list(model.state_dict())
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    assert recurrent_rows(int8, x) == [("layer.recurrent", True)]
    assert coverage(int8, x).share == 1
    assert isinstance(int8.layer.recurrent, RECURRENT_MODULES)
    # weights of 8 bits per tensor give 30 to 40 dB; a layer that is left out or doubled, less than 10
    assert decibels(model(x)[0], int8(x)[0]) > 25
    assert type(model.layer) is kind
    assert list(model.state_dict()) == keys
    assert "recurrent" not in model.layer._modules
    assert copy.deepcopy(model)(x)[0].equal(model(x)[0])


@pytest.mark.parametrize("name", ["own forward", "own Parameter"])
def test_it_computes_what_a_plain_layer_does(name: str) -> None:
    """The same Parameters in torch's own class, quantized by hand."""
    layer, x = LAYERS[name]().eval(), torch.randn(5, 6, 8)
    with expose_recurrent(layer) as exposed:
        assert exposed == {"recurrent": ""}
        plain = layer.recurrent
        assert type(plain) in (nn.LSTM, nn.GRU)
        assert all(a is layer._parameters[key] for key, a in plain._parameters.items())
    expected = convert(calibrated(plain, x, method="dynamic"))
    found = convert(calibrated(Model(layer).eval(), x, method="dynamic")).layer.recurrent
    assert torch.equal(found(x)[0], expected(x)[0])


def test_training_reaches_the_parameters() -> None:
    model, x = Model(LAYERS["own Parameter"]()), torch.randn(5, 6, 8)
    prepared = prepare(model, method="qat", example_inputs=x)
    prepared(x)[0].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # the ranges that were seen hold what it gives now
    int8 = convert(prepared)
    assert decibels(model.eval()(x)[0], int8(x)[0]) > 20


def test_a_layer_that_is_the_whole_model(tmp_path: Path) -> None:
    layer, x = LAYERS["own forward"]().eval(), torch.randn(5, 6, 8)
    prepared = calibrated(layer, x)
    known = info(prepared)
    assert set(known.replaced) == set(dict(layer.named_parameters()))
    paths = export(prepared, None, ExportConfig(directory=tmp_path, formats=("torchscript",)), x)
    fresh = torch.randn(2, 9, 8)
    assert decibels(layer(fresh)[0], load(paths["torchscript"])(fresh)[0]) > 25


class Deciding(nn.LSTM):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x if x.sum() > 0 else -x)


def test_one_that_decides_by_its_data_stays_float_and_says_why() -> None:
    model, x = Model(Deciding(8, 16, batch_first=True)).eval(), torch.randn(5, 6, 8)
    prepared = calibrated(model, x)
    (reason,) = info(prepared).kept.values()
    assert "symbolically traced variables cannot be used as inputs to control flow" in reason
    int8 = convert(prepared)
    assert type(int8.layer) is Deciding
    assert recurrent_rows(int8, x) == [("layer", False)]
    assert decibels(model(x)[0], int8(x)[0]) > 25
    with pytest.raises(CaptureError, match="control flow"):
        prepare(model.layer, method="static", example_inputs=x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(OwnForward(8, 16), "weight_hh_l0"),
        lambda: nn.LSTM(8, 16),
        lambda: nn.Linear(8, 16),
        lambda: type("Derived", (nn.RNN,), {})(8, 16),
    ],
    ids=["parametrized", "torch's own", "another layer", "nn.RNN"],
)
def test_what_is_not_exposed(make: Any) -> None:
    with expose_recurrent(module := make()) as exposed:
        assert exposed == {}
        assert "recurrent" not in module._modules


def test_it_is_put_back_after_an_error() -> None:
    layer = OwnForward(8, 16)

    def fail() -> None:
        with expose_recurrent(layer):
            assert type(layer) is not OwnForward
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert type(layer) is OwnForward
    assert not layer._modules


# ---- sequences of several lengths, none among them


class Lengths(ABC, nn.RNNBase):
    """The shape of pytorch-forecasting's recurrent layers: lengths that may be 0, and branches on them."""

    def forward(self, x: Any, hx: Any = None, lengths: Any = None, enforce_sorted: bool = True) -> Any:
        if isinstance(x, PackedSequence) or lengths is None:
            return super().forward(x, hx=hx)
        if lengths.max() == 0:
            shape = (*x.shape[:2], self.hidden_size)
            return torch.zeros(shape), self.init_hidden_state(x)
        packed = pack_padded_sequence(x, lengths.clamp(min=1), self.batch_first, enforce_sorted)
        outputs, state = super().forward(packed, hx=hx)
        if lengths.min() == 0:
            initial = self.init_hidden_state(x) if hx is None else hx
            state = self.handle_no_encoding(state, (lengths == 0)[None, :, None], initial)
        return pad_packed_sequence(outputs, batch_first=self.batch_first)[0], state

    def zeros(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(self.num_layers, x.shape[0 if self.batch_first else 1], self.hidden_size)


class LSTM(Lengths, nn.LSTM):
    def handle_no_encoding(self, state: Any, none: torch.Tensor, initial: Any) -> Any:
        # both from the first: as the library does it
        return state[0].masked_scatter(none, initial[0]), state[1].masked_scatter(none, initial[0])

    def init_hidden_state(self, x: torch.Tensor) -> Any:
        return self.zeros(x), self.zeros(x)


class GRU(Lengths, nn.GRU):
    def handle_no_encoding(self, state: Any, none: torch.Tensor, initial: Any) -> Any:
        return state.masked_scatter(none, initial)

    def init_hidden_state(self, x: torch.Tensor) -> Any:
        return self.zeros(x)


LSTM.__module__ = GRU.__module__ = "pytorch_forecasting.models.nn.rnn"
assert all((kind.__module__, kind.__name__) in recurrent.OF_LIBRARIES for kind in (LSTM, GRU))


class WithLengths(Model):
    def __init__(self, layer: nn.Module, initial: bool = False) -> None:
        super().__init__(layer)
        self.initial = initial

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        start: Any = None
        if self.initial:
            start = torch.tanh(
                x.transpose(0, 1)[:1].repeat(1, 1, 2) if self.layer.batch_first else x[:1].repeat(1, 1, 2)
            )
            start = (start, start * 2) if isinstance(self.layer, nn.LSTM) else start
        outputs, state = self.layer(x, start, lengths=lengths, enforce_sorted=False)
        return self.fc(outputs), *(state if isinstance(state, tuple) else (state,))


@METHODS
@pytest.mark.parametrize("initial", [False, True], ids=["", "initial state"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["", "batch first"])
@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_lengths(kind: Any, batch_first: bool, initial: bool, method: Method) -> None:
    model = WithLengths(kind(8, 16, batch_first=batch_first), initial).eval()

    def data(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(lengths), max(lengths) or 6, 8) if batch_first else (max(lengths) or 6, len(lengths), 8)
        return torch.randn(shape), torch.tensor(lengths)

    batches = [data(3, 0, 6, 6, 1), data(2, 5), data(7, 3, 1, 0), *([] if initial else [data(0, 0)])]
    prepared = calibrated(model, *batches[0], method=method)
    if method == "qat":
        prepared.train()  # its observers follow the data then
    for _ in range(20):
        for batch in batches:
            prepared(*batch)
    int8 = convert(prepared.eval())
    for batch in batches:
        for ours, theirs in zip(model(*batch), int8(*batch), strict=True):
            assert ours.shape == theirs.shape
            if ours.any():
                # in training ranges are moving averages, which clip the largest of batches as different as these
                assert decibels(ours, theirs) > (12 if method == "qat" else 25)
            else:
                assert not theirs.any()
    assert recurrent_rows(int8, *data(3, 0, 6)) == [("layer.recurrent", True)]


def test_a_file_with_lengths(tmp_path: Path) -> None:
    model = WithLengths(LSTM(8, 16, batch_first=True)).eval()
    x, lengths = torch.randn(5, 6, 8), torch.tensor([3, 0, 6, 6, 1])
    prepared = calibrated(model, x, lengths)
    paths = export(prepared, None, ExportConfig(directory=tmp_path, formats=("torchscript",)), (x, lengths))
    loaded, int8 = load(paths["torchscript"]), convert(prepared)
    for fresh in (
        (x, lengths),
        (torch.randn(3, 4, 8), torch.tensor([1, 4, 0])),
        (torch.randn(1, 2, 8), torch.tensor([2])),
    ):
        for ours, theirs in zip(int8(*fresh), loaded(*fresh), strict=True):
            torch.testing.assert_close(ours, theirs)
