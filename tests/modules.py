"""LightningModules and data that the tests of the callbacks run: real digits, tiny networks."""

from __future__ import annotations

import functools
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

BATCH = 16
TRAIN = 96  # 6 batches
VAL = 40  # 3 batches, the last one of 8
RAW_MAX = 16.0  # pixels of load_digits


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(1797, 1, 8, 8)`` in 0 to 16 as the scanner gave them, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target)


def rows(start: int, stop: int, *, normalised: bool = True) -> TensorDataset:
    images, labels = digits()
    return TensorDataset(images[start:stop] / (RAW_MAX if normalised else 1), labels[start:stop])


def train_loader(**kwargs: Any) -> DataLoader:
    return DataLoader(rows(0, TRAIN), **{"batch_size": BATCH, **kwargs})


def val_loader(start: int = TRAIN, size: int = VAL, **kwargs: Any) -> DataLoader:
    return DataLoader(rows(start, start + size), **{"batch_size": BATCH, **kwargs})


class Digits(pl.LightningDataModule):
    """Normalises on the device: a model that sees a batch without this hook gets inputs 16 times too large."""

    def __init__(self, *, val_sets: int = 1, shuffle: bool = True) -> None:
        super().__init__()
        self.val_sets = val_sets
        self.shuffle = shuffle

    def train_dataloader(self) -> DataLoader:
        return DataLoader(rows(0, TRAIN, normalised=False), batch_size=BATCH, shuffle=self.shuffle)

    def val_dataloader(self) -> Any:
        starts = [TRAIN + i * VAL for i in range(self.val_sets)]
        loaders = [DataLoader(rows(s, s + VAL, normalised=False), batch_size=BATCH) for s in starts]
        return loaders[0] if self.val_sets == 1 else loaders

    def test_dataloader(self) -> Any:
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return images / RAW_MAX, labels


class Augmented(Dataset):
    """Rows with random noise: each draw moves torch's global generator."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.drawn.append(index)
        image, label = self.dataset[index]
        return image + 0.1 * torch.randn_like(image), label


def convnet(dropout: float = 0.0) -> nn.Sequential:
    """Conv-BN-ReLU and a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(128, 10),
    )  # fmt: skip


class Classifier(pl.LightningModule):
    """A network as a child, a stateful torchmetric, a loss; the same step for training, validation and test."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        if net is not None:
            self.net = net
        self.val_acc = MulticlassAccuracy(10, average="micro")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def _evaluate(self, batch: Any, stage: str) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log(f"{stage}_loss", F.cross_entropy(logits, labels))
        self.log(f"{stage}_acc", self.val_acc, on_step=False, on_epoch=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
