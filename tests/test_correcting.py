"""Corrections by the config: the callback, a checkpoint, a search; what was not corrected is not converted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from models import poisoned
from modules import Classifier, Digits, convnet, rows, trained_mobile, trainer, weights
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import (
    ConfigError,
    ExportConfig,
    LayerConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantReport,
    TensorSpec,
    convert,
    correct,
    prepare,
    quantize_checkpoint,
)
from lightning_quant.config import BackendName, CorrectionName
from lightning_quant.correcting import ROWS, _few
from lightning_quant.corrections import CORRECTIONS, MOVES_RANGES, apply

NATIVE = {"fx": ("torchscript",), "eager": ("torchscript",), "pt2e": ("pt2",)}
ALL = ("cross_layer_equalization", "choose_ranges", "bias_correction")


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    return trained_mobile(epochs=8)


def run(net: nn.Module, folder: Path, config: QuantConfig, **settings: Any) -> QuantReport:
    export = ExportConfig(directory=str(folder), formats=NATIVE[config.backend])
    callback = PostTrainingQuantization(config, export=export, **settings)
    module = Classifier(net)
    before = weights(module)
    trainer(callback).validate(module, DataLoader(rows(1000, 1797), batch_size=100), verbose=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(module).items())
    assert callback.report is not None
    return callback.report


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_a_bad_channel_is_equalized_by_the_callback(backend: BackendName, trained: Any, tmp_path: Path) -> None:
    """In float the net is as good as without the channel that is 3000 times as large; in int8 it is not."""
    net = poisoned(trained)
    assert run(net, tmp_path / "without", QuantConfig(backend=backend)).metrics_int8["val_acc"] < 0.5
    report = run(net, tmp_path / "with", QuantConfig(backend=backend, corrections=ALL))
    assert report.metrics_float["val_acc"] > 0.9
    assert report.metrics_int8["val_acc"] > report.metrics_float["val_acc"] - 0.02
    changed = [note.split() for note in report.notes if " changed " in note]
    assert [words[:2] for words in changed] == [["net:", name] for name in ALL]
    assert int(changed[0][3]) > 0
    assert report.config["corrections"] == ALL


def test_a_search_corrects_each_of_its_models(trained: Any, tmp_path: Path) -> None:
    """Equalized, the poisoned net needs no layer in float; what the search prepares again is corrected as well."""
    report = run(
        poisoned(trained), tmp_path, QuantConfig(corrections=ALL), max_drop=0.02, monitor="val_acc", mode="max"
    )
    assert report.search is not None
    assert report.search["is_met"]
    assert report.search["left_float"] == []


class Known(nn.Module):
    """Takes ``(N, 1, 8, 8)``. Of what ``known`` reads, a folded batch norm tells the mean; of the rest nothing does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.known = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.known(torch.relu(self.norm(self.first(x)))))
        return self.head(torch.flatten(x, 1))


def test_a_search_may_leave_nothing_to_correct(tmp_path: Path) -> None:
    """The only layer that can be corrected without data is the worst one: without it, the correction has no effect."""
    torch.manual_seed(0)
    config = QuantConfig(
        corrections=("analytic_bias_correction",), layers=(LayerConfig(name="net.known", weight=TensorSpec(bits=2)),)
    )
    report = run(Known().eval(), tmp_path, config, max_drop=1e-9, monitor="val_loss", mode="min")
    assert report.search is not None
    assert "net.known" in report.search["left_float"]
    assert any("analytic_bias_correction changed 0 of" in note for note in report.notes)
    with pytest.raises(ConfigError, match="no layer with weights in int8 reads what one with a folded batch norm"):
        run(Known().eval(), tmp_path / "skipped", replace(config, layers=(), skip=("net.known",)))


def test_a_checkpoint(tmp_path: Path) -> None:
    module = Classifier(convnet())
    runner = trainer(max_epochs=1, limit_train_batches=4)
    runner.fit(module, datamodule=Digits())
    runner.save_checkpoint(tmp_path / "float.ckpt")
    config = QuantConfig(corrections=["bias_correction", "choose_ranges"])  # type: ignore[arg-type]
    report = quantize_checkpoint(
        tmp_path / "float.ckpt", module, config, datamodule=Digits(), directory=str(tmp_path / "q"),
        formats=("torchscript",), calibration_batches=2,
    )  # fmt: skip
    names = [note.split()[1] for note in report.notes if " changed " in note]
    assert names == ["choose_ranges", "bias_correction"]


def test_a_config_without_its_corrections_is_not_converted() -> None:
    x = torch.randn(8, 4)
    prepared = prepare(nn.Linear(4, 2), QuantConfig(corrections=ALL), method="static", example_inputs=x)
    prepared(x)
    with pytest.raises(ConfigError, match=r"Call prepared = correct\(prepared, batches\) first"):
        convert(prepared)
    corrected = correct(prepared, [x])
    assert convert(corrected)(x).shape == (8, 2)
    with pytest.raises(ConfigError, match=r"it was corrected already \(cross_layer_equalization, choose_ranges"):
        correct(corrected, [x])
    plain = prepare(nn.Linear(4, 2), method="static", example_inputs=x)
    with pytest.raises(ConfigError, match="its config has no corrections"):
        correct(plain, [x])
    with pytest.raises(ConfigError, match="'other' is not one of cross_layer_equalization"):
        apply(plain, [x], ["other"])  # type: ignore[list-item]


class Halves(nn.Module):
    """Takes ``(N, 4)``: two graphs, with code between that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        self.second = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x * 2 if float(x.detach().sum()) > 0 else x)


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_each_graph_of_a_model_is_corrected_on_what_it_is_given(backend: BackendName) -> None:
    torch.manual_seed(0)
    net, x = Halves().eval(), torch.randn(64, 4)
    prepared = prepare(net, QuantConfig(backend=backend, corrections=ALL), method="static", example_inputs=x)
    prepared(x)
    corrected: Any = correct(prepared, [x[:32], x[32:]])
    torch.testing.assert_close(convert(corrected)(x), net(x), rtol=0, atol=0.03 * float(net(x).detach().abs().max()))


@pytest.mark.parametrize("name", ["adaround", "gptq"])
@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_four_bits_are_rounded_by_the_callback(
    backend: BackendName, name: CorrectionName, trained: Any, tmp_path: Path
) -> None:
    """To nearest they lose points of accuracy; otherwise they lose fewer."""
    few = QuantConfig(backend=backend, weight=TensorSpec(bits=4))
    nearest = run(trained, tmp_path / "nearest", few)
    report = run(trained, tmp_path / name, replace(few, corrections=(name,)))
    assert report.sqnr_db > nearest.sqnr_db + 3
    assert report.metrics_int8["val_acc"] > report.metrics_float["val_acc"] - 0.02
    assert [note.split()[1] for note in report.notes if " changed " in note] == [name]


def test_they_have_the_order_of_the_config() -> None:
    assert tuple(CORRECTIONS) == get_args(CorrectionName)
    assert tuple(CORRECTIONS)[: len(MOVES_RANGES)] == MOVES_RANGES  # what is calibrated again comes first


def test_of_large_batches_a_few_are_kept() -> None:
    calls = [(torch.zeros(200, 1),) for _ in range(5)]
    assert len(_few(calls)) == ROWS // 200
    assert len(_few([(torch.zeros(2 * ROWS, 1),), (torch.zeros(1, 1),)])) == 1
