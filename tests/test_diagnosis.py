"""Why int8 costs accuracy, by function and command: on digits, with a network that one channel breaks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import modules
import pytest
from models import poisoned

from lightning_quant import ConfigError, Diagnosis, QuantConfig, QuantReport, diagnose
from lightning_quant.cli import main

MODEL, DATA = "--model=modules.Mobile", "--data=modules.ManyDigits"


def save(net: Any, path: Path) -> Path:
    module = modules.Mobile()
    module.net = net
    trainer = modules.trainer()
    trainer.validate(module, datamodule=modules.ManyDigits(), verbose=False)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    net = modules.trained_mobile(epochs=6)
    folder = tmp_path_factory.mktemp("float")
    return {"sound": save(net, folder / "sound.ckpt"), "poisoned": save(poisoned(net), folder / "poisoned.ckpt")}


@pytest.fixture(scope="module")
def found(checkpoints: dict[str, Path]) -> Diagnosis:
    return diagnose(
        checkpoints["poisoned"], modules.Mobile, monitor="val_acc", max_drop=0.02, datamodule=modules.ManyDigits()
    )


def test_int8_that_is_good_enough_ends_it(checkpoints: dict[str, Path]) -> None:
    found = diagnose(
        checkpoints["sound"], modules.Mobile, monitor="val_acc", max_drop=0.05, datamodule=modules.ManyDigits()
    )
    assert [trial.text for trial in found.trials] == ["the settings as they are"]
    assert found.layers is None
    assert found.left_float is None
    assert found.advice == "Int8 is good enough as it is: there is nothing to do."
    assert found.settings() == "{}\n"


def test_a_poisoned_channel_is_found(found: Diagnosis) -> None:
    first, *others, last = found.trials
    assert not first.is_enough
    assert first.value < found.reference - 0.2
    assert not any(trial.is_enough for trial in others)
    assert last.is_enough
    assert found.best is last
    assert found.layers is not None
    worst = found.layers.worst_first[0]
    assert worst.skip in last.config.skip
    assert found.left_float is not None
    assert 0 < found.left_float < 0.5


def test_the_settings_give_the_same_again(found: Diagnosis, checkpoints: dict[str, Path]) -> None:
    """Read by ptq, they give the metric that was found."""
    Path("found.yaml").write_text(found.settings(), encoding="utf8")
    args = ["ptq", str(checkpoints["poisoned"]), MODEL, DATA, "--config=found.yaml", "--formats=[torchscript]"]
    assert main(args) == 0
    report = QuantReport.load("quantized")
    assert report.metrics_int8["val_acc"] == pytest.approx(found.best.value, abs=1e-9)
    assert report.metrics_float["val_acc"] == pytest.approx(found.reference, abs=1e-9)


def test_the_command(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    args = ["diagnose", str(checkpoints["sound"]), MODEL, DATA, "--monitor=val_acc", "--max-drop=0.05"]
    assert main([*args, "--output=found.yaml"]) == 0
    output = capsys.readouterr().out
    start = r"val_acc in float: 0\.\d+ \(standard error 0\.\d+\)\. Asked for: val_acc drops by at most 0.05"
    assert re.search(start, output)
    assert re.search(r"1\. the settings as they are: 0\.\d+, enough", output)
    assert Path("found.yaml").read_text("utf8") == "{}\n"


def test_what_is_shown_of_a_poisoned_channel(found: Diagnosis, capsys: pytest.CaptureFixture[str]) -> None:
    found.print()
    output = capsys.readouterr().out
    assert "1. the settings as they are: " in output
    assert "what each layer costs" in output
    assert "Settings, for ptq --config:" in output
    assert "skip:" in output


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"monitor": "val_accuracy"}, "monitor='val_accuracy': the module does not log it in validation. "),
        ({"monitor": "val_acc", "max_drop": -1}, "max_drop=-1: give how much worse 'val_acc' may be, 0 or more."),
        (
            {"monitor": "val_acc", "config": QuantConfig(backend="torchscript")},
            "diagnose with backend='torchscript': its graphs have no float form",
        ),
        (
            {"monitor": "val_acc", "datamodule": None},
            "diagnose compares a metric of validation, and there is no validation data: give a datamodule",
        ),
    ],
)
def test_errors(settings: dict[str, Any], text: str, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}"):
        diagnose(checkpoints["sound"], modules.Mobile, **{"datamodule": modules.ManyDigits(), **settings})
