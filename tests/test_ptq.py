"""PostTrainingQuantization: a float run that ends with an int8 model, and leaves the module as it was."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import (
    MIN_MAX,
    WITHOUT_VAL_LOADER,
    BuiltInConfigureModel,
    BuiltInSetup,
    Classifier,
    ConvClassifier,
    Digits,
    ForwardUnused,
    Losses,
    OwnLoaders,
    Recurrent,
    StepsOnly,
    WithHyperparameters,
    as_test,
    convnet,
    different,
    merged,
    mlp,
    ptq,
    surface,
    train_loader,
    trainer,
    val_loader,
    weights,
)
from roots import part, pl
from torch import nn

from lightning_quant import (
    CalibrationError,
    ExportConfig,
    ExportError,
    PostTrainingQuantization,
    load,
)
from lightning_quant.exporters.writing import EXPORTERS
from lightning_quant.figures import class_labels

EarlyStopping = part("callbacks").EarlyStopping
ModelCheckpoint = part("callbacks").ModelCheckpoint
CSVLogger = part("loggers").CSVLogger


@pytest.mark.parametrize("entry", ["validate", "fit"])
def test_a_run_ends_with_report_model_and_files(entry: str) -> None:
    callback = PostTrainingQuantization()
    getattr(trainer(callback), entry)(Classifier(convnet()), datamodule=Digits())
    assert callback.quantized_model is not None
    assert callback.report is not None
    folder = Path("quantized")
    files = {"torchscript": folder / "model.ts", "onnx": folder / "model.onnx", "openvino": folder / "model.xml"}
    names = {file.name for file in files.values()} | {"model.bin"}
    assert {f.name for f in folder.iterdir()} == {"report.html", "report.json", "report.md", *names}
    assert callback.report.artifacts == files
    for name, entry in callback.report.formats.items():
        assert entry.latency_ms_float is not None
        # a convolution and a linear layer; TorchScript does not show its kernels
        assert (entry.int8_kernels, entry.float_kernels) == ((None, None) if name == "torchscript" else (2, 0))
        assert entry.left_float == ()
    assert callback.report.formats["openvino"].size_bytes == sum(
        (folder / name).stat().st_size for name in ("model.xml", "model.bin")
    )
    assert callback.report.targets == ["net"]
    assert json.loads((folder / "report.json").read_text()) == callback.report.to_dict()
    assert callback.report.metrics_int8.keys() == callback.report.metrics_float.keys() == {"val_loss", "val_acc"}


@pytest.mark.parametrize(
    ("limits", "data"),
    [
        pytest.param({}, lambda: {"datamodule": Digits()}, id="normalising datamodule"),
        pytest.param({"limit_val_batches": 2}, lambda: {"datamodule": Digits()}, id="number of batches"),
        pytest.param({"limit_val_batches": 0.7}, lambda: {"datamodule": Digits()}, id="share of batches"),
        pytest.param({}, lambda: {"datamodule": Digits(val_sets=2)}, id="several in a datamodule"),
        pytest.param({"limit_val_batches": 1}, lambda: {"datamodule": Digits(val_sets=2)}, id="several, limited"),
        pytest.param({}, lambda: {"dataloaders": val_loader()}, id="bare loader"),
        pytest.param({}, lambda: {"dataloaders": [val_loader(), val_loader(300, 7)]}, id="bare list"),
        pytest.param({}, lambda: {"dataloaders": {"a": val_loader(), "b": val_loader(300, 7)}}, id="bare dict"),
        pytest.param({}, dict, id="the module's own"),
    ],
)
def test_float_metrics_are_those_of_trainer_validate(limits: dict[str, Any], data: Any) -> None:
    model = OwnLoaders()
    callback = ptq()
    trainer(callback, **limits).validate(model, **data())
    assert callback.report.metrics_float == merged(trainer(**limits).validate(model, **data()))
    assert callback.report.metrics_int8.keys() == callback.report.metrics_float.keys()


def test_metrics_of_several_dataloaders_keep_lightnings_names() -> None:
    callback = ptq()
    trainer(callback).validate(Classifier(convnet()), Digits(val_sets=2))
    names = {f"val_{m}/dataloader_idx_{i}" for m in ("loss", "acc") for i in (0, 1)}
    assert callback.report.metrics_float.keys() == names


def test_float_metrics_after_fit_are_those_of_the_trained_weights() -> None:
    model, data, callback = Classifier(convnet()), Digits(), ptq()
    runner = trainer(callback, max_epochs=2)
    runner.fit(model, data)
    assert callback.report.metrics_float == merged(trainer().validate(model, data))
    assert callback.report.metrics_float == {k: runner.callback_metrics[k].item() for k in ("val_loss", "val_acc")}


def _trained(*callbacks: pl.Callback) -> tuple[dict[str, torch.Tensor], list[float], torch.Tensor]:
    pl.seed_everything(3, verbose=False)
    model, losses = Classifier(convnet(dropout=0.3)), Losses()
    trainer(*callbacks, losses, max_epochs=2).fit(model, Digits())
    return weights(model), losses.values, torch.get_rng_state()


def test_fit_is_untouched() -> None:
    state, losses, rng = _trained()
    quantized_state, quantized_losses, quantized_rng = _trained(ptq())
    assert different(state, quantized_state) == []
    assert losses == quantized_losses
    assert torch.equal(rng, quantized_rng)


@pytest.mark.parametrize("entry", ["validate", "fit"])
def test_the_module_is_not_edited(entry: str) -> None:
    """Against a module that went through the same run without the callback."""
    torch.manual_seed(1)
    plain = Classifier(convnet())
    torch.manual_seed(1)
    model = Classifier(convnet())
    getattr(trainer(), entry)(plain, datamodule=Digits(shuffle=False))
    getattr(trainer(ptq()), entry)(model, datamodule=Digits(shuffle=False))
    assert surface(model) == surface(plain)
    assert different(weights(model), weights(plain)) == []
    trainer().fit(model, Digits(shuffle=False))
    trainer().fit(plain, Digits(shuffle=False))
    assert different(weights(model), weights(plain)) == []


class _Calls:
    """Counts the calls of a float layer; taken off with ``remove``."""

    def __init__(self, layer: nn.Module) -> None:
        self.count = 0
        self.handle = layer.register_forward_pre_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("entry", ["validate", "fit"])
def test_trainer_test_runs_the_int8_model(entry: str) -> None:
    model, data, callback = Classifier(convnet()), Digits(), ptq()
    runner = trainer(callback)
    getattr(runner, entry)(model, datamodule=data)
    float_layer = _Calls(model.net[0])
    results = merged(runner.test(model, data, verbose=False))
    assert float_layer.count == 0
    assert results == as_test(merged(trainer().validate(callback.quantized_model, data)))
    assert results == as_test(callback.report.metrics_int8)
    float_results = merged(trainer().test(model, data, verbose=False))
    assert float_layer.count > 0  # the module is float again
    assert float_results["test_loss"] != results["test_loss"]


def test_validate_and_predict_run_the_module_itself() -> None:
    model, data, callback = Classifier(convnet()), Digits(), ptq()
    runner = trainer(callback)
    runner.fit(model, data)
    runner.test(model, data, verbose=False)
    plain = merged(trainer().validate(model, data))
    assert merged(runner.validate(model, data)) == plain
    predictions = torch.cat(runner.predict(model, data))
    assert torch.equal(predictions, torch.cat(trainer().predict(model, data)))


def test_test_without_an_int8_model_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, data = Classifier(convnet()), Digits()
    with caplog.at_level("WARNING"):
        results = trainer(ptq()).test(model, data, verbose=False)
    assert "there is no int8 model yet: this tests the float module" in caplog.text
    assert results == trainer().test(model, data, verbose=False)


@pytest.mark.parametrize("fresh", [False, True], ids=["same callback", "fresh callback"])
def test_test_of_a_checkpoint_calibrates_its_weights(fresh: bool) -> None:
    model, data, callback = Classifier(convnet()), Digits(), ptq()
    keep = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1)
    runner = trainer(callback, keep, enable_checkpointing=True, max_epochs=2)
    runner.fit(model, data)
    path = "ckpt/epoch=0.ckpt"
    if fresh:
        runner = trainer(ptq(), keep, enable_checkpointing=True)
    results = merged(runner.test(model, data, ckpt_path=path, verbose=False, weights_only=True))

    first = Classifier(convnet())
    first.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    expected = ptq()
    trainer(expected).validate(first, data)
    assert results == as_test(expected.report.metrics_int8)


def test_test_of_a_checkpoint_calibrates_on_the_loaders_of_fit() -> None:
    model, callback = Classifier(convnet()), ptq()
    runner = trainer(callback)
    runner.fit(model, train_loader(), val_loader())
    runner.save_checkpoint("a.ckpt")
    results = merged(runner.test(model, val_loader(), ckpt_path="a.ckpt", verbose=False, weights_only=True))
    assert results == as_test(callback.report.metrics_int8)


@WITHOUT_VAL_LOADER
def test_test_of_a_checkpoint_without_validation_data_is_refused() -> None:
    model = Classifier(convnet())
    runner = trainer()
    runner.fit(model, train_loader())
    runner.save_checkpoint("a.ckpt")
    with pytest.raises(CalibrationError, match=r"calibrates the checkpoint's weights, and there is no val dataloader"):
        trainer(ptq()).test(model, val_loader(), ckpt_path="a.ckpt", weights_only=True)


def test_validate_of_a_checkpoint_quantizes_its_weights() -> None:
    model, data = Classifier(convnet()), Digits()
    runner = trainer()
    runner.fit(model, data)
    runner.save_checkpoint("a.ckpt")
    callback = ptq()
    trainer(callback).validate(Classifier(convnet()), data, ckpt_path="a.ckpt", weights_only=True)
    assert callback.report.metrics_float == merged(trainer().validate(model, data))


def _input_scale(callback: PostTrainingQuantization) -> float:
    """The scale with which the int8 model quantizes its input."""
    scales = [value for name, value in callback.quantized_model.named_buffers() if name.endswith("input_scale_0")]
    assert len(scales) == 1
    return scales[0].item()


@pytest.mark.parametrize(("batches", "observed"), [(1, 1), (2, 2), (None, 3), (99, 3)])
def test_calibration_batches(batches: int | None, observed: int) -> None:
    """Each batch is brighter than the one before it, so that the input's range says which ones were seen."""
    images = torch.rand(12, 1, 8, 8) * torch.arange(1, 4).repeat_interleave(4).reshape(12, 1, 1, 1)
    images[::4, 0, 0, 0] = 0  # the range begins at 0
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.arange(12) % 10), batch_size=4)
    model = Classifier(convnet())
    callback = ptq(MIN_MAX, calibration_batches=batches)
    trainer(callback).validate(model, loader)
    assert _input_scale(callback) == pytest.approx(images[: 4 * observed].max().item() / 255, rel=1e-6)
    assert callback.report.metrics_float == merged(trainer().validate(model, loader))


@pytest.mark.parametrize(
    ("net", "int8"),
    [(mlp, "torch.ao.nn.quantized.dynamic.modules.linear"), (Recurrent, "torch.ao.nn.quantized.dynamic.modules.rnn")],
    ids=["mlp", "lstm"],
)
def test_dynamic(net: Any, int8: str) -> None:
    model, data = Classifier(net()), Digits()
    callback = PostTrainingQuantization(method="dynamic")
    runner = trainer(callback)
    runner.fit(model, data)
    report = callback.report
    assert report.metrics_float == merged(trainer().validate(model, data))
    assert int8 in {type(part).__module__ for part in callback.quantized_model.modules()}
    assert report.coverage == 1
    assert list(report.artifacts) == ["torchscript"]
    reason = "backend 'fx' does not write it for method 'dynamic'"
    assert report.formats_left_out == {"onnx": reason, "openvino": reason}
    assert merged(runner.test(model, data, verbose=False)) == as_test(report.metrics_int8)


@WITHOUT_VAL_LOADER
def test_dynamic_needs_no_validation_data() -> None:
    callback = ptq(method="dynamic")
    trainer(callback).fit(Classifier(mlp()), train_loader())
    assert callback.report.metrics_float == callback.report.metrics_int8 == {}
    assert callback.report.artifacts["torchscript"].is_file()


def test_quantized_model_is_an_int8_copy() -> None:
    model, callback = Classifier(convnet()), ptq()
    trainer(callback).fit(model, Digits())
    int8 = callback.quantized_model
    assert type(int8) is Classifier
    assert int8 is not model
    assert not any(part.training for part in int8.modules())
    assert {x.device.type for x in (*int8.parameters(), *int8.buffers())} == {"cpu"}
    kinds = {type(part).__module__.removeprefix("torch.ao.nn.") for part in int8.modules()}
    assert {"intrinsic.quantized.modules.conv_relu", "quantized.modules.linear"} <= kinds
    assert not any(isinstance(part, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) for part in int8.modules())
    assert list(int8.parameters()) == []
    shared = {id(x) for x in (*model.parameters(), *model.buffers())} & {id(x) for x in int8.buffers()}
    assert not shared


def test_metrics_reach_the_logger() -> None:
    callback = ptq()
    trainer(callback, logger=CSVLogger(".", name="logs", version=0)).fit(Classifier(convnet()), Digits())
    with Path("logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    last = {name: float(value) for name, value in rows[-1].items() if value}
    assert last["int8/val_loss"] == pytest.approx(callback.report.metrics_int8["val_loss"])
    assert last["float/val_loss"] == pytest.approx(callback.report.metrics_float["val_loss"])
    assert last["int8/coverage"] == 1
    assert last["int8/size_bytes"] == callback.report.size_bytes_int8
    assert last["step"] == 6


def test_a_second_run_replaces_the_files_of_the_first() -> None:
    first = ptq()
    trainer(first).validate(StepsOnly(), Digits())
    second = ptq()
    trainer(second).validate(Classifier(convnet()), Digits())
    assert {f.name for f in Path("quantized").iterdir()} == {"report.html", "report.json", "report.md", "model.ts"}
    again = ptq()
    trainer(again).validate(Classifier(convnet()), Digits())
    assert load(again.report.artifacts["torchscript"])(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_one_callback_in_two_runs() -> None:
    callback = ptq()
    runner = trainer(callback)
    model, data = Classifier(convnet()), Digits()
    runner.fit(model, data)
    runner.fit_loop.max_epochs = 2
    runner.fit(model, data)
    assert callback.report.metrics_float == merged(trainer().validate(model, data))
    other = Classifier(mlp())
    trainer(callback).validate(other, data)
    assert callback.report.metrics_float == merged(trainer().validate(other, data))


class _Reloaded(Classifier):
    """The module with a file in the place of its forward."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.__dict__["file"] = load(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.__dict__["file"](x)


def test_layers_on_the_module_itself() -> None:
    model, data, callback = ConvClassifier(), Digits(), ptq()
    runner = trainer(callback)
    runner.fit(model, data)
    assert callback.report.targets == ["forward"]
    assert callback.report.artifacts == {"torchscript": Path("quantized/model.ts")}
    assert callback.report.coverage == 1
    assert not any(isinstance(part, (nn.Conv2d, nn.Linear)) for part in callback.quantized_model.modules())
    assert callback.report.metrics_float == merged(trainer().validate(model, data))
    assert merged(runner.test(model, data, verbose=False)) == as_test(callback.report.metrics_int8)


SUFFIXES = {"torchscript": "ts", "onnx": "onnx"}


@pytest.mark.parametrize(
    ("made_by", "formats"), [(StepsOnly, ("torchscript", "onnx")), (ForwardUnused, ("torchscript",))]
)
def test_where_no_step_calls_forward_there_is_a_file_per_target(made_by: Any, formats: Any) -> None:
    model, data = made_by(), Digits()
    callback = PostTrainingQuantization(export=ExportConfig(formats=formats))
    trainer(callback).fit(model, data)
    report = callback.report
    assert report.targets == ["encoder", "head"]
    folder = Path("quantized")
    assert report.artifacts == {
        name: {target: folder / f"model.{target}.{suffix}" for target in ("encoder", "head")}
        for name, suffix in SUFFIXES.items()
        if name in formats
    }
    assert all(path.is_file() for files in report.artifacts.values() for path in files.values())
    assert any("one file per target" in note for note in report.notes)
    for format_name, files in report.artifacts.items():
        put_back = made_by()
        put_back.encoder, put_back.head = load(files["encoder"]), load(files["head"])
        assert report.formats[format_name].metrics == merged(trainer().validate(put_back, data))
    assert report.formats["torchscript"].metrics == report.metrics_int8


class _ForwardLeavesOut(StepsOnly):
    """``forward`` is called by the step, and does not reach the layer that the step uses besides."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self(images).flatten(1))


def test_a_forward_that_does_not_reach_every_target_is_not_the_file() -> None:
    callback = ptq()
    trainer(callback).validate(_ForwardLeavesOut(), Digits())
    assert callback.report.artifacts["torchscript"].keys() == {"encoder", "head"}


class _Chosen(nn.Module):
    """Decides by its data, which no file can do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) if x.sum() > 0 else self.down(x)


def test_a_forward_with_a_part_that_decides_by_its_data_is_not_the_file() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), _Chosen(), nn.Linear(64, 10))
    callback = ptq()
    trainer(callback).validate(Classifier(net), Digits())
    assert callback.report.targets == ["net", "net.3.up"]
    assert callback.report.artifacts == {"torchscript": {"net.3.up": Path("quantized/model.net.3.up.ts")}}
    assert callback.report.formats["torchscript"].metrics.keys() == callback.report.metrics_int8.keys()


class _ExtraHead(StepsOnly):
    """A layer that training alone uses stays float, and the report says why."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = nn.Linear(128, 10)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) + F.cross_entropy(
            self.helper(self.encoder(batch[0]).flatten(1)), batch[1]
        )


def test_a_layer_that_only_training_uses_stays_float() -> None:
    callback = ptq()
    trainer(callback).fit(_ExtraHead(), Digits())
    assert callback.report.targets == ["encoder", "head"]
    assert callback.report.float_layers == {"helper": "its forward is never called by the validation step"}
    assert isinstance(callback.quantized_model.helper, nn.Linear)


def test_reloaded_files_give_the_metrics_of_the_report() -> None:
    callback, data = PostTrainingQuantization(), Digits()
    trainer(callback).fit(Classifier(convnet()), data)
    report = callback.report
    for format_name, path in report.artifacts.items():
        assert report.formats[format_name].metrics == merged(trainer().validate(_Reloaded(path), data))
    assert report.formats["torchscript"].metrics == report.metrics_int8
    # other runtimes round ties in another way: a logit moves by a few steps of 1/255 of its range at most
    for name in ("onnx", "openvino"):
        assert report.formats[name].metrics["val_loss"] == pytest.approx(report.metrics_int8["val_loss"], rel=0.02)


@pytest.mark.parametrize("made_by", [BuiltInSetup, BuiltInConfigureModel])
@pytest.mark.parametrize("entry", ["validate", "fit"])
def test_layers_that_are_made_late(made_by: Any, entry: str) -> None:
    model, data, callback = made_by(), Digits(), ptq()
    runner = trainer(callback)
    getattr(runner, entry)(model, datamodule=data)
    assert callback.report.targets == ["net"]
    assert callback.report.metrics_float == merged(trainer().validate(model, data))
    assert merged(runner.test(model, data, verbose=False)) == as_test(callback.report.metrics_int8)


def test_hyperparameters_stay() -> None:
    model, callback = WithHyperparameters(width=4), ptq()
    runner = trainer(callback)
    runner.fit(model, Digits())
    assert callback.quantized_model.hparams == model.hparams == {"width": 4, "lr": 0.05}
    runner.save_checkpoint("a.ckpt")
    again = WithHyperparameters.load_from_checkpoint("a.ckpt", weights_only=True)
    assert different(weights(again), weights(model)) == []


def test_beside_the_users_own_callbacks() -> None:
    callback = ptq()
    best = ModelCheckpoint("ckpt", monitor="val_loss")
    stop = EarlyStopping("val_loss", patience=0, mode="max")  # the loss falls: stops after the second epoch
    model = Classifier(convnet())
    runner = trainer(callback, best, stop, enable_checkpointing=True, max_epochs=5)
    runner.fit(model, Digits())
    assert runner.current_epoch == 2
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))
    assert "lightning_quant" not in torch.load(best.best_model_path, weights_only=True)


def _plain_copy(model: Classifier) -> Classifier:
    plain = Classifier(convnet())
    plain.load_state_dict(model.state_dict())
    return plain


class _BringsItsCallback(Classifier):
    def configure_callbacks(self) -> list[pl.Callback]:
        self.__dict__["made"] = ptq()
        return [self.__dict__["made"]]


def test_from_configure_callbacks() -> None:
    model = _BringsItsCallback(convnet())
    trainer().fit(model, Digits())
    callback = model.__dict__["made"]
    assert callback.report.metrics_float == merged(trainer().validate(_plain_copy(model), Digits()))
    assert Path("quantized/model.ts").is_file()


@pytest.mark.parametrize("entry", ["validate", "fit"])
def test_fast_dev_run_writes_nothing(entry: str) -> None:
    callback = ptq()
    getattr(trainer(callback, fast_dev_run=True), entry)(Classifier(convnet()), datamodule=Digits())
    assert list(Path().iterdir()) == []
    assert callback.quantized_model is not None
    assert callback.report is None


def test_after_training_in_mixed_precision_the_float_model_is_float32() -> None:
    model, callback = Classifier(convnet()), ptq()
    trainer(callback, precision="bf16-mixed").fit(model, Digits())
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))
    assert callback.report.metrics_int8["val_loss"] == pytest.approx(
        callback.report.metrics_float["val_loss"], rel=0.05
    )


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bar(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    callback = ptq()
    bar = [pl.callbacks.TQDMProgressBar()] if shown else []
    trainer(callback, *bar, enable_progress_bar=shown).validate(Classifier(convnet()), Digits())
    out = "".join(capsys.readouterr())
    assert ("Calibrating" in out) == shown
    assert "int8 by static" in out


@pytest.fixture
def no_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to networks that sort their sequences by length, whose number no ONNX file can leave open."""

    def refuse(*_: Any) -> Path:
        raise ExportError("torch.export cannot capture the model: u0\nmore lines")

    for name in ("onnx", "openvino"):
        monkeypatch.setitem(EXPORTERS, name, refuse)


@pytest.mark.usefixtures("no_onnx")
def test_a_format_that_nobody_named_is_left_out_where_it_cannot_be() -> None:
    callback = PostTrainingQuantization()
    trainer(callback).validate(Classifier(mlp()), datamodule=Digits())
    assert callback.report is not None
    assert callback.report.artifacts == {"torchscript": Path("quantized/model.ts")}
    reason = "torch.export cannot capture the model: u0"
    assert callback.report.formats_left_out == {"onnx": reason, "openvino": reason}
    page = Path("quantized/report.md").read_text(encoding="utf8")
    assert f"`onnx` was not written: {reason}." in page
    assert f"`openvino` was not written: {reason}." in page


@pytest.mark.usefixtures("no_onnx")
def test_a_format_that_was_named_is_an_error_where_it_cannot_be() -> None:
    callback = PostTrainingQuantization(export=ExportConfig(formats=("torchscript", "onnx")))
    with pytest.raises(ExportError, match=r"torch\.export cannot capture the model: u0"):
        trainer(callback).validate(Classifier(mlp()), datamodule=Digits())
    assert not [path for path in Path("quantized").iterdir() if path.suffix in (".ts", ".onnx")]


# ---- what files say of the module


class _Config:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@pytest.mark.parametrize(
    ("attributes", "labels"),
    [
        ({"class_names": ["cat", "dog"]}, ("cat", "dog")),
        ({"classes": ("cat", "dog")}, ("cat", "dog")),
        ({"id2label": {1: "dog", 0: "cat"}}, ("cat", "dog")),
        ({"class_to_idx": {"dog": 1, "cat": 0}}, ("cat", "dog")),
        ({"config": _Config(id2label={1: "dog", 0: "cat"})}, ("cat", "dog")),
        ({"class_labels": ["a"], "classes": ["b"]}, ("a",)),
        ({"classes": 10}, None),
        ({"classes": [0, 1]}, None),
        ({"labels": torch.tensor([1, 2])}, None),
        ({"class_to_idx": {"dog": "cat"}}, None),
        ({"config": _Config()}, None),
        ({}, None),
    ],
)
def test_class_labels(attributes: dict[str, Any], labels: tuple[str, ...] | None) -> None:
    assert class_labels(_Config(**attributes)) == labels


def test_files_hold_labels_and_metrics() -> None:
    model, callback = Classifier(convnet()), ptq()
    model.class_names = [str(digit) for digit in range(10)]
    trainer(callback).validate(model, Digits())
    metadata = load(callback.report.artifacts["torchscript"]).metadata
    assert metadata["class_labels"] == model.class_names
    assert metadata["metrics"] == {
        "float": callback.report.metrics_float,
        "int8": callback.report.metrics_int8,
    }
