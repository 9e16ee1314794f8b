"""The float module as a teacher: its terms of the loss, where they are added, and what checkpoints hold of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modules import Classifier, Digits, convnet, different, trainer, weights
from roots import part, pl
from torch import nn
from torch.nn import functional as F

from lightning_quant import (
    ConfigError,
    Distillation,
    ExportConfig,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
)
from lightning_quant.distillation import METRIC, divergence, feature_loss, output_loss

KEY = "lightning_quant"
LOW = QuantConfig(weight=TensorSpec(bits=4), activation=TensorSpec(bits=4))

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def net() -> Any:
    torch.manual_seed(11)
    return Classifier(convnet())


def distilled(config: QuantConfig = LOW, distill: Distillation | None = None, **settings: Any) -> Any:
    formats: Any = ("pt2",) if config.backend == "pt2e" else ("torchscript",)
    return QuantizationAwareTraining(
        config, distill=distill or Distillation(), export=ExportConfig(formats=formats), **settings
    )


def fit(model: Any, *callbacks: Any, ckpt_path: Any = None, **settings: Any) -> Any:
    runner = trainer(*callbacks, **settings)
    runner.fit(model, datamodule=Digits(shuffle=False), ckpt_path=ckpt_path, weights_only=True)
    return runner


class Watch(pl.Callback):
    """The loss that is differentiated, what the module's own step gave, and the weights before each epoch."""

    def __init__(self, begun: Any = lambda: None) -> None:
        self.begun = begun
        self.losses: list[float] = []
        self.epochs: list[dict[str, torch.Tensor]] = []
        self.teachers: list[Any] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.begun()

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.epochs.append(weights(module))

    def on_before_backward(self, trainer: Any, module: Any, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())
        ours = next(c for c in trainer.callbacks if isinstance(c, QuantizationAwareTraining))
        self.teachers.append(ours._distiller.teacher)


# ---- the terms


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 2)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_is_that_of_its_formula(shape: tuple[int, ...], temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    p, q = (softmax(x.numpy() / temperature) for x in (teacher, student))
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)
    assert divergence(student, student, temperature).item() == pytest.approx(0, abs=1e-12)


def test_which_loss_an_output_gets() -> None:
    torch.manual_seed(0)
    scores, image, one = torch.randn(2, 6, 5), torch.randn(2, 6, 3, 4, 4), torch.randn(2, 6, 1)
    kl, auto, mse = (Distillation(loss=loss, temperature=2.0) for loss in ("kl", "auto", "mse"))  # type: ignore[arg-type]
    assert output_loss(*scores, auto) == divergence(*scores, 2.0) != output_loss(*scores, mse)
    for pair in (image, one):
        assert output_loss(*pair, auto) == F.mse_loss(*pair)
    assert output_loss(*image, kl) == divergence(*image, 2.0)
    several = [{"a": x, "n": torch.arange(3), "b": (y,)} for x, y in zip(scores, image, strict=True)]
    expected = divergence(*scores, 2.0) + F.mse_loss(*image)
    assert output_loss(*several, auto).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_student_of_zeros_has_a_feature_loss_of_one() -> None:
    teacher = 7 * torch.randn(4, 3, 5, 5)
    assert feature_loss(torch.zeros_like(teacher), teacher).item() == pytest.approx(1, rel=1e-6)
    assert feature_loss(teacher, teacher) == 0


# ---- in training


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_the_loss_of_the_step_gets_the_term(backend: Any) -> None:
    """By hand: the teacher is the module before the fit, the student what the module's own loss was made from."""

    class Noting(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            images, labels = batch
            student = self(images)
            loss = F.cross_entropy(student, labels)
            noted.append((images, student.detach(), loss.item()))
            return loss

    noted: list[tuple[torch.Tensor, torch.Tensor, float]] = []
    torch.manual_seed(11)
    model, before, watch = Noting(convnet()), net(), Watch(noted.clear)  # a copy runs a step before the training
    settings = QuantConfig(backend=backend, weight=LOW.weight, activation=LOW.activation)
    callback = distilled(settings, Distillation(weight=0.5, temperature=2.0))
    runner = fit(model, watch, callback, max_epochs=1)
    before.eval()
    terms = []
    for loss, (images, student, mine) in zip(watch.losses, noted, strict=True):
        with torch.no_grad():
            terms.append(0.5 * divergence(student, before(images), 2.0).item())
        assert loss == pytest.approx(mine + terms[-1], rel=1e-5)
        assert terms[-1] > 0
    assert runner.callback_metrics[METRIC].item() == pytest.approx(np.mean(terms), rel=1e-4)
    assert callback.report is not None


def test_the_teacher_is_the_module_when_quantization_begins() -> None:
    model, watch, callback = net(), Watch(), None
    callback = distilled(start_epoch=1)
    fit(model, watch, callback, max_epochs=3)
    steps = len(watch.losses) // 3
    assert all(teacher is None for teacher in watch.teachers[:steps])
    assert len({id(teacher) for teacher in watch.teachers[steps:]}) == 1
    teacher = watch.teachers[-1]
    assert different(weights(teacher), watch.epochs[1]) == []
    assert different(weights(teacher), watch.epochs[2]) != []
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert callback._distiller is None


def test_nothing_of_the_teacher_is_on_the_module_or_in_files(tmp_path: Path) -> None:
    model = net()
    names = set(model.state_dict())
    callback = distilled()
    runner = fit(model, callback, max_epochs=1)
    assert set(model.state_dict()) == names
    assert "training_step" not in vars(model)
    assert {module._forward_hooks == {} for module in model.modules()} == {True}
    runner.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == names == set(checkpoint[KEY]["teacher"])
    plain = QuantizationAwareTraining(LOW, export=ExportConfig(directory=str(tmp_path), formats=("torchscript",)))
    fit(net(), plain, max_epochs=1)
    sizes = [sum(f.stat().st_size for f in Path(folder).glob("model.*")) for folder in ("quantized", tmp_path)]
    assert abs(sizes[0] - sizes[1]) < 200  # the numbers in the metadata
    made = callback.report.made_by["init_args"]["distill"]
    assert made["temperature"] == 4.0


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.relu, self.fc = nn.ReLU(), nn.Linear(8 * 64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.fc(self.relu(self.second(x) + x).flatten(1))


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_features_are_those_of_the_layers(backend: Any) -> None:
    """With rounding off, in eval mode, the student gives what the teacher gives: all terms are 0."""
    from lightning_quant.attachment import attached_to

    terms: list[dict[str, float]] = []

    class Off(pl.Callback):
        """The terms of the first batch, with rounding off and on."""

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if terms:
                return
            distiller = callback._distiller
            graphs = attached_to(module)
            assert graphs is not None
            module.eval()
            for flag in (0, 1):
                for fake in graphs.modules():
                    if hasattr(fake, "fake_quant_enabled"):
                        fake.fake_quant_enabled.fill_(flag)
                with distiller._watching(module) as (calls, features):
                    module(batch[0])
                terms.append({"all": distiller._loss(calls, features).item(), "seen": len(features["net.first"])})
            module.train()

    torch.manual_seed(3)
    model = Classifier(Blocks())
    config = QuantConfig(backend=backend, weight=LOW.weight, activation=LOW.activation)
    callback = distilled(config, Distillation(weight=0, features=("net.first", "net.second", "net.second.1")))
    runner = fit(model, Off(), callback, max_epochs=1)
    off, on = terms
    assert off["seen"] == on["seen"] == 1
    # batch norms are folded in fx and eager: float32 rounds otherwise
    assert off["all"] < 1e-9
    assert on["all"] > 1e-4
    assert runner.callback_metrics[METRIC].item() > 0


class Parts(Classifier):
    """Two parts with code between them, which no graph can follow."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 16)), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return self.head(y if y.sum().item() > -1e9 else -y)


def test_several_parts_are_compared_by_forward() -> None:
    torch.manual_seed(0)
    model, watch = Parts(), Watch()
    fit(model, watch, distilled(), max_epochs=1)
    assert watch.teachers[-1] is not None
    assert model._forward_hooks == {}

    class Steps(Parts):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.head(self.body(batch[0])), batch[1])

    text = (
        "distill=...: training_step called none of what could be compared: 'body', 'head'. With one quantized part its "
        "output is, with several the module's forward: call self(...) in training_step, or name one part with "
        "QuantConfig(targets=...)."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        fit(Steps(), distilled(), max_epochs=1)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("kind", ["dict", "none"])
def test_other_results_of_a_step(kind: str) -> None:
    class Other(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            own.append(loss.item())
            return {"loss": loss, "more": 1} if kind == "dict" else (loss if batch_idx else None)

    own: list[float] = []
    watch = Watch(own.clear)
    torch.manual_seed(0)
    runner = fit(Other(convnet()), watch, distilled(), max_epochs=1)
    kept = own if kind == "dict" else own[1:]
    assert len(watch.losses) == len(kept)
    assert all(loss > mine for loss, mine in zip(watch.losses, kept, strict=True))
    assert runner.callback_metrics[METRIC] > 0


# ---- going on


STATE = ("state_dict", "optimizer_states", "epoch", "global_step")


def numbers(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in numbers(inner, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return numbers(dict(enumerate(value)), name)
    return {name: value} if isinstance(value, torch.Tensor) else {}


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_a_run_that_goes_on_is_the_same_to_the_bit(tmp_path: Path, start_epoch: int) -> None:
    """From each epoch, before and after the teacher is taken."""
    keeper = part("callbacks").ModelCheckpoint

    def run(folder: str, ckpt_path: Any = None) -> dict[str, torch.Tensor]:
        saved = keeper(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        distill = Distillation(features=("net.2",))
        fit(net(), saved, distilled(distill=distill, start_epoch=start_epoch), max_epochs=3, ckpt_path=ckpt_path,
            enable_checkpointing=True)  # fmt: skip
        checkpoint = torch.load(tmp_path / folder / "epoch=2.ckpt", weights_only=True)
        return numbers({name: checkpoint[name] for name in (*STATE, KEY)})

    whole = run("whole")
    assert any(name.startswith(f"/{KEY}/teacher/") for name in whole)
    for epoch in (0, 1):
        checkpoint = torch.load(tmp_path / "whole" / f"epoch={epoch}.ckpt", weights_only=True)
        assert ("teacher" in checkpoint[KEY]) == (epoch >= start_epoch)
        assert different(run(f"from {epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt"), whole) == []


def test_a_quantized_training_without_a_teacher_cannot_get_one(tmp_path: Path) -> None:
    plain = QuantizationAwareTraining(LOW, export=ExportConfig(formats=("torchscript",)))
    runner = fit(net(), plain, max_epochs=1)
    runner.save_checkpoint(tmp_path / "plain.ckpt")
    text = (
        "distill=...: this goes on with a quantized training that had no teacher, and the float weights from before it "
        "are gone. Leave distill out, or begin with a float checkpoint."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        fit(net(), distilled(), max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")


# ---- what cannot be


def test_manual_optimization() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__(convnet())
            self.automatic_optimization = False

    text = (
        "distill=... with manual optimization: Manual calls manual_backward with losses of its own, to which nothing "
        "can be added from outside. Use automatic optimization, or leave distill out."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        fit(Manual(), distilled(), max_epochs=1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weight": -1}, "Distillation(weight=-1): give a number that is not negative."),
        ({"temperature": "hot"}, "Distillation(temperature='hot'): give a number that is not negative."),
        ({"temperature": 0}, "Distillation(temperature=0): scores are divided by it. Give a number above 0."),
        ({"loss": "l1"}, "Distillation(loss='l1'): not one of 'auto', 'kl', 'mse'."),
        ({"features": "a"}, "Distillation(features='a'): give a list, e.g. ('a',)."),
        ({"weight": 0}, "Distillation(weight=0) without features: nothing is compared. Give a weight, or features."),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=exactly(text)):
        Distillation(**settings)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("net.8", "Distillation(features=...): there is no submodule 'net.8'. Did you mean "),
        ("net", "Distillation(features=...): 'net' is quantized as a whole, and what it gives is compared by weight. "),
        (
            "net.0",
            "Distillation(features=...): what '0' gives is not there in the quantized graph. It runs as one kernel: 0 "
            "+ 1 + 2. Name the last module of these. Name a layer whose output is rounded, such as a block.",
        ),
    ],
)
def test_features_that_cannot_be(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}"):
        fit(net(), distilled(distill=Distillation(features=(name,))), max_epochs=1)


def test_no_distillation() -> None:
    with pytest.raises(ConfigError, match=exactly("distill=True: give a Distillation, or None.")):
        QuantizationAwareTraining(distill=True)  # type: ignore[arg-type]
