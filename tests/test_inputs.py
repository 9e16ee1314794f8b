"""One real call of each submodule, taken without moving anything that training will use."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from killed import ResumableLoader
from modules import (
    BATCH,
    RAW_MAX,
    TRAIN,
    WITHOUT_VAL_LOADER,
    Augmented,
    Classifier,
    Digits,
    Losses,
    convnet,
    different,
    merged,
    mlp,
    ptq,
    qat,
    rows,
    surface,
    train_loader,
    trainer,
    val_loader,
    weights,
)
from roots import pl
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from lightning_quant.inputs import Sample, isolated_rng, peek, sample

# Part 1: one batch of one loader


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _shuffled(generator: torch.Generator) -> DataLoader:
    return train_loader(shuffle=True, generator=generator)


def _random_sampler(generator: torch.Generator) -> DataLoader:
    return train_loader(sampler=RandomSampler(rows(0, TRAIN), generator=generator))


def _weighted_sampler(generator: torch.Generator) -> DataLoader:
    return train_loader(sampler=WeightedRandomSampler(torch.ones(TRAIN), TRAIN, generator=generator))


def _batch_sampler(generator: torch.Generator) -> DataLoader:
    batches = BatchSampler(RandomSampler(rows(0, TRAIN), generator=generator), BATCH, drop_last=False)
    return DataLoader(rows(0, TRAIN), batch_sampler=batches)


def _one_by_one(generator: torch.Generator) -> DataLoader:
    return train_loader(batch_size=None, shuffle=True, generator=generator)


@pytest.mark.parametrize("made_by", [_shuffled, _random_sampler, _weighted_sampler, _batch_sampler, _one_by_one])
def test_generators_of_loaders_and_samplers_do_not_move(made_by: Any) -> None:
    generator, twin = _generator(), _generator()
    loader = made_by(generator)
    found, batch = peek(loader)
    assert found
    assert batch[0].shape[-2:] == (8, 8)
    assert torch.equal(generator.get_state(), twin.get_state())
    for ours, theirs in zip(loader, made_by(twin), strict=True):
        assert torch.equal(ours[0], theirs[0])


class _DrawsFromItsOwn(Dataset):
    """Augments with a generator that it holds."""

    def __init__(self, generator: Any, draw: Any) -> None:
        self.generator = generator
        self.draw = draw

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> float:
        return float(self.draw(self.generator))


@pytest.mark.parametrize("wrap", [lambda dataset: dataset, lambda dataset: Subset(dataset, range(4))])
@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (_generator, lambda generator: torch.rand(1, generator=generator)),
        (lambda: np.random.default_rng(5), lambda generator: generator.random()),
        (lambda: np.random.RandomState(5), lambda generator: generator.rand()),
        (lambda: random.Random(5), lambda generator: generator.random()),
    ],
    ids=["torch", "numpy", "numpy, legacy", "python"],
)
def test_generators_of_datasets_do_not_move(generator: Any, draw: Any, wrap: Any) -> None:
    looked_at, plain = (DataLoader(wrap(_DrawsFromItsOwn(generator(), draw)), batch_size=2) for _ in range(2))
    assert peek(looked_at)[0]
    assert [batch.tolist() for batch in looked_at] == [batch.tolist() for batch in plain]


class _Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.full((1, 8, 8), float(i)), i) for i in range(6)])


class _GetItems(Dataset):
    """Fetches a whole batch at once, as datasets of Hugging Face do."""

    def __len__(self) -> int:
        return 6

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(torch.full((1, 8, 8), float(i)), i) for i in indices]


def _pairs(batch: list[Any]) -> dict[str, Any]:
    return {"images": torch.stack([image for image, _ in batch]), "labels": [label for _, label in batch]}


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(_Stream(), batch_size=4),
        DataLoader(_Stream(), batch_size=4, drop_last=True),
        DataLoader(_Stream(), batch_size=None),
        DataLoader(_GetItems(), batch_size=4),
        DataLoader(_GetItems(), batch_size=4, collate_fn=_pairs),
        DataLoader(_GetItems(), batch_sampler=BatchSampler(SequentialSampler(range(6)), 3, drop_last=False)),
        [torch.zeros(2, 3), torch.ones(2, 3)],
    ],
    ids=["stream", "drop_last", "stream of samples", "__getitems__", "collate_fn", "batch_sampler", "list"],
)
def test_the_batch_is_the_loaders_first_one(loader: Any) -> None:
    found, batch = peek(loader)
    expected = next(iter(loader))
    assert found
    torch.testing.assert_close(batch, expected, rtol=0, atol=0)


def test_no_workers_are_started() -> None:
    loader = train_loader(num_workers=2, persistent_workers=True)
    assert peek(loader)[0]
    assert loader._iterator is None


class _OwnIterator(IterableDataset):
    """What it gives is gone."""

    def __init__(self) -> None:
        self.left = iter(range(6))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.left)


@pytest.mark.parametrize("wrapped", [True, False], ids=["in a DataLoader", "bare"])
def test_nothing_is_taken_from_an_iterator(wrapped: bool) -> None:
    iterator = _OwnIterator()
    assert peek(DataLoader(iterator, batch_size=2) if wrapped else iterator) == (False, None)
    assert list(iterator) == list(range(6))


@pytest.mark.parametrize("empty", [[], DataLoader(rows(0, 0)), DataLoader(rows(0, 3), batch_size=4, drop_last=True)])
def test_an_empty_loader_has_no_batch(empty: Any) -> None:
    assert peek(empty) == (False, None)


@pytest.mark.parametrize("given", [0, 2])
def test_a_loader_that_knows_where_it_is_stays_there(given: int) -> None:
    """As torchdata's StatefulDataLoader: Lightning stores its state, to resume in the middle of an epoch."""
    images, labels = rows(0, 96).tensors
    looked_at, other = ResumableLoader(images, labels), ResumableLoader(images, labels)
    for loader in (looked_at, other):
        loader.load_state_dict({"given": given})
    found, batch = peek(looked_at)
    assert found
    assert looked_at.state_dict() == {"given": given}
    batches, others = list(looked_at), list(other)
    assert len(batches) == len(others) == 6 - given
    assert torch.equal(batch[0], others[0][0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, others, strict=True))


def test_isolated_rng_puts_every_state_back_whatever_happens() -> None:
    def draw() -> list[float]:
        return [torch.rand(1).item(), float(np.random.rand()), random.random()]

    def fails() -> None:
        with isolated_rng():
            draw()
            raise ValueError

    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    expected = draw()
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    with pytest.raises(ValueError):  # noqa: PT011
        fails()
    assert draw() == expected


# Part 2: one batch through a module


class Looks(pl.Callback):
    """Takes a sample where our callbacks do, and notes what should not change."""

    def __init__(self) -> None:
        self.sample: Sample

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        before = self._states(trainer, pl_module)
        self.sample = sample(trainer, pl_module)
        after = self._states(trainer, pl_module)
        assert before == after

    def _states(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        metrics = {name: part.update_count for name, part in module.named_modules() if hasattr(part, "update_count")}
        return (
            torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate(), surface(module),
            {name: value.tolist() for name, value in module.state_dict().items()}, metrics,
            dict(trainer.callback_metrics), dict(trainer.logged_metrics),
        )  # fmt: skip


class _DrawsEverywhere(Augmented):
    def __getitem__(self, index: int) -> Any:
        np.random.rand()
        random.random()
        return super().__getitem__(index)


class _Random(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.train_set, self.val_set = _DrawsEverywhere(rows(0, TRAIN)), _DrawsEverywhere(rows(TRAIN, TRAIN + 20))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, batch_size=BATCH, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, batch_size=BATCH, shuffle=False)


def _run(*callbacks: pl.Callback, **kwargs: Any) -> dict[str, Any]:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    model, data, losses = Classifier(convnet(dropout=0.2)), _Random(), Losses()
    trainer(losses, *callbacks, **kwargs).fit(model, data)
    draws = [torch.rand(1).item(), float(np.random.rand()), random.random()]
    return {
        "weights": weights(model), "losses": losses.values, "draws": draws,
        "train": data.train_set.drawn, "val": data.val_set.drawn,
    }  # fmt: skip


@pytest.mark.parametrize("limits", [{}, {"limit_val_batches": 0}], ids=["validation batch", "training batch"])
def test_a_run_goes_on_as_if_nobody_had_looked(limits: dict[str, int]) -> None:
    looks = Looks()
    ours, plain = _run(looks, **limits), _run(**limits)
    source, name = ("training_step", "train") if limits else ("validation_step", "val")
    assert looks.sample.source == source
    assert different(ours["weights"], plain["weights"]) == []
    assert ours["losses"] == plain["losses"]
    assert ours["draws"] == plain["draws"]
    other = "val" if limits else "train"
    assert ours[other] == plain[other]
    # the one batch that was looked at, and then the same indices in the same order
    assert ours[name][BATCH:] == plain[name]


@pytest.mark.parametrize(("limits", "source"), [({}, "validation_step"), ({"limit_val_batches": 0}, "training_step")])
def test_the_users_transfer_hooks_apply(limits: dict[str, int], source: str) -> None:
    looks, model, data = Looks(), Classifier(convnet()), Digits(shuffle=False)
    trainer(looks, **limits).fit(model, data)
    assert looks.sample.source == source
    expected = next(iter(data.train_dataloader() if limits else data.val_dataloader()))[0] / RAW_MAX
    for name in ("", "net"):
        assert torch.equal(looks.sample.recordings[name].call.args[0], expected)
    assert (looks.sample.data is None) == bool(limits)


class _OwnTransfer(Classifier):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 2, batch[1]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device((batch[0] / 3, batch[1]), device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 5, batch[1]


@WITHOUT_VAL_LOADER
@pytest.mark.parametrize("with_validation", [True, False])
def test_the_modules_own_transfer_hooks_apply(with_validation: bool) -> None:
    looks = Looks()
    data = [train_loader(), val_loader(0)] if with_validation else [train_loader()]
    trainer(looks).fit(_OwnTransfer(convnet()), *data)
    expected = rows(0, BATCH).tensors[0] / 30
    torch.testing.assert_close(looks.sample.recordings["net"].call.args[0], expected)


@WITHOUT_VAL_LOADER
def test_without_validation_a_training_batch_is_taken() -> None:
    looks, callback, model = Looks(), qat(), Classifier(convnet())
    runner = trainer(looks, callback)
    runner.fit(model, train_loader())
    assert looks.sample.source == "training_step"
    assert callback.report.metrics_before is None
    assert callback.report.metrics_float == callback.report.metrics_int8 == {}
    assert callback.report.sqnr_db > 20
    assert callback.report.artifacts["torchscript"].is_file()


def test_without_a_validation_step_a_training_batch_is_taken() -> None:
    class TrainsOnly(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    callback = qat()
    trainer(callback).fit(TrainsOnly(), train_loader())
    assert callback.report.targets == ["net"]


class _TwoSources(Classifier):
    """Each training batch is a dict with one batch of each loader."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return sum(F.cross_entropy(self(images), labels) for images, labels in (batch["a"], batch["b"]))


@WITHOUT_VAL_LOADER
def test_several_training_loaders_give_their_batches_together() -> None:
    looks = Looks()
    trainer(looks).fit(_TwoSources(convnet()), {"a": train_loader(), "b": val_loader()})
    recording = looks.sample.recordings["net"]
    assert torch.equal(recording.call.args[0], rows(0, BATCH).tensors[0])
    assert len(recording.within) == 2


def test_test_takes_a_test_batch() -> None:
    looks = Looks()
    trainer(looks).test(Classifier(convnet()), val_loader(5), verbose=False)
    assert looks.sample.source == "test_step"
    assert torch.equal(looks.sample.recordings["net"].call.args[0], rows(5, 5 + BATCH).tensors[0])


@WITHOUT_VAL_LOADER
@pytest.mark.parametrize(
    "example",
    [torch.rand(2, 1, 8, 8), (torch.rand(2, 1, 8, 8),), {"x": torch.rand(2, 1, 8, 8)}],
    ids=["tensor", "tuple", "dict"],
)
@pytest.mark.parametrize("made_by", [qat, lambda: ptq(method="dynamic")], ids=["qat", "dynamic"])
def test_example_input_array(example: Any, made_by: Any) -> None:
    """Where batches come from an iterator, of which nothing may be taken."""
    looks, callback, model, losses = Looks(), made_by(), Classifier(mlp()), Losses()
    model.example_input_array = example
    trainer(looks, callback, losses).fit(model, iter(train_loader()))
    assert looks.sample.source == "example_input_array"
    call = looks.sample.recordings[""].call
    given = call.keywords["x"] if isinstance(example, dict) else call.args[0]
    assert given.shape == (2, 1, 8, 8)
    assert len(losses.values) == TRAIN // BATCH  # no batch is missing in training
    assert callback.report.artifacts["torchscript"].is_file()


class _ManualOptimization(Classifier):
    """Its training step cannot run outside of a Trainer."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False
        self.example_input_array = torch.rand(2, 1, 8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        return loss


@WITHOUT_VAL_LOADER
def test_example_input_array_where_the_training_step_cannot_run_alone() -> None:
    model, callback = _ManualOptimization(), qat()
    before = weights(model)
    trainer(callback).fit(model, train_loader())
    assert len(different(before, weights(model))) == 4
    assert callback.report.targets == ["net"]


def test_a_module_that_trains_by_hand_and_validates() -> None:
    model, callback = _ManualOptimization(), qat()
    trainer(callback).fit(model, Digits())
    assert callback.report.metrics_float == merged(trainer().validate(model, Digits()))
