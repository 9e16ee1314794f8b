"""The callbacks from a LightningCLI's flags and YAML, with every backend."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from roots import part

from lightning_quant import (
    LayerConfig,
    OscillationFreezing,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
)
from lightning_quant.demo import Digits, DigitsClassifier

QUIET = [
    "--seed_everything=0",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LightningCLI that is given arguments warns of those of the process, and calls what jsonargparse deprecates."""
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


#: Other formats are those of any run, and take their time.
NATIVE = {"pt2e": "pt2"}


def run(*args: str) -> Any:
    """The quantization callback of a LightningCLI that ran with these arguments."""
    cli = part("cli").LightningCLI(DigitsClassifier, Digits, args=[*args, *QUIET], save_config_callback=None)
    (callback,) = [
        c for c in cli.trainer.callbacks if isinstance(c, (PostTrainingQuantization, QuantizationAwareTraining))
    ]
    return callback


@pytest.mark.parametrize("backend", ["eager", "torchscript", "fx", "pt2e"])
def test_calibration_from_flags(backend: str) -> None:
    callback = run(
        "validate",
        "--trainer.callbacks+=PostTrainingQuantization",
        f"--trainer.callbacks.config.backend={backend}",
        "--trainer.callbacks.config.skip=[model.0]",
        "--trainer.callbacks.calibration_batches=2",
        "--trainer.callbacks.export.directory=out",
        f"--trainer.callbacks.export.formats=[{NATIVE.get(backend, 'torchscript')}]",
    )
    assert callback.config == QuantConfig(backend=backend, skip=("model.0",))  # type: ignore[arg-type]
    assert callback.report.config["backend"] == backend
    assert callback.report.sqnr_db > 25
    assert list(callback.report.formats) == [NATIVE.get(backend, "torchscript")]
    assert callback.report.float_layers == {"model.0": "left float by 'skip'"}
    assert f"backend `{backend}`" in Path("out/report.md").read_text(encoding="utf8")


@pytest.mark.parametrize("backend", ["eager", "fx", "pt2e"])
def test_training_from_yaml(backend: str) -> None:
    layer = {"type": "torch.nn.Conv2d", "weight": {"qscheme": "per_tensor_symmetric"}}
    export = {"directory": "out", "formats": [NATIVE.get(backend, "torchscript")], "skip_slow": False}
    config = {
        "trainer": {
            "max_epochs": 1,
            "limit_train_batches": 3,
            "callbacks": [
                {
                    "class_path": "lightning_quant.QuantizationAwareTraining",
                    "init_args": {
                        "config": {"backend": backend, "layers": [layer]},
                        "freeze_oscillations": {"threshold": 0.05, "final_threshold": None},
                        "export": export,
                    },
                }
            ],
        }
    }
    Path("config.yaml").write_text(yaml.safe_dump(config), encoding="utf8")
    callback = run("fit", "--config=config.yaml")
    assert callback.config == QuantConfig(
        backend=backend,  # type: ignore[arg-type]
        layers=(LayerConfig(type="torch.nn.Conv2d", weight=TensorSpec(qscheme="per_tensor_symmetric")),),
    )
    assert callback.freeze_oscillations == OscillationFreezing(threshold=0.05, final_threshold=None)
    assert callback.report.coverage == 1.0


def test_a_wrong_value_names_the_value_and_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "callbacks": [
                        {"class_path": "PostTrainingQuantization", "init_args": {"config": {"backend": "fy"}}}
                    ]
                }
            }
        ),
        encoding="utf8",
    )
    with pytest.raises(SystemExit):
        run("validate", "--config=config.yaml")
    shown = capsys.readouterr().err
    assert "'fy'" in shown or "fy" in shown
    assert all(name in shown for name in ("eager", "torchscript", "fx", "pt2e"))
