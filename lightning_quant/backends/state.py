"""What a module changes of itself while it runs, and how it is put back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from lightning_quant.arguments import Call, Captured, Positional
from lightning_quant.capture import watch
from lightning_quant.errors import CaptureError
from lightning_quant.scripted import ScriptedChild
from lightning_quant.structures import is_setting, same

_State = tuple[dict[str, Any], dict[str, Any], dict[int, tuple[Any, Any]]]


def state_of(module: nn.Module) -> _State:
    """The attributes and buffers of ``module``, and the contents of the lists and dicts among them."""
    attributes = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
    contents = {id(v): (v, copy.copy(v)) for v in attributes.values() if type(v) in (list, dict)}
    return attributes, dict(module._buffers), contents


def changed(module: nn.Module, state: _State) -> list[str]:
    """The names of the attributes and buffers that ``module`` holds other objects in than it did."""
    attributes, buffers, contents = state
    now = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
    names = [k for k in now.keys() | attributes.keys() if not _unchanged(now.get(k), attributes.get(k))]
    names += [k for k in module._buffers if module._buffers[k] is not buffers.get(k)]
    names += [k for k, v in attributes.items() if id(v) in contents and not _unchanged(v, contents[id(v)][1])]
    return sorted(set(names))


def put_back(module: nn.Module, state: _State) -> list[str]:
    """The names of what ``module`` changed of itself since, which is put back."""
    attributes, buffers, contents = state
    names = changed(module, state)
    for name in [k for k in module.__dict__ if not k.startswith("_") and k not in attributes]:
        del module.__dict__[name]
    module.__dict__.update(attributes)
    module._buffers.clear()
    module._buffers.update(buffers)
    for value, content in contents.values():
        if isinstance(value, list):
            value[:] = content
        else:
            value.clear()
            value.update(content)
    return names


def _unchanged(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    return is_setting(a) and is_setting(b) and type(a) is type(b) and bool(a == b)


def carries(names: list[str]) -> str:
    """What to say of a forward that changes these attributes of its module."""
    return f"its forward changes self.{', self.'.join(names)}: it carries state from call to call"


def without_changes(root: nn.Module, run: Callable[[], Any]) -> Any:
    """What ``run`` gives, which calls ``root``.

    Raises:
        CaptureError: A module changed itself by it. What it changed is put back.
    """
    before = {name: (m, state_of(m)) for name, m in root.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    tensors = tensors_of(root)
    try:
        return run()
    finally:
        written = [*tensors.written(), *tensors.written_attributes()]
        changes = {name: names for name, (part, state) in before.items() if (names := put_back(part, state))}
        tensors.put_back()
        for name, names in changes.items():
            raise CaptureError(f"{name + ': ' if name else ''}{carries(names)}")
        if written:
            raise CaptureError(carries(written))


# ---- tensors, which a forward may also write into


def _modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, with the start of its buffers' names in the user's model.

    What this package put around modules of it is no part of the names.
    """
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        inside = _inside(module)
        if inside is not None:
            yield from visit(inside, prefix)
            return
        yield prefix, module
        for name, child in list(module._modules.items()):
            if child is not None:
                yield from visit(child, f"{prefix}{name}.")

    return visit(root, "")


def _inside(module: nn.Module) -> nn.Module | None:
    """The module that another one of this package stands for or around, None of any other."""
    if isinstance(module, Captured):
        return module.graph
    if isinstance(module, Positional):
        return module.module
    # a graph may have taken its place
    return module._modules.get("script") if isinstance(module, ScriptedChild) else None


def places(root: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Each buffer's name in the user's model, the module that has it, and its key there; those that are None, too."""
    for prefix, module in _modules(root):
        for key in list(module._buffers.keys()):
            yield prefix + key, module, key


@dataclass(frozen=True)
class _Kept:
    tensor: torch.Tensor | None
    version: int
    value: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> _Kept:
        return cls(tensor, _version(tensor), None if tensor is None else tensor.detach().clone())

    def is_written(self) -> bool:
        """Whether the tensor itself was written into, also with the values that it had."""
        if self.tensor is None or self.value is None:
            return False
        return _version(self.tensor) != self.version or not same(self.tensor, self.value)  # by way of .data

    def put_back(self) -> None:
        if self.tensor is not None and self.value is not None and self.is_written():
            with torch.no_grad():
                self.tensor.copy_(self.value)


@dataclass(frozen=True)
class Tensors:
    """The buffers of a module as they were at one time, and the tensors in its other attributes.

    Attributes:
        root: The module.
        buffers: By the names of :func:`places`.
        attributes: Name -> the tensors in what is no buffer.
    """

    root: nn.Module
    buffers: dict[str, tuple[nn.Module, str, _Kept]]
    attributes: dict[str, list[_Kept]]

    def written(self) -> list[str]:
        """The buffers that were assigned, or written into, since then: also with the values that they had."""
        found = [
            name
            for name, (owner, key, kept) in self.buffers.items()
            if _held(owner, key) is not kept.tensor or kept.is_written()
        ]
        return sorted(found + [name for name, _, _ in places(self.root) if name not in self.buffers])

    def written_attributes(self) -> list[str]:
        """What else was written into. What was assigned, :func:`changed` knows."""
        return [name for name, tensors in self.attributes.items() if any(kept.is_written() for kept in tensors)]

    def put_back(self) -> None:
        """Let all buffers be the same objects as then, and all tensors have the values of then."""
        for owner, key, kept in self.buffers.values():
            if _held(owner, key) is not kept.tensor:
                setattr(owner, key, kept.tensor)
            kept.put_back()
        for name, owner, key in list(places(self.root)):
            if name not in self.buffers:
                del owner._buffers[key]
        for tensors in self.attributes.values():
            for kept in tensors:
                kept.put_back()


def tensors_of(root: nn.Module) -> Tensors:
    """The buffers of ``root``, and the tensors in its attributes, as they are now."""
    buffers = {name: (owner, key, _Kept.of(owner._buffers[key])) for name, owner, key in places(root)}
    attributes: dict[str, list[_Kept]] = {}
    for prefix, module in _modules(root):
        for key, value in module.__dict__.items():
            if not key.startswith("_") and isinstance(value, (torch.Tensor, list, tuple, dict)):
                tensors = [x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor)]
                if tensors:
                    attributes[prefix + key] = [_Kept.of(tensor) for tensor in tensors]
    return Tensors(root, buffers, attributes)


def _held(owner: nn.Module, key: str) -> torch.Tensor | None:
    return owner._buffers[key] if key in owner._buffers else None


def _version(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


@contextlib.contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Put back, at the end, the buffers and attributes that ``root`` has changed by its calls."""
    before = {m: state_of(m) for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)}
    tensors = tensors_of(root)
    try:
        yield
    finally:
        for part, state in before.items():
            put_back(part, state)
        tensors.put_back()


def writers(root: nn.Module, call: Call) -> dict[str, list[str]]:
    """The submodules whose own forward, not that of one inside of them, writes tensors -> the names of those.

    Tensors are buffers, and what attributes hold.

    Args:
        root: Not changed: a copy runs.
        call: One call of it.
    """
    twin = copy.deepcopy(root)
    running: list[str] = []
    found: dict[str, list[str]] = {}
    last = tensors_of(twin)

    def note() -> None:
        nonlocal last
        if running and (names := [*last.written(), *last.written_attributes()]):
            found.setdefault(running[-1], []).extend(n for n in names if n not in found.get(running[-1], []))
            last = tensors_of(twin)

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note()
        running.append(name)

    def leave() -> None:
        note()
        running.pop()

    for name, module in list(twin.named_modules()):
        if not isinstance(module, torch.jit.ScriptModule):
            watch(module, name, enter, leave)
    given = copy.deepcopy(call)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin(*given.args, **given.keywords)
    return found
