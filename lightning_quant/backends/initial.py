"""Where an int8 model begins: with the state of the float module when it was prepared, not with what calibration left.

What a forward changes is never part of a graph (see :mod:`.tracing`): it is in the user's own modules, which stand
around graphs or inside of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_quant.backends.graph import is_graph
from lightning_quant.backends.state import changed, places, state_of, tensors_of
from lightning_quant.errors import CaptureError

_STATE = "lightning_quant state"


class Absent:
    """Stands for the value of what a forward makes, and was not there before. The class itself, which copies keep."""


@dataclass(frozen=True)
class Initial:
    """What a forward changes, as it was before; :class:`Absent` where it was not there.

    Attributes:
        buffers: Name in the user's model -> value.
        attributes: Name of a module of it -> attributes that are no buffers -> their values.
        trained: Training goes on with it: the int8 model begins where that ends.
    """

    buffers: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    trained: bool = False


class Watched:
    """Sees what a call of a copy changes of it.

    Attributes:
        buffers: Names, in the user's model.
        attributes: Name of a module -> names of what is no buffer.
    """

    def __init__(self) -> None:
        self.buffers: list[str] = []
        self.attributes: dict[str, list[str]] = {}

    def run(self, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Call ``twin``."""
        parts = {n: m for n, m in twin.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
        before = {name: state_of(module) for name, module in parts.items()}
        tensors = tensors_of(twin)
        twin(*args, **kwargs)
        self.buffers = tensors.written()
        written = tensors.written_attributes()
        for name, module in parts.items():
            own = [key for key in changed(module, before[name]) if key not in module._buffers]
            own += [key for key in module.__dict__ if (f"{name}.{key}" if name else key) in written]
            if own:
                self.attributes[name] = own

    def of(self, model: nn.Module, *, trained: bool) -> Initial | None:
        """What was changed, as ``model`` has it; None: nothing was."""
        if not self.buffers and not self.attributes:
            return None
        held = {name: owner._buffers[key] for name, owner, key in places(model)}
        attributes = {
            name: {key: copy.deepcopy(model.get_submodule(name).__dict__.get(key, Absent)) for key in keys}
            for name, keys in self.attributes.items()
        }
        buffers = {name: held.get(name, Absent) for name in self.buffers}
        return Initial(_copied(buffers), attributes, trained)


def _copied(buffers: dict[str, Any]) -> dict[str, Any]:
    """A copy, in one go: what shares memory does so there."""
    detached = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in buffers.items()}
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in copy.deepcopy(detached).items()}


def remember(prepared: nn.Module, initial: Initial | None) -> None:
    """Note on a prepared model where its int8 model begins."""
    if initial is not None:
        _notes(prepared)[_STATE] = initial


def initial_of(prepared: nn.Module) -> Initial | None:
    """What :func:`remember` noted; None: its forward changes nothing."""
    found: Initial | None = _notes(prepared).get(_STATE)
    return found


def _notes(prepared: nn.Module) -> dict[str, Any]:
    # of torch's graph modules, copies keep this alone
    notes: dict[str, Any] = prepared.__dict__["meta"] if is_graph(prepared) else prepared.__dict__
    return notes


def begin_again(twin: nn.Module) -> None:
    """Let a copy of a prepared model, on the CPU, have its initial state, unless that was trained.

    Raises:
        CaptureError: It has no longer what changes.
    """
    initial = initial_of(twin)
    if initial is None:
        return
    del _notes(twin)[_STATE]
    if initial.trained:
        return
    held = {name: (owner, key) for name, owner, key in places(twin)}
    for name, value in _copied(initial.buffers).items():
        if value is Absent:
            if name in held:
                owner, key = held[name]
                del owner._buffers[key]
            continue
        if name not in held:
            raise CaptureError(
                f"forward changes the buffer {name!r}, which is part of what is int8, from outside of it. Leave "
                f"{name.rpartition('.')[0]!r} in float with QuantConfig(skip=...)."
            )
        owner, key = held[name]
        setattr(owner, key, value)
    for name, values in initial.attributes.items():
        module = _module(twin, name)
        for key, value in values.items():
            if value is not Absent:
                module.__dict__[key] = copy.deepcopy(value)
            else:
                module.__dict__.pop(key, None)


def _module(twin: nn.Module, name: str) -> nn.Module:
    """The submodule that has this name in the user's model."""
    found = twin
    for part in name.split(".") if name else ():
        found = getattr(found, "graph", found) if part not in found._modules else found
        found = found.get_submodule(part)
    return found
