"""A transformer reads a docstring and says whose it is: Python's, torch's or numpy's.

    python examples/text_transformer.py fit --config examples/text_transformer.yaml

The text is real, and is where Python, torch and numpy are. Their names are taken out of it.
"""

import builtins
import collections
import inspect
import os
import random
import re
import statistics
import string

import numpy
import torch
import torchmetrics
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant.cli import QuantCLI

SOURCES = (
    (builtins, str, bytes, dict, list, set, os, os.path, random, statistics, string, collections, inspect, re),
    (torch, torch.Tensor, torch.nn, torch.nn.functional, torch.linalg, torch.optim, torch.distributions),
    (numpy, numpy.ndarray, numpy.linalg, numpy.random, numpy.fft, numpy.ma, numpy.polynomial),
)
HIDDEN = {"torch", "pytorch", "tensor", "tensors", "numpy", "np", "ndarray", "array", "python"}
PADDING, UNKNOWN = 0, 1


class DocstringClassifier(LightningModule):
    def __init__(self, words: int = 2000, length: int = 48, width: int = 64, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(words, width, padding_idx=PADDING)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(SOURCES))
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=len(SOURCES))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position).mean(1))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        tokens, label = batch
        return F.cross_entropy(self(tokens), label)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        tokens, label = batch
        self.accuracy(self(tokens), label)
        self.log("val_acc", self.accuracy, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams["lr"])


class Docstrings(LightningDataModule):
    def __init__(self, words: int = 2000, length: int = 48, batch_size: int = 64) -> None:
        super().__init__()
        self.words, self.length, self.batch_size = words, length, batch_size

    def setup(self, stage: str) -> None:
        texts = [(tokens, label) for label, owners in enumerate(SOURCES) for tokens in docstrings(owners)]
        random.Random(0).shuffle(texts)
        middle = len(texts) * 3 // 4
        counts = collections.Counter(word for tokens, _ in texts[:middle] for word in tokens)
        known = {word: number for number, (word, _) in enumerate(counts.most_common(self.words - 2), 2)}
        self.train_set, self.val_set = self.encoded(texts[:middle], known), self.encoded(texts[middle:], known)

    def encoded(self, texts: list, known: dict[str, int]) -> TensorDataset:
        tokens = torch.full((len(texts), self.length), PADDING)
        for row, (words, _) in enumerate(texts):
            ids = [known.get(word, UNKNOWN) for word in words[: self.length]]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return TensorDataset(tokens, torch.tensor([label for _, label in texts]))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, 2 * self.batch_size)

    test_dataloader = val_dataloader


def docstrings(owners: tuple[object, ...]) -> list[list[str]]:
    """The words of each docstring, once, in a fixed order."""
    found = {}
    for owner in owners:
        for name in sorted(vars(owner)):
            text = inspect.getdoc(getattr(owner, name, None)) or ""
            words = [word for word in re.findall(r"[a-z]+|[^\sa-z]", text.lower()) if word not in HIDDEN]
            if len(words) >= 8:
                found[" ".join(words)] = words
    return list(found.values())


if __name__ == "__main__":
    QuantCLI(DocstringClassifier, Docstrings, seed_everything_default=0)
