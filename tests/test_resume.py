"""A training that is killed goes on as if nothing had happened: in a fresh process, from its last checkpoint."""

from __future__ import annotations

import json
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from killed import BATCHES, PLACES, WAYS, Job
from modules import different

KEY = "lightning_quant"
EXIT_CODES = {"SIGKILL": -signal.SIGKILL, "exception": 1, "SIGINT": 1}


def flat(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every number in a nested value, by its path."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), name)
    if isinstance(value, torch.Tensor):
        return {name: value}
    return {name: torch.tensor(value)} if isinstance(value, (bool, int, float)) else {}


#: What a training is: all of a checkpoint but the folder that it is in.
STATE = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", KEY)


def state(folder: Path, name: str = "end.ckpt") -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / name, weights_only=True)
    return {k: v for key in STATE if key in checkpoint for k, v in flat(checkpoint[key], key).items()}


def phases(*folders: Path) -> dict[int, str]:
    """Global step -> phase, of runs one after the other; the later one counts."""
    lines = [json.loads(line) for folder in folders for line in (folder / "phases.jsonl").read_text().splitlines()]
    return dict(lines)


class Runs:
    """Trainings by what they were asked: those that nothing disturbs are run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[Job, Path] = {}
        self.deaths = 0

    def undisturbed(self, job: Job) -> Path:
        job = replace(job.undisturbed(), place="", step=0)
        if job not in self.done:
            self.done[job] = self.folder / f"undisturbed {len(self.done)}"
            assert killed.run(job, self.done[job]) == 0, (self.done[job] / "output.txt").read_text()
        return self.done[job]

    def resumed(self, job: Job) -> tuple[Path, Path]:
        """The folders of the run that died and of the one that went on."""
        self.deaths += 1
        died, again = (self.folder / f"death {self.deaths}" / name for name in ("died", "again"))
        assert killed.run(job, died) == EXIT_CODES[job.way], f"{job}: {(died / 'output.txt').read_text()}"
        assert not (died / "end.ckpt").exists()
        assert killed.run(job.undisturbed(), again, killed.latest(died)) == 0, (
            f"{job}: {(again / 'output.txt').read_text()}"
        )
        return died, again


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def check(runs: Runs, job: Job) -> None:
    floating = job.in_float()
    _, again = runs.resumed(floating)
    assert different(state(runs.undisturbed(floating)), state(again)) == [], "not even the float module resumes"
    died, again = runs.resumed(job)
    whole = runs.undisturbed(job)
    expected = state(whole)
    assert any(name.startswith(KEY) for name in expected)
    assert different(expected, state(again)) == []
    assert phases(whole) == phases(died, again)
    assert (whole / "metrics.json").read_text() == (again / "metrics.json").read_text()


FROZEN = {"freeze_observers_epoch": 2, "freeze_batch_norm_epoch": 1}


@pytest.mark.parametrize(
    "job",
    [
        # the last checkpoint is from before quantization begins, in the middle of an epoch
        Job(start_epoch=1, every_n_steps=3, place="backward", way="SIGKILL", step=BATCHES + 1, **FROZEN),
        # from before observers are frozen: the freeze is in the run that goes on
        Job(learned=True, adam=True, place="validation", way="SIGINT", step=2 * BATCHES, **FROZEN),
        # in the middle of an epoch in which all is frozen
        Job(every_n_steps=2, place="optimizer step", way="exception", step=2 * BATCHES + 3, **FROZEN),
        # some weights are frozen, and others are about to be
        Job(freezing=True, learned=True, every_n_steps=2, place="backward", way="SIGKILL", step=2 * BATCHES + 3),
    ],
    ids=["SIGKILL in an epoch", "SIGINT at the end of an epoch", "exception when frozen", "oscillating"],
)
def test_a_killed_training_goes_on_bit_for_bit(job: Job, runs: Runs) -> None:
    check(runs, job)


def at_random(seed: int) -> Job:
    """A job that dies somewhere, of any kind."""
    draw = random.Random(seed)
    start = draw.randrange(3)
    epochs = 4
    freezes = [None, *range(start + 1, epochs)]
    return Job(
        start_epoch=start,
        freeze_observers_epoch=draw.choice(freezes),
        freeze_batch_norm_epoch=draw.choice([None, *range(start, epochs)]),
        learned=draw.random() < 0.5,
        freezing=draw.random() < 0.5,
        adam=draw.random() < 0.5,
        every_n_steps=draw.choice([None, 1, 2, 3, 4, 7]),
        epochs=epochs,
        place=draw.choice(PLACES),
        way=draw.choice(WAYS),
        step=draw.randrange(1, (epochs - 1) * BATCHES),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_any_kill_point(seed: int, runs: Runs) -> None:
    check(runs, at_random(seed))


def test_a_resumed_training_has_frozen_weights(runs: Runs) -> None:
    """What the comparison above is about is there."""
    job = Job(freezing=True, learned=True, every_n_steps=2)
    kept = state(runs.undisturbed(replace(job, place="backward", step=2 * BATCHES + 3)))
    frozen = [value.float().mean() for name, value in kept.items() if name.endswith("/frozen")]
    assert len(frozen) == 2
    assert 0 < max(frozen) < 1


def test_the_comparison_can_fail(runs: Runs) -> None:
    """A run of another seed of dropout, as it were: a killed one that begins anew at its last weights."""
    job = Job(**FROZEN)
    whole = runs.undisturbed(job)
    assert killed.run(job, runs.folder / "other", None) == 0
    assert different(state(whole), state(runs.folder / "other")) == []
    longer = runs.undisturbed(replace(job, freeze_observers_epoch=None))
    assert {name.partition("/")[0] for name in different(state(whole), state(longer))} >= {KEY}
