"""Checkpoints of a quantization-aware training, in every order of a Trainer's functions and with every way to save."""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import (
    WITHOUT_VAL_LOADER,
    Classifier,
    Digits,
    WithHyperparameters,
    as_test,
    convnet,
    different,
    merged,
    qat,
    rows,
    surface,
    train_loader,
    trainer,
    val_loader,
    weights,
)
from roots import part, pl
from torch import nn

from lightning_quant import ConfigError, QuantizationAwareTraining
from lightning_quant.attachment import attached_to
from lightning_quant.backends.graph import is_initialised

ModelCheckpoint = part("callbacks").ModelCheckpoint
OnExceptionCheckpoint = part("callbacks").OnExceptionCheckpoint

# a run that resumes into another folder, or with other callbacks
pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

KEY = "lightning_quant"


def net() -> Any:
    torch.manual_seed(11)
    return Classifier(convnet())


def keeper(folder: str = "ckpt", **kwargs: Any) -> Any:
    return ModelCheckpoint(folder, **{"filename": "{epoch}", "save_top_k": -1, **kwargs})


def fit(model: Any, *callbacks: Any, data: Any = None, ckpt_path: Any = None, **kwargs: Any) -> Any:
    """The Trainer, after its fit."""
    keeps = any(isinstance(callback, part("callbacks").Checkpoint) for callback in callbacks)
    runner = trainer(*callbacks, **{"enable_checkpointing": keeps, **kwargs})
    runner.fit(model, data or Digits(shuffle=False), ckpt_path=ckpt_path, weights_only=True)
    return runner


def read(path: str | Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# ---- from a float checkpoint


class _Seen(pl.Callback):
    """Weights, and whether ranges were known, when training began."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.weights = weights(module)
        self.initialised = [is_initialised(graph) for graph in attached_to(module).named().values()]


@pytest.mark.parametrize("how", ["fit(ckpt_path)", "load_from_checkpoint", "after a quantized fit"])
def test_a_float_checkpoint_begins_with_fresh_observers(how: str) -> None:
    runner = fit(WithHyperparameters())
    runner.save_checkpoint("float.ckpt")
    stored = read("float.ckpt")["state_dict"]
    callback, seen = qat(), _Seen()
    if how == "load_from_checkpoint":
        model = WithHyperparameters.load_from_checkpoint("float.ckpt", weights_only=True)
        fit(model, callback, seen)
    else:
        model = WithHyperparameters()
        if how == "after a quantized fit":  # the same module and callback: their ranges are of other weights
            fit(model, callback)
        fit(model, callback, seen, ckpt_path="float.ckpt", max_epochs=2)
    assert different(stored, seen.weights) == []
    assert seen.initialised == [False]
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))


def test_a_second_fit_without_a_checkpoint_keeps_the_ranges() -> None:
    callback, seen, model = qat(), _Seen(), net()
    fit(model, callback)
    fit(model, callback, seen)
    assert seen.initialised == [True]


# ---- every order


#: Each of the five after each of them, itself included.
EVERY_PAIR = (
    "fit fit test fit validate fit predict fit best fit test test validate test predict test best test "
    "validate validate predict validate best validate predict predict best predict best best fit"
)


def test_the_sequence_has_every_pair() -> None:
    steps = EVERY_PAIR.split()
    assert set(itertools.pairwise(steps)) >= {(a, b) for a in steps for b in steps}


def test_every_order_of_a_trainers_functions() -> None:
    """No function of the Trainer but ``fit`` changes the module, and each computes what it always computes."""
    model, data, callback = net(), Digits(shuffle=False), qat()
    plain = net()
    keep = keeper(monitor="val_loss", save_top_k=1)
    runner = trainer(callback, keep, enable_checkpointing=True)
    structure, int8 = None, None
    for step in EVERY_PAIR.split():
        before = weights(model)
        if step == "fit":
            runner.fit_loop.max_epochs += structure is not None
            runner.fit(model, data)
            assert different(before, weights(model))
            int8 = as_test(callback.report.metrics_int8)
            assert int8 == as_test(merged(trainer().validate(callback.quantized_model, data)))
            if structure is None:
                trainer().fit(plain, data)
                structure = surface(plain)
        elif step == "best":
            tested = merged(runner.test(model, data, ckpt_path="best", verbose=False, weights_only=True))
            fresh = trainer(qat()).test(net(), data, ckpt_path=keep.best_model_path, verbose=False, weights_only=True)
            assert tested == merged(fresh)
            int8 = tested
            # Lightning leaves the checkpoint's weights in the module
            assert different(read(keep.best_model_path)["state_dict"], weights(model)) == []
        else:
            if step == "test":
                # of the last fit, or of the checkpoint that was tested since
                assert merged(runner.test(model, data, verbose=False)) == int8
            elif step == "validate":
                assert merged(runner.validate(model, data)) == merged(trainer().validate(model, data))
            else:
                outputs = (torch.cat(run.predict(model, data)) for run in (runner, trainer()))
                assert torch.equal(*outputs)
            assert different(before, weights(model)) == []
        assert surface(model) == structure, step


@pytest.mark.parametrize("function", ["test", "validate", "predict"])
def test_weights_and_ranges_of_a_checkpoint_stay_together(function: str) -> None:
    """After ``test(ckpt_path=...)`` the module has that checkpoint's weights; what is saved then has its ranges."""
    model, data, callback = net(), Digits(shuffle=False), qat()
    runner = fit(model, callback, keeper(), data=data, max_epochs=2)
    getattr(runner, function)(model, data, ckpt_path="ckpt/epoch=0.ckpt", weights_only=True)
    runner.save_checkpoint("after.ckpt")
    first, after = read("ckpt/epoch=0.ckpt"), read("after.ckpt")
    assert different(first["state_dict"], after["state_dict"]) == []
    assert different(first[KEY]["observers"]["net"], after[KEY]["observers"]["net"]) == []
    fit(net(), keeper("float"), data=data)
    with pytest.raises(ConfigError) if function == "test" else contextlib.nullcontext():
        getattr(runner, function)(model, data, ckpt_path="float/epoch=0.ckpt", weights_only=True)
    runner.save_checkpoint("float.ckpt")
    assert KEY not in read("float.ckpt")


# ---- every way to save


@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "save_weights_only"])
def test_each_file_has_the_float_keys_and_what_quantization_needs(weights_only: bool) -> None:
    model, callback = net(), qat()
    keep = keeper(save_last=True, save_weights_only=weights_only)
    fit(model, callback, keep, max_epochs=2)
    names = {path.name for path in Path("ckpt").iterdir()}
    assert names == {"epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"}
    for name in names:
        kept = read(f"ckpt/{name}")
        assert list(kept["state_dict"]) == list(net().state_dict())
        assert kept[KEY]["phase"] == {"quantize": True, "observe": True, "update_batch_norm": True}
        assert ("optimizer_states" in kept) is not weights_only
    runner = trainer(qat(), keeper("again"), enable_checkpointing=True)
    tested = merged(runner.test(net(), Digits(), ckpt_path="ckpt/last.ckpt", verbose=False, weights_only=True))
    assert tested == as_test(callback.report.metrics_int8)


def test_fit_goes_on_from_the_last_one() -> None:
    whole = net()
    fit(whole, qat(), keeper("whole"), max_epochs=3)
    fit(net(), qat(), keeper(save_last=True), max_epochs=2)
    resumed = net()
    fit(resumed, qat(), keeper(save_last=True), ckpt_path="last", max_epochs=3)
    assert different(weights(whole), weights(resumed)) == []


class _Fails(Classifier):
    fails = True

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fails and batch_idx == 3:
            raise ValueError("out of paper")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "keep",
    [
        lambda: OnExceptionCheckpoint("ckpt", "broken"),
        lambda: ModelCheckpoint("ckpt", "broken", save_on_exception=True),
        lambda: ModelCheckpoint("ckpt", "broken", save_on_exception=True, save_weights_only=True),
    ],
    ids=["OnExceptionCheckpoint", "save_on_exception", "weights only"],
)
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings(r"ignore:`?\.fit\(ckpt_path=")  # OnExceptionCheckpoint looks for a last one
def test_a_checkpoint_that_an_exception_leaves_behind(keep: Any) -> None:
    torch.manual_seed(11)
    model, plain, callback = _Fails(convnet()), _Fails(convnet()), qat()
    for module, callbacks in ((model, [callback, keep()]), (plain, [])):
        with pytest.raises(ValueError, match="out of paper"):
            fit(module, *callbacks)
    assert surface(model) == surface(plain)
    kept = read("ckpt/broken.ckpt")
    assert different(kept["state_dict"], weights(model)) == []
    assert kept[KEY]["phase"]["quantize"]
    tested = merged(trainer(qat()).test(net(), Digits(), ckpt_path="ckpt/broken.ckpt", verbose=False))
    int8 = tested["test_acc"], merged(trainer().test(model, Digits(), verbose=False))["test_acc"]
    assert int8[0] == pytest.approx(int8[1], abs=0.1)
    if "optimizer_states" in kept:
        model.fails = False
        fit(model, callback, ckpt_path="ckpt/broken.ckpt", max_epochs=2)
        assert callback.report is not None


def test_a_best_checkpoint_from_before_quantization_is_not_exported() -> None:
    """The loss of a float epoch is the lowest one, as it often is."""
    model, data, callback = net(), Digits(shuffle=False), qat(start_epoch=2)
    best = keeper(monitor="val_loss", mode="max", save_top_k=1)  # falls with each epoch: the first is kept
    runner = fit(model, callback, best, data=data, max_epochs=3)
    assert best.best_model_path.endswith("epoch=0.ckpt")
    assert callback.report is not None
    text = (
        r"test\(ckpt_path=\.\.\.\): this checkpoint is from before quantization began \(start_epoch\): its weights "
        r"have never seen fake quantize\. Choose a later one \(save_last=True and ckpt_path='last', or a "
        r"ModelCheckpoint for each epoch\), or quantize this one with PostTrainingQuantization\."
    )
    with pytest.raises(ConfigError, match=f"^{text}$"):
        runner.test(model, data, ckpt_path="best", verbose=False, weights_only=True)
    # it goes on from there
    resumed, again = net(), qat(start_epoch=2)
    fit(resumed, again, keeper("again"), data=data, ckpt_path=best.best_model_path, max_epochs=3)
    assert again.report.metrics_int8 == callback.report.metrics_int8


def test_a_phase_is_kept_with_each_checkpoint() -> None:
    fit(net(), qat(start_epoch=1, freeze_observers_epoch=2, freeze_batch_norm_epoch=3), keeper(), max_epochs=4)
    phases = [tuple(read(f"ckpt/epoch={epoch}.ckpt")[KEY]["phase"].values()) for epoch in range(4)]
    assert phases == [(False, False, True), (True, True, True), (True, False, True), (True, False, False)]


def test_a_checkpoint_holds_no_more_than_is_needed() -> None:
    """Tensors that are parts of larger ones are stored with all of it: of 40 validation images, two are kept."""
    fit(net(), qat(), keeper())
    kept = read("ckpt/epoch=0.ckpt")[KEY]
    assert set(kept) == {"observers", "phase", "config", "export", "example"}
    (images,) = kept["example"]["args"]
    assert images.shape == (2, 1, 8, 8)
    assert images.untyped_storage().nbytes() == images.numel() * 4
    assert torch.equal(images, rows(96, 98).tensors[0])


@pytest.mark.torchvision
@WITHOUT_VAL_LOADER
def test_a_checkpoint_is_hardly_larger_than_the_float_one() -> None:
    """ResNet-18 with its optimizer, on images of ImageNet's size: at most 5 % larger."""
    models = pytest.importorskip("torchvision.models")

    class Images(Classifier):
        def __init__(self) -> None:
            super().__init__(models.resnet18(num_classes=10))

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                [(torch.randn(3, 224, 224), 0), (torch.randn(3, 224, 224), 1)], batch_size=2
            )

    class Save(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(f"{len(trainer.callbacks)}.ckpt")

    sizes = []
    for callbacks in ([Save()], [Save(), qat()]):
        runner = trainer(*callbacks, fast_dev_run=True, limit_val_batches=0)
        runner.fit(Images())
        assert read(f"{len(runner.callbacks)}.ckpt")["optimizer_states"][0]["state"]
        sizes.append(Path(f"{len(runner.callbacks)}.ckpt").stat().st_size)
    assert sizes[0] < sizes[1] <= 1.05 * sizes[0], sizes


# ---- LightningCLI


def test_through_lightning_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI reads checkpoints with ``weights_only=True``, whatever it is told."""
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    quiet = [f"--trainer.{name}=false" for name in ("logger", "enable_progress_bar", "enable_model_summary")]
    ours = ["--trainer.callbacks+=QuantizationAwareTraining", "--trainer.callbacks.export.formats=[torchscript]"]
    keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=ckpt",
            "--trainer.callbacks.save_last=true"]  # fmt: skip

    def run(command: str, *args: str) -> Any:
        cli = part("cli").LightningCLI(
            WithHyperparameters,
            Digits,
            args=[command, "--seed_everything=0", "--trainer.accelerator=cpu", *quiet, *ours, *keep, *args],
            save_config_callback=None,
        )
        callback = next(c for c in cli.trainer.callbacks if isinstance(c, QuantizationAwareTraining))
        return cli.trainer, callback

    run("fit", "--trainer.max_epochs=1", "--data.shuffle=false")
    assert read("ckpt/last.ckpt")["hyper_parameters"]["_instantiator"]
    runner, callback = run("fit", "--trainer.max_epochs=2", "--data.shuffle=false", "--ckpt_path=ckpt/last.ckpt")
    assert runner.current_epoch == 2
    whole = run("fit", "--trainer.max_epochs=2", "--data.shuffle=false", "--trainer.default_root_dir=other")[1]
    assert callback.report.metrics_int8 == whole.report.metrics_int8
    runner, _ = run("test", "--ckpt_path=ckpt/last.ckpt")
    assert {name: value.item() for name, value in runner.callback_metrics.items()} == pytest.approx(
        as_test(whole.report.metrics_int8), rel=1e-6
    )


# ---- runs of every shape


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_sanity_check_changes_nothing(steps: int, resumed: bool) -> None:
    path = None
    if resumed:
        fit(net(), qat(freeze_observers_epoch=1), keeper())
        path = "ckpt/epoch=0.ckpt"
    expected, other = net(), net()
    fit(expected, qat(freeze_observers_epoch=1), keeper("a"), ckpt_path=path, max_epochs=2, num_sanity_val_steps=1)
    fit(other, qat(freeze_observers_epoch=1), keeper("b"), ckpt_path=path, max_epochs=2, num_sanity_val_steps=steps)
    assert different(weights(expected), weights(other)) == []
    a, b = (read(f"{folder}/epoch=1.ckpt")[KEY]["observers"]["net"] for folder in "ab")
    assert different(a, b) == []


@pytest.mark.parametrize(
    "limits",
    [{"limit_val_batches": 0}, {"overfit_batches": 2}, {"max_steps": 7, "max_epochs": -1}, {"limit_train_batches": 1}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
def test_runs_with_limits(limits: dict[str, Any]) -> None:
    model, callback = net(), qat()
    runner = fit(model, callback, keeper(), **limits)
    report = callback.report
    assert report.coverage == 1.0
    if "limit_val_batches" in limits:
        assert report.metrics_int8 == report.metrics_float == {}
        assert report.metrics_before is None
        assert report.sqnr_db > 15
    else:
        assert report.metrics_float == merged(trainer(**limits).validate(model, Digits(shuffle=False)))
        assert report.metrics_int8.keys() == report.metrics_float.keys()
    if "max_steps" in limits:
        assert runner.global_step == 7
    assert Path("quantized/model.ts").is_file()


@WITHOUT_VAL_LOADER
def test_without_a_val_dataloader() -> None:
    model, callback = net(), qat()
    trainer(callback).fit(model, train_loader())
    assert callback.report.metrics_int8 == {}
    assert callback.report.sqnr_db > 15
    assert merged(trainer(callback).test(model, val_loader(), verbose=False)).keys() == {"test_loss", "test_acc"}


@pytest.mark.parametrize("count", [True, 3])
def test_fast_dev_run_writes_nothing(count: Any) -> None:
    model, callback = net(), qat()
    runner = trainer(callback, keeper(), fast_dev_run=count, enable_checkpointing=True)
    runner.fit(model, Digits())
    assert list(Path().iterdir()) == []
    assert callback.report is None
    assert isinstance(callback.quantized_model, nn.Module)


def test_max_steps_that_end_before_quantization(caplog: pytest.LogCaptureFixture) -> None:
    model, callback = net(), qat(start_epoch=1)
    with caplog.at_level("WARNING"):
        fit(model, callback, max_steps=4, max_epochs=-1)
    assert "quantization never began: no training batch ran with fake quantize. There is no int8 model." in caplog.text
    assert callback.report is None
