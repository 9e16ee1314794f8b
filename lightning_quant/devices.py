"""Models on an accelerator: graphs are made from them on the CPU, and go where the model is."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from lightning_quant.errors import ConfigError

CPU = torch.device("cpu")


def device_of(model: nn.Module) -> torch.device:
    """Where the Parameters and buffers of ``model`` are; the CPU, if it has none.

    Raises:
        ConfigError: They are on several devices.
    """
    found = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise ConfigError(
            f"{type(model).__name__} is on several devices ({names}), and a graph is on one. Move it to one of them "
            "before it is prepared, e.g. model.cpu()."
        )
    return found.pop() if found else CPU


@contextlib.contextmanager
def on_cpu(model: nn.Module) -> Iterator[None]:
    """Let Parameters and buffers be on the CPU meanwhile; then they are where they were, the same tensors as before.

    Parameters stay the same objects all the while: what shares them shares them afterwards.
    """
    modules = list(model.modules())
    parameters = [(p, p.data) for p in model.parameters() if _is_away(p)]
    buffers = [(m, n, b) for m in modules for n, b in m._buffers.items() if b is not None and _is_away(b)]
    copies: dict[int, torch.Tensor] = {}
    try:
        for parameter, data in parameters:
            parameter.data = data.cpu()
        for module, name, buffer in buffers:
            module._buffers[name] = copies.setdefault(id(buffer), buffer.cpu())
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def _is_away(tensor: torch.Tensor) -> bool:
    return tensor.device.type not in ("cpu", "meta")
