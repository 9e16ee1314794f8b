"""``quantize_checkpoint`` and the commands ``ptq``, ``plan`` and ``report``: int8 from what a float run wrote."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modules
import pytest
import torch
from roots import pl
from torch import nn

from lightning_quant import (
    ArtifactError,
    CaptureError,
    ConfigError,
    ExportConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantReport,
    quantize_checkpoint,
    recipes,
)
from lightning_quant._roots import ROOTS
from lightning_quant.cli import main

REPO = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console on which no line is broken."""
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a float run that knows nothing of this package; its width is no default."""
    torch.manual_seed(0)
    trainer = modules.trainer(max_epochs=1, limit_train_batches=8)
    trainer.fit(modules.WithHyperparameters(width=6), datamodule=modules.Digits())
    path = tmp_path_factory.mktemp("float") / "float.ckpt"
    trainer.save_checkpoint(path)
    return path


def run(*args: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, output, and errors."""
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


MODEL, DATA = "--model=modules.WithHyperparameters", "--data=modules.Digits"


# ---- the function


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(backend="eager", skip=("net.0",))])
def test_it_is_what_the_callback_does(checkpoint: Path, config: QuantConfig) -> None:
    kind = modules.WithHyperparameters
    found = quantize_checkpoint(
        checkpoint, kind, config, datamodule=modules.Digits(), directory="ours", formats=("torchscript",)
    )
    module = kind.load_from_checkpoint(checkpoint, weights_only=True)
    export = ExportConfig(directory="theirs", formats=("torchscript",))
    callback = PostTrainingQuantization(config, export=export)
    modules.trainer(callback).validate(module, datamodule=modules.Digits(), verbose=False)
    theirs = callback.report
    assert (found.metrics_float, found.metrics_int8) == (theirs.metrics_float, theirs.metrics_int8)
    assert (found.sqnr_db, found.coverage, found.config) == (theirs.sqnr_db, theirs.coverage, theirs.config)
    assert found.float_layers == theirs.float_layers
    assert QuantReport.load("ours").to_dict() == found.to_dict()


def test_a_module_that_is_there_already_is_not_changed(checkpoint: Path) -> None:
    module = modules.WithHyperparameters(width=6)
    before = modules.weights(module)
    state = torch.get_rng_state()
    report = quantize_checkpoint(
        checkpoint, module, datamodule=modules.Digits, calibration_batches=1, directory="out", formats=["torchscript"]
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert modules.different(modules.weights(module), before) == []
    assert report.metrics_float["val_acc"] > 0.2  # that of the checkpoint, not of the module
    assert Path("out/model.ts").is_file()


def test_dynamic_needs_no_data() -> None:
    class Words(modules.Classifier):
        def __init__(self) -> None:
            super().__init__(modules.Recurrent())
            self.example_input_array = torch.randn(3, 1, 8, 8)

    module = Words()
    trainer = modules.trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint("float.ckpt")
    report = quantize_checkpoint("float.ckpt", module, method="dynamic")
    assert (report.method, report.metrics_int8, report.coverage) == ("dynamic", {}, 1.0)


class NoData(modules.Classifier):
    def __init__(self) -> None:
        super().__init__(modules.convnet())


class OneArgument(modules.Classifier):
    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width))


def saved(module: Any) -> Path:
    """A checkpoint of it, untrained."""
    trainer = modules.trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint("saved.ckpt")
    return Path("saved.ckpt")


def damaged() -> Path:
    Path("damaged.ckpt").write_bytes(b"hello")
    return Path("damaged.ckpt")


def with_code() -> Path:
    torch.save({"state_dict": {}, "hyper_parameters": {"path": Path("x")}}, "code.ckpt")
    return Path("code.ckpt")


@pytest.mark.parametrize(
    ("path", "kind", "settings", "error", "text"),
    [
        (
            lambda: "no.ckpt",
            NoData,
            {},
            ConfigError,
            r"^no\.ckpt: there is no such file\. Give a checkpoint of a train",
        ),
        (damaged, NoData, {}, ArtifactError, r"^damaged\.ckpt: .*(checkpoint|running code)"),
        (
            with_code,
            NoData,
            {},
            ArtifactError,
            r"without running code in it\. (?s:.*)call lightning_quant\.quantize_che",
        ),
        (
            lambda: saved(NoData()),
            NoData,
            {},
            ConfigError,
            r"^static quantization calibrates on validation data, and NoData has none: give a datamodule with a val "
            r"dataloader \(--data my_package\.MyDataModule\), define validation_step, or use method='dynamic'",
        ),
        (
            lambda: saved(NoData()),
            NoData,
            {"method": "dynamic"},
            CaptureError,
            r"^no input was found to trace NoData wi",
        ),
        (
            lambda: saved(OneArgument(3)),
            OneArgument,
            {"datamodule": modules.Digits},
            ConfigError,
            r"^OneArgument cannot be made from saved\.ckpt: .*width.*call lightning_quant\.quantize_checkp",
        ),
        (
            lambda: saved(NoData()),
            modules.OwnLoaders,
            {"calibration_batches": 0},
            ConfigError,
            r"^calibration_batches=0:",
        ),
        (
            lambda: saved(NoData()),
            modules.WithHyperparameters,
            {},
            ConfigError,
            r"the weights are those of another modu",
        ),
        (
            lambda: saved(NoData()),
            nn.Linear,
            {},
            ConfigError,
            r"^module=.*Linear.*: give a LightningModule or its class",
        ),
        (
            lambda: saved(modules.OwnLoaders()),
            modules.OwnLoaders,
            {"method": "qat"},
            ConfigError,
            r"^quantize_checkpoint\(method='qat'\): give 'static' or 'dynamic'",
        ),
    ],
)
def test_errors(path: Callable[[], Any], kind: Any, settings: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        quantize_checkpoint(path(), kind, **settings)
    assert not Path("quantized/report.json").exists()


@pytest.mark.skipif(len(ROOTS) < 2, reason="unavoidable: one Lightning package is installed")
def test_a_module_and_data_of_two_packages() -> None:
    class Other(ROOTS[1].LightningDataModule):  # type: ignore[misc, name-defined]
        pass

    text = (
        f"OwnLoaders is a LightningModule of {pl.__name__}, and Other is no LightningDataModule of it. Import both "
        f"from {pl.__name__}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        quantize_checkpoint(saved(modules.OwnLoaders()), modules.OwnLoaders, datamodule=Other())


# ---- the commands


def test_ptq_plan_and_report(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan, one line of it edited, an int8 model by it, and its report again."""
    status, output, errors = run("plan", "--checkpoint", checkpoint, MODEL, DATA, "--output=plan.yaml", capsys=capsys)
    assert (status, output) == (0, "plan.yaml: 100.0% of the multiply-accumulates in int8\n"), errors
    text = Path("plan.yaml").read_text(encoding="utf8")
    Path("plan.yaml").write_text(text.replace("- name: net.0\n  dtype: int8", "- name: net.0\n  dtype: float"), "utf8")
    args = ("ptq", checkpoint, MODEL, DATA, "--config=plan.yaml", "--directory=out", "--formats=[torchscript]")
    status, output, errors = run(*args, "--calibration-batches=2", capsys=capsys)
    assert status == 0, errors
    assert "float: net.0 (left float by 'layers')" in output
    report = QuantReport.load("out")
    assert list(report.float_layers) == ["net.0"]
    for path in ("out", "out/report.json"):
        status, again, _ = run("report", path, capsys=capsys)
        assert status == 0
        assert output.endswith(again)  # before it, there was a progress bar
        assert "SQNR of the output" in again
    assert run("report", "out", "--html=again.html", capsys=capsys)[0] == 0
    assert Path("again.html").read_text("utf8") == Path("out", "report.html").read_text("utf8")


def test_ptq_with_a_recipe_and_changes_of_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("ptq", checkpoint, MODEL, DATA, "--config=any_x86", "--config.skip=[net.3]", "--formats=[torchscript]")
    status, _, errors = run(*args, capsys=capsys)
    assert status == 0, errors
    config = QuantReport.load("quantized").config
    assert (config["engine"], config["reduce_range"], config["skip"]) == ("x86", True, ["net.3"])


def test_a_plan_on_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a module that is made without arguments, with a recipe for training."""
    status, output, errors = run(
        "plan", "--model=modules.OwnLoaders", "--config=int8_qat", "--method=qat", capsys=capsys
    )
    assert status == 0, errors
    Path("plan.yaml").write_text(output, encoding="utf8")
    assert [entry.name for entry in recipes.load("plan.yaml").layers] == ["net.0", "net.6"]
    assert "moving_average" in output
    assert "method qat" in output.splitlines()[0]


def test_a_plan_of_layers_that_configure_model_makes(capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = run("plan", "--model=modules.BuiltInConfigureModel", DATA, capsys=capsys)
    assert status == 0, errors
    assert "- name: net.0\n" in output


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["ptq", "no.ckpt", MODEL], "no.ckpt: there is no such file. Give a checkpoint of a training."),
        (
            ["ptq", "no.ckpt", "--model=modules.Nothing"],
            "--model modules.Nothing: 'modules.Nothing' cannot be imported",
        ),
        (
            ["ptq", "no.ckpt", "--model=modules.Digits"],
            "--model modules.Digits: this class is no LightningModule of ",
        ),
        (
            ["ptq", "no.ckpt", MODEL, "--data=modules.WithHyperparameters"],
            "--data modules.WithHyperparameters: this class is no LightningDataModule of ",
        ),
        (["ptq", "no.ckpt", MODEL, "--formats=[aoti,onx]"], "ExportConfig(formats='onx'): not one of"),
        (["ptq", "no.ckpt", MODEL, "--config.weight.dtype=quint8"], "QuantConfig(weight.dtype='quint8'): int8 kernels"),
        (["ptq", "no.ckpt", MODEL, "--config=int8_static", "--method=dynamic"], "QuantConfig(activation=TensorSpec("),
        (["plan", "--model=test_post_training.OneArgument"], "--model OneArgument cannot be made without arguments: "),
        (["plan", MODEL, "--checkpoint=no.ckpt"], "no.ckpt: there is no such file. Give a checkpoint of a training."),
        (["plan", MODEL], "no input was found to trace WithHyperparameters with: "),
        (["plan", MODEL, DATA, "--config.skip=[head]"], "QuantConfig(skip=...): 'head' matches no submodule. Known:"),
        (["report", "nowhere"], "nowhere: no report can be read there: "),
    ],
)
def test_errors_of_the_command_have_no_traceback(
    args: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output, errors = run(*args, capsys=capsys)
    assert (status, output) == (1, "")
    assert errors.startswith(f"error: {text}"), errors


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (
            ["ptq", "x.ckpt", MODEL, "--config=int8_statik"],
            ["'int8_statik' is no recipe", "Did you mean 'int8_static'"],
        ),
        (["ptq", "x.ckpt", MODEL, "--method=qat"], ["method", "qat", "'static', 'dynamic'"]),
        (["ptq", "x.ckpt"], ["model", "required"]),
        (["plan", MODEL, "--config.backend=fy"], ["config.backend", "fy", "'fx', 'eager', 'torchscript', 'pt2e'"]),
    ],
)
def test_wrong_arguments(args: list[str], texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    shown = capsys.readouterr().err
    assert all(text in shown for text in texts), shown


USERS = """
import torch
from {root} import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(64, 16), torch.arange(64) % 2), batch_size=16)

    val_dataloader = train_dataloader


if __name__ == "__main__":
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir="run")
    trainer.fit(Net(width=8), datamodule=Data())
    trainer.save_checkpoint("old.ckpt")
"""


@pytest.mark.slow
def test_as_a_user_does_it(tmp_path: Path) -> None:
    """A float training by a script of the user's, then the command, with no line of code in between."""
    (tmp_path / "users.py").write_text(USERS.format(root=ROOTS[-1].__name__), encoding="utf8")
    command = "import sys; from lightning_quant.cli import main; sys.exit(main())"
    for args in (
        ["users.py"],
        [
            "-c",
            command,
            "ptq",
            "old.ckpt",
            "--model",
            "users.Net",
            "--data",
            "users.Data",
            "--formats",
            "[torchscript]",
        ],
    ):
        done = subprocess.run(
            [sys.executable, *args], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "SQNR of the output" in done.stdout
    assert QuantReport.load(tmp_path / "quantized").coverage == 1.0


# ---- bounds


def test_a_bound_on_a_metric(checkpoint: Path, tmp_path: Path) -> None:
    module, data = modules.WithHyperparameters, modules.Digits()
    found = quantize_checkpoint(checkpoint, module, datamodule=data, directory=str(tmp_path), formats=("torchscript",),
                                max_drop=1.0, monitor="val_acc")  # fmt: skip
    assert found.search is not None
    assert (found.search["is_met"], found.search["left_float"]) == (True, [])


def test_a_bound_on_the_size(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'lightning-quant[onnx]'")
    status, _, _ = run(
        "ptq", checkpoint, MODEL, DATA, f"--directory={tmp_path}", "--formats=[onnx]", "--max_size=3 kB", capsys=capsys
    )
    assert status == 0
    report = QuantReport.load(tmp_path)
    assert report.search is not None
    assert report.search["max_size"] == "3 kB"
    assert set(report.search["bits"]) == {"net.0", "net.3"}
    assert [layer["weight"]["bits"] for layer in report.config["layers"]] == [4, 4]


def test_bounds_that_cannot_be(checkpoint: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"monitor": "val_acc"},
            "lightning_quant.quantize_checkpoint(monitor=..., mode=..., relative=...",
        ),
        ({"max_drop": 0.1}, "max_drop=0.1 needs monitor=..."),
        ({"max_size": "3"}, "max_size='3': give a number and a unit"),
    ]
    for settings, text in cases:
        with pytest.raises(ConfigError, match=re.escape(text)):
            quantize_checkpoint(checkpoint, modules.WithHyperparameters, directory=str(tmp_path), **settings)
