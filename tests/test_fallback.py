"""Layers left in float until the module's own metric is within a bound: by the callback, on digits."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import mobile, poisoned
from modules import Classifier, Recurrent, digits, rows, trained_mobile, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import ConfigError, ExportConfig, PostTrainingQuantization, QuantConfig, QuantReport, fallback
from lightning_quant.analysis.simulation import simulate_graph
from lightning_quant.config import BackendName
from lightning_quant.evaluate import evaluate, validation_data
from lightning_quant.fallback import Task, _switch, prepare_again, simulated_module
from lightning_quant.inputs import sample
from lightning_quant.parts import convert_module
from lightning_quant.pipeline import capture

NATIVE = {"fx": ("torchscript",), "eager": ("torchscript",), "pt2e": ("pt2",)}


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    return trained_mobile(epochs=8)


def val_loader() -> DataLoader:
    return DataLoader(rows(1000, 1797), batch_size=100)


def run(
    net: nn.Module, folder: Path, config: QuantConfig | None = None, data: Any = None, **settings: Any
) -> tuple[PostTrainingQuantization, QuantReport]:
    config = config or QuantConfig()
    export = ExportConfig(directory=str(folder), formats=NATIVE[config.backend])
    callback = PostTrainingQuantization(config, export=export, **settings)
    trainer(callback).validate(Classifier(net), data or val_loader(), verbose=False)
    assert callback.report is not None
    return callback, callback.report


@pytest.mark.parametrize("backend", ["fx", "eager", pytest.param("pt2e", marks=pytest.mark.slow)])
def test_a_poisoned_layer_is_found_and_left_in_float(backend: BackendName, trained: Any, tmp_path: Path) -> None:
    net, config = poisoned(trained), QuantConfig(backend=backend)
    _, without = run(net, tmp_path / "without", config)
    assert without.metrics_float["val_acc"] > 0.9
    assert without.metrics_int8["val_acc"] < 0.5
    callback, report = run(net, tmp_path / "with", config, max_drop=0.005, monitor="val_acc")
    assert report.search is not None
    # exported graphs round what a layer takes; torch's int8 layers round what they give as well
    assert report.search["left_float"] == (["net.13"] if backend == "pt2e" else ["net.10", "net.13"])
    assert report.search["evaluations"] <= 12
    assert report.search["is_met"] is True
    assert report.metrics_float["val_acc"] - report.metrics_int8["val_acc"] <= 0.005
    assert report.coverage >= 0.7
    (note,) = [note for note in report.notes if "Left in float" in note]
    assert "val_acc drops by at most 0.005: it does" in note
    assert "Without a search: QuantConfig(skip=(" in note
    # the config gives the same without a search
    assert callback.tuned_config is not None
    assert callback.tuned_config.skip == tuple(report.search["left_float"])
    assert report.config["skip"] == report.search["left_float"]
    again, second = run(net, tmp_path / "again", callback.tuned_config)
    assert second.metrics_int8 == report.metrics_int8
    assert second.coverage == report.coverage
    assert again.tuned_config is None
    images = digits()[0][1000:1100] / 16
    assert torch.equal(again.quantized_model(images), callback.quantized_model(images))
    assert QuantReport.load(tmp_path / "with").search == report.search


def test_a_mobile_net_stays_in_int8(trained: Any, tmp_path: Path) -> None:
    _, report = run(trained, tmp_path, max_drop=0.005, monitor="val_acc")
    assert report.search is not None
    assert report.search["is_met"] is True
    assert report.coverage >= 0.95
    assert report.search["evaluations"] <= 12


def test_a_loss_that_rises_relatively(trained: Any, tmp_path: Path) -> None:
    _, report = run(poisoned(trained), tmp_path, max_drop=0.2, monitor="val_loss", relative=True)
    assert report.search is not None
    assert report.search["mode"] == "min"
    assert report.search["is_met"] is True
    assert report.metrics_int8["val_loss"] <= 1.2 * report.metrics_float["val_loss"]


def test_a_bound_that_cannot_be_met_is_said_loudly(
    trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = poisoned(trained)
    with caplog.at_level(logging.WARNING, logger="lightning_quant"):
        _, report = run(net, tmp_path, max_drop=0.0, monitor="val_loss", max_evaluations=2)
    assert report.search is not None
    assert report.search["is_met"] is False
    (text,) = [r.getMessage() for r in caplog.records if "THE BOUND IS NOT MET" in r.getMessage()]
    assert "val_loss rises by at most 0 was asked for" in text
    assert text in report.notes
    assert (tmp_path / "model.ts").exists()
    assert report.search["evaluations"] <= 2


def test_a_killed_search_goes_on(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = poisoned(trained)
    _, expected = run(net, tmp_path / "whole", max_drop=0.005, monitor="val_acc")
    assert expected.search is not None
    original, calls = fallback.evaluate, []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the first records inputs
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(fallback, "evaluate", dying)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run(net, tmp_path / "parts", max_drop=0.005, monitor="val_acc")
    state = json.loads((tmp_path / "parts" / "search.json").read_text())
    assert [e["kind"] for e in state["evaluations"]] == ["int8", "simulated"]
    counted: list[Any] = []
    monkeypatch.setattr(fallback, "evaluate", lambda *a, **k: counted.append(1) or original(*a, **k))
    _, report = run(net, tmp_path / "parts", max_drop=0.005, monitor="val_acc")
    assert report.search == expected.search
    assert len(counted) == expected.search["evaluations"] - 2


def test_other_weights_begin_another_search(trained: Any, tmp_path: Path) -> None:
    run(trained, tmp_path, max_drop=0.005, monitor="val_acc")
    first = json.loads((tmp_path / "search.json").read_text())
    run(poisoned(trained), tmp_path, max_drop=0.005, monitor="val_acc")
    second = json.loads((tmp_path / "search.json").read_text())
    assert first["fingerprint"] != second["fingerprint"]
    assert len(second["evaluations"]) > len(first["evaluations"]) == 1


@pytest.mark.parametrize("backend", ["fx", *(pytest.param(b, marks=pytest.mark.slow) for b in ("eager", "pt2e"))])
def test_simulated_metrics_are_those_of_int8(backend: BackendName, trained: Any) -> None:
    """For each layer in float, and for pairs: by a real conversion, brute force."""
    module, config = Classifier(poisoned(trained)), QuantConfig(backend=backend)
    runs = trainer(limit_val_batches=3)
    runs.validate(module, val_loader(), verbose=False)
    data = validation_data(runs)
    assert data is not None
    taken = sample(runs, module, needs_validation=True)
    task = Task(module, taken, data, config, "static")
    _, graphs = prepare_again(task, frozenset())
    assert capture(module, taken, config, "static").targets
    simulated: Any = {name: simulate_graph(graph) for name, graph in graphs.items()}
    for left in ((), ("net.10",), ("net.13",), ("net.10", "net.13"), ("net.0", "net.6"), ("net.3", "net.10", "net.13")):
        _switch(simulated, frozenset(left))
        ours = evaluate(simulated_module(module, simulated), data)
        real = evaluate(convert_module(module, prepare_again(task, frozenset(left))[1]).module, data)
        # 3 of 300 images, whose two largest logits are nearly the same
        assert ours["val_acc"] == pytest.approx(real["val_acc"], abs=0.0101)


def test_dynamic(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    images, labels = digits()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(images[:1000] / 16), labels[:1000]).backward()
        optimizer.step()
    with torch.no_grad():
        net[1].bias[0], net[1].weight[0] = 1e4, 0  # a channel that is constant: the range of the next layer's input
        net[3].bias -= 1e4 * net[3].weight[:, 0]
    export = ExportConfig(directory=str(tmp_path), formats=("torchscript",))
    callback = PostTrainingQuantization(method="dynamic", export=export, max_drop=0.005, monitor="val_acc")
    trainer(callback).validate(Classifier(net), val_loader(), verbose=False)
    assert callback.report is not None
    assert callback.report.search is not None
    assert callback.report.search["left_float"] == ["net.3"]
    assert callback.report.search["is_met"] is True


def test_fit_ends_with_a_search_too(trained: Any, tmp_path: Path) -> None:
    export = ExportConfig(directory=str(tmp_path), formats=("torchscript",))
    callback = PostTrainingQuantization(export=export, max_drop=0.1, monitor="val_acc")
    train = DataLoader(rows(0, 64), batch_size=32)
    trainer(callback).fit(Classifier(copy.deepcopy(trained).train(), lr=0.0), train, val_loader())
    assert callback.report is not None
    assert callback.report.search is not None
    # the int8 model that is tested is that of the search
    results = trainer(callback).test(Classifier(copy.deepcopy(trained)), val_loader(), verbose=False)
    assert results[0]["test_acc"] == pytest.approx(callback.report.metrics_int8["val_acc"], abs=1e-6)


def test_what_is_skipped_stays_so(trained: Any, tmp_path: Path) -> None:
    config = QuantConfig(skip=("net.0",))
    callback, report = run(poisoned(trained), tmp_path, config, max_drop=0.005, monitor="val_acc")
    assert callback.tuned_config is not None
    assert callback.tuned_config.skip == ("net.0", "net.10", "net.13")
    assert "net.0" in report.float_layers


def test_layers_that_have_no_module_of_their_own(tmp_path: Path) -> None:
    """A product with a stored matrix: the module around it stands for it, and here that is everything."""

    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(10, 64) / 8)
            self.head = nn.Linear(10, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(F.linear(x.flatten(1), self.matrix))

    _, report = run(Stored(), tmp_path, max_drop=0.0, monitor="val_loss", max_evaluations=6)
    assert report.search is not None
    assert set(report.search["left_float"]) <= {"net.head"}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"monitor": "val_acc"},
            r"are settings of the search for layers to leave in float. Give max_drop=\.\.\. as well",
        ),
        ({"max_drop": 0.1}, r"max_drop=0\.1 needs monitor="),
        ({"max_drop": 0.1, "monitor": "score"}, "does not say whether more or less is better"),
        (
            {"max_drop": 0.1, "monitor": "val_acc", "config": QuantConfig(backend="torchscript")},
            r"max_drop=\.\.\.\) with backend='torchscript'.*Use backend='fx', 'eager' or 'pt2e'",
        ),
    ],
)
def test_settings_are_checked_when_the_callback_is_made(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PostTrainingQuantization(**settings)


def test_a_metric_that_is_not_logged_is_named(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"monitor='val_accuracy': the module does not log it in validation.*'val_acc'"
    ):
        run(trained, tmp_path, max_drop=0.1, monitor="val_accuracy")


def test_recurrent_layers_take_part(tmp_path: Path) -> None:
    images, labels = digits()
    data = DataLoader(TensorDataset(images[:40] / 16, labels[:40]), batch_size=20)
    _, report = run(Recurrent(), tmp_path, data=data, max_drop=0.0, monitor="val_loss", max_evaluations=5)
    assert report.search is not None


@pytest.mark.slow
def test_fashion_mnist(fashion_mnist_path: Path, tmp_path: Path) -> None:
    """A depthwise network on real images: within half a point with 95 % of the work in int8."""
    import gzip

    import numpy as np

    def read(name: str, offset: int) -> Any:
        with gzip.open(fashion_mnist_path / name) as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=offset).copy())

    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28).float() / 255
    labels = read("t10k-labels-idx1-ubyte.gz", 8).long()
    torch.manual_seed(0)
    net = mobile()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(2):
        for start in range(0, 7000, 100):
            optimizer.zero_grad()
            F.cross_entropy(net(images[start : start + 100]), labels[start : start + 100]).backward()
            optimizer.step()
    data = DataLoader(TensorDataset(images[7000:], labels[7000:]), batch_size=200)
    _, plain = run(net.eval(), tmp_path / "plain", data=data, max_drop=0.005, monitor="val_acc")
    assert plain.search is not None
    assert plain.search["is_met"] is True
    assert plain.coverage >= 0.95
    _, report = run(poisoned(net), tmp_path / "poisoned", data=data, max_drop=0.005, monitor="val_acc")
    assert report.search is not None
    assert report.search["is_met"] is True
    assert report.search["evaluations"] <= 12
