"""Files that compute something else are refused, with the first layer that differs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Residual, calibrated, settle
from torch import nn

from lightning_quant import ExportConfig, ExportError, QuantConfig, export
from lightning_quant.exporters.verification import (
    AMPLIFICATION_MARGIN_DB,
    FLOAT_MARGIN_DB,
    LEAST_SQNR_DB,
    MIN_SQNR_DB,
    verify,
)
from lightning_quant.exporters.writing import EXPORTERS


class Down(nn.Module):
    """A block whose shortcut has a convolution too, as those of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = self.conv2(torch.relu(self.conv1(x)))
        return self.head(self.fc(torch.relu(y + self.shortcut(x)).mean((2, 3))))


class Spoiled:
    """An exporter that writes one layer with other integers."""

    def __init__(self, name: str, layer: str) -> None:
        self.own = EXPORTERS[name]
        self.weight = f"module.{layer}.weight"

    def __call__(self, program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
        if self.weight in program.state_dict:
            program = copy.deepcopy(program)
            program.state_dict[self.weight] = torch.full_like(program.state_dict[self.weight], 90)
        self.own(program, path, metadata)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (Residual, "blocks.0.conv2"),
        # half of the layers end with "shortcut", which does not see what "conv2" gives
        *((Down, layer) for layer in ("conv2", "shortcut")),
    ],
)
def test_the_first_layer_that_differs_is_named(
    make: Callable[[], nn.Module], layer: str, name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = settle(make()), torch.randn(16, 3, 8, 8)
    prepared = calibrated(model, x, config=QuantConfig(reduce_range=False))
    monkeypatch.setitem(EXPORTERS, name, Spoiled(name, layer))
    with pytest.raises(ExportError, match=rf"\. The first layer that differs is {layer}\. It was not kept\. Leave"):
        export(prepared, None, ExportConfig(directory=tmp_path, formats=(name,)), x)
    assert list(tmp_path.iterdir()) == []


def test_no_layer_is_named_where_none_is_to_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts end with a layer: what comes behind the last one is in none of them."""
    own = EXPORTERS["onnx"]

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.exp(self.fc(x) * 3.0)

    def wrong(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
        program = copy.deepcopy(program)
        for node in program.graph.nodes:
            if node.target is torch.ops.aten.mul.Tensor:
                node.args = (node.args[0], 2.0)
        program.graph_module.recompile()
        own(program, path, metadata)

    x = torch.randn(32, 4)
    monkeypatch.setitem(EXPORTERS, "onnx", wrong)
    with pytest.raises(ExportError, match=r"dB are needed\. It was not kept\. "):
        export(calibrated(Scaled().eval(), x), None, ExportConfig(directory=tmp_path, formats=("onnx",)), x)


# ---- the figures

X = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).double()
NOISE = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).double()
OTHER = torch.randn(256, 64, generator=torch.Generator().manual_seed(2)).double()
NOISE *= X.norm() / NOISE.norm()
OTHER -= NOISE * (OTHER * NOISE).sum() / (NOISE * NOISE).sum()
OTHER *= X.norm() / OTHER.norm()


class Plus(nn.Module):
    """What it is given, and something that has so many decibels less."""

    def __init__(self, *parts: tuple[torch.Tensor, float]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + sum(noise[: len(x)] * 10 ** (-db / 20) for noise, db in self.parts)


def test_a_file_like_its_program() -> None:
    assert verify("it", Plus(), Plus(), [(X,)]) == float("inf")
    assert verify("it", Plus((NOISE, 40.0)), Plus(), [(X,)]) == pytest.approx(40.0, abs=1e-6)


class Overwriting(Plus):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1.0)


def test_a_file_that_overwrites_its_inputs() -> None:
    before = X.clone()
    text = (
        "it: the file overwrites its inputs: whoever runs it twice on the same data gets two answers. It was not kept. "
        "Leave the format out with ExportConfig(formats=...), or the first layers in float with QuantConfig(skip=...)."
    )
    with pytest.raises(ExportError, match=f"^{re.escape(text)}$"):
        verify("it", Overwriting(), Plus(), [(X,)])
    assert torch.equal(X, before)


def test_the_bound() -> None:
    assert verify("it", Plus((NOISE, MIN_SQNR_DB + 0.1)), Plus(), [(X,)]) == pytest.approx(25.1, abs=1e-6)
    asked = []
    text = (
        "^it: the file computes something else than the model that it was written from: 24.9 dB, where at least 25 dB "
        "are needed. Here. It was not kept. "
    )
    with pytest.raises(ExportError, match=text):
        verify(
            "it", Plus((NOISE, 24.9)), Plus(), [(X,)], differs_at=lambda needed: asked.append(needed) or "Here. "
        )  # fmt: skip
    assert asked == [MIN_SQNR_DB]


def test_all_inputs_count() -> None:
    class OfOne(nn.Module):
        """Right for a batch, wrong for one sample."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if len(x) > 1 else -x

    with pytest.raises(ExportError, match=r"^it: the file computes something else"):
        verify("it", OfOne(), Plus(), [(X,), (X[:1],)])


class Amplifying(nn.Module):
    """A function of which the last bits of its input decide a part, as a network's that rounds again and again."""

    def __init__(self, db: float) -> None:
        super().__init__()
        self.size = 2**0.5 * 10 ** (-db / 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.size * torch.sin(1e9 * x) * x.std()


@pytest.mark.parametrize(
    ("own", "file", "kept"),
    [
        # itself it differs by two such parts: 3 dB less
        (20.0, 20.0 - 3 - AMPLIFICATION_MARGIN_DB + 0.5, True),
        (20.0, 20.0 - 3 - AMPLIFICATION_MARGIN_DB - 0.5, False),
        (60.0, MIN_SQNR_DB - 0.5, False),
        (5.0, LEAST_SQNR_DB + 0.5, True),
        (5.0, LEAST_SQNR_DB - 0.5, False),
    ],
)
def test_a_network_that_amplifies(own: float, file: float, kept: bool) -> None:
    source = Amplifying(own)

    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = source(x)
            return y + NOISE * (y.norm() / NOISE.norm()) * 10 ** (-file / 20)

    if kept:
        assert verify("it", Other(), source, [(X,)]) == pytest.approx(file, abs=1e-6)
    else:
        with pytest.raises(ExportError, match=r"^it: the file computes something else"):
            verify("it", Other(), source, [(X,)])


def test_the_kernels_of_the_process_stay() -> None:
    enabled = torch._C._get_mkldnn_enabled()
    with pytest.raises(ExportError):
        verify("it", Plus((NOISE, 5.0)), Plus(), [(X,)])
    assert torch._C._get_mkldnn_enabled() == enabled


# ---- the distance to float


@pytest.mark.parametrize(("loss", "kept"), [(FLOAT_MARGIN_DB - 0.1, True), (FLOAT_MARGIN_DB + 0.1, False)])
def test_a_file_may_be_a_decibel_further_from_float(loss: float, kept: bool) -> None:
    in_float, converted = Plus(), Plus((NOISE, 30.0))
    # orthogonal noise: powers add
    added = -10 * torch.log10(torch.tensor(10 ** (-(30.0 - loss) / 10) - 10 ** (-30.0 / 10))).item()
    file = Plus((NOISE, 30.0), (OTHER, added))
    assert added > MIN_SQNR_DB  # so that it is not refused for the distance to its program
    if kept:
        verify("it", file, converted, [(X,)], in_float=in_float, converted=converted)
        return
    text = (
        "^it: the file is further from the float model than the int8 model in memory: 28.9 dB against 30.0 dB. It was "
        "not kept. Leave the format out"
    )
    with pytest.raises(ExportError, match=text):
        verify("it", file, converted, [(X,)], in_float=in_float, converted=converted)


def test_a_file_nearer_to_float_is_kept() -> None:
    converted = Plus((NOISE, 30.0))
    verify("it", Plus(), converted, [(X,)], in_float=Plus(), converted=converted)


def test_where_float_is_not_known_it_is_not_compared() -> None:
    verify("it", Plus((OTHER, 26.0)), Plus(), [(X,)], converted=Plus())
    verify("it", Plus((OTHER, 26.0)), Plus(), [(X,)], in_float=Plus())
