"""A training whose end fails is not lost: int8 files are written from its checkpoint, by a function and a command."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import (
    BuiltInConfigureModel,
    BuiltInSetup,
    Classifier,
    ConvClassifier,
    Digits,
    OwnLoaders,
    StepsOnly,
    WithHyperparameters,
    convnet,
    different,
    merged,
    qat,
    rows,
    surface,
    trainer,
    weights,
)
from own_classes import Wider
from roots import part, pl
from torch import nn

from lightning_quant import (
    ArtifactError,
    CaptureError,
    ConfigError,
    ExportConfig,
    ExportError,
    LayerConfig,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    export_checkpoint,
    load,
)
from lightning_quant.cli import main
from lightning_quant.from_checkpoint import config_of, export_of, settings

ModelCheckpoint = part("callbacks").ModelCheckpoint
LEARNED = TensorSpec(fake_quantize="learned")


def trained(model: Any, callback: Any = None, data: Any = None, **kwargs: Any) -> Any:
    """``(checkpoint, callback)`` of a short training."""
    callback = callback or qat()
    keep = ModelCheckpoint("ckpt", filename="last", save_top_k=1, **kwargs)
    torch.manual_seed(12)
    own = () if isinstance(model, OwnLoaders) else (data or Digits(shuffle=False),)
    trainer(callback, keep, enable_checkpointing=True).fit(model, *own)
    return Path("ckpt/last.ckpt"), callback


def computes(path: Any) -> torch.Tensor:
    with torch.no_grad():
        return load(path)(rows(200, 232).tensors[0])


# ---- settings as plain values


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(
            backend="eager", engine="qnnpack", activation=TensorSpec(dtype="quint8", qscheme="per_tensor_affine"),
            weight=LEARNED, targets=("net",), skip=("net.0",), reduce_range=True, min_coverage=0.25,
        ),
        QuantConfig(
            layers=(
                LayerConfig(name="net.0", activation=LEARNED, weight=TensorSpec(observer="min_max")),
                LayerConfig(type=nn.Linear, keep=True),
                LayerConfig(name="net.3", weight=TensorSpec(observer=Wider)),
            )
        ),
    ],
    ids=["default", "everything", "layers"],
)  # fmt: skip
def test_settings_survive_a_file(config: QuantConfig) -> None:
    export = ExportConfig(directory="out", formats=("onnx", "torchscript"), skip_slow=True)
    torch.save(settings(config, export), "settings.pt")
    read = torch.load("settings.pt", weights_only=True)
    assert config_of(read) == config
    assert export_of(read) == export
    assert export_of(settings(config, ExportConfig())) == ExportConfig()


# ---- the files of the training, again


@pytest.mark.parametrize(
    ("made_by", "data"),
    [
        (WithHyperparameters, Digits),
        (WithHyperparameters, None),
        (OwnLoaders, None),
        (BuiltInSetup, Digits),
        (BuiltInSetup, None),
        (BuiltInConfigureModel, Digits),
        (ConvClassifier, None),
        (StepsOnly, Digits),
    ],
    ids=lambda value: "no data" if value is None else value.__name__,
)
def test_the_files_of_the_training_are_written_again(made_by: Any, data: Any) -> None:
    torch.manual_seed(11)
    model = made_by()
    path, callback = trained(model)
    expected = callback.report
    report = export_checkpoint(path, made_by, datamodule=data, directory="again")
    assert report.targets == expected.targets
    assert report.config == expected.config
    assert report.coverage == expected.coverage
    assert report.float_layers == expected.float_layers
    with_data = data is not None or made_by is OwnLoaders
    assert report.metrics_int8 == (expected.metrics_int8 if with_data else {})
    assert report.metrics_float == (expected.metrics_float if with_data else {})
    files, others = (r.artifacts["torchscript"] for r in (report, expected))
    if not isinstance(files, dict):
        files, others = {"": files}, {"": others}
        assert torch.equal(computes(files[""]), computes(others[""]))
    assert {name: Path(file).name for name, file in files.items()} == {n: Path(f).name for n, f in others.items()}
    assert all(Path(file).is_file() and "again" in str(file) for file in files.values())
    assert Path("again/report.md").is_file()


@pytest.mark.parametrize(
    ("config", "native", "weights_only"),
    [
        (QuantConfig(backend="eager", skip=("net.0",)), "torchscript", False),
        (QuantConfig(backend="pt2e"), "pt2", False),
        (QuantConfig(activation=LEARNED, weight=LEARNED), "torchscript", True),
        (QuantConfig(layers=(LayerConfig(name="net.6", weight=TensorSpec(qscheme="per_tensor_symmetric")),)),
         "torchscript", True),
    ],
    ids=["eager", "pt2e", "learned, save_weights_only", "layers, save_weights_only"],
)  # fmt: skip
def test_with_the_settings_of_the_training(config: QuantConfig, native: Any, weights_only: bool) -> None:
    export = ExportConfig(formats=(native, "onnx"))
    callback = QuantizationAwareTraining(config, export=export)
    path, _ = trained(OwnLoaders(), callback, save_weights_only=weights_only)
    report = export_checkpoint(path, OwnLoaders, directory="again", formats=[native])
    assert report.config == callback.report.config
    assert list(report.artifacts) == [native]
    assert report.metrics_int8 == callback.report.metrics_int8
    assert torch.equal(computes(report.artifacts[native]), computes(callback.report.artifacts[native]))


def test_with_a_module_that_is_there_already() -> None:
    torch.manual_seed(11)
    model = Classifier(convnet())
    path, callback = trained(model)
    other = Classifier(convnet())
    before, structure = weights(other), surface(other)
    report = export_checkpoint(path, other, datamodule=Digits(), directory="again")
    assert report.metrics_int8 == callback.report.metrics_int8
    assert different(before, weights(other)) == []
    assert surface(other) == structure


def test_random_states_stay() -> None:
    path, _ = trained(OwnLoaders())
    model = OwnLoaders()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    export_checkpoint(path, model, directory="again")
    assert torch.equal(before, torch.get_rng_state())


class _OtherWay(Classifier):
    """Training calls the head in another way than validation does: it is not captured with its neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = _Head()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x), noise=self.training)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0]), noise=True), batch[1])


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(144, 10)

    def forward(self, x: torch.Tensor, noise: bool) -> torch.Tensor:
        return self.fc(x) + 0.1 if noise else self.fc(x)


def test_targets_are_those_of_the_training() -> None:
    """Only a training batch shows in how many ways a submodule is called, and there is none here."""
    path, callback = trained(_OtherWay())
    assert callback.report.targets == ["body", "head.fc"]
    report = export_checkpoint(path, _OtherWay, datamodule=Digits, directory="again")
    assert report.targets == callback.report.targets
    assert report.metrics_int8 == callback.report.metrics_int8


# ---- what cannot be exported


class _WithAClass(WithHyperparameters):
    def __init__(self, layer: Any = nn.Linear) -> None:
        super().__init__()
        self.hparams["layer"] = layer


class _Wide(WithHyperparameters):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width=2 * width)


class _NoLoader(pl.LightningDataModule):
    def __init__(self, folder: str) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("trains", "exports", "data", "error", "text"),
    [
        (lambda: Classifier(convnet()), StepsOnly, None, ConfigError,
         r"ckpt/last\.ckpt: the weights are those of another module: Error.*StepsOnly"),
        (WithHyperparameters, _Wide, None, ConfigError, r"another module: .*size mismatch"),
        (StepsOnly, StepsOnly, None, CaptureError, "no input was found to trace StepsOnly with: there is no validation "
         "data, the module has no example_input_array, and the checkpoint has no input of its forward. Give a "
         "datamodule with a val dataloader."),
        (_WithAClass, _WithAClass, None, ArtifactError, r"ckpt/last\.ckpt: .*If this is one, and you trust it, allow "
         r"the classes that it holds \(of hyperparameters, for example\) with torch\.serialization\.add_safe_globals"),
        (OwnLoaders, OwnLoaders, _NoLoader, ConfigError, r"_NoLoader cannot be made from ckpt/last\.ckpt: .*'folder'.*"
         r"call lightning_quant\.export_checkpoint with a datamodule that you have made\."),
        (OwnLoaders, Digits, None, ConfigError, "give a LightningModule or its class"),
        (OwnLoaders, OwnLoaders, nn.Linear, ConfigError, "give a LightningDataModule or its class"),
        (OwnLoaders, 3, None, ConfigError, "module=3: give a LightningModule or its class"),
    ],
    ids=["other keys", "other shapes", "no input", "a class among hyperparameters", "datamodule with arguments",
         "no module", "no datamodule", "a number"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module` and is already saved")
def test_what_cannot_be_exported(trains: Any, exports: Any, data: Any, error: Any, text: str) -> None:
    path, _ = trained(trains())
    with pytest.raises(error, match=f"(?s){text}"):
        export_checkpoint(path, exports, datamodule=data, directory="again")


def test_a_module_with_arguments_that_are_not_stored() -> None:
    class Net(Classifier):
        def __init__(self, width: int) -> None:
            super().__init__(convnet())

    path, _ = trained(Net(3))
    with pytest.raises(ConfigError) as raised:
        export_checkpoint(path, Net, directory="again")
    assert re.fullmatch(
        r"Net cannot be made from ckpt/last\.ckpt: .*'width'\. The checkpoint has the arguments of a module that calls "
        r"self\.save_hyperparameters\(\) in its __init__\. For another one call lightning_quant\.export_checkpoint "
        r"with a module that you have made\.",
        str(raised.value),
    )


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (None, ConfigError, "there is no such file. Give a checkpoint of a training."),
        (b"", ArtifactError, "cannot be read as a checkpoint"),
        (b"no checkpoint", ArtifactError, "A checkpoint is read without running code in it."),
        ([1, 2], ArtifactError, "this is no checkpoint of Lightning. Give one that a Trainer has saved."),
        ({"state_dict": {}}, ConfigError, "this checkpoint has no observers: it was saved without Quantization"),
    ],
    ids=["no file", "empty", "text", "a list", "float"],
)
def test_what_is_no_checkpoint(content: Any, error: Any, text: str) -> None:
    if isinstance(content, bytes):
        Path("a.ckpt").write_bytes(content)
    elif content is not None:
        torch.save(content, "a.ckpt")
    with pytest.raises(error, match=f"^a.ckpt: .*{re.escape(text)}"):
        export_checkpoint("a.ckpt", OwnLoaders)


def test_a_checkpoint_from_before_quantization_is_refused() -> None:
    path, _ = trained(OwnLoaders(), qat(start_epoch=1))
    with pytest.raises(ConfigError, match=r"^ckpt/last.ckpt: this checkpoint is from before quantization began"):
        export_checkpoint(path, OwnLoaders)
    assert list(Path("quantized").iterdir()) == []


# ---- the command


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = trained(WithHyperparameters(width=6))
    shutil.rmtree("quantized")
    arguments = ["export", str(path), "--model", "modules.WithHyperparameters", "--data", "modules.Digits"]
    assert main([*arguments, "--directory=out", "--formats=[torchscript,onnx]"]) == 0
    assert {file.name for file in Path("out").iterdir()} == {
        "model.ts",
        "model.onnx",
        "report.html",
        "report.json",
        "report.md",
    }
    assert "int8 by qat of fx" in capsys.readouterr().out
    assert main(arguments) == 0  # as in training
    assert {file.name for file in Path("quantized").iterdir()} == {
        "model.ts",
        "report.html",
        "report.json",
        "report.md",
    }
    assert main(["export", str(path), "--model", "modules.Nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: --model modules.Nothing: 'modules.Nothing' cannot be imported")


def test_the_command_imports_from_the_folder_that_it_runs_in(tmp_path: Path) -> None:
    path, _ = trained(WithHyperparameters())
    Path("mine.py").write_text("from modules import WithHyperparameters\nclass Mine(WithHyperparameters): pass\n")
    code = "import sys; sys.path.pop(0); from lightning_quant.cli import main; sys.exit(main())"
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(
        [sys.executable, "-c", code, "export", str(path), "--model", "mine.Mine", "--directory", "out"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path("out/model.ts").is_file()


# ---- the end of a training that fails


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A disk of 8 kB."""
    folder = Path("small").absolute()
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("unavoidable: to mount a small disk takes root")
    yield folder / "out"
    subprocess.run(["umount", str(folder)], check=True)


class _Break(pl.Callback):
    """Does something when training ends."""

    def __init__(self, then: Any) -> None:
        self.on_train_end = lambda *_: then()


def fails(error: Any, text: str, *others: Any, directory: str = "quantized", formats: Any = ("torchscript",)) -> Any:
    """``(message, module)`` of a training whose end fails, and whose result is as if it had not."""
    expected = WithHyperparameters.load_from_checkpoint(undisturbed(), weights_only=True)
    torch.manual_seed(11)
    model = WithHyperparameters()
    callback = QuantizationAwareTraining(export=ExportConfig(directory=directory, formats=formats))
    torch.manual_seed(12)
    keep = ModelCheckpoint("ckpt", filename="last")
    with pytest.raises(error, match=text) as raised:
        trainer(callback, *others, keep, enable_checkpointing=True).fit(model, Digits(shuffle=False))
    assert different(weights(model), weights(expected)) == []
    assert surface(model) == surface(expected)
    assert callback.report is None
    stored = torch.load("ckpt/last.ckpt", weights_only=True)
    assert different(stored["state_dict"], weights(model)) == []
    return str(raised.value), model


def undisturbed() -> str:
    torch.manual_seed(11)
    model = WithHyperparameters()
    torch.manual_seed(12)
    runner = trainer(QuantizationAwareTraining(export=ExportConfig(directory="expected", formats=("torchscript",))))
    runner.fit(model, Digits(shuffle=False))
    runner.save_checkpoint("expected.ckpt")
    return "expected.ckpt"


def do_what_it_says(message: str, directory: str) -> None:
    """Run the command of an error's text, and look at its files."""
    assert "The training is not lost: the module has the trained weights. Write the files again with: " in message
    command = shlex.split(message.partition("Write the files again with: ")[2])
    assert command[0] == "lightning-quant"
    assert main([*command[1:], f"--directory={directory}"]) == 0
    assert torch.equal(computes(f"{directory}/model.ts"), computes("expected/model.ts"))


@pytest.mark.parametrize("format_name", ["torchscript", "pt2"])
def test_a_full_disk(format_name: str, small_disk: Path) -> None:
    """Where torch's own writers end the process."""
    text = rf"{format_name} export of forward failed: \[Errno 28\] No space left on device"
    message, _ = fails(ExportError, text, directory=str(small_disk), formats=(format_name,))
    message = message + " --formats=[torchscript]"
    do_what_it_says(message, "again")


@pytest.mark.parametrize("place", ["replace", "mkdtemp", "write_text", "onnx.save"])
def test_no_space_left(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {
        "replace": "os.replace", "mkdtemp": "tempfile.mkdtemp", "write_text": "pathlib.Path.write_text",
        "onnx.save": "onnx.save",
    }[place]  # fmt: skip
    # a format that nobody named is left out where it cannot be, but not for this reason
    formats = None if place == "onnx.save" else ("torchscript",)
    with monkeypatch.context() as patched:
        message, _ = fails(
            ExportError, "No space left on device", _Break(lambda: patched.setattr(where, full)), formats=formats
        )
    assert not list(Path("quantized").glob("*.onnx"))
    do_what_it_says(message, "again")


def test_a_folder_that_was_removed_is_made_again() -> None:
    callback = qat()
    torch.manual_seed(11)
    keep = _Break(lambda: shutil.rmtree("quantized"))
    trainer(callback, keep).fit(WithHyperparameters(), Digits(shuffle=False))
    assert Path("quantized/model.ts").is_file()


def test_a_folder_that_became_a_file() -> None:
    def break_it() -> None:
        shutil.rmtree("quantized")
        Path("quantized").write_text("in the way")

    message, _ = fails(ConfigError, r"ExportConfig\(directory='quantized'\): cannot write there", _Break(break_it))
    do_what_it_says(message, "again")


def test_an_exporter_that_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    with monkeypatch.context() as patched:
        message, _ = fails(ExportError, "no such operator", _Break(lambda: patched.setattr("torch.jit.freeze", crash)))
    do_what_it_says(message, "again")


def test_without_a_checkpoint_the_error_says_how_to_save_one(monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed()
    torch.manual_seed(11)
    model, callback = WithHyperparameters(), qat()
    torch.manual_seed(12)
    runner = trainer(callback)
    with monkeypatch.context() as patched:
        patched.setattr("lightning_quant.callbacks.base.convert_module", lambda *_: 1 / 0)
        with pytest.raises(ExportError) as raised:
            runner.fit(model, Digits(shuffle=False))
    assert str(raised.value) == (
        "the int8 model could not be made: ZeroDivisionError: division by zero. The training is not lost: the module "
        "has the trained weights. Save a checkpoint with trainer.save_checkpoint('trained.ckpt'). Write the files "
        "again with: lightning-quant export trained.ckpt --model modules.WithHyperparameters --data modules.Digits"
    )
    runner.save_checkpoint("trained.ckpt")
    do_what_it_says(str(raised.value).replace("Save a checkpoint with trainer.save_checkpoint('trained.ckpt'). ", ""),
                    "again")  # fmt: skip


def test_after_a_calibration_the_error_says_how_to_calibrate_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from modules import ptq

    callback, model = ptq(), WithHyperparameters()
    runner = trainer(callback)
    text = r"Write the files again with trainer\.validate\(\.\.\.\) and this callback\."
    with monkeypatch.context() as patched:
        patched.setattr("lightning_quant.callbacks.base.convert_module", lambda *_: 1 / 0)
        with pytest.raises(ExportError, match=text):
            runner.fit(model, Digits())
    runner.validate(model, Digits())
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))
