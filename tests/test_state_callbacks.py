"""The callbacks with modules that change their buffers in forward, on digits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import decibels
from modules import MIN_MAX, Classifier, Digits, rows
from roots import pl
from torch import nn

from lightning_quant import (
    ExportConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    load,
)
from lightning_quant.config import BackendName, FormatName
from lightning_quant.evaluate import copy_of

DB = 25.0
FORMATS: dict[BackendName, tuple[FormatName, ...]] = {
    "fx": ("torchscript", "onnx", "pt2"),
    "eager": ("torchscript", "onnx"),
    "pt2e": ("pt2", "onnx"),
}
NAMES = {"inside": "net.5.mean", "around": "net.mean"}


class Centred(nn.Module):
    """Takes off a running mean of what it has seen, in evaluation as well."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, width))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x - self.mean
        mean = 0.7 * self.mean + 0.3 * x.mean(0, keepdim=True).detach()
        if self.way == "copy":
            self.mean.copy_(mean)
        else:
            self.mean = mean
        return y


class Around(nn.Module):
    """The same in the forward that calls the layers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(128, 10)
        self.register_buffer("mean", torch.zeros(1, 128))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(Centred.forward(self, nn.functional.max_pool2d(self.conv(x).relu(), 2).flatten(1)))


def module_of(where: str, way: str) -> Classifier:
    """It learns slowly: ranges of a training are moving averages, and those of a network that grows come behind it."""
    pl.seed_everything(7)
    if where == "around":
        return Classifier(Around(way), lr=0.01)
    return Classifier(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            Centred(128, way), nn.Linear(128, 10),
        ),
        lr=0.01,
    )  # fmt: skip


def fit(module: Any, callback: Any, folder: Path, epochs: int = 1) -> Any:
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False,
        default_root_dir=folder, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Digits())
    return trainer


def images(start: int, stop: int) -> torch.Tensor:
    return rows(start, stop).tensors[0]


def check(module: Any, callback: Any, where: str, formats: tuple[FormatName, ...]) -> None:
    """The int8 model and each file begin at the state of the trained module, and go on as it does."""
    name = NAMES[where]
    first = module.get_buffer(name).clone()
    assert first.abs().sum() > 0
    # those of validation, which calibration has seen
    batches = [images(96, 112), images(112, 128), images(128, 136)]
    float_module = copy_of(module)
    with torch.no_grad():
        expected = [float_module(x) for x in batches]
        after = float_module.get_buffer(name)
        int8 = copy.deepcopy(callback.quantized_model)
        assert torch.equal(int8.get_buffer(name), first)
        found = [int8(x) for x in batches]
        assert min(decibels(a, b) for a, b in zip(expected, found, strict=True)) > DB
        assert decibels(after, int8.get_buffer(name)) > DB
        assert tuple(callback.report.artifacts) == formats
        for format_name, path in callback.report.artifacts.items():
            loaded = load(path)
            assert torch.equal(loaded.state[name], first), format_name
            found = [loaded(x) for x in batches]
            assert min(decibels(a, b) for a, b in zip(expected, found, strict=True)) > DB, format_name
            assert decibels(after, loaded.state[name]) > DB
    assert torch.equal(module.get_buffer(name), first)
    entries = callback.report.formats
    for format_name in formats:
        # three batches, one after the other, from the same state as the int8 model: a part of a percent is one image
        assert entries[format_name].metrics["val_loss"] == pytest.approx(
            callback.report.metrics_int8["val_loss"], rel=0.02
        )
        assert entries[format_name].sqnr_db > DB


@pytest.mark.parametrize(
    ("backend", "where", "way"),
    [
        ("fx", "inside", "copy"),
        ("fx", "around", "assign"),
        ("pt2e", "around", "copy"),
        pytest.param("eager", "inside", "assign", marks=pytest.mark.slow),
    ],
)
def test_post_training_quantization(backend: BackendName, where: str, way: str, tmp_path: Path) -> None:
    for package in ("onnxruntime", "torchao"):
        pytest.importorskip(package)
    export = ExportConfig(directory=tmp_path / "out", formats=FORMATS[backend])
    config = QuantConfig(backend=backend, activation=MIN_MAX.activation)
    callback = PostTrainingQuantization(config, export=export)
    module = module_of(where, way)
    fit(module, callback, tmp_path)
    check(module, callback, where, FORMATS[backend])


@pytest.mark.parametrize(("backend", "where", "way"), [("fx", "inside", "assign"), ("pt2e", "around", "assign")])
def test_quantization_aware_training(backend: BackendName, where: str, way: str, tmp_path: Path) -> None:
    for package in ("onnxruntime", "torchao"):
        pytest.importorskip(package)
    export = ExportConfig(directory=tmp_path / "out", formats=FORMATS[backend])
    callback = QuantizationAwareTraining(QuantConfig(backend=backend), export=export)
    module = module_of(where, way)
    fit(module, callback, tmp_path, epochs=2)
    check(module, callback, where, FORMATS[backend])


def test_a_test_leaves_the_quantized_model_where_it_begins(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(
        MIN_MAX, export=ExportConfig(directory=tmp_path / "out", formats=("torchscript",))
    )
    module = module_of("inside", "copy")
    trainer = fit(module, callback, tmp_path)
    first = callback.quantized_model.get_buffer("net.5.mean").clone()
    results = [trainer.test(module, datamodule=Digits(), verbose=False) for _ in range(2)]
    assert results[0] == results[1]
    assert torch.equal(callback.quantized_model.get_buffer("net.5.mean"), first)


class Rows(nn.Module):
    """What it keeps has a row for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(128, 10)
        self.register_buffer("mean", torch.zeros(1, 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.max_pool2d(self.conv(x).relu(), 2).flatten(1)
        y = h - self.mean[:1]
        self.mean = h.detach()
        return self.fc(y)


def test_state_that_no_file_holds_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The files are those of the layers, which have no state."""
    pl.seed_everything(7)
    module = Classifier(Rows())
    callback = PostTrainingQuantization(
        MIN_MAX, export=ExportConfig(directory=tmp_path / "out", formats=("torchscript",))
    )
    fit(module, callback, tmp_path)
    assert callback.report.artifacts["torchscript"].keys() == {"net.conv", "net.fc"}
    (note,) = [note for note in callback.report.notes if "state" in note]
    assert "forward carries the buffer 'net.mean' from call to call, and it is torch.float32" in note
