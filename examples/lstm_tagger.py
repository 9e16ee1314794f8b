"""An LSTM names the kind of each character of a program (name, number, string ...); dynamic quantization.

    python examples/lstm_tagger.py fit --config examples/lstm_tagger.yaml

The programs are modules of Python's own library, and what is right is said by `tokenize`.
"""

import importlib
import inspect
import io
import keyword
import tokenize

import torch
import torchmetrics
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant.cli import QuantCLI

TRAIN = ("argparse", "ast", "calendar", "csv", "difflib", "fractions", "gzip", "heapq", "shutil", "tarfile", "textwrap")
VAL = ("ipaddress", "json.decoder", "random", "statistics")
SPACE, NAME, KEYWORD, NUMBER, OPERATOR, STRING, COMMENT = range(7)
KINDS = {tokenize.NUMBER: NUMBER, tokenize.OP: OPERATOR, tokenize.STRING: STRING, tokenize.COMMENT: COMMENT}


class Tagger(LightningModule):
    def __init__(self, width: int = 64, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(128, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 7)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=7)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        """``(batch, length)`` -> scores ``(batch, length, kinds)``."""
        return self.head(self.lstm(self.embedding(characters))[0])

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        characters, kinds = batch
        return F.cross_entropy(self(characters).flatten(0, 1), kinds.flatten())

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        characters, kinds = batch
        self.accuracy(self(characters).flatten(0, 1), kinds.flatten())
        self.log("val_acc", self.accuracy, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.hparams["lr"])


class Programs(LightningDataModule):
    def __init__(self, length: int = 96, batch_size: int = 32) -> None:
        super().__init__()
        self.length, self.batch_size = length, batch_size

    def setup(self, stage: str) -> None:
        self.train_set, self.val_set = self.windows(TRAIN), self.windows(VAL)

    def windows(self, names: tuple[str, ...]) -> TensorDataset:
        parts = [tagged(inspect.getsource(importlib.import_module(name))) for name in names]
        characters, kinds = (torch.tensor([x for part in parts for x in part[side]]) for side in (0, 1))
        whole = len(characters) // self.length * self.length
        return TensorDataset(characters[:whole].view(-1, self.length), kinds[:whole].view(-1, self.length))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, 2 * self.batch_size)

    test_dataloader = val_dataloader


def tagged(source: str) -> tuple[list[int], list[int]]:
    """The characters of a program, as ASCII, and the kind of each."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds = [SPACE] * len(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = KINDS.get(token.type)
        if token.type == tokenize.NAME:
            kind = KEYWORD if keyword.iskeyword(token.string) else NAME
        if kind is not None:
            first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
            kinds[first:last] = [kind] * (last - first)
    return [min(ord(character), 127) for character in source], kinds


if __name__ == "__main__":
    QuantCLI(Tagger, Programs, seed_everything_default=0)
