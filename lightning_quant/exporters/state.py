"""What a model carries from call to call, as explicit inputs and outputs: every runtime can hold those.

A file is a function without memory. The state that a forward keeps in buffers is given to it with the data, and it
gives the new state with its output; ``load`` feeds the one into the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from lightning_quant.analysis.sqnr import float_tensors, sqnr_db
from lightning_quant.arguments import batch_size, with_batch
from lightning_quant.backends.graph import engine
from lightning_quant.backends.state import changed, places, put_back, state_of, tensors_of, unchanged
from lightning_quant.errors import ExportError
from lightning_quant.exporters.program import Program, State
from lightning_quant.structures import same

#: Of the calls of a function that is given its state, against the module that keeps it: no more than float sums in
#: another order. State that was overlooked gives much less.
LEAST_DB = 40.0


class StateError(ExportError):
    """A model carries from call to call what no file can hold."""


class ExplicitState(nn.Module):
    """A module as a function of its data and its state by position, which gives ``(output, new state)``.

    Args:
        module: Takes the data by position. It is left as it is by every call.
        names: Of its buffers that are the state, as of :func:`lightning_quant.backends.state.places`.

    Raises:
        StateError: It has no such buffer.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        held = {name: (owner, key) for name, owner, key in places(module)}
        for name in names:
            if name not in held:
                raise StateError(f"forward changes the buffer {name!r}, which the int8 model does not have")
        self.places = [held[name] for name in names]

    def forward(self, *inputs: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
        """What ``module`` gives for ``(*data, *state)``, and the state after it."""
        count = len(inputs) - len(self.places)
        parts = [part for part in self.module.modules() if not isinstance(part, torch.jit.ScriptModule)]
        before = {part: state_of(part) for part in parts}
        try:
            for (owner, key), value in zip(self.places, inputs[count:], strict=True):
                owner._buffers[key] = value.clone()  # forward may write into it
            output = self.module(*inputs[:count])
            return output, tuple(owner.get_buffer(key).clone() for owner, key in self.places)
        finally:
            for part, state in before.items():
                put_back(part, state)


def with_explicit_state(program: Program) -> Program:
    """``program`` as a function of its data and its state, if it carries any from call to call.

    Raises:
        StateError: It carries what no file can hold. The message has the name.
    """
    found = carried(program)
    if not found.names:
        return program
    held = {name: owner.get_buffer(key) for name, owner, key in places(program.converted) if name in found.names}
    explicit = replace(
        program,
        converted=ExplicitState(program.converted, found.names),
        qdq=lambda: ExplicitState(program.qdq(), found.names),
        in_float=None if program.in_float is None else ExplicitState(program.in_float, found.names),
        state=tuple(State(name, held[name].detach().clone().cpu()) for name in found.names),
        one_sample=found.one_sample,
    )
    _check(program, explicit)
    return explicit


@dataclass(frozen=True)
class Carried:
    """What a program changes by a call.

    Attributes:
        names: Of its buffers.
        one_sample: They are those of one sample: it can run no other batch, or they would have another shape.
    """

    names: tuple[str, ...] = ()
    one_sample: bool = False


@dataclass(frozen=True)
class _Seen:
    """One call: what it gave, the names of the buffers that it wrote, all buffers after it, what else it changed."""

    output: Any
    written: list[str]
    buffers: dict[str, torch.Tensor | None]
    attributes: list[str]


def carried(program: Program) -> Carried:
    """The buffers that a program changes by a call.

    Those of which the shape is another one afterwards, or with another batch, do not count where no call reads what an
    earlier one left in them; nor do attributes.

    Raises:
        StateError: It reads what an earlier call has left in an attribute that is no buffer, in a buffer of another
            shape or in a program of TorchScript.
    """
    before = {name: (owner, owner._buffers[key]) for name, owner, key in places(program.converted)}
    with _left_alone(program):
        seen = _run(program.converted, program.data)
    if not seen.written and not seen.attributes:
        return Carried()
    label = program.name or "forward"
    for name in seen.written:
        if name in before and isinstance(before[name][0], torch.jit.ScriptModule):
            raise StateError(
                f"{label}: a program of TorchScript changes its buffer {name!r}, which cannot be made an input and an "
                "output of it. Quantize the module that it was compiled from."
            )
    loose = _never_held(seen, {name: before[name][1] if name in before else None for name in seen.written})
    bound = _bound(program, {n: x for n in seen.written if n not in loose and (x := before[n][1]) is not None})
    names = tuple(name for name in seen.written if name not in loose and name not in bound)
    one_sample = bool(bound) and batch_size(program.data) == 1 and _reads(program, names)
    if one_sample:
        names = tuple(name for name in seen.written if name not in loose)
    else:
        loose |= bound
    if (loose or seen.attributes) and _reads(program, names):
        raise StateError(f"{label}: {_refusal(loose, seen.attributes)}")
    return Carried(names, one_sample)


def _refusal(loose: dict[str, str], attributes: list[str]) -> str:
    for name, reason in loose.items():
        return (
            f"forward carries the buffer {name!r} from call to call, and {reason}. A file holds state of one shape and "
            "dtype. Give it that (where it follows the batch: export with data of one sample), or take the state as "
            "an argument and return the new one."
        )
    return (
        f"forward carries {', '.join(attributes)} from call to call, which is no buffer. A file holds the state of "
        "buffers: use self.register_buffer, or take the state as an argument and return the new one."
    )


@contextlib.contextmanager
def _left_alone(program: Program) -> Iterator[None]:
    with torch.no_grad(), engine(program.config.engine), unchanged(program.converted):
        yield


def _run(module: nn.Module, data: tuple[Any, ...]) -> _Seen:
    parts = {n: m for n, m in module.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    before = {name: state_of(part) for name, part in parts.items()}
    tensors = tensors_of(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = module(*data)
    attributes = [
        ".".join(part for part in (*name.split("."), key) if part not in ("", "module", "graph"))
        for name, part in parts.items()
        for key in changed(part, before[name])
        if key not in part._buffers
    ]
    after = {name: owner._buffers[key] for name, owner, key in places(module)}
    return _Seen(output, tensors.written(), after, [*attributes, *tensors.written_attributes()])


def _never_held(seen: _Seen, written: dict[str, torch.Tensor | None]) -> dict[str, str]:
    """The buffers that are not what they were after any call -> how.

    Args:
        seen: One call.
        written: The buffers that it wrote, with their values before.
    """
    loose = {}
    for name, x in written.items():
        now = seen.buffers.get(name)
        if x is None:
            loose[name] = "it is None, or not there, before the first one"
        elif now is None or not _fits(now, x):
            loose[name] = f"it is {_shown(x)} before one and {'None' if now is None else _shown(now)} after it"
    return loose


def _bound(program: Program, written: dict[str, torch.Tensor]) -> dict[str, str]:
    """The buffers that follow the number of samples -> how."""
    for size in (1, 2):
        with _left_alone(program):
            try:
                found = _run(program.converted, with_batch(program.data, size)).buffers
            except Exception:  # whatever torch raises where state does not fit the data
                return dict.fromkeys(written, f"with it forward cannot run a batch of {size}")
        for name, x in written.items():
            now = found.get(name)
            if now is None or not _fits(now, x):
                return {name: f"after a batch of {size} it is {'None' if now is None else _shown(now)}"}
    return {}


def _fits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _shown(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of the shape {tuple(tensor.shape)}"


def _reads(program: Program, names: Sequence[str]) -> bool:
    """Whether a second call gives something else because of what the first one left beside the buffers ``names``."""
    module = program.converted
    explicit = ExplicitState(module, names)
    values = tuple(owner.get_buffer(key).clone() for owner, key in explicit.places)
    with _left_alone(program):
        results = []
        for _ in range(2):
            for (owner, key), value in zip(explicit.places, values, strict=True):
                owner._buffers[key] = value.clone()
            seen = _run(module, program.data)
            results.append((seen.output, [owner.get_buffer(key).clone() for owner, key in explicit.places]))
    return not _equal(*results)


def _equal(one: Any, other: Any) -> bool:
    (a, spec), (b, other_spec) = tree_flatten(one), tree_flatten(other)
    return spec == other_spec and all(
        same(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x is y or bool(x == y)
        for x, y in zip(a, b, strict=True)
    )


def _check(program: Program, explicit: Program) -> None:
    """Three calls of the module, and of the function with the state handed on, are the same.

    Raises:
        StateError: They are not.
    """
    values = tuple(state.value for state in explicit.state)
    with _left_alone(program):
        expected = [_run(program.converted, program.data).output for _ in range(3)]
    found = []
    with torch.no_grad(), engine(program.config.engine):
        for _ in range(3):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                output, values = explicit.converted(*program.data, *values)
            found.append(output)
    if not _equal(expected, found) and (not float_tensors(found) or sqnr_db(expected, found) < LEAST_DB):
        names = ", ".join(repr(state.name) for state in explicit.state)
        raise StateError(
            f"{program.name or 'forward'}: forward changes {names} and carries more than that from call to call. Two "
            "buffers that share memory cannot be held in a file: give each its own."
        )
