"""QuantCLI: ``--quantize`` from flags and YAML, recipes by name, for both Lightning packages."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from roots import part

from lightning_quant import (
    ConfigError,
    LayerConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    QuantReport,
    TensorSpec,
    cli,
    recipes,
)
from lightning_quant._roots import ROOTS
from lightning_quant.cli import QuantCLI, quant_cli
from lightning_quant.demo import Digits, DigitsClassifier

REPO = Path(__file__).parents[1]
PTQ, QAT = "--quantize=PostTrainingQuantization", "--quantize=QuantizationAwareTraining"


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LightningCLI that is given arguments warns of those of the process, and calls what jsonargparse deprecates."""
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


class Named(DigitsClassifier):
    """Its arguments have values that are names of recipes as well."""

    def __init__(self, runtime: str = "torch", untouched: str | None = None) -> None:
        super().__init__(channels=4)
        self.runtime, self.untouched = runtime, untouched


def made(*args: str, model: Any = DigitsClassifier) -> Any:
    """The CLI, which runs nothing."""
    quiet = ["--seed_everything=0", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    return QuantCLI(model, Digits, args=[*quiet, *args], save_config_callback=None, run=False)


def quantize_of(found: Any) -> Any:
    """The quantization callback of its Trainer."""
    kinds = (PostTrainingQuantization, QuantizationAwareTraining)
    (callback,) = [c for c in found.trainer.callbacks if isinstance(c, kinds)]
    return callback


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is said of wrong arguments, without the usage."""
    with pytest.raises(SystemExit) as exit_:
        made(*args)
    assert exit_.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2]


# ---- what it makes


def test_without_the_argument_nothing_is_quantized() -> None:
    kinds = (PostTrainingQuantization, QuantizationAwareTraining)
    assert not [callback for callback in made().trainer.callbacks if isinstance(callback, kinds)]


def test_every_argument_from_flags() -> None:
    callback = quantize_of(
        made(
            PTQ,
            "--quantize.config.backend=eager",
            "--quantize.config.weight.qscheme=per_tensor_symmetric",
            "--quantize.config.layers=[{name: model.0, dtype: float}]",
            "--quantize.calibration_batches=2",
            "--quantize.export.directory=out",
            "--quantize.export.formats=[torchscript, onnx]",
        )
    )
    assert isinstance(callback, PostTrainingQuantization)
    assert callback.config == QuantConfig(
        backend="eager",
        weight=TensorSpec(qscheme="per_tensor_symmetric"),
        layers=(LayerConfig(name="model.0", dtype="float"),),
    )
    assert callback.calibration_batches == 2
    assert (callback.export.directory, callback.export.formats) == ("out", ("torchscript", "onnx"))


def test_before_averages_and_pruning() -> None:
    callbacks = made(
        QAT,
        "--trainer.callbacks+=EMAWeightAveraging",
        "--trainer.callbacks+=ModelPruning",
        "--trainer.callbacks.pruning_fn=l1_unstructured",
    ).trainer.callbacks
    names = [type(callback).__name__ for callback in callbacks]
    assert names[:3] == ["QuantizationAwareTraining", "EMAWeightAveraging", "ModelPruning"]


def test_a_single_callback_of_the_trainer_stays() -> None:
    Path("config.yaml").write_text("trainer: {callbacks: {class_path: EMAWeightAveraging}}", encoding="utf8")
    names = [type(callback).__name__ for callback in made("--config=config.yaml", PTQ).trainer.callbacks]
    assert names[:2] == ["PostTrainingQuantization", "EMAWeightAveraging"]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_each_recipe_by_its_name(name: str) -> None:
    recipe = recipes.RECIPES[name]
    for method in recipe.methods:
        kind = [QAT] if method == "qat" else [PTQ, f"--quantize.method={method}"]
        assert quantize_of(made(*kind, f"--quantize.config={name}")).config == recipe.config


def test_a_recipe_in_part() -> None:
    """Settings after the name of a recipe change some of it."""
    callback = quantize_of(made(QAT, "--quantize.config=int8_qat_learned", "--quantize.config.skip=[model.8]"))
    learned = TensorSpec(fake_quantize="learned")
    assert callback.config == QuantConfig(activation=learned, weight=learned, skip=("model.8",))


def test_a_recipe_in_yaml_and_for_the_trainers_own_list() -> None:
    settings = {"class_path": "PostTrainingQuantization", "init_args": {"config": "mobile_qnnpack"}}
    Path("one.yaml").write_text(yaml.safe_dump({"quantize": settings}), encoding="utf8")
    Path("two.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [settings]}}), encoding="utf8")
    for file in ("one.yaml", "two.yaml"):
        assert quantize_of(made(f"--config={file}")).config == recipes.mobile_qnnpack


def test_a_config_from_a_file_of_its_own() -> None:
    Path("quant.yaml").write_text("backend: eager\nskip: [model.0]", encoding="utf8")
    callback = quantize_of(made(PTQ, "--quantize.config=quant.yaml", "--quantize.config.engine=qnnpack"))
    assert callback.config == QuantConfig(backend="eager", engine="qnnpack", skip=("model.0",))


def test_other_arguments_may_have_the_names_of_recipes() -> None:
    model = made("--model.runtime=onnxruntime", "--model.untouched=openvino", model=Named).model
    assert (model.runtime, model.untouched) == ("onnxruntime", "openvino")


@pytest.mark.parametrize("kind", [PTQ, QAT])
def test_what_is_printed_is_read_again(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "int8_static" if kind == PTQ else "int8_qat_learned"
    args = (kind, f"--quantize.config={name}", "--quantize.config.layers=[{name: model.0, dtype: float}]")
    with pytest.raises(SystemExit):
        made(*args, "--print_config")
    printed = capsys.readouterr().out
    Path("config.yaml").write_text(printed, encoding="utf8")
    with pytest.raises(SystemExit):
        made("--config=config.yaml", "--print_config")
    assert capsys.readouterr().out == printed
    # the settings, and not the name, which may mean something else in another version
    assert name not in printed
    assert quantize_of(made("--config=config.yaml")).config == quantize_of(made(*args)).config


# ---- help


@pytest.mark.parametrize("kind", [PostTrainingQuantization, QuantizationAwareTraining])
def test_every_argument_has_help(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        made(f"--quantize.help={kind.__name__}")
    shown = capsys.readouterr().out
    entries = shown.partition("Help for")[2].split("\n  --quantize.")[1:]
    assert {entry.split()[0] for entry in entries} >= {"config.backend", "config.weight.qscheme", "export.formats"}
    for entry in entries:
        text = " ".join(entry.split())
        if text.split()[0].endswith(".help"):
            continue
        assert "(type: " in text, text
        described = text.partition("(type: ")[0].split("}")[-1].split("]")[-1].split()
        assert len(described) > 3, text
        assert "Any" not in text.partition("(type: ")[2]


# ---- errors


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        ([PTQ, "--quantize.config.backend=fy"], ["config.backend", "fy", "'fx', 'eager', 'torchscript', 'pt2e'"]),
        ([PTQ, "--quantize.config.weight.qscheme=row"], ["config.weight.qscheme", "row", "'per_channel_symmetric'"]),
        ([PTQ, "--quantize.config.activation.observer=minmax"], ["activation.observer", "minmax", "'min_max'"]),
        ([QAT, "--quantize.config.weight.fake_quantize=lsq"], ["weight.fake_quantize", "lsq", "'learned'"]),
        ([PTQ, "--quantize.method=qat"], ["method", "qat", "'static', 'dynamic'"]),
        ([PTQ, "--quantize.config.reduce_range=perhaps"], ["config.reduce_range", "perhaps", "bool"]),
        ([PTQ, "--quantize.export.formats=[onx]"], ["export.formats", "onx", "'torchscript', 'onnx', 'openvino'"]),
        ([PTQ, "--quantize.config.bakend=fx"], ["--config.bakend=fx"]),
        (
            [PTQ, "--quantize.config=int8_statik"],
            ["'int8_statik' is no recipe, and no file with settings. Did you mean 'int8_static'", "mobile_qnnpack"],
        ),
        (["--quantize=Quantization"], ["quantize", "Quantization", "PostTrainingQuantization", "QuantizationAware"]),
    ],
)
def test_a_wrong_value_names_the_value_the_field_and_the_choices(
    args: list[str], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = refused(capsys, *args)
    assert all(text in shown for text in texts), shown


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            [PTQ, "--quantize.config.weight.dtype=quint8"],
            "QuantConfig(weight.dtype='quint8'): int8 kernels take signed weights. Use 'qint8'.\n",
        ),
        (
            [QAT, "--quantize.config.backend=torchscript"],
            "backend='torchscript' cannot train: TorchScript graph mode has no fake quantize. Train with backend='fx', "
            "'eager' or 'pt2e'; 'fx' and 'eager' write TorchScript files.\n",
        ),
        (
            [QAT, "--quantize.config=int8_static"],
            "QuantConfig(activation.observer='histogram') with quantization-aware training: ranges follow the training "
            "with a moving average. Use 'auto' or 'moving_average'.\n",
        ),
        (
            ["--trainer.callbacks+=PostTrainingQuantization", "--trainer.callbacks.calibration_batches=0"],
            "calibration_batches=0: give 1 or more, or None for all.\n",
        ),
    ],
)
def test_settings_that_contradict_each_other(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, *args) == text


def test_what_a_users_class_raises_is_not_ours() -> None:
    with pytest.raises(RuntimeError, match="of the user"):
        made(PTQ, model=Raises)


class Raises(DigitsClassifier):
    def __init__(self) -> None:
        raise RuntimeError("of the user")


# ---- classes


def test_a_class_derived_from_a_cli() -> None:
    class Own(part("cli").LightningCLI):  # type: ignore[misc]
        def add_arguments_to_parser(self, parser: Any) -> None:  # which calls nothing above, as most
            parser.add_argument("--answer", type=int, default=42)

    found = quant_cli(Own)(DigitsClassifier, Digits, args=[PTQ, "--trainer.logger=false"], run=False)
    assert found.config["answer"] == 42
    assert isinstance(found.trainer.callbacks[0], PostTrainingQuantization)


def test_one_class_for_each_root() -> None:
    assert cli.QuantCLI is QuantCLI is quant_cli(part("cli").LightningCLI)
    found = {quant_cli(import_module(f"{root.__name__}.cli").LightningCLI) for root in ROOTS}
    assert len(found) == len(ROOTS)
    with pytest.raises(AttributeError, match="no attribute 'Quantcli'"):
        cli.Quantcli  # noqa: B018


def test_a_class_that_is_no_cli() -> None:
    with pytest.raises(ConfigError, match=r"^quant_cli\(<class 'dict'>\): give \S+\.cli\.LightningCLI"):
        quant_cli(dict)


# ---- programs, as a user starts them

PROGRAM = """
import torch
from {root} import LightningModule
from {root}.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset
from lightning_quant.cli import quant_cli


class Classifier(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Conv2d(1, width, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(36 * width, 4)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 4), batch_size=16)

    val_dataloader = train_dataloader


if __name__ == "__main__":
    {cli}(Classifier, save_config_callback=None, seed_everything_default=0)
"""

COMMON = [
    *("--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]


@pytest.mark.parametrize(
    ("root", "way"),
    [
        pytest.param(root.__name__, way, marks=() if (root, way) == (ROOTS[-1], "yaml") else pytest.mark.slow)
        for root in ROOTS
        for way in ("flags", "yaml")
    ],
)
def test_a_program(root: str, way: str, tmp_path: Path) -> None:
    """Flags: a LightningCLI that was not changed. YAML: ours, with a recipe."""
    name = "LightningCLI" if way == "flags" else "quant_cli(LightningCLI)"
    (tmp_path / "program.py").write_text(PROGRAM.format(root=root, cli=name), encoding="utf8")
    if way == "flags":
        callback = "--trainer.callbacks"
        args = [
            *("fit", "--trainer.max_epochs=1", f"{callback}+=QuantizationAwareTraining"),
            *(f"{callback}.config.backend=eager", f"{callback}.config.skip=[net.0]"),
            f"{callback}.export.formats=[torchscript]",
        ]
    else:
        quantize = {
            "class_path": "lightning_quant.PostTrainingQuantization",
            "init_args": {"config": "any_x86", "export": {"formats": ["torchscript"]}},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"quantize": quantize}), encoding="utf8")
        args = ["validate", "--config=config.yaml", "--quantize.config.skip=[net.0]"]
    done = subprocess.run(
        [sys.executable, "program.py", *args, *COMMON],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = QuantReport.load(tmp_path / "quantized")
    assert report.float_layers == {"net.0": "left float by 'skip'"}
    assert report.config["backend"] == ("eager" if way == "flags" else "fx")
    assert way == "flags" or report.config["reduce_range"] is True
