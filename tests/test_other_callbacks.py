"""Lightning's other callbacks and settings of the Trainer beside quantization."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modules import (
    ONE_FORMAT,
    TRAIN,
    Classifier,
    Digits,
    convnet,
    different,
    merged,
    ptq,
    qat,
    rows,
    trainer,
    weights,
)
from roots import part, pl
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import ConfigError, ExportConfig, QuantConfig, QuantizationAwareTraining, TensorSpec
from lightning_quant._roots import ROOTS
from lightning_quant.backends.graph import observers, sees_weights
from lightning_quant.pruning import check_pruning

BackboneFinetuning = part("callbacks").BackboneFinetuning
BatchSizeFinder = part("callbacks").BatchSizeFinder
GradientAccumulationScheduler = part("callbacks").GradientAccumulationScheduler
LearningRateFinder = part("callbacks").LearningRateFinder
ModelCheckpoint = part("callbacks").ModelCheckpoint
ModelPruning = part("callbacks").ModelPruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

KEY = "lightning_quant"
BOTH_KINDS = pytest.mark.parametrize("kind", ["auto", "learned"])


def settings(kind: Any) -> QuantConfig:
    return QuantConfig(activation=TensorSpec(fake_quantize=kind), weight=TensorSpec(fake_quantize=kind))


def seeded(made_by: Any = lambda: Classifier(convnet())) -> Any:
    torch.manual_seed(11)
    return made_by()


def fitted(*callbacks: Any, model: Any = None, data: Any = None, ckpt_path: Any = None, **kwargs: Any) -> Any:
    model = model or seeded()
    runner = trainer(*callbacks, **{"max_epochs": 2, **kwargs})
    torch.manual_seed(12)
    runner.fit(model, data or Digits(shuffle=False), ckpt_path=ckpt_path)
    return runner, model


def is_right(callback: Any, model: Any) -> None:
    """The report is about the module as it is, and int8 is near to it."""
    report = callback.report
    assert report.metrics_float == merged(trainer().validate(model, Digits(), verbose=False))
    assert report.metrics_int8["val_loss"] == pytest.approx(report.metrics_float["val_loss"], rel=0.05)


# ---- pruning


def pruning(**kwargs: Any) -> Any:
    return ModelPruning("l1_unstructured", amount=0.5, verbose=0, **kwargs)


class Masks(pl.Callback):
    """What the graphs round as weights, beside the masks, and the gradients that the optimizer is given."""

    def __init__(self) -> None:
        self.called = 0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        for graph in module._modules["_lightning_quant"].graphs:
            for name, part_ in observers(graph).items():
                if sees_weights(graph, name):
                    part_.register_forward_pre_hook(lambda _, args, module=module: self._look(module, args[0]))

    def _look(self, module: Any, weight: torch.Tensor) -> None:
        for layer in module.modules():
            mask = getattr(layer, "weight_mask", None)
            if mask is not None and mask.shape == weight.shape:
                assert not weight[mask == 0].any()
                assert (mask == 0).any()
                self.called += 1

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        for layer in module.modules():
            if hasattr(layer, "weight_mask") and layer.weight_orig.grad is not None:
                assert not layer.weight_orig.grad[layer.weight_mask == 0].any()


@pytest.mark.parametrize(
    ("backend", "order"),
    [
        ("fx", "ours first"),
        ("fx", "ours last"),
        ("eager", "ours first"),
        pytest.param("pt2e", "ours first", marks=pytest.mark.slow),
    ],
)
def test_pruned_weights_are_zero_in_training_and_in_int8(backend: Any, order: str) -> None:
    callback, masks = qat(QuantConfig(backend=backend)) if backend != "pt2e" else _pt2e(), Masks()
    callbacks = [callback, pruning()] if order == "ours first" else [pruning(), callback]
    _, model = fitted(*callbacks, masks, max_epochs=3)
    # the second and third epoch, six batches of training and three of validation, two layers
    assert masks.called >= 2 * 2 * (6 + 3)
    sparsity = {name: (p == 0).float().mean().item() for name, p in model.named_parameters() if p.dim() > 1}
    # global: half, and half of the rest twice again
    total = sum((p == 0).sum().item() for p in model.parameters() if p.dim() > 1)
    assert total >= 0.85 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert sparsity["net.6.weight"] > 0.5
    is_right(callback, model)


def _pt2e() -> Any:
    return QuantizationAwareTraining(QuantConfig(backend="pt2e"), export=ExportConfig(formats=("pt2",)))


def test_pruning_before_calibration() -> None:
    callback = ptq()
    _, model = fitted(callback, pruning())
    assert (model.net[6].weight == 0).float().mean() > 0.5
    is_right(callback, model)


@pytest.mark.parametrize("made_by", [qat, ptq])
def test_pruning_that_stays_a_mask_is_refused(made_by: Any) -> None:
    with pytest.raises(ConfigError) as error:
        fitted(made_by(), pruning(make_pruning_permanent=False))
    assert str(error.value) == (
        "ModelPruning(make_pruning_permanent=False): at the end of the training weights would still be products with a "
        "mask, and int8 is made from plain ones. Leave it at True."
    )


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_pruning_of_every_lightning_package_is_known(root: Any) -> None:
    callback = root.callbacks.ModelPruning("l1_unstructured", make_pruning_permanent=False)
    with pytest.raises(ConfigError, match="Leave it at True"):
        check_pruning(SimpleNamespace(callbacks=[object(), callback]))


# ---- finetuning


class WithBackbone(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


class Epochs(pl.Callback):
    """The state of the module and the sizes of the optimizer's groups at the end of each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.groups: list[list[int]] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.states.append(weights(module))
        own = {id(p) for p in (*module.backbone.parameters(), *module.head.parameters())}
        groups = trainer.optimizers[0].param_groups
        self.groups.append([sum(id(p) in own for p in group["params"]) for group in groups])


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@BOTH_KINDS
@pytest.mark.parametrize("order", ["ours first", "ours last"])
def test_a_backbone_that_thaws(kind: str, order: str) -> None:
    callback, ours, theirs = qat(settings(kind)), Epochs(), Epochs()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    callbacks = [callback, finetuning] if order == "ours first" else [finetuning, callback]
    _, model = fitted(*callbacks, ours, model=seeded(WithBackbone))
    fitted(BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False), theirs, model=seeded(WithBackbone))
    assert ours.groups == theirs.groups == [[4], [4, 2]]  # batch norms are not frozen
    start = weights(seeded(WithBackbone))
    trained = {name for name, _ in model.named_parameters()}
    for states in (ours.states, theirs.states):
        moved = {"head.weight", "head.bias", "backbone.1.weight", "backbone.1.bias"}
        assert set(different(start, states[0])) & trained == moved
        assert "backbone.0.weight" in different(states[0], states[1])
    is_right(callback, model)


class StandsStill(BackboneFinetuning):
    """Freezes batch norms as well; Lightning's own keeps them in training, whatever ``train_bn`` is."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone, train_bn=False)


def test_a_backbone_whose_batch_norms_stand_still() -> None:
    start = weights(seeded(WithBackbone))
    moved = []
    for callbacks in ([qat()], []):
        epochs = Epochs()
        finetuning = StandsStill(unfreeze_backbone_at_epoch=1, train_bn=False, verbose=False)
        _, model = fitted(*callbacks, finetuning, epochs, model=seeded(WithBackbone))
        moved.append([different(start, epochs.states[0]), different(*epochs.states)])
        if callbacks:
            is_right(callbacks[0], model)
    assert moved[0] == moved[1]
    assert moved[0][0] == ["head.bias", "head.weight"]


# ---- finders


class Sized(Digits):
    """A datamodule whose batch size can be searched for."""

    def __init__(self) -> None:
        super().__init__(shuffle=False)
        self.batch_size = 4

    def train_dataloader(self) -> DataLoader:
        return DataLoader(rows(0, TRAIN, normalised=False), batch_size=self.batch_size)


def rate_finder() -> Any:
    return LearningRateFinder(num_training_steps=5, update_attr=False)


def size_finder() -> Any:
    return BatchSizeFinder(steps_per_trial=2, init_val=8, max_trials=1)


class Start(pl.Callback):
    """What the training begins with, after the search."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_start(self, trainer: Any, module: Any) -> None:
        checkpoint: dict[str, Any] = {}
        module.on_save_checkpoint(checkpoint)
        self.state = checkpoint[KEY]
        self.weights = weights(module)
        self.phase = self.callback.phase


FAST = (
    (rate_finder, "learned", "a checkpoint"),
    (rate_finder, "learned", "a run"),
    (size_finder, "auto", "a checkpoint"),
)


@pytest.mark.filterwarnings("ignore:.*not enough points")
@pytest.mark.parametrize(
    ("finder", "kind", "before"),
    [
        pytest.param(finder, kind, before, marks=[] if (finder, kind, before) in FAST else [pytest.mark.slow])
        for finder in (rate_finder, size_finder)
        for kind in ("auto", "learned")
        for before in ("nothing", "a checkpoint", "a run")
    ],
)
def test_a_search_leaves_no_trace(finder: Any, kind: str, before: str) -> None:
    """Ranges, scales, weights and phase are those of a training without it."""
    data, starts, ends = Sized, [], []
    keep = ModelCheckpoint("ckpt", filename="{epoch}")
    fitted(qat(settings(kind)), keep, data=data(), max_epochs=1, enable_checkpointing=True)
    for search in (False, True):
        callback = qat(settings(kind))
        model = seeded()
        if before == "a run":
            fitted(callback, model=model, data=data(), max_epochs=1)
        start = Start(callback)
        found = data()
        found.batch_size = 8
        path = "ckpt/epoch=0.ckpt" if before == "a checkpoint" else None
        others = [finder()] if search else []
        fitted(callback, *others, start, model=model, data=found, ckpt_path=path, max_epochs=2)
        assert found.batch_size == 8
        starts.append(start)
        ends.append((weights(model), callback.report.metrics_int8))
    plain, searched = starts
    assert different(plain.weights, searched.weights) == []
    assert different(plain.state["observers"]["net"], searched.state["observers"]["net"]) == []
    assert plain.phase == searched.phase
    assert plain.state["phase"] == searched.state["phase"]
    if before != "a checkpoint":  # where Lightning's finders leave a resumed loop elsewhere, in float as well
        assert different(ends[0][0], ends[1][0]) == []
        assert ends[0][1] == ends[1][1]


# ---- the optimizer's steps


@BOTH_KINDS
def test_accumulated_and_clipped_gradients(kind: str) -> None:
    """Ranges follow every batch, and scales are trained with the weights."""

    class Steps(pl.Callback):
        count = 0
        largest = 0.0

        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if grads:
                self.largest = max(self.largest, torch.stack([g.norm() for g in grads]).norm().item())

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.count = trainer.global_step

    for accumulating in (GradientAccumulationScheduler({0: 3, 1: 2}), None):
        callback, steps = qat(settings(kind)), Steps()
        more = {} if accumulating else {"accumulate_grad_batches": 2}
        callbacks = [callback, steps, *([accumulating] if accumulating else [])]
        _, model = fitted(*callbacks, gradient_clip_val=0.1, **more)
        assert steps.count == (2 + 3 if accumulating else 6)
        is_right(callback, model)


def test_synchronised_batch_norms_of_one_process() -> None:
    callback = qat()
    _, model = fitted(callback, sync_batchnorm=True)
    assert type(model.net[1]) is nn.BatchNorm2d
    is_right(callback, model)
    assert callback.export == ONE_FORMAT
