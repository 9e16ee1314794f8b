"""Trainings that are killed, each in a process of its own, and go on in another: what tests/test_resume.py looks at.

The float module has to resume bit for bit, or nobody could: batches come from a loader with a state, and dropout draws
from a seed that is the step's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from modules import BATCH, ONE_FORMAT, Classifier, convnet, rows, trainer
from roots import part, pl

from lightning_quant import OscillationFreezing, QuantConfig, QuantizationAwareTraining, TensorSpec

TRAIN, VAL = 72, 40
BATCHES = 5  # the last one of 8
VAL_BATCHES = 3

#: Where a process can die.
PLACES = ("batch start", "backward", "optimizer step", "batch end", "validation", "epoch end")
#: How: nothing of the process runs any more; Lightning's handlers run; Ctrl+C, for which Lightning exits with 1.
WAYS = ("SIGKILL", "exception", "SIGINT")


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        quantized: With QuantizationAwareTraining, else in float.
        learned: Scales are trained.
        freezing: Weights have 3 bits, and those that oscillate are frozen.
        adam: Else SGD with momentum.
        every_n_steps: Checkpoints come after so many steps; None: at the end of each epoch.
        place, way, step: Where, how and at which global step it dies; ``way=""``: it does not. A place that is passed
            once an epoch counts from that step on.
    """

    quantized: bool = True
    start_epoch: int = 0
    freeze_observers_epoch: int | None = None
    freeze_batch_norm_epoch: int | None = None
    learned: bool = False
    freezing: bool = False
    adam: bool = False
    every_n_steps: int | None = None
    epochs: int = 3
    place: str = "batch end"
    way: str = ""
    step: int = 0

    def undisturbed(self) -> Job:
        """The same one, which does not die."""
        return replace(self, way="")

    def in_float(self) -> Job:
        """The same one without quantization."""
        return replace(self, quantized=False, start_epoch=0, freeze_observers_epoch=None, freeze_batch_norm_epoch=None,
                       learned=False, freezing=False)  # fmt: skip


class _Order:
    """Another order in each epoch. Lightning says which epoch it is, as it says it to a DistributedSampler."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class ResumableLoader:
    """Shuffled batches, and a state from which the epoch goes on."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels
        self.sampler = _Order()
        self.given = 0

    def __len__(self) -> int:
        return -(-len(self.labels) // BATCH)

    def __iter__(self) -> Iterator[Any]:
        self.given %= len(self)
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(self.sampler.epoch))
        while self.given < len(self):
            chosen = order[self.given * BATCH : (self.given + 1) * BATCH]
            self.given += 1
            yield self.images[chosen], self.labels[chosen]

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Net(Classifier):
    def __init__(self, adam: bool) -> None:
        super().__init__(convnet(dropout=0.3))
        self.adam = adam

    def configure_optimizers(self) -> Any:
        of: Any = torch.optim.AdamW if self.adam else torch.optim.SGD
        optimizer = of(self.parameters(), lr=0.003) if self.adam else of(self.parameters(), lr=0.05, momentum=0.9)
        steps = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.97**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "step"}}


class SeedOfTheStep(pl.Callback):
    """Dropout draws the same in step n, whatever ran before: Lightning stores no random state."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        torch.manual_seed(trainer.global_step)


class Phases(pl.Callback):
    """What the quantization callback does with each batch, one line for each, in a file that survives a kill."""

    def __init__(self, path: Path, of: Any) -> None:
        self.path, self.of = path, of

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        with self.path.open("a") as file:
            print(json.dumps([trainer.global_step, str(self.of.phase)]), file=file)


class Death(pl.Callback):
    """Ends the process, or raises, where a job says so."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def _at(self, trainer: Any, place: str) -> None:
        job = self.job
        now = trainer.global_step
        if place != job.place or trainer.sanity_checking:
            return
        if now < job.step if place in ("validation", "epoch end") else now != job.step:
            return
        if job.way == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        elif job.way == "SIGINT":
            os.kill(os.getpid(), signal.SIGINT)
        elif job.way == "exception":
            raise RuntimeError("the power is out")

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._at(trainer, "batch start")

    def on_after_backward(self, trainer: Any, *_: Any) -> None:
        self._at(trainer, "backward")

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self._at(trainer, "optimizer step")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._at(trainer, "batch end")

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        self._at(trainer, "validation")

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        self._at(trainer, "epoch end")


def train(job: Job, folder: Path, resume: Path | None) -> None:
    """In a fresh process: train, and write what came of it."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    callbacks: list[Any] = [SeedOfTheStep()]
    quantization = None
    if job.quantized:
        spec = TensorSpec(fake_quantize="learned") if job.learned else TensorSpec()
        freezing = OscillationFreezing(threshold=0.2, final_threshold=0.1, momentum=0.1) if job.freezing else None
        quantization = QuantizationAwareTraining(
            QuantConfig(activation=spec, weight=replace(spec, bits=3) if job.freezing else spec),
            freeze_oscillations=freezing,
            start_epoch=job.start_epoch,
            freeze_observers_epoch=job.freeze_observers_epoch,
            freeze_batch_norm_epoch=job.freeze_batch_norm_epoch,
            export=ONE_FORMAT,
        )
        callbacks += [quantization, Phases(folder / "phases.jsonl", quantization)]
    if job.way:
        callbacks.append(Death(job))
    keep = part("callbacks").ModelCheckpoint(
        folder / "ckpt", filename="{step}", save_top_k=-1, every_n_train_steps=job.every_n_steps
    )
    torch.manual_seed(11)
    net = Net(job.adam)
    # another seed after a kill: nothing may hang on it
    torch.manual_seed(99 if resume else 12)
    runner = trainer(*callbacks, keep, enable_checkpointing=True, max_epochs=job.epochs)
    loader = ResumableLoader(*rows(0, TRAIN).tensors)
    val = torch.utils.data.DataLoader(rows(TRAIN, TRAIN + VAL), batch_size=BATCH)
    runner.fit(net, loader, val, ckpt_path=resume, weights_only=True)
    runner.save_checkpoint(folder / "end.ckpt")
    if quantization is not None:
        report = quantization.report
        (folder / "metrics.json").write_text(json.dumps([report.metrics_float, report.metrics_int8]))


def latest(folder: Path) -> Path | None:
    """The last checkpoint that was written."""
    found = sorted((folder / "ckpt").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    return found[-1] if found else None


def run(job: Job, folder: Path, resume: Path | None = None, timeout_s: float = 120) -> int:
    """Train in a process that has imported everything and run nothing. Returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([pl.__name__, "torchao", "lightning_quant", "sklearn.datasets"])
    process = context.Process(target=_quietly, args=(asdict(job), folder, resume))
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{job} took more than {timeout_s} s")
    assert process.exitcode is not None
    return process.exitcode


def _quietly(job: dict[str, Any], folder: Path, resume: Path | None) -> None:
    """With what it prints in a file: a test that fails shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    out = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train(Job(**job), folder, resume)
