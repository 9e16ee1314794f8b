"""What a module changes of itself while it runs, and how it is put back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_quant.arguments import Call, Captured, Positional
from lightning_quant.capture import watch
from lightning_quant.errors import CaptureError
from lightning_quant.structures import is_setting

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
    buffers = buffers_of(root)
    try:
        return run()
    finally:
        written = buffers.written()
        changes = {name: names for name, (part, state) in before.items() if (names := put_back(part, state))}
        buffers.put_back()
        for name, names in changes.items():
            raise CaptureError(f"{name + ': ' if name else ''}{carries(names)}")
        if written:
            raise CaptureError(carries(written))


# ---- buffers, which a forward may also write into


def places(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """Each buffer's name, the module that has it, and its key there; those that are None, too.

    Names are those of the user's model: what this package put around its modules is no part of them.
    """
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, (Captured, Positional)):
            yield from visit(module.graph if isinstance(module, Captured) else module.module, prefix)
            return
        for key in list(module._buffers.keys()):
            yield prefix + key, module, key
        for name, child in list(module._modules.items()):
            if child is not None:
                yield from visit(child, f"{prefix}{name}.")

    return visit(root, prefix)


@dataclass(frozen=True)
class _Kept:
    owner: nn.Module
    key: str
    tensor: torch.Tensor | None
    version: int
    value: torch.Tensor | None


@dataclass(frozen=True)
class Buffers:
    """The buffers of a module as they were at one time, by the names of :func:`places`."""

    root: nn.Module
    kept: dict[str, _Kept]

    def written(self) -> list[str]:
        """Those that were assigned, or written into, since then: also with the values that they had."""
        found = [name for name, kept in self.kept.items() if _is_written(kept)]
        return sorted(found + [name for name, _, _ in places(self.root) if name not in self.kept])

    def put_back(self) -> None:
        """Let all of them have the values of then, and be the same objects."""
        for kept in self.kept.values():
            if not _is_written(kept):
                continue
            if _held(kept.owner, kept.key) is not kept.tensor:
                setattr(kept.owner, kept.key, kept.tensor)
            if kept.tensor is not None and kept.value is not None:
                with torch.no_grad():
                    kept.tensor.copy_(kept.value)
        for name, owner, key in list(places(self.root)):
            if name not in self.kept:
                del owner._buffers[key]


def buffers_of(root: nn.Module) -> Buffers:
    """The buffers of ``root`` as they are now."""
    kept = {}
    for name, owner, key in places(root):
        tensor = owner._buffers[key]
        value = None if tensor is None else tensor.detach().clone()
        kept[name] = _Kept(owner, key, tensor, _version(tensor), value)
    return Buffers(root, kept)


def _held(owner: nn.Module, key: str) -> torch.Tensor | None:
    return owner._buffers[key] if key in owner._buffers else None


def _version(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _is_written(kept: _Kept) -> bool:
    now = _held(kept.owner, kept.key)
    if now is not kept.tensor or _version(now) != kept.version:
        return True
    return now is not None and kept.value is not None and not same(now, kept.value)  # by way of .data


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, NaN among them, in one shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@contextlib.contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Put back, at the end, the buffers and attributes that ``root`` has changed by its calls."""
    before = {m: state_of(m) for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)}
    buffers = buffers_of(root)
    try:
        yield
    finally:
        for part, state in before.items():
            put_back(part, state)
        buffers.put_back()


def writers(root: nn.Module, call: Call) -> dict[str, list[str]]:
    """The submodules whose own forward, and not that of one inside of them, writes buffers -> which ones.

    Args:
        root: Not changed: a copy runs.
        call: One call of it.
    """
    twin = copy.deepcopy(root)
    running: list[str] = []
    found: dict[str, list[str]] = {}
    last = buffers_of(twin)

    def note() -> None:
        nonlocal last
        if running and (names := last.written()):
            found.setdefault(running[-1], []).extend(n for n in names if n not in found.get(running[-1], []))
            last = buffers_of(twin)

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
