"""LightningModules and data that the tests of the callbacks run: real digits, tiny networks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import mobile
from roots import pl
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_quant import (
    ExportConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
)
from lightning_quant.config import Method

# networks this small gain nothing from a second thread, and lose much where tests share the cores
torch.set_num_threads(1)

#: Lightning's remark on a validation_step without data.
WITHOUT_VAL_LOADER = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

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


class ManyDigits(pl.LightningDataModule):
    """So many for validation that an accuracy says something."""

    def val_dataloader(self) -> DataLoader:
        return DataLoader(rows(1000, 1797), batch_size=100)


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

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return self(images)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.logits(images), labels)
        self.log("train_loss", loss)
        return loss

    def _evaluate(self, batch: Any, stage: str) -> None:
        images, labels = batch
        logits = self.logits(images)
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


class ConvClassifier(Classifier):
    """The layers sit directly on the LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


class StepsOnly(Classifier):
    """``forward`` is never overridden: the steps call two children."""

    forward = pl.LightningModule.forward

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(128, 10)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(images).flatten(1))


class ForwardUnused(StepsOnly):
    """``forward`` is there for users of the trained module, and no step calls it; it branches on its data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.logits(x)
        return logits if logits.sum() > 0 else -logits


class BuiltInSetup(Classifier):
    """Layers that do not exist before ``setup``."""

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = convnet()


class BuiltInConfigureModel(Classifier):
    """Layers that do not exist before ``configure_model``."""

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = convnet()


class Mobile(Classifier):
    """Depthwise and pointwise convolutions by turns."""

    def __init__(self) -> None:
        super().__init__(mobile())


class WithHyperparameters(Classifier):
    def __init__(self, width: int = 8, lr: float = 0.05) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 10))


class PrebuiltOptimizer(Classifier):
    """The optimizer exists before the Trainer does, as with LightningCLI's ``--optimizer``."""

    def __init__(self) -> None:
        super().__init__(convnet())
        self.__dict__["optimizer"] = torch.optim.SGD(self.parameters(), lr=0.05)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.__dict__["optimizer"]


class FrozenNorm(Classifier):
    """Keeps its batch norm in eval mode, whatever the Trainer asks for."""

    def __init__(self) -> None:
        super().__init__(convnet())
        self.train()

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.net[1].eval()
        return self


class Recurrent(nn.Module):
    """Reads a digit row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.lstm(x.flatten(1, 2))
        return self.head(outputs[:, -1])


class OwnLoaders(Classifier):
    """Brings its own dataloaders."""

    def __init__(self) -> None:
        super().__init__(convnet())

    def train_dataloader(self) -> DataLoader:
        return train_loader()

    def val_dataloader(self) -> DataLoader:
        return val_loader()

    def test_dataloader(self) -> DataLoader:
        return val_loader()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def trained_mobile(epochs: int) -> nn.Sequential:
    """On the first 1000 digits, over 16."""
    torch.manual_seed(0)
    net = mobile()
    images, labels = digits()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(epochs):
        for start in range(0, 1000, 50):
            optimizer.zero_grad()
            F.cross_entropy(net(images[start : start + 50] / 16), labels[start : start + 50]).backward()
            optimizer.step()
    return net.eval()


def trainer(*callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    """A Trainer, on the CPU unless said, that writes and prints nothing."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "max_epochs": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, "devices": 1, **kwargs})


ONE_FORMAT = ExportConfig(formats=("torchscript",))


#: Finding the range in a histogram takes a third of the time of a run this small.
MIN_MAX = QuantConfig(activation=TensorSpec(observer="min_max"))


def ptq(config: QuantConfig | None = None, *, method: Method = "static", **kwargs: Any) -> PostTrainingQuantization:
    config = config or (MIN_MAX if method == "static" else QuantConfig())
    return PostTrainingQuantization(config, method=method, export=ONE_FORMAT, **kwargs)


def qat(config: QuantConfig = QuantConfig(), **kwargs: Any) -> QuantizationAwareTraining:  # noqa: B008
    return QuantizationAwareTraining(config, export=ONE_FORMAT, **kwargs)


def merged(results: list[dict[str, float]]) -> dict[str, float]:
    """What ``trainer.validate`` returns, one dict for all dataloaders."""
    return {name: value for result in results for name, value in result.items()}


def as_test(metrics: dict[str, float]) -> dict[str, float]:
    """Validation metrics under the names that the test step gives them."""
    return {name.replace("val_", "test_"): value for name, value in metrics.items()}


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that a checkpoint of ``module`` holds."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def different(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    """The names whose values are not the same, bit for bit. Empty: the two states are the same."""
    shared = ours.keys() & theirs.keys()
    return sorted(
        (ours.keys() ^ theirs.keys()) | {name for name in shared if not torch.equal(ours[name], theirs[name])}
    )


class Losses(pl.Callback):
    """Every training loss and every validation metric, in order."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.values += [value.item() for _, value in sorted(trainer.callback_metrics.items())]


def surface(module: nn.Module) -> dict[str, Any]:
    """What a user can see of a module's tree: types, modes, attributes, hooks, names of tensors."""
    lightning = {"_trainer", "_current_fx_name", "_param_requires_grad_state", "_metric_attributes", "_hparams"}
    return {
        name: (type(part), part.training, sorted(part.__dict__.keys() - lightning), part.forward.__func__,
               [len(v) for k, v in sorted(part.__dict__.items()) if k.endswith("_hooks")])
        for name, part in module.named_modules()
    }  # fmt: skip
