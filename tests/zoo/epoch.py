"""One architecture through an epoch of quantization-aware training, as a user would: a LightningModule, a Trainer."""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import Architecture
from measure import call, settled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from lightning_quant import ExportConfig, QuantizationAwareTraining
from lightning_quant._roots import ROOTS

pl: Any = ROOTS[0]

TRAINED = 32  # of the samples of a task; the others validate
BATCH = 8
LEARNING_RATE = 3e-5  # Adam's first steps are of this size in every weight: more, and wide transformers diverge


@dataclass(frozen=True)
class Epoch:
    """What one epoch did; the metrics are ``val_loss`` and ``val_acc`` on the same samples.

    Attributes:
        entry: The architecture.
        float_losses: Of each training batch in float training.
        fake_losses: Of the same batches, with fake quantize.
        float_metrics: After an epoch of float training from the same weights, with the same batches.
        fake_metrics: After the epoch with fake quantize, as its own validation loop gives them.
        int8_metrics: Of the int8 model.
        file_metrics: Of the file, reloaded.
        coverage: Share of the multiply-accumulates of layers with weights that run in int8.
        files: What was written.
        unmoved: Parameters that float training moved and training with fake quantize did not.
        seconds: Of both trainings, with all that follows the second.
    """

    entry: Architecture
    float_losses: tuple[float, ...]
    fake_losses: tuple[float, ...]
    float_metrics: dict[str, float]
    fake_metrics: dict[str, float]
    int8_metrics: dict[str, float]
    file_metrics: dict[str, float]
    coverage: float
    files: tuple[Path, ...]
    unmoved: tuple[str, ...]
    seconds: float


class Samples(Dataset[Any]):
    """Rows of the inputs, which are a tuple or a dict of tensors, and their targets."""

    def __init__(self, inputs: Any, targets: Tensor) -> None:
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return _rows(self.inputs, index), self.targets[index]


class Learner(pl.LightningModule):
    """An architecture that learns its task. It knows nothing of quantization."""

    def __init__(self, entry: Architecture, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scores = entry.task.scores
        example = entry.inputs(1)
        self.settings = {k: v for k, v in example.items() if not isinstance(v, Tensor)} if _named(example) else {}
        self.losses: list[float] = []

    def forward(self, inputs: Any) -> Any:
        """What the architecture gives for a tuple or a dict of inputs."""
        return call(self.model, {**inputs, **self.settings} if _named(inputs) else inputs)

    def _loss_and_accuracy(self, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        scores, labels = self.scores(self(inputs), targets)
        return F.cross_entropy(scores, labels), (scores.argmax(1) == labels).float().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self._loss_and_accuracy(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, accuracy = self._loss_and_accuracy(batch)
        self.log_dict({"val_loss": loss, "val_acc": accuracy}, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # no weight decay: it would move weights that no gradient reaches
        return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)


def _named(inputs: Any) -> bool:
    return isinstance(inputs, dict)


def train(entry: Architecture, directory: Path) -> Epoch:
    """Train from the same random weights in float and with fake quantize, and deliver the second in ``directory``."""
    torch.manual_seed(0)
    inputs, targets = entry.task.data(entry.inputs(1))
    model = settled(entry, lambda batch: _rows(inputs, torch.randperm(TRAINED)[:batch]))
    loaders = [
        DataLoader(Samples(_rows(inputs, own), targets[own]), batch_size=BATCH)
        for own in (slice(TRAINED), slice(TRAINED, None))
    ]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5  # at torch's 0.1, the running statistics of so short an epoch are those of before it
    start = {name: x.clone() for name, x in model.state_dict().items()}
    began = time.perf_counter()
    plain = Learner(entry, model)
    float_metrics = _fit(plain, loaders, [])
    moved = _moved(model, start)
    model.load_state_dict(start)
    callback = QuantizationAwareTraining(export=ExportConfig(directory=str(directory), formats=("torchscript",)))
    learner = Learner(entry, model)
    fake_metrics = _fit(learner, loaders, [callback])
    report = callback.report
    assert report is not None
    return Epoch(
        entry=entry,
        float_losses=tuple(plain.losses),
        fake_losses=tuple(learner.losses),
        float_metrics=float_metrics,
        fake_metrics=fake_metrics,
        int8_metrics=report.metrics_int8,
        file_metrics=report.formats["torchscript"].metrics,
        coverage=report.coverage,
        files=tuple(directory.glob("*.ts")),
        unmoved=tuple(sorted(moved - _moved(model, start))),
        seconds=time.perf_counter() - began,
    )


def _rows(inputs: Any, rows: Any) -> Any:
    return tree_map(lambda x: x[rows], inputs)


def _fit(learner: Learner, loaders: list[DataLoader[Any]], callbacks: list[Any]) -> dict[str, float]:
    """Train for an epoch; the metrics of its validation."""
    learner.train()  # Lightning leaves each module in the mode in which it comes
    pl.seed_everything(0, verbose=False)  # masks and dropouts of both trainings are the same
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=callbacks,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the report
        trainer.fit(learner, *loaders)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _moved(model: nn.Module, start: dict[str, Tensor]) -> set[str]:
    return {name for name, x in model.named_parameters() if not torch.equal(x, start[name])}
