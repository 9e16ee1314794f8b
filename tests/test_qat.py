"""QuantizationAwareTraining: training through fake quantize, on a module whose layers and checkpoints stay float."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import (
    Augmented,
    BuiltInConfigureModel,
    BuiltInSetup,
    Classifier,
    ConvClassifier,
    Digits,
    FrozenNorm,
    Losses,
    PrebuiltOptimizer,
    StepsOnly,
    WithHyperparameters,
    as_test,
    convnet,
    different,
    merged,
    qat,
    rows,
    surface,
    trainer,
    val_loader,
    weights,
)
from roots import part, pl
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import ConfigError, ExportConfig, ExportError, QuantConfig, QuantizationAwareTraining, load

EMAWeightAveraging = part("callbacks").EMAWeightAveraging
ModelCheckpoint = part("callbacks").ModelCheckpoint
StochasticWeightAveraging = part("callbacks").StochasticWeightAveraging
Tuner = part("tuner").Tuner

# a run that resumes into another folder
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

KEY = "lightning_quant"
RANGES = ("scale", "zero_point", "min_val", "max_val")


def ranges(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    """The ranges that a checkpoint of a module in training holds, those of activations and of weights."""
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    return ranges_of(checkpoint)


def ranges_of(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{target}/{name}": value
        for target, values in checkpoint[KEY]["observers"].items()
        for name, value in values.items()
        if name.endswith(RANGES)
    }


def activations(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in values.items() if "weight_fake_quant" not in name}


class Probe(pl.Callback):
    """Notes what ``look`` sees of the module at each of the hooks that are named."""

    def __init__(self, look: Callable[[pl.LightningModule], Any], *hooks: str) -> None:
        self.seen: dict[str, list[Any]] = {hook: [] for hook in hooks}
        for hook in hooks:
            setattr(self, hook, lambda _, module, *__, hook=hook: self.seen[hook].append(look(module)))


def seeded(net: Callable[[], pl.LightningModule] = lambda: Classifier(convnet())) -> pl.LightningModule:
    torch.manual_seed(11)
    return net()


def fitted(callback: Any = None, *others: pl.Callback, model: Any = None, data: Any = None, **kwargs: Any) -> Any:
    """``(module, callback)`` after a fit that always sees the same."""
    model = model or seeded()
    torch.manual_seed(12)
    trainer(*([callback] if callback else []), *others, **kwargs).fit(model, data or Digits())
    return model, callback


def keeper(folder: str = "ckpt", **kwargs: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, **kwargs)


@pytest.mark.parametrize(
    ("made_by", "targets"),
    [
        (lambda: Classifier(convnet()), ["net"]),
        (ConvClassifier, ["forward"]),
        (StepsOnly, ["encoder", "head"]),
        (BuiltInSetup, ["net"]),
        (BuiltInConfigureModel, ["net"]),
        (WithHyperparameters, ["net"]),
    ],
    ids=["child", "own layers", "steps only", "setup", "configure_model", "hyperparameters"],
)
def test_a_run_ends_with_report_model_and_files(made_by: Any, targets: list[str]) -> None:
    model, data, callback = made_by(), Digits(), qat()
    probe = Probe(weights, "on_fit_start")
    runner = trainer(callback, probe)
    runner.fit(model, data)
    report = callback.report
    assert report.targets == targets
    assert report.method == "qat"
    assert report.metrics_float == merged(trainer().validate(model, data))
    assert report.metrics_int8 == merged(trainer().validate(callback.quantized_model, data))
    assert different(weights(model), probe.seen["on_fit_start"][0])
    for files in report.artifacts.values():
        assert all(Path(path).is_file() for path in (files.values() if isinstance(files, dict) else [files]))
    assert merged(runner.test(model, data, verbose=False)) == as_test(report.metrics_int8)


def test_all_formats_are_written_and_give_their_metrics() -> None:
    model, callback = fitted(QuantizationAwareTraining(), max_epochs=2)
    report = callback.report
    files = {"model.ts", "model.onnx", "model.xml", "model.bin"}
    assert {f.name for f in Path("quantized").iterdir()} == {"report.html", "report.json", "report.md", *files}
    assert report.formats.keys() == {"torchscript", "onnx", "openvino"}
    for format_name, path in report.artifacts.items():
        put_back = copy.deepcopy(model)
        put_back.net = load(path)
        assert merged(trainer().validate(put_back, Digits())) == report.formats[format_name].metrics
    assert report.formats["torchscript"].metrics == report.metrics_int8


def test_training_and_validation_go_through_fake_quantize() -> None:
    ours, plain = Losses(), Losses()
    _, callback = fitted(qat(), ours)
    fitted(None, plain)
    # after the 2 values of the sanity check, which is float
    assert ours.values[2] != plain.values[2]
    # rounding moves a logit by about 1/255 of its range
    assert ours.values[2] == pytest.approx(plain.values[2], rel=0.02)
    shown, report = ours.values[-1], callback.report  # val_loss is the last name
    assert shown != report.metrics_float["val_loss"]
    # kernels round the accumulator, fake quantize rounds a float
    assert shown == pytest.approx(report.metrics_int8["val_loss"], rel=0.01)


def test_gradients_reach_every_weight() -> None:
    model = seeded()
    names = [name for name, _ in model.named_parameters()]
    probe = Probe(
        lambda module: {name: None if p.grad is None else p.grad.abs().sum().item() for name, p in
                        module.named_parameters()},
        "on_after_backward",
    )  # fmt: skip
    fitted(qat(), probe, model=model)
    for gradients in probe.seen["on_after_backward"]:
        assert list(gradients) == names
        # the batch norm takes out what a bias before it adds: its gradient is 0, not missing
        assert [name for name, value in gradients.items() if not value] in ([], ["net.0.bias"])


def test_an_optimizer_that_was_built_before_setup_trains_the_module() -> None:
    prebuilt, _ = fitted(qat(), model=seeded(PrebuiltOptimizer), max_epochs=2)
    usual = seeded(PrebuiltOptimizer)
    usual.configure_optimizers = lambda: torch.optim.SGD(usual.parameters(), lr=0.05)
    fitted(qat(), model=usual, max_epochs=2)
    assert len(different(weights(prebuilt), weights(seeded(PrebuiltOptimizer)))) >= 7
    assert different(weights(prebuilt), weights(usual)) == []


class _RandomData(pl.LightningDataModule):
    """Shuffled, augmented with noise, so that any draw that the callback makes would show."""

    def __init__(self) -> None:
        super().__init__()
        self.train_set = Augmented(rows(0, 96))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Augmented(rows(96, 136)), batch_size=16)


def _random_run(callback: Any, epochs: int) -> dict[str, Any]:
    data, losses = _RandomData(), Losses()
    model = seeded(lambda: Classifier(convnet(dropout=0.3)))
    rng = Probe(lambda _: torch.get_rng_state(), "on_train_epoch_end", "on_fit_end")
    fitted(callback, losses, rng, model=model, data=data, max_epochs=epochs)
    # a Trainer puts its callbacks in order: ours is before the probe
    return {"weights": weights(model), "losses": losses.values, "rng": rng.seen, "drawn": data.train_set.drawn}


def test_before_start_epoch_training_is_float_bit_for_bit(caplog: pytest.LogCaptureFixture) -> None:
    callback = qat(start_epoch=2)
    with caplog.at_level(logging.WARNING):
        ours, plain = _random_run(callback, 2), _random_run(None, 2)
    assert different(ours["weights"], plain["weights"]) == []
    assert ours["losses"] == plain["losses"]
    # one batch is looked at before training, for its shapes
    assert ours["drawn"][-len(plain["drawn"]) :] == plain["drawn"]
    for hook, states in plain["rng"].items():
        assert all(torch.equal(a, b) for a, b in zip(ours["rng"][hook], states, strict=True)), hook
    assert "start_epoch=2 and max_epochs=2: training ends before quantization begins" in caplog.text
    assert "There is no int8 model" in caplog.text
    assert callback.report is None
    assert callback.quantized_model is None


def test_start_epoch_is_the_first_that_differs() -> None:
    ours, plain = _random_run(qat(start_epoch=1), 2)["losses"], _random_run(None, 2)["losses"]
    first = next(i for i, (a, b) in enumerate(zip(ours, plain, strict=True)) if a != b)
    # the sanity check's 3 values, 6 losses, 3 values of validation: the next loss is the first of epoch 1
    sanity = 2
    assert first == sanity + 6 + 3


def test_observers_do_not_move_in_validation() -> None:
    hooks = ("on_fit_start", "on_sanity_check_end", "on_train_start", "on_validation_start", "on_validation_end",
             "on_train_end")  # fmt: skip
    probe = Probe(ranges, *hooks)
    fitted(qat(), probe, max_epochs=2, val_check_interval=0.5)
    seen = probe.seen
    assert different(seen["on_fit_start"][0], seen["on_sanity_check_end"][0]) == []
    assert different(seen["on_fit_start"][0], seen["on_train_start"][0]) == []
    starts, ends = seen["on_validation_start"], seen["on_validation_end"]
    assert len(starts) == len(ends) == 5  # the sanity check, and two in each epoch
    for start, end in zip(starts, ends, strict=True):
        assert different(start, end) == []
    for end, start in zip(ends, starts[1:], strict=False):  # training in between moves them
        assert any(name.endswith("max_val") for name in different(activations(end), activations(start)))


def test_batch_norms_do_not_move_in_validation() -> None:
    probe = Probe(weights, "on_validation_start", "on_validation_end")
    fitted(qat(), probe, val_check_interval=0.5)
    for start, end in zip(*probe.seen.values(), strict=True):
        assert different(start, end) == []


def test_freeze_observers_epoch() -> None:
    probe = Probe(ranges, "on_train_epoch_end")
    fitted(qat(freeze_observers_epoch=1), probe, max_epochs=3)
    first, second, third = probe.seen["on_train_epoch_end"]
    assert different(activations(first), activations(second)) == []
    assert different(activations(first), activations(third)) == []
    # a weight's range is always that of the weight as it is
    moved = {name for name in different(second, third) if "max_val" in name}
    assert moved == {name for name in third if "weight_fake_quant" in name and "max_val" in name}


STATISTICS = {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"}


@pytest.mark.parametrize("frozen", [1, 2, None])
def test_freeze_batch_norm_epoch(frozen: int | None) -> None:
    probe = Probe(weights, "on_train_epoch_end")
    model, _ = fitted(qat(freeze_batch_norm_epoch=frozen), probe, max_epochs=3, val_check_interval=0.5)
    epochs = probe.seen["on_train_epoch_end"]
    for epoch in (1, 2):
        moved = set(different(epochs[epoch - 1], epochs[epoch]))
        assert moved & STATISTICS == (STATISTICS if frozen is None or epoch < frozen else set())
        assert {"net.0.weight", "net.1.weight", "net.6.weight"} <= moved
    assert model.net[1].training == model.training  # nothing stays frozen after the run


def test_a_second_fit_begins_its_schedule_again() -> None:
    probe = Probe(lambda module: (weights(module), ranges(module)), "on_train_start", "on_train_epoch_end")
    callback = qat(freeze_observers_epoch=1, freeze_batch_norm_epoch=1)
    model, _ = fitted(callback, probe, max_epochs=2)
    fitted(callback, probe, model=model, max_epochs=2)
    start, (first, second) = probe.seen["on_train_start"][1], probe.seen["on_train_epoch_end"][2:]
    assert set(different(start[0], first[0])) >= STATISTICS
    assert different(activations(start[1]), activations(first[1]))
    assert not STATISTICS & set(different(first[0], second[0]))
    assert different(activations(first[1]), activations(second[1])) == []


def test_frozen_observers_do_not_thaw_after_validation() -> None:
    probe = Probe(ranges, "on_validation_end", "on_train_epoch_end")
    fitted(qat(freeze_observers_epoch=1), probe, max_epochs=2, val_check_interval=0.5)
    inside, end = probe.seen["on_validation_end"][3], probe.seen["on_train_epoch_end"][1]
    assert different(activations(inside), activations(end)) == []


def test_state_dict_keeps_the_float_keys() -> None:
    model = seeded()
    keys = list(model.state_dict())
    parameters = [name for name, _ in model.named_parameters()]
    probe = Probe(
        lambda module: (list(module.state_dict()), [name for name, _ in module.named_parameters()]),
        "on_fit_start", "on_train_batch_end", "on_validation_end", "on_train_end",
    )  # fmt: skip
    fitted(qat(), probe, keeper(), model=model, enable_checkpointing=True)
    assert all(seen == (keys, parameters) for hook in probe.seen.values() for seen in hook)
    assert list(torch.load("ckpt/epoch=0.ckpt", weights_only=True)["state_dict"]) == keys


@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "save_weights_only"])
def test_a_checkpoint_loads_without_the_callback(weights_only: bool) -> None:
    model, _ = fitted(
        qat(), keeper(save_weights_only=weights_only), enable_checkpointing=True, model=seeded(WithHyperparameters)
    )
    path = "ckpt/epoch=0.ckpt"
    assert KEY in torch.load(path, weights_only=True)
    plain = WithHyperparameters.load_from_checkpoint(path, weights_only=True)
    assert different(weights(plain), weights(model)) == []
    runner = trainer(keeper(), enable_checkpointing=True)
    tested = merged(runner.test(WithHyperparameters(), Digits(), ckpt_path=path, verbose=False, weights_only=True))
    expected = merged(trainer().validate(model, Digits()))
    assert tested == as_test(expected)
    if not weights_only:
        again = trainer(keeper("again"), enable_checkpointing=True, max_epochs=2)
        fresh = WithHyperparameters()
        again.fit(fresh, Digits(), ckpt_path=path, weights_only=True)
        assert again.current_epoch == 2
        assert different(weights(fresh), weights(model))


@pytest.mark.parametrize(
    "schedule",
    [{}, {"start_epoch": 1}, {"start_epoch": 2}, {"freeze_observers_epoch": 1, "freeze_batch_norm_epoch": 1}],
    ids=["from the start", "resumed where it begins", "resumed before it begins", "frozen"],
)
def test_resuming_equals_the_uninterrupted_run(schedule: dict[str, int]) -> None:
    data = Digits(shuffle=False)  # Lightning does not store the random state in which a shuffle goes on
    whole, expected = fitted(qat(**schedule), keeper(), data=data, enable_checkpointing=True, max_epochs=3)
    checkpoint = torch.load("ckpt/epoch=2.ckpt", weights_only=True)
    resumed, callback = Classifier(convnet()), qat(**schedule)
    runner = trainer(callback, keeper("again"), enable_checkpointing=True, max_epochs=3)
    runner.fit(resumed, data, ckpt_path="ckpt/epoch=0.ckpt", weights_only=True)
    again = torch.load("again/epoch=2.ckpt", weights_only=True)
    assert again["epoch"] == 2
    assert different(weights(whole), weights(resumed)) == []
    assert different(ranges_of(checkpoint), ranges_of(again)) == []
    assert callback.report.metrics_int8 == expected.report.metrics_int8
    assert callback.report.metrics_float == expected.report.metrics_float


@pytest.mark.parametrize("fresh", [False, True], ids=["same callback", "fresh callback"])
def test_test_of_a_checkpoint_converts_its_weights_and_observers(fresh: bool) -> None:
    """The best one is the first, by a loss that falls: the int8 model of a run that ended there."""
    data = Digits(shuffle=False)
    _, ended = fitted(qat(), data=data)
    best = ModelCheckpoint("ckpt", filename="{epoch}", monitor="val_loss", mode="max")
    model, callback = seeded(), qat()
    runner = trainer(callback, best, enable_checkpointing=True, max_epochs=3)
    runner.fit(model, data)
    assert best.best_model_path.endswith("epoch=0.ckpt")
    assert callback.report.metrics_int8 != ended.report.metrics_int8
    path = "best"
    if fresh:
        model, path = Classifier(convnet()), best.best_model_path
        runner = trainer(qat(), ModelCheckpoint("ckpt", monitor="val_loss", mode="max"), enable_checkpointing=True)
    tested = merged(runner.test(model, data, ckpt_path=path, verbose=False, weights_only=True))
    assert tested == as_test(ended.report.metrics_int8)


def _float_checkpoint() -> str:
    runner = trainer()
    runner.fit(seeded(), Digits())
    runner.save_checkpoint("float.ckpt")
    return "float.ckpt"


def test_a_float_checkpoint_resumes_with_fresh_observers() -> None:
    path = _float_checkpoint()
    model, callback = Classifier(convnet()), qat()
    probe = Probe(weights, "on_train_start")
    runner = trainer(callback, probe, max_epochs=2)
    runner.fit(model, Digits(), ckpt_path=path, weights_only=True)
    stored = torch.load(path, weights_only=True)["state_dict"]
    assert different(stored, probe.seen["on_train_start"][0]) == []
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))
    assert callback.report.metrics_int8["val_loss"] == pytest.approx(callback.report.metrics_float["val_loss"], rel=0.1)


def test_test_of_a_float_checkpoint_is_refused() -> None:
    path = _float_checkpoint()
    with pytest.raises(
        ConfigError, match=r"this checkpoint has no observers: it was saved without Quant.*Post"
    ) as error:
        trainer(qat()).test(Classifier(convnet()), Digits(), ckpt_path=path, weights_only=True)
    assert "give PostTrainingQuantization" in str(error.value)


def test_a_checkpoint_of_other_targets_is_refused() -> None:
    fitted(qat(), keeper(), enable_checkpointing=True)
    with pytest.raises(ConfigError, match="observers for another graph"):
        trainer(qat(QuantConfig(skip=("net.6",))), keeper("again"), enable_checkpointing=True, max_epochs=2).fit(
            Classifier(convnet()), Digits(), ckpt_path="ckpt/epoch=0.ckpt", weights_only=True
        )


@pytest.mark.parametrize(
    ("limits", "val_sets"), [({}, 1), ({"limit_val_batches": 2}, 1), ({}, 2)], ids=["one", "limited", "two loaders"]
)
def test_metrics_before_and_after_are_those_of_trainer_validate(limits: dict[str, Any], val_sets: int) -> None:
    model, data, callback = Classifier(convnet()), Digits(val_sets=val_sets), qat()
    before = merged(trainer(**limits).validate(model, data))
    trainer(callback, **limits).fit(model, data)
    assert callback.report.metrics_before == before
    assert callback.report.metrics_float == merged(trainer(**limits).validate(model, data))
    assert callback.report.metrics_int8.keys() == before.keys()


def test_a_deepcopy_during_training_is_independent() -> None:
    copies: list[Any] = []

    def look(module: pl.LightningModule) -> None:
        before, seen = ranges(module), weights(module)
        twin = copy.deepcopy(module)
        assert not {id(p) for p in module.parameters()} & {id(p) for p in twin.parameters()}
        images = rows(0, 8).tensors[0]
        twin(100 * images).sum().backward()  # moves the copy's observers, statistics and gradients
        assert different(ranges(twin), before)
        assert different(weights(twin), seen)
        assert different(ranges(module), before) == []
        assert different(weights(module), seen) == []
        copies.append(twin)

    probe = Probe(look, "on_train_batch_end")
    model, _ = fitted(qat(), probe)
    undisturbed, _ = fitted(qat())
    assert len(copies) == 6
    assert different(weights(model), weights(undisturbed)) == []


def test_a_deepcopy_runs_its_own_weights() -> None:
    outputs: list[torch.Tensor] = []

    def look(module: pl.LightningModule) -> None:
        twin = copy.deepcopy(module).eval()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
            outputs.append(twin(rows(0, 8).tensors[0]))

    fitted(qat(), Probe(look, "on_train_batch_end"))
    assert all(torch.count_nonzero(output) == 0 for output in outputs)


def test_the_module_is_not_edited() -> None:
    plain, _ = fitted()
    model, _ = fitted(qat())
    assert surface(model) == surface(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    for module in (model, plain):  # and a float training goes on from here
        module.load_state_dict(plain.state_dict())
        fitted(model=module)
    assert different(weights(model), weights(plain)) == []


def test_fit_again_goes_on() -> None:
    model, callback = fitted(qat(), data=Digits(shuffle=False))
    first = callback.report
    state = weights(model)
    probe = Probe(weights, "on_train_start")
    runner = trainer(callback, probe, max_epochs=1)
    runner.fit(model, Digits())
    assert different(probe.seen["on_train_start"][0], state) == []
    assert callback.report.metrics_before == first.metrics_float
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))


def test_one_callback_trains_another_module() -> None:
    _, callback = fitted(qat())
    other, _ = fitted(callback, model=seeded(ConvClassifier))
    assert callback.report.targets == ["forward"]
    assert callback.report.metrics_float == merged(trainer().validate(other, Digits()))


class _Fails(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 3:
            raise ValueError("out of paper")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_an_exception_in_training_leaves_the_module_float(start_epoch: int) -> None:
    model, plain, callback = _Fails(convnet()), _Fails(convnet()), qat(start_epoch=start_epoch)
    for module, callbacks in ((model, [callback]), (plain, [])):
        with pytest.raises(ValueError, match="out of paper"):
            trainer(*callbacks, max_epochs=2).fit(module, Digits())
    assert surface(model) == surface(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert callback.report is None
    assert not Path("quantized/model.ts").exists()


def test_a_checkpoint_on_exception_has_the_observers() -> None:
    keep = ModelCheckpoint("ckpt", save_on_exception=True)
    with pytest.raises(ValueError, match="out of paper"):
        trainer(qat(), keep, enable_checkpointing=True).fit(_Fails(convnet()), Digits())
    (path,) = Path("ckpt").glob("*.ckpt")
    assert ranges_of(torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    ("format_name", "breaks"), [("torchscript", "torch.jit.freeze"), ("onnx", "torch.onnx.export")]
)
def test_a_crash_in_an_exporter_keeps_the_trained_weights(
    format_name: str, breaks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(breaks, crash)
    expected, _ = fitted()
    callback = QuantizationAwareTraining(export=ExportConfig(formats=("torchscript", "onnx")))
    model = seeded()
    torch.manual_seed(12)
    with pytest.raises(ExportError, match="no such operator"):
        trainer(callback).fit(model, Digits())
    monkeypatch.undo()
    assert surface(model) == surface(expected)
    undisturbed, other = fitted(qat())
    assert different(weights(model), weights(undisturbed)) == []
    assert callback.report is None
    assert merged(trainer().validate(callback.quantized_model, Digits())) == other.report.metrics_int8
    assert not Path(f"quantized/model.{format_name}").exists()


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode at the start of training")
@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")  # which is what this is about
def test_a_batch_norm_that_the_module_keeps_in_eval_mode_stays_so() -> None:
    model = seeded(FrozenNorm).train()  # Lightning trains a module in the modes that it finds
    before = weights(model)
    fitted(qat(), model=model, max_epochs=2)
    moved = set(different(before, weights(model)))
    assert not moved & STATISTICS
    assert {"net.0.weight", "net.1.weight", "net.6.weight"} <= moved
    assert not model.net[1].training


def test_frozen_parameters_stay() -> None:
    model = seeded()
    model.net[0].requires_grad_(False)
    before = weights(model)
    fitted(qat(), model=model)
    assert {"net.0.weight", "net.0.bias"}.isdisjoint(different(before, weights(model)))
    assert not model.net[0].weight.requires_grad


def test_skipped_layers_train_in_float() -> None:
    model, callback = fitted(qat(QuantConfig(skip=("net.0",))))
    assert callback.report.float_layers == {"net.0": "left float by 'skip'"}
    assert 0 < callback.report.coverage < 1
    assert any(type(part) is nn.Conv2d for part in callback.quantized_model.modules())
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))


def test_a_checkpoint_saved_after_fit_has_the_observers() -> None:
    model, callback, data = seeded(), qat(), Digits()
    runner = trainer(callback)
    runner.fit(model, data)
    runner.save_checkpoint("a.ckpt")
    assert ranges_of(torch.load("a.ckpt", weights_only=True))
    tested = merged(trainer(qat()).test(Classifier(convnet()), data, ckpt_path="a.ckpt", verbose=False))
    assert tested == as_test(callback.report.metrics_int8)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: EMAWeightAveraging(decay=0.9), id="EMA"),
        pytest.param(lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1), id="SWA", marks=pytest.mark.slow),
    ],
)
def test_weight_averaging(other: Any) -> None:
    """The averaged weights are those that are quantized."""
    model, callback = fitted(qat(), other(), max_epochs=2)
    last, _ = fitted(qat(), max_epochs=2)
    assert different(weights(model), weights(last))
    report = callback.report
    assert report.metrics_float == merged(trainer().validate(model, Digits()))
    assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.05)


@pytest.mark.slow
def test_a_learning_rate_search_before_fit_leaves_no_trace() -> None:
    model, callback = seeded(), qat()
    runner = trainer(callback)
    before = weights(model)
    Tuner(runner).lr_find(model, Digits(), num_training=8, update_attr=False)
    assert different(before, weights(model)) == []
    assert callback.report is None
    runner.fit(model, Digits())
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))


def test_bare_loaders() -> None:
    model, callback = seeded(), qat()
    trainer(callback).fit(model, DataLoader(rows(0, 96), batch_size=16), val_loader())
    assert callback.report.metrics_float == merged(trainer().validate(model, val_loader()))


def test_fast_dev_run_writes_nothing() -> None:
    callback = qat()
    trainer(callback, fast_dev_run=True).fit(seeded(), Digits())
    assert list(Path().iterdir()) == []
    assert callback.quantized_model is not None
    assert callback.report is None


def test_gradients_can_be_accumulated_and_clipped() -> None:
    model, callback = fitted(qat(), accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))
