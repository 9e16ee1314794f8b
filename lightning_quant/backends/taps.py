"""Where a prepared graph gives what a layer of the float model gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx

from lightning_quant._torch_ao import is_observer
from lightning_quant.backends.graph import info, place_of
from lightning_quant.errors import ConfigError


@dataclass(frozen=True)
class Tap:
    """A module of a graph whose output is that of a layer, rounded.

    Attributes:
        name: In the graph.
        call: Which of its calls in one pass; tensors may share a fake quantize.
        clamp: ``(least, most)``: what it clamps to while it rounds, for an activation function that it stands for.
    """

    name: str
    call: int = 0
    clamp: tuple[float, float] = (-math.inf, math.inf)


def tap(prepared: Any, layer: str) -> Tap:
    """Where the output of ``layer``, a module inside of the target, can be read.

    Args:
        prepared: A graph that was prepared for ``qat``.
        layer: Its name in the float target. Of what is fused into one kernel, the last one.

    Raises:
        ConfigError: Nothing in the graph gives what it gives.
    """
    node = _last_node(prepared, layer)
    reader = None if node is None else _reader(prepared, node)
    if reader is None:
        known = info(prepared)
        group = next((group for group in known.fused if layer in group.members), None)
        inside = f" It runs as one kernel: {group}. Name the last module of these." if group else ""
        raise ConfigError(
            f"Distillation(features=...): what {layer!r} gives is not there in the quantized graph.{inside} Name a "
            "layer whose output is rounded, such as a block."
        )
    module = prepared.get_submodule(str(reader.target))
    calls = [n for n in prepared.graph.nodes if n.op == "call_module" and prepared.get_submodule(n.target) is module]
    rounding = module if is_observer(module) else getattr(module, "activation_post_process", None)
    return Tap(str(reader.target), calls.index(reader), getattr(rounding, "clamp", Tap.clamp))


def _last_node(prepared: Any, layer: str) -> fx.Node | None:
    """The last node of a layer, or of the kernel that it is the end of."""
    known = info(prepared)
    place = layer
    for group in known.fused:
        modules = [member for member in group.members if member in known.replaced]  # others are functions
        if layer in modules and known.config.backend != "pt2e":
            if layer != modules[-1]:
                return None
            place = group.members[0]
    found = None
    for node in prepared.graph.nodes:
        called = node.op == "call_module"
        if node.op not in ("call_module", "call_function", "call_method"):
            continue
        if called and is_observer(prepared.get_submodule(str(node.target))):
            continue
        own = place_of(node) or (str(node.target) if called else "")
        if own == place or own.startswith(f"{place}."):
            found = node
    return found


def _reader(prepared: Any, node: fx.Node) -> fx.Node | None:
    """What can be listened to: the fake quantize behind a node, else the module that it calls."""
    for user in node.users:
        if user.op == "call_module" and is_observer(prepared.get_submodule(str(user.target))):
            return user
    return node if node.op == "call_module" else None
