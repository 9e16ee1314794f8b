"""Which submodules of a model are quantized, and what could not be captured, and why.

A *target* is a submodule that is quantized as one graph. Finding them is done in two steps that do not know each
other: :func:`record_calls` watches the model run once, and :func:`find_targets` reads from what was seen which
submodules can be replaced by a graph without anyone noticing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from lightning_quant.arguments import Call
from lightning_quant.config import Method, near
from lightning_quant.errors import CaptureError, ConfigError
from lightning_quant.qconfig import QUANTIZABLE, WEIGHTED


@dataclass(frozen=True)
class Recording:
    """What was seen of one submodule: its first call, and for each call the submodules that were running then."""

    call: Call
    within: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Target:
    """A submodule to quantize as one graph. ``name`` is ``""`` for the forward of the model itself."""

    name: str
    call: Call

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return self.name or "forward"


@dataclass(frozen=True)
class Capture:
    """The targets of a model, the names that are skipped in them, and the reasons for what stays float."""

    targets: tuple[Target, ...]
    skipped: frozenset[str]
    float_layers: dict[str, str]

    def relative_skips(self, target: Target) -> tuple[str, ...]:
        """The skipped names inside ``target``, as the target itself would write them."""
        if not target.name:
            return tuple(sorted(self.skipped))
        prefix = target.name + "."
        return tuple(sorted(name.removeprefix(prefix) for name in self.skipped if name.startswith(prefix)))


def detached(value: Any) -> Any:
    """``value`` with every tensor in it copied, detached and on the CPU."""
    return tree_map(lambda x: x.detach().clone().cpu() if isinstance(x, torch.Tensor) else x, value)


def record_calls(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, Recording]:
    """Run a copy of ``model`` once and say how each of its submodules was called.

    Args:
        model: Left as it is: the copy is run in eval mode on the CPU, without gradients.
        run: Called with the copy, e.g. a validation step.

    Returns:
        For the name of each submodule whose ``forward`` ran (``""`` for the model's own), what was seen.
    """
    twin = copy.deepcopy(model).cpu().eval()
    running: list[str] = []
    calls: dict[str, Call] = {}
    within: dict[str, list[frozenset[str]]] = {}

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in calls:
            calls[name] = Call(detached(args), detached(kwargs))
        within.setdefault(name, []).append(frozenset(running))
        running.append(name)

    for name, module in twin.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        _watch(module, name, enter, running.pop)
    with torch.no_grad():
        run(twin)
    return {name: Recording(call, tuple(within[name])) for name, call in calls.items()}


def _watch(
    module: nn.Module,
    name: str,
    enter: Callable[[str, tuple[Any, ...], dict[str, Any]], None],
    leave: Callable[[], object],
) -> None:
    """Call ``enter`` and ``leave`` around ``module.forward``, also where user code calls ``forward`` itself."""
    original = module.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        enter(name, args, kwargs)
        try:
            return original(*args, **kwargs)
        finally:
            leave()

    module.forward = MethodType(forward, module)


def matching(patterns: Iterable[str], names: Iterable[str], what: str) -> set[str]:
    """The names that one of the ``fnmatch`` patterns matches.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    names = [name for name in names if name]
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise ConfigError(f"QuantConfig({what}=...): {pattern!r} matches no submodule. {near(pattern, names)}")
        found.update(hits)
    return found


def is_left_alone(module: nn.Module) -> bool:
    """Metrics and losses: they measure the model, they are not part of it."""
    return isinstance(module, Metric) or isinstance(module, nn.modules.loss._Loss)


def weight_layers(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """The names of the layers with weights under ``model``, metrics and losses left out."""
    if is_left_alone(model):
        return
    if isinstance(model, WEIGHTED):
        yield prefix
        return
    for name, child in model.named_children():
        yield from weight_layers(child, f"{prefix}.{name}" if prefix else name)


def _own_layers(model: nn.Module) -> bool:
    """Whether ``model`` computes with layers or weights that are its own, not those of a child that has a forward."""
    if any(True for _ in model.parameters(recurse=False)):
        return True
    return any(isinstance(child, WEIGHTED) for child in model.children())


def _own_weights(module: nn.Module) -> bool:
    """Whether ``module`` may hold weights that it uses with functions, e.g. a Parameter for ``F.linear``.

    Layers of torch.nn that are not quantized (norms, embeddings) hold Parameters as well: those do not count.
    """
    return any(
        parameter.dim() >= 2
        for part in module.modules()
        if not type(part).__module__.startswith("torch.nn.")
        for parameter in part.parameters(recurse=False)
    )


def find_targets(
    model: nn.Module,
    recordings: dict[str, Recording],
    trace: Callable[[nn.Module, Call], object],
    *,
    method: Method,
    targets: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    prefer_children: bool = False,
) -> Capture:
    """Choose the largest submodules that a graph can stand for.

    A submodule is a target if its ``forward`` was called, if every layer with weights inside it ran only while that
    ``forward`` ran (else the graph would miss some of its calls), and if ``trace`` does not fail on it. Where it is
    not, its children are tried.

    Args:
        model: Not changed.
        recordings: From :func:`record_calls`.
        trace: The backend's. It raises :class:`CaptureError` for what it cannot capture.
        method: Which kinds of layers can be quantized depends on it.
        targets: Names or patterns to restrict the search to.
        skip: Names or patterns that stay float.
        prefer_children: For a LightningModule: its own forward is a target only if it has layers of its own.

    Raises:
        ConfigError: A pattern matches nothing.
        CaptureError: Nothing that can be quantized was found.
    """
    modules = dict(model.named_modules())
    skipped = matching(skip, modules, "skip")
    skipped |= {name for name in modules if any(name.startswith(s + ".") for s in skipped)}
    wanted = matching(targets, modules, "targets")
    kinds = QUANTIZABLE[method]
    found: list[Target] = []
    reasons: dict[str, str] = {name: "left float by 'skip'" for name in skipped}

    def visit(name: str, module: nn.Module, allowed: bool) -> None:
        allowed = allowed or name in wanted
        if is_left_alone(module) or name in skipped:
            return
        layers = [layer for layer in weight_layers(module, name) if layer not in skipped]
        if not any(isinstance(modules[layer], kinds) for layer in layers) and not _own_weights(module):
            return
        if allowed and not (not name and prefer_children and not _own_layers(module)):
            reason = _obstacle(name, module, layers, recordings, trace)
            if reason is None:
                found.append(Target(name, recordings[name].call))
                return
            reasons.update({layer: reason for layer in layers if layer == name})
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child, allowed)

    visit("", model, not wanted)
    if not found:
        details = "".join(f"\n  {layer}: {reason}" for layer, reason in sorted(reasons.items())[:10])
        raise CaptureError(
            f"{type(model).__name__} has nothing that can be quantized: no convolution or linear layer that its "
            f"forward reaches.{details}"
        )
    covered = {layer for t in found for layer in weight_layers(modules[t.name], t.name)}
    for layer in weight_layers(model):
        if layer not in covered and layer not in reasons:
            reasons[layer] = "never called by the validation step" if layer not in recordings else "not in a target"
    return Capture(
        tuple(found), frozenset(skipped), {k: v for k, v in reasons.items() if k in set(weight_layers(model))}
    )


def _obstacle(
    name: str,
    module: nn.Module,
    layers: list[str],
    recordings: dict[str, Recording],
    trace: Callable[[nn.Module, Call], object],
) -> str | None:
    """Why ``module`` cannot be replaced by a graph, or None."""
    if name not in recordings:
        return "its forward is never called by the validation step"
    for layer in layers:
        seen = recordings.get(layer)
        if layer != name and seen and not all(name in stack for stack in seen.within):
            return f"{layer} is also called from outside of it"
    try:
        trace(module, recordings[name].call)
    except CaptureError as error:
        return str(error)
    return None
