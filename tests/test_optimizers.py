"""Manual optimization, several optimizers, parts that are not trained: what each optimizer has, and what is int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from modules import Classifier, Digits, convnet, different, merged, mlp, qat, trainer, weights
from roots import pl
from torch import nn

from lightning_quant import QuantConfig, TensorSpec
from lightning_quant.backends.graph import observers

BOTH_KINDS = pytest.mark.parametrize("kind", ["auto", "learned"])


def settings(kind: Any, **kwargs: Any) -> QuantConfig:
    spec = TensorSpec(fake_quantize=kind)
    return QuantConfig(activation=spec, weight=spec, **kwargs)


class Gan(pl.LightningModule):
    """A generator of digits and its discriminator, each with an optimizer, trained in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.generator(z)

    def loss(self, images: torch.Tensor, real: bool) -> torch.Tensor:
        logits = self.discriminator(images)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))

    def noise(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images = batch[0].flatten(1)
        generator, discriminator = self.optimizers()
        noise = self.noise(len(images))
        for optimizer, losses in (
            (generator, lambda: self.loss(self(noise), True)),
            (discriminator, lambda: self.loss(images, True) + self.loss(self(noise).detach(), False)),
        ):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(losses())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(self(self.noise(len(batch[0]))), True))

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 1e-3) for part in (self.generator, self.discriminator)]


class Watch(pl.Callback):
    """The sizes of parameter groups in training, the gradients' owners, and what fake quantize is in."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.targets: set[str] = set()
        self.begin: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.groups = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        self.targets = set(module._modules["_lightning_quant"].names)
        self.begin = weights(module)


def optimizers_own(runner: Any) -> list[int]:
    return [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in runner.optimizers]


@BOTH_KINDS
@pytest.mark.parametrize("named", [{"targets": ("generator",)}, {"skip": ("discriminator",)}], ids=["targets", "skip"])
def test_a_generator_alone(kind: str, named: dict[str, Any]) -> None:
    torch.manual_seed(11)
    model, callback, watch = Gan(), qat(settings(kind, **named)), Watch()
    runner = trainer(callback, watch, max_epochs=2)
    runner.fit(model, Digits())
    assert watch.targets == {"generator"}
    assert callback.report.targets == ["generator"]
    assert callback.report.float_layers.keys() == {"discriminator.0", "discriminator.2"}
    # the generator's has the scales of two weights, of the input, and of what the first layer gives
    assert watch.groups == [[4 + (4 if kind == "learned" else 0)], [4]]
    assert optimizers_own(runner) == [4, 4]
    # both were trained, each by its own
    assert len(different(watch.begin, weights(model))) == 8
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits(), verbose=False))
    assert callback.report.metrics_int8["val_loss"] == pytest.approx(
        callback.report.metrics_float["val_loss"], rel=0.02
    )


def test_a_discriminator_that_is_not_named_in_float_is_quantized_too() -> None:
    torch.manual_seed(11)
    callback, watch = qat(), Watch()
    trainer(callback, watch).fit(Gan(), Digits())
    assert watch.targets == {"generator", "discriminator"}
    assert callback.report.coverage == 1


def test_the_discriminator_runs_in_float() -> None:
    class Judged(pl.Callback):
        steps = 0

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            x = torch.rand(5, 64)
            first, _, last = module.discriminator
            with torch.no_grad():
                expected = F.linear(F.relu(F.linear(x, first.weight, first.bias)), last.weight, last.bias)
                assert torch.equal(module.discriminator(x), expected)
                z = torch.rand(5, 8)
                first, _, last = module.generator
                rounded = F.linear(F.relu(F.linear(z, first.weight, first.bias)), last.weight, last.bias)
                assert not torch.equal(module.generator(z), rounded)
            self.steps += 1

    judged = Judged()
    trainer(qat(QuantConfig(targets=("generator",))), judged).fit(Gan(), Digits())
    assert judged.steps == 12


class Distilled(Classifier):
    """Learns from a frozen teacher, which stays in eval mode."""

    def __init__(self) -> None:
        super().__init__(convnet())
        self.teacher = nn.Sequential(mlp(), nn.Dropout(0.5)).requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Distilled:
        super().train(mode)
        self.teacher.eval()
        return self

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        logits = self(images)
        return F.cross_entropy(logits, labels) + F.mse_loss(logits, self.teacher(images))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Compared(Distilled):
    """Its validation calls the teacher as well."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        self.log("gap", F.mse_loss(self(batch[0]), self.teacher(batch[0])))


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start of training")
@pytest.mark.parametrize("made_by", [Distilled, Compared])
@pytest.mark.parametrize("named", [{}, {"targets": ("net",)}], ids=["found", "named"])
def test_a_frozen_teacher_is_left_alone(made_by: Any, named: dict[str, Any]) -> None:
    torch.manual_seed(11)
    model, callback, watch = made_by(), qat(QuantConfig(**named)), Watch()
    before = weights(model.teacher)
    x = torch.rand(4, 1, 8, 8)
    answers = model.teacher(x)
    runner = trainer(callback, watch, max_epochs=2)
    runner.fit(model, Digits())
    assert watch.targets == {"net"}
    assert callback.report.targets == ["net"]
    assert callback.report.float_layers.keys() == {"teacher.0.1", "teacher.0.3"}
    assert different(before, weights(model.teacher)) == []
    assert torch.equal(model.teacher(x), answers)
    assert torch.equal(callback.quantized_model.teacher(x), answers)
    assert not any(part.training for part in model.teacher.modules())
    assert not any(p.requires_grad for p in model.teacher.parameters())
    own = [p for p in model.parameters()]
    assert [p for group in runner.optimizers[0].param_groups for p in group["params"]] == own


class Manual(Classifier):
    """One optimizer, stepped by hand every other batch."""

    def __init__(self) -> None:
        super().__init__(convnet())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            optimizer.step()
            optimizer.zero_grad()


@BOTH_KINDS
def test_steps_by_hand(kind: str) -> None:
    class Ranges(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[list[float]] = []

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            (graph,) = module._modules["_lightning_quant"].graphs
            found: Any = observers(graph).values()
            self.seen.append([m.activation_post_process.max_val.max().item() for m in found])

    torch.manual_seed(11)
    model, callback, ranges = Manual(), qat(settings(kind)), Ranges()
    runner = trainer(callback, ranges, max_epochs=2)
    runner.fit(model, Digits())
    assert runner.global_step == 6
    assert ranges.seen[0] != ranges.seen[1] or kind == "learned"  # ranges follow each batch, not each step
    assert optimizers_own(runner) == [6]
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits(), verbose=False))
    assert callback.report.metrics_int8["val_loss"] == pytest.approx(
        callback.report.metrics_float["val_loss"], rel=0.05
    )
