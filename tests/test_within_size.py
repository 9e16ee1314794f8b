"""Files no larger than asked for, with weights of 4 bits where they cost least: by the callback, on digits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import Classifier, rows, trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import ConfigError, ExportConfig, LayerConfig, PostTrainingQuantization, QuantConfig, TensorSpec
from lightning_quant.config import plain
from lightning_quant.report import QuantReport
from lightning_quant.runtime import files_of
from lightning_quant.within_size import with_layers

pytest.importorskip("onnxruntime", reason="pip install 'lightning-quant[onnx]'")


def wide() -> nn.Sequential:
    """Most of its file are weights: 500, 20,000, 40,000 and 2,000 of them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2500), nn.ReLU(), nn.Linear(2500, 16), nn.ReLU(),
        nn.Linear(16, 10),
    )  # fmt: skip


def loader() -> DataLoader:
    return DataLoader(rows(0, 128), batch_size=64)


def run(
    folder: Path, max_size: str | None, config: QuantConfig | None = None, formats: Any = ("onnx",), net: Any = None
) -> tuple[PostTrainingQuantization, QuantReport]:
    callback = PostTrainingQuantization(
        config or QuantConfig(), max_size=max_size, export=ExportConfig(directory=str(folder), formats=formats)
    )
    trainer(callback).validate(Classifier(net or wide()), loader(), verbose=False)
    assert callback.report is not None
    return callback, callback.report


@pytest.fixture(scope="module")
def plain_size(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of an ONNX file of :func:`wide` with weights of 8 bits."""
    _, report = run(tmp_path_factory.mktemp("plain"), None)
    assert report.search is None
    return size_of(report)


def size_of(report: QuantReport, format_name: str = "onnx") -> int:
    return sum(file.stat().st_size for file in files_of(Path(report.artifacts[format_name])))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("eager", "pt2e")]


@pytest.mark.parametrize("backend", ["fx", *SLOW])
def test_a_file_is_as_small_as_asked_for(backend: Any, plain_size: int, tmp_path: Path) -> None:
    config = QuantConfig(backend=backend)
    limit = plain_size - 12_000  # half of the 40,000 bytes of one layer, or of the 20,000 of another and more
    callback, report = run(tmp_path / "small", f"{limit} B", config)
    found = report.search
    assert found is not None
    assert found["is_met"] is True
    assert size_of(report) == found["size_bytes"] <= limit
    assert found["bits"] == {"net.5": 4}
    (note,) = [note for note in report.notes if "Files of at most" in note]
    assert f"Files of at most {limit} B: onnx has" in note
    assert "Weights of 4 bits: net.5." in note
    # the same without a search
    tuned = callback.tuned_config
    assert tuned is not None
    assert [(entry.name, entry.weight.bits) for entry in tuned.layers if entry.weight] == [("net.5", 4)]
    assert plain(tuned) == plain(with_layers(config, QuantReport.load(tmp_path / "small").search["layers"]))  # type: ignore[index]
    _, again = run(tmp_path / "again", None, tuned)
    assert again.metrics_int8 == report.metrics_int8
    assert abs(size_of(again) - size_of(report)) < 100  # of the metadata


@pytest.mark.slow
def test_where_it_costs_least(tmp_path: Path) -> None:
    """Two layers of one size, of which one is multiplied by little behind it."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.soft = nn.Linear(64, 300), nn.Linear(64, 300)
            self.head = nn.Linear(300, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.flatten(1)
            return self.head(torch.relu(self.loud(x)) + 0.05 * torch.relu(self.soft(x)))

    _, plainly = run(tmp_path / "plain", None, net=Two())
    _, report = run(tmp_path / "small", f"{size_of(plainly) - 7_000} B", net=Two())
    assert report.search is not None
    assert report.search["bits"] == {"net.soft": 4}


def test_what_fits_is_left_alone(tmp_path: Path) -> None:
    callback, report = run(tmp_path, "10 MB")
    assert report.search is not None
    assert (report.search["is_met"], report.search["bits"]) == (True, {})
    assert callback.tuned_config == callback.config
    assert any("No layer has fewer bits for it." in note for note in report.notes)
    assert report.made_by["init_args"]["max_size"] == "10 MB"


def test_a_bound_that_cannot_be_met(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, report = run(tmp_path, "2 kB")
    assert report.search is not None
    assert report.search["is_met"] is False
    assert set(report.search["bits"]) == {"net.1", "net.3", "net.5", "net.7"}
    (note,) = [note for note in report.notes if note.startswith("THE BOUND IS NOT MET: files of at most 2 kB were")]
    assert note in caplog.text
    assert "with weights of 4 bits wherever there can be." in note


def test_what_the_config_says_of_layers_stays(plain_size: int, tmp_path: Path) -> None:
    entry = LayerConfig(name="net.5", activation=TensorSpec(observer="min_max"))
    small = LayerConfig(name="net.3", weight=TensorSpec(bits=3))
    config = QuantConfig(layers=(entry, small), weight=TensorSpec(qscheme="per_tensor_symmetric"))
    # net.3 has half of its bytes from the beginning
    callback, report = run(tmp_path, f"{plain_size - 25_000} B", config)
    assert report.search is not None
    assert report.search["is_met"] is True
    tuned = callback.tuned_config
    assert tuned is not None
    (added,) = tuned.layers[2:]
    assert added.name == "net.5"
    assert added.activation == entry.activation
    assert added.weight == TensorSpec(qscheme="per_tensor_symmetric", bits=4)


@pytest.mark.slow
def test_every_format_that_can_be_is_small_enough(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'lightning-quant[openvino]'")
    _, plainly = run(tmp_path / "plain", None, formats=("torchscript", "onnx", "openvino"))
    limit = max(size_of(plainly, name) for name in ("onnx", "openvino")) - 15_000
    _, report = run(tmp_path / "small", f"{limit} B", formats=("torchscript", "onnx", "openvino"))
    assert report.search is not None
    assert report.search["is_met"] is True
    assert all(size_of(report, name) <= limit for name in ("onnx", "openvino"))
    assert report.search["size_bytes"] == max(size_of(report, name) for name in ("onnx", "openvino"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_size": "0.2"}, "max_size='0.2': give a number and a unit"),
        (
            {"max_drop": 0.1, "monitor": "val_acc"},
            "max_size='1 MB' and max_drop=0.1: one makes files smaller, the other larger, and either could undo what",
        ),
        ({"method": "dynamic"}, "max_size='1 MB' with method='dynamic': its files store weights in 8 bits."),
        (
            {"export": ExportConfig(skip_slow=True)},
            "max_size='1 MB' with ExportConfig(skip_slow=True): layers that a runtime runs slower",
        ),
        (
            {"export": ExportConfig(formats=("torchscript",))},
            "max_size='1 MB': of the files that are to be written none stores weights in fewer than 8 bits. Let "
            "formats have 'onnx' or 'openvino', with backend='fx', 'eager' or 'pt2e'.",
        ),
        (
            {"config": QuantConfig(backend="torchscript")},
            "max_size='1 MB': of the files that are to be written none stores weights",
        ),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PostTrainingQuantization(**{"max_size": "1 MB", **settings})
    assert str(caught.value).startswith(text)
