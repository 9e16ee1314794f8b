"""Which submodules of a model are quantized, and what could not be captured, and why.

A *target* is a submodule that is quantized as one graph. Finding them is done in two steps that do not know each
other: :func:`record_calls` watches the model run once, and :func:`find_targets` reads from what was seen which
submodules can be replaced by a graph without anyone noticing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from lightning_quant.arguments import Call, Interface, signature_of
from lightning_quant.config import LayerConfig, Method, near
from lightning_quant.errors import CaptureError, ConfigError
from lightning_quant.modes import without_fast_path
from lightning_quant.placement import is_compiled
from lightning_quant.qconfig import EMBEDDINGS, QUANTIZABLE, WEIGHTED
from lightning_quant.scripted import is_scripted, opened_copy
from lightning_quant.structures import settings


@dataclass(frozen=True)
class Recording:
    """What was seen of one submodule.

    Attributes:
        call: The first call.
        within: For each call, the submodules that were running then.
        ways: How its calls differ in more than their data, one text for each way; a single one if they do not.
        free_dims: For each input, the dimensions that had another size in another call.
    """

    call: Call
    within: tuple[frozenset[str], ...]
    ways: tuple[str, ...] = ("",)
    free_dims: tuple[tuple[int, ...], ...] = ()


class Found(Protocol):
    """What a backend finds out by trying a submodule."""

    @property
    def kept(self) -> dict[str, str]:
        """Submodules that a graph would call as they are -> why."""

    @property
    def between(self) -> bool:
        """Whether operators between layers can run in int8."""


@dataclass(frozen=True)
class Target:
    """A submodule to quantize as one graph.

    Attributes:
        name: ``""`` for the forward of the model itself.
        call: One call of it.
        kept: Names, relative to it, of the submodules that its graph calls as they are -> why. Targets may be inside.
        between: Operators between its layers can run in int8.
        free_dims: For each input, the dimensions that have other sizes in other calls.
    """

    name: str
    call: Call
    kept: dict[str, str] = field(default_factory=dict)
    between: bool = True
    free_dims: tuple[tuple[int, ...], ...] = ()

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return self.name or "forward"


@dataclass(frozen=True)
class Capture:
    """What is quantized of a model.

    Attributes:
        targets: The submodules.
        skipped: Names that stay float, in targets or around them.
        float_layers: Layer with weights that stays float -> why.
        layers: Submodule -> its own settings (from :func:`lightning_quant.layers.nearest`).
    """

    targets: tuple[Target, ...]
    skipped: frozenset[str]
    float_layers: dict[str, str]
    layers: dict[str, LayerConfig] = field(default_factory=dict)

    def relative_skips(self, target: Target) -> tuple[str, ...]:
        """The skipped names inside ``target``, as the target itself would write them."""
        if not target.name:
            return tuple(sorted(self.skipped))
        prefix = target.name + "."
        return tuple(sorted(name.removeprefix(prefix) for name in self.skipped if name.startswith(prefix)))


LEFT_BY_SKIP = "left float by 'skip'"

#: The attribute of an exception that names the innermost submodule that raised it.
FAILED_IN = "_lightning_quant_failed_in"


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
    twin = opened_copy(model).cpu().eval()
    running: list[str] = []
    calls: dict[str, Call] = {}
    ways: dict[str, list[str]] = {}
    sizes: dict[str, set[tuple[tuple[int, ...], ...]]] = {}
    within: dict[str, list[frozenset[str]]] = {}

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in calls:
            calls[name] = Call(detached(args), detached(kwargs))
        way, shapes = _way(modules[name], args, kwargs)
        if way not in ways.setdefault(name, []):
            ways[name].append(way)
        sizes.setdefault(name, set()).add(shapes)
        within.setdefault(name, []).append(frozenset(running))
        running.append(name)

    modules = dict(twin.named_modules())
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        watch(module, name, enter, running.pop)
    with torch.no_grad(), without_fast_path():  # which calls no layer inside of attention
        run(twin)
    return {
        name: Recording(call, tuple(within[name]), tuple(ways[name]), _free_dims(sizes[name]))
        for name, call in calls.items()
    }


def _free_dims(sizes: set[tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
    first = next(iter(sizes))
    if any([len(x) for x in other] != [len(x) for x in first] for other in sizes):
        return ()  # its calls differ in more than their sizes
    return tuple(
        tuple(dim for dim in range(len(shape)) if len({other[i][dim] for other in sizes}) > 1)
        for i, shape in enumerate(first)
    )


def _way(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """What a call passes besides its data, and the shapes of the data."""
    try:
        interface = Interface.of(signature_of(module), Call(args, kwargs))
    except (CaptureError, TypeError):  # no target anyway: it takes what a graph cannot
        return "", ()
    shapes = tuple(tuple(getattr(x, "shape", ())) for x in interface.flatten(args, kwargs))
    fixed = [pair for name, structure in interface.structures.items() for pair in settings(structure, name)]
    return ", ".join([*interface.inputs, *(f"{name}={value!r}" for name, value in fixed)]), shapes


def watch(
    module: nn.Module,
    name: str,
    enter: Callable[[str, tuple[Any, ...], dict[str, Any]], None],
    leave: Callable[[], object],
) -> None:
    """Call ``enter`` and ``leave`` around ``module.forward``, also where user code calls ``forward`` itself."""
    original: Any = module._orig_mod if is_compiled(module) else module.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        enter(name, args, kwargs)
        try:
            return original(*args, **kwargs)
        except Exception as error:
            if not hasattr(error, FAILED_IN):
                setattr(error, FAILED_IN, name)
            raise
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


def _own_weights(module: nn.Module, kept: Collection[str] = ()) -> bool:
    """Whether ``module`` may hold weights that it uses with functions, e.g. a Parameter for ``F.linear``.

    Layers of torch.nn that are not quantized (norms, embeddings) hold Parameters as well: those do not count, nor do
    those inside of the submodules ``kept``.
    """
    outside = tuple(f"{name}." for name in kept)
    return any(
        parameter.dim() >= 2
        for name, part in module.named_modules()
        if not type(part).__module__.startswith("torch.nn.") and not f"{name}.".startswith(outside)
        for parameter in part.parameters(recurse=False)
    )


def find_targets(
    model: nn.Module,
    recordings: dict[str, Recording],
    trace: Callable[[str, nn.Module, Call], Found],
    *,
    method: Method,
    targets: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    left: Mapping[str, str] = {},
    whole: Mapping[str, str] = {},
    prefer_children: bool = False,
) -> Capture:
    """Choose the largest submodules that a graph can stand for.

    A submodule is a target if its ``forward`` was called, if every layer with weights inside it ran only while that
    ``forward`` ran (else the graph would miss some of its calls), and if ``trace`` does not fail on it. Where it is
    not, its children are tried; so are the children of what the graph of a target calls as it is.

    Args:
        model: Not changed.
        recordings: From :func:`record_calls`.
        trace: The backend's, with the name of the submodule. It gives the submodules that the graph calls as they
            are, and raises :class:`CaptureError` where the forward itself cannot be captured.
        method: Which kinds of layers can be quantized depends on it.
        targets: Names or patterns to restrict the search to.
        skip: Names or patterns that stay float, with all that is inside.
        left: Names of further submodules that stay float, each for itself -> why.
        whole: Names of submodules that are called as they are -> why. Nothing inside them is a target.
        prefer_children: For a LightningModule: its own forward is a target only if it has layers of its own.

    Raises:
        ConfigError: A pattern matches nothing.
        CaptureError: Nothing that can be quantized was found.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    skipped = matching(skip, modules, "skip")
    skipped |= {name for name in modules if any(name.startswith(s + ".") for s in skipped)}
    wanted = matching(targets, modules, "targets")
    kinds = QUANTIZABLE[method]
    found: list[Target] = []
    reasons: dict[str, str] = {**{name: LEFT_BY_SKIP for name in skipped}, **left}
    skipped |= left.keys()

    def visit(name: str, module: nn.Module, allowed: bool) -> None:
        allowed = allowed or name in wanted
        if is_left_alone(module) or name in skipped:
            return
        if name in whole:
            reasons.update({layer: whole[name] for layer in weight_layers(module, name)})
            return
        if name in copies and name not in wanted:
            obstacles[name] = copies[name]
            reasons.update({layer: copies[name] for layer in weight_layers(module, name)})
            return
        layers = [layer for layer in weight_layers(module, name) if layer not in skipped]
        if not any(isinstance(modules[layer], kinds) for layer in layers) and not _own_weights(module):
            return
        if allowed and not (not name and prefer_children and not _own_layers(module)):
            result = _attempt(name, module, layers, recordings, trace)
            if not isinstance(result, str):
                seen = recordings[name]
                target = Target(name, seen.call, result.kept, result.between, seen.free_dims)
                own = [layer for layer in layers if not _is_kept(layer, target)]
                if any(isinstance(modules[layer], kinds) for layer in own) or _own_weights(module, result.kept):
                    found.append(target)
                for kept, reason in result.kept.items():
                    inside = _join(name, kept)
                    reasons.setdefault(inside, reason)
                    if inside not in whole:
                        visit_children(inside, modules[inside])
                return
            obstacles[name] = result
            reasons.update({layer: result for layer in layers if layer == name})
        if is_scripted(module):
            return  # its parts have no calls of their own
        visit_children(name, module, allowed)

    def visit_children(name: str, module: nn.Module, allowed: bool = True) -> None:
        for child_name, child in module.named_children():
            visit(_join(name, child_name), child, allowed)

    obstacles: dict[str, str] = {}
    copies = _copies(model, recordings) if prefer_children else {}
    visit("", model, not wanted)
    if not found:
        known = {**obstacles, **dict(sorted(reasons.items()))}
        details = "".join(f"\n  {name or 'forward'}: {reason}" for name, reason in list(known.items())[:10])
        raise CaptureError(
            f"{type(model).__name__} has nothing that can be quantized: no convolution or linear layer that its "
            f"forward reaches.{details}"
        )
    found = [t for t in found if not _is_part_of_another(t, found, modules, recordings)]
    covered = set()
    for t in found:
        for layer in weight_layers(modules[t.name], t.name):
            if layer != t.name and _is_looked_up_before(layer, t.name, modules[t.name], recordings):
                reasons.setdefault(layer, f"it is called from outside of {t.label}, which holds it")
            elif not _is_kept(layer, t):
                covered.add(layer)
    for layer in weight_layers(model):
        if layer not in covered and layer not in reasons:
            around = [reason for name, reason in reasons.items() if layer.startswith(name + ".")]
            called = "not in a target" if not around else around[-1]
            reasons[layer] = called if layer in recordings else "never called by the validation step"
    return Capture(
        tuple(found), frozenset(skipped), {k: v for k, v in reasons.items() if k in set(weight_layers(model))}
    )


def _is_part_of_another(
    target: Target, found: list[Target], modules: dict[str, nn.Module], recordings: dict[str, Recording]
) -> bool:
    """Whether a shared module is reached by its other name only, inside of a graph that has it as a part."""
    stacks = recordings[target.name].within
    for other in found:
        parts = dict(modules[other.name].named_modules(remove_duplicate=False))
        inside = any(
            part is modules[target.name] and not _is_kept(_join(other.name, name), other)
            for name, part in parts.items()
            if name
        )
        if other is not target and inside and stacks and all(other.name in stack for stack in stacks):
            return True
    return False


def _copies(model: nn.Module, recordings: dict[str, Recording]) -> dict[str, str]:
    """Children of a LightningModule that are held beside what is trained: teachers, and averages of its weights."""
    found: dict[str, str] = {}
    children = dict(model.named_children())
    trained = [child for child in children.values() if any(p.requires_grad for p in child.parameters())]
    for name, child in children.items():
        if isinstance(child, AveragedModel):
            found[name] = "an average of weights that are held elsewhere; name it in 'targets' to quantize it"
        if not trained or child in trained or not any(True for _ in child.parameters()):
            continue
        shapes = {key: x.shape for key, x in child.state_dict().items()}
        twin = any({k: x.shape for k, x in other.state_dict().items()} == shapes for other in trained)
        seen = recordings.get(name)
        apart = "" in recordings and seen is not None and not any("" in stack for stack in seen.within)
        if twin or apart:
            found[name] = (
                f"frozen, and {'a copy of what is trained' if twin else 'not part of forward'}: a teacher or an "
                "average; name it in 'targets' to quantize it"
            )
    return found


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _is_kept(layer: str, target: Target) -> bool:
    return any(layer == _join(target.name, k) or layer.startswith(_join(target.name, k) + ".") for k in target.kept)


def _is_looked_up_before(layer: str, name: str, module: nn.Module, recordings: dict[str, Recording]) -> bool:
    """Whether an embedding is held by ``module`` for its callers, who hand in its rows: then it is in no graph."""
    inside = layer.removeprefix(name + ".") if name else layer
    seen = recordings.get(layer)
    if seen is None or not isinstance(module.get_submodule(inside), EMBEDDINGS):
        return False
    return not any(name in stack for stack in seen.within)


def _attempt(
    name: str,
    module: nn.Module,
    layers: list[str],
    recordings: dict[str, Recording],
    trace: Callable[[str, nn.Module, Call], Found],
) -> Found | str:
    """What a graph in the place of ``module`` calls as it is, or why there cannot be one."""
    if is_compiled(module):
        return "it is compiled: what it was compiled from is quantized"
    if name not in recordings:
        return "its forward is never called by the validation step"
    for layer in layers:
        seen = recordings.get(layer)
        if layer != name and seen and not all(name in stack for stack in seen.within):
            if _is_looked_up_before(layer, name, module, recordings):
                continue
            return f"{layer} is also called from outside of it"
    if len(recordings[name].ways) > 1:
        return f"it is called in different ways: ({'), ('.join(recordings[name].ways)})"
    try:
        return trace(name, module, recordings[name].call)
    except CaptureError as error:
        return str(error)
