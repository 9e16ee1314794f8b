"""What a module changes of itself while it runs, and how it is put back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_quant.errors import CaptureError
from lightning_quant.structures import is_setting

_State = tuple[dict[str, Any], dict[str, Any], dict[int, tuple[Any, Any]]]


def state_of(module: nn.Module) -> _State:
    """The attributes and buffers of ``module``, and the contents of the lists and dicts among them."""
    attributes = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
    contents = {id(v): (v, copy.copy(v)) for v in attributes.values() if type(v) in (list, dict)}
    return attributes, dict(module._buffers), contents


def put_back(module: nn.Module, state: _State) -> list[str]:
    """The names of what ``module`` changed of itself since, which is put back."""
    attributes, buffers, contents = state
    now = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
    changed = [k for k in now.keys() | attributes.keys() if not _unchanged(now.get(k), attributes.get(k))]
    changed += [k for k in module._buffers if module._buffers[k] is not buffers.get(k)]
    changed += [k for k, v in attributes.items() if id(v) in contents and not _unchanged(v, contents[id(v)][1])]
    for name in now.keys() - attributes.keys():
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
    return sorted(set(changed))


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
    try:
        return run()
    finally:
        changes = {name: changed for name, (part, state) in before.items() if (changed := put_back(part, state))}
        for name, changed in changes.items():
            raise CaptureError(f"{name + ': ' if name else ''}{carries(changed)}")
