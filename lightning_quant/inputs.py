"""One real call of each submodule, before any loader has run: what a model is traced with.

A validation batch (else a training batch) goes through the user's own transfer hooks and step on a deep copy; else
``example_input_array``. Random states, loaders, metrics and logs are afterwards what they were before.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_quant._roots import root_of
from lightning_quant.arguments import Call
from lightning_quant.capture import FAILED_IN, Recording, detached, record_calls
from lightning_quant.errors import CalibrationError, CaptureError, where
from lightning_quant.evaluate import ValidationData, copy_of, evaluate
from lightning_quant.team import all_ranks


@dataclass(frozen=True)
class Sample:
    """How the module's parts were called for one batch.

    Attributes:
        recordings: Name of the submodule (``""``: the module's own forward) -> its calls.
        source: Where the batch came from, for messages.
        data: That batch as validation data, or None if it is not one.
    """

    recordings: dict[str, Recording]
    source: str
    data: ValidationData | None


def sample(trainer: Any, module: Any, *, needs_validation: bool = False, trains_quantized: bool = False) -> Sample:
    """Record one batch.

    Args:
        trainer: In ``setup`` or later, of ``fit``, ``validate`` or ``test``.
        module: The user's LightningModule. Not changed: a copy runs.
        needs_validation: An empty val dataloader is an error.
        trains_quantized: Graphs will run in ``training_step`` as well.

    Raises:
        CalibrationError: ``needs_validation``, and the val dataloader is empty.
        CaptureError: There is no batch and no ``example_input_array``, or the step raises.
    """
    root = root_of(trainer)
    fn = trainer.state.fn.value
    val_loop = trainer.fit_loop.epoch_loop.val_loop if fn == "fit" else trainer.validate_loop
    example = getattr(module, "example_input_array", None)
    with isolated_rng():
        if fn != "test" and trainer.limit_val_batches != 0 and _overridden(root, "validation_step", module):
            data = _first_validation_batches(trainer, val_loop._data_source, needs_validation)
            if data is not None:
                recordings = _record(module, "validation_step", lambda twin: evaluate(twin, data))
                if trains_quantized:
                    recordings = _with_training(trainer, module, recordings)
                return Sample(recordings, "validation_step", data)
        for stage, step, source in (
            ("fit", "training_step", trainer.fit_loop._data_source),
            ("test", "test_step", trainer.test_loop._data_source),
        ):
            if fn != stage:
                continue
            found, batch = _first_of(source, sequential=stage == "test")
            if not found:
                continue
            try:
                return Sample(_record(module, step, _by_hand(trainer, step, batch)), step, None)
            except CaptureError:  # e.g. manual optimization, which asks for the optimizers
                if example is None:
                    raise
        if example is not None:
            call = _call_of(example)
            recordings = _record(module, "forward", lambda twin: twin(*call.args, **call.keywords))
            return Sample(recordings, "example_input_array", None)
    raise CaptureError(
        f"no input was found to trace {type(module).__name__} with: there is no validation or training batch "
        f"that can be "
        "looked at without consuming it. Set self.example_input_array in the LightningModule to an input of forward."
    )


def sample_without_trainer(module: Any, data: ValidationData | None, example: Call | None) -> Sample:
    """Record one batch of a module that no Trainer holds.

    Args:
        module: A LightningModule. Not changed: a copy runs.
        data: Its first batch goes through ``validation_step``.
        example: A call of ``forward`` on real data, for where there is none; else ``example_input_array`` is taken.

    Raises:
        CaptureError: There is no input, or the step raises.
    """
    with isolated_rng():
        if data is not None:
            found, batches = _first(data.loaders, _OneBatch)
            if found:
                first = replace(data, loaders=batches, limit_batches=1)
                return Sample(
                    _record(module, "validation_step", lambda twin: evaluate(twin, first)), "validation_step", first
                )
        array = getattr(module, "example_input_array", None)
        call = example if array is None or example is not None else _call_of(array)
        if call is not None:
            recordings = _record(module, "forward", lambda twin: twin(*call.args, **call.keywords))
            return Sample(recordings, "example_input_array" if example is None else "checkpoint", None)
    raise CaptureError(
        f"no input was found to trace {type(module).__name__} with: there is no validation data, the module has no "
        "example_input_array, and the checkpoint has no input of its forward. Give a datamodule with a val dataloader."
    )


def _with_training(trainer: Any, module: Any, recordings: dict[str, Recording]) -> dict[str, Recording]:
    """The recordings, with the ways in which ``training_step`` calls the same submodules, where it can be run alone."""
    found, batch = _first_of(trainer.fit_loop._data_source, sequential=False)
    if not found:
        return recordings
    try:
        training = _record(module, "training_step", _by_hand(trainer, "training_step", batch))
    except CaptureError:  # e.g. manual optimization, which asks for the optimizers
        return recordings
    return {
        name: replace(seen, ways=tuple(dict.fromkeys((*seen.ways, *training[name].ways)))) if name in training else seen
        for name, seen in recordings.items()
    }


def _call_of(example: Any) -> Call:
    if isinstance(example, dict):
        return Call((), detached(example))
    return Call(tuple(detached(list(example))), {}) if isinstance(example, tuple) else Call((detached(example),), {})


def _record(module: Any, step: str, run: Any) -> dict[str, Recording]:
    twin = copy_of(module)
    try:
        return record_calls(twin, run)
    except Exception as error:  # whatever the user's code raises
        inside = getattr(error, FAILED_IN, "")
        place = f"{where(error)}in {inside!r}: " if inside else where(error)
        raise CaptureError(
            f"{type(module).__name__}.{step} raised {type(error).__name__} on one batch, on the CPU in eval mode: "
            f"{place}{str(error).rstrip('.')}. Its parts are traced with what it passes them. "
            "If it cannot run there, set self.example_input_array."
        ) from error


def _by_hand(trainer: Any, step: str, batch: Any) -> Any:
    """Run one step of a copy as the Trainer would, with the user's transfer hooks and without its logs."""

    def run(twin: Any) -> None:
        moved = batch
        twin.__dict__["log"] = twin.__dict__["log_dict"] = lambda *_, **__: None
        for hook, extra in (
            ("on_before_batch_transfer", ()),
            ("transfer_batch_to_device", (torch.device("cpu"),)),
            ("on_after_batch_transfer", ()),
        ):
            owner = trainer.datamodule
            if owner is None or not _overridden(root_of(trainer), hook, owner):
                owner = twin
            moved = getattr(owner, hook)(moved, *extra, 0)
        method = getattr(twin, step)
        method(moved, 0) if len(inspect.signature(method).parameters) > 1 else method(moved)

    return run


def _overridden(root: Any, name: str, owner: Any) -> bool:
    overridden: bool = root.utilities.model_helpers.is_overridden(name, owner)
    return overridden


@contextlib.contextmanager
def isolated_rng() -> Iterator[None]:
    """Put the random states of Python, NumPy and torch back, whatever happens inside."""
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _loaders_of(source: Any) -> tuple[Any, str]:
    """``(loaders, mode)`` of a Lightning dataloader source; None where there is none."""
    if source.instance is None or not source.is_defined():
        return None, "sequential"
    loaders = source.dataloader()
    return getattr(loaders, "iterables", loaders), getattr(loaders, "_mode", "sequential")


class _OneBatch:
    """A dataloader of one batch. Not a list: Lightning would take that for several dataloaders."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch])

    def __len__(self) -> int:
        return 1


def _first_validation_batches(trainer: Any, source: Any, needed: bool) -> ValidationData | None:
    """The first batch of each val dataloader, in their structure."""
    loaders, mode = _loaders_of(source)
    if loaders is None:
        return None
    found, batches = _first(loaders, _OneBatch)
    if not found and needed and _is_empty(loaders):
        raise CalibrationError(
            "the val dataloader is empty, and static quantization calibrates on it. Give it at least one batch (with "
            "drop_last=True it may have dropped the only one), or use method='dynamic', which needs no data."
        )
    return ValidationData(root_of(trainer), batches, mode, trainer.datamodule, 1) if found else None


def _is_empty(loaders: Any) -> bool:
    items = list(loaders.values()) if isinstance(loaders, dict) else loaders if isinstance(loaders, list) else [loaders]
    return any(hasattr(x, "__len__") and not isinstance(x, IterableDataset) and _length(x) == 0 for x in items)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a DataLoader over an iterable dataset has __len__, and raises
        return None


def _first_of(source: Any, *, sequential: bool) -> tuple[bool, Any]:
    """``(found, batch)`` as a step gets it: of several loaders, the first one's, or all of them in their structure."""
    loaders, _ = _loaders_of(source)
    if loaders is None:
        return False, None
    found, batch = _first(loaders, lambda batch: batch)
    while found and sequential and isinstance(loaders, (list, tuple, dict)) and not _is_batches(loaders):
        loaders = next(iter(loaders.values() if isinstance(loaders, dict) else loaders))
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return found, batch


def _first(loaders: Any, wrap: Any) -> tuple[bool, Any]:
    """``(found, first batches)`` in the structure of ``loaders``."""
    if isinstance(loaders, (list, tuple, dict)) and not _is_batches(loaders):
        items = list(loaders.values()) if isinstance(loaders, dict) else list(loaders)
        found = [_first(item, wrap) for item in items]
        if not found or not all(ok for ok, _ in found):
            return False, None
        batches = [batch for _, batch in found]
        return True, dict(zip(loaders, batches, strict=True)) if isinstance(loaders, dict) else type(loaders)(batches)
    ok, batch = peek(loaders)
    return ok, wrap(batch)


def _is_batches(value: Any) -> bool:
    """Whether a list is a list of batches, not of loaders."""
    items = list(value.values()) if isinstance(value, dict) else list(value)
    return any(isinstance(x, torch.Tensor) or not hasattr(x, "__iter__") for x in items) or (
        bool(items) and isinstance(items[0], (list, tuple, dict))
    )


def peek(loader: Any) -> tuple[bool, Any]:
    """``(found, first batch)`` of a loader, without workers, and without moving its generators or its state.

    An iterator, or a dataset that is one, is left alone: what is taken from it would be missing in training.
    """
    if isinstance(loader, _Stateful):
        state = copy.deepcopy(loader.state_dict())
        try:
            return _peek(loader)
        finally:
            loader.load_state_dict(state)
    return _peek(loader)


@runtime_checkable
class _Stateful(Protocol):
    """A loader that knows where it is, so that Lightning resumes within an epoch (torchdata's, for example)."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""


def _peek(loader: Any) -> tuple[bool, Any]:
    if not isinstance(loader, DataLoader):
        try:
            iterator = iter(loader)
        except TypeError:
            return False, None
        if iterator is loader:
            return False, None
        return next(((True, batch) for batch in iterator), (False, None))
    put_back = [_remember(generator) for generator in _generators(loader)]
    try:
        if isinstance(loader.dataset, IterableDataset):
            if iter(loader.dataset) is loader.dataset:
                return False, None
            fresh = DataLoader(
                loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn, drop_last=loader.drop_last
            )
            return next(((True, batch) for batch in fresh), (False, None))
        if loader.batch_sampler is None:
            index = next(iter(loader.sampler), None)
            return (False, None) if index is None else (True, loader.collate_fn(loader.dataset[index]))
        indices = next(iter(loader.batch_sampler), None)
        if indices is None:
            return False, None
        fetch = getattr(loader.dataset, "__getitems__", None)
        rows = fetch(indices) if fetch else [loader.dataset[index] for index in indices]
        return True, loader.collate_fn(rows)
    finally:
        for undo in put_back:
            undo()


def _generators(loader: DataLoader[Any]) -> Iterator[Any]:
    """The generators of random numbers of a loader, its samplers and its datasets."""
    batch_sampler = loader.batch_sampler
    holders: list[Any] = [loader, loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    dataset: Any = loader.dataset
    while dataset is not None:  # e.g. Subset(Augmented(...))
        holders.append(dataset)
        dataset = getattr(dataset, "dataset", None)
    seen: set[int] = set()
    for holder in holders:
        for value in list(getattr(holder, "__dict__", {}).values()):
            if isinstance(value, _GENERATORS) and id(value) not in seen:
                seen.add(id(value))
                yield value


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def _remember(generator: Any) -> Callable[[], object]:
    """A function that puts the state of ``generator`` back to what it is now."""
    if isinstance(generator, np.random.Generator):
        bits, state = generator.bit_generator, copy.deepcopy(generator.bit_generator.state)
        return lambda: setattr(bits, "state", state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


def training_batches(trainer: Any, count: int) -> Iterator[Any]:
    """The first batches of an epoch of training, as the loaders of a running ``fit`` give them.

    Call it with :func:`isolated_rng`. What a loader draws from generators of its own, and where it is, is put back.

    Args:
        trainer: In ``fit``, with its train dataloader.
        count: How many at the most; ``limit_train_batches`` counts as well.
    """
    combined = trainer.fit_loop._combined_loader
    put_back: list[Callable[[], object]] = []
    for loader in combined.flattened:
        if isinstance(loader, _Stateful):
            put_back.append(partial(loader.load_state_dict, copy.deepcopy(loader.state_dict())))
        if isinstance(loader, DataLoader):
            put_back += [_remember(generator) for generator in _generators(loader)]
    again = root_of(trainer).utilities.combined_loader.CombinedLoader(combined.iterables, combined._mode)
    try:
        for index, (batch, _, _) in enumerate(again):
            yield batch
            if index + 1 >= min(count, trainer.num_training_batches):
                break
    finally:
        for undo in put_back:
            undo()


def run_training_step(trainer: Any, module: Any, batch: Any) -> None:
    """Run ``training_step`` of a copy as the Trainer would, with the user's transfer hooks and without its logs."""
    _by_hand(trainer, "training_step", batch)(module)


def recorded_forward(recordings: dict[str, Recording], module: nn.Module) -> Call | None:
    """The call of the module's own ``forward``, or that which ``example_input_array`` stands for, or None."""
    if "" in recordings:
        return recordings[""].call
    example = getattr(module, "example_input_array", None)
    return None if example is None else _call_of(example)


def has_validation(trainer: Any, module: Any) -> bool:
    """Whether a validation loop will run: a step, a dataloader, and batches."""
    fitting = trainer.state.fn == "fit"
    source = (trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop)._data_source
    root = root_of(trainer)
    has_loader = source.instance is not None and source.is_defined()
    return bool(has_loader and trainer.limit_val_batches != 0 and _overridden(root, "validation_step", module))


def validation_data_of_test(trainer: Any, module: Any) -> ValidationData:
    """The validation batches of a Trainer that is testing: from the datamodule, else from the module.

    Raises:
        CalibrationError: Neither has a val dataloader.
    """
    root = root_of(trainer)
    datamodule = trainer.datamodule
    if datamodule is not None and _overridden(root, "val_dataloader", datamodule):
        datamodule.setup("validate")  # in test, Lightning has set up the test data alone
        loaders = datamodule.val_dataloader()
    elif _overridden(root, "val_dataloader", module):
        loaders = module.val_dataloader()
    else:
        raise CalibrationError(
            "test(ckpt_path=...) with PostTrainingQuantization calibrates the checkpoint's weights, and there is no "
            "val dataloader: give test a datamodule that has one, or call validate(ckpt_path=...) before test."
        )
    return ValidationData(root, loaders, "sequential", datamodule, trainer.limit_val_batches, all_ranks())
