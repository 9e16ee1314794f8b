"""What is known of the graph of one target, prepared or converted, whichever backend made it.

A graph is a module that takes the data of a call by position. Backends make it and convert it; everything else in the
package asks the functions here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import fx, nn

from lightning_quant._torch_ao import forget_models, is_fake_quantize, is_observer, quiet
from lightning_quant.arguments import Call, Interface
from lightning_quant.config import Method, QuantConfig
from lightning_quant.errors import CalibrationError, CaptureError, ConfigError
from lightning_quant.fusion import FusedGroup
from lightning_quant.placement import uncompile

_META = "lightning_quant"

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Correction:
    """What a correction after calibration did.

    Attributes:
        name: Of it, as in ``QuantConfig.corrections``.
        changes: How many of ``of`` were changed.
        of: What they are, in the plural.
    """

    name: str
    changes: int
    of: str


@dataclass(frozen=True)
class Normal:
    """How each channel is distributed that a layer gives, before its activation: as its folded batch norm leaves it.

    Attributes:
        mean: float64 on the CPU, ``(channels,)``. Not to be changed in place: copies of a graph share it.
        deviation: As ``mean``, the standard deviation.
    """

    mean: torch.Tensor
    deviation: torch.Tensor


@dataclass(frozen=True)
class Prepared:
    """What is known of a prepared or converted graph, kept in ``graph_module.meta``.

    Attributes:
        config: With engine and reduce_range resolved.
        method: dynamic, static or qat.
        interface: Which arguments of ``forward`` are inputs of the graph, and the values of the others.
        replaced: Names of the modules, parameters and buffers of the float model that the graph stands for.
        fused: What runs as one kernel.
        origins: Prepared module -> module of the float model of which it is another view.
        batch_norms: Prepared module that holds a batch norm -> that batch norm in the float model.
        kept: Submodules that the graph calls as they are -> why. Other graphs may stand inside them.
        float_layers: Layers with weights that stay float for a reason of their own -> that reason.
        swapped: Modules of a user's own in the graph -> the class that takes their place in the int8 model.
        weight_observers: Observers and fake quantizes of the graph that see weights, where these are not inside the
            layer that has the weight.
        corrected: What was corrected after calibration, in that order.
        normals: Layer with a weight into which a batch norm was folded, by its name -> how its output is distributed.
    """

    config: QuantConfig
    method: Method
    interface: Interface
    replaced: tuple[str, ...]
    fused: tuple[FusedGroup, ...] = ()
    origins: dict[str, str] = field(default_factory=dict)
    batch_norms: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)
    swapped: dict[str, str] = field(default_factory=dict)
    weight_observers: frozenset[str] = frozenset()
    corrected: tuple[Correction, ...] = ()
    normals: dict[str, Normal] = field(default_factory=dict, compare=False)  # tensors have no truth value


@dataclass(frozen=True)
class Feasible:
    """What a backend's ``check`` found out.

    Attributes:
        kept: The submodules that the graph has to call as they are -> why.
        between: Operators between the layers can run in int8; else one of them has no kernel for what it is given.
    """

    kept: dict[str, str]
    between: bool = True


class Backend(Protocol):
    """What a module of this package with a backend in it has. ``kept`` is what stands in the places of kept modules."""

    def check(self, model: nn.Module, call: Call, method: Method, config: QuantConfig) -> Feasible:
        """See whether ``model`` can be one graph; CaptureError where it cannot. ``config.skip`` are names in it."""

    def prepare(
        self, model: nn.Module, config: QuantConfig, method: Method, example: Call, *, between: bool = True
    ) -> nn.Module:
        """A graph of ``model`` with observers or fake quantizes. ``model`` keeps its structure, buffers and mode."""

    def convert(self, prepared: nn.Module, kept: dict[str, nn.Module] | None = None) -> nn.Module:
        """The int8 graph, on the CPU in eval mode. ``prepared`` is unchanged."""

    def reference(self, prepared: nn.Module, kept: dict[str, nn.Module] | None = None) -> fx.GraphModule:
        """The same as float arithmetic between quantize and dequantize operators."""

    def with_float_weights(
        self, prepared: nn.Module, kept: dict[str, nn.Module] | None = None
    ) -> tuple[fx.GraphModule, dict[str, torch.Tensor]]:
        """The same with the float weights: in the graph before they are rounded, or by the name of their layer.

        Of a graph that takes ranges at run time: the int8 graph, where there is no neutral form.
        """


def info(graph_module: nn.Module) -> Prepared:
    """What the backend noted about this graph.

    Raises:
        CaptureError: No backend made it.
    """
    found = graph_module.__dict__.get("meta", {}).get(_META)
    if not isinstance(found, Prepared):
        raise CaptureError(f"{type(graph_module).__name__} was not made by lightning_quant.prepare: prepare it first.")
    return found


def with_info(graph_module: Module, known: Prepared) -> Module:
    """Note what is known of a graph that a backend made."""
    meta: dict[str, Any] = graph_module.__dict__.setdefault("meta", {})
    meta[_META] = known
    return graph_module


def named(graph_module: Module, name: str) -> Module:
    """Let messages call the module that the graph stands for ``name``."""
    known = info(graph_module)
    return with_info(graph_module, replace(known, interface=replace(known.interface, owner=name)))


def is_graph(module: nn.Module) -> bool:
    """Whether ``module`` was made by a backend's ``prepare`` or ``convert``."""
    return _META in module.__dict__.get("meta", {})


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Run with this kernel library: the one for which weights are packed, and which fixes the choice of kernels."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def working(config: QuantConfig) -> Iterator[None]:
    """Torch.ao packs for the current engine, warns, draws random numbers for weights that it then fills, remembers."""
    try:
        with quiet(), engine(config.engine), torch.random.fork_rng(devices=[]):
            yield
    finally:
        forget_models()


def twin_of(model: nn.Module, *, share: bool) -> nn.Module:
    """A copy of the structure and the buffers of ``model``; of its Parameters only if not ``share``."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if share else {}
    twin = copy.deepcopy(model, memo)
    uncompile(twin)
    return twin


def link(prepared: nn.Module, model: nn.Module) -> None:
    """Let the prepared graph train ``model`` itself: use its batch norms, its other modules and its buffers.

    After this, a step of the prepared graph moves the running statistics of ``model``, and ``model``'s train and eval
    modes are those of the graph. Modules that only the prepared graph has (fake quantizes) stay its own.
    """
    known = info(prepared)
    for name in known.kept:
        put(prepared, name, model.get_submodule(name))
    modules = dict(model.named_modules())
    views = {**{name: name for name in modules if name}, **known.origins, **known.batch_norms}
    for name, module in list(prepared.named_modules(remove_duplicate=False)):
        origin = modules.get(views[name]) if name in views else None
        if origin is None or origin is module:
            continue
        is_leaf = not any(True for _ in module.children())
        is_view = getattr(module, "is_view", False)  # set apart on purpose, with settings of its own
        if type(module) is type(origin) and is_leaf and not is_view and origin is not model:
            put(prepared, name, origin)
            continue
        for registry, theirs in ((module._parameters, origin._parameters), (module._buffers, origin._buffers)):
            for key in registry.keys() & theirs.keys():
                registry[key] = theirs[key]


def followers(prepared: nn.Module, model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Batch norms of a linked graph that stand for one of ``model`` and are not the same object, and that one."""
    known = info(prepared)
    modules = dict(model.named_modules())
    views = {**known.origins, **known.batch_norms}
    pairs = [(module, modules.get(views[name])) for name, module in prepared.named_modules() if name in views]
    kind = nn.modules.batchnorm._BatchNorm
    return [(a, b) for a, b in pairs if isinstance(a, kind) and isinstance(b, kind) and a is not b]


def put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Let ``part`` be the submodule ``name`` of ``module``."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, part)


def own_modules(prepared: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The modules of a linked graph that ``model`` does not have."""
    theirs = {id(module) for module in model.modules()}
    return [module for module in prepared.modules() if id(module) not in theirs]


def observers(prepared: nn.Module) -> dict[str, nn.Module]:
    """The observers and fake quantizes of a prepared graph by name, activations and weights.

    Those of graphs inside of the modules that it keeps are not among them.
    """
    kept = tuple(f"{name}." for name in info(prepared).kept)
    return {
        name: module
        for name, module in prepared.named_modules()
        if is_observer(module) and not name.startswith(kept) and not _inside_fake_quantize(prepared, name)
    }


def _inside_fake_quantize(prepared: nn.Module, name: str) -> bool:
    return is_fake_quantize(prepared.get_submodule(name.rpartition(".")[0]))


def sees_weights(prepared: nn.Module, name: str) -> bool:
    """Whether one of :func:`observers` stands at a weight, which is known in full, and not at an activation."""
    return name.endswith("weight_fake_quant") or name in info(prepared).weight_observers


def is_initialised(prepared: nn.Module) -> bool:
    """Whether every observer of an activation has seen data."""
    return not _unseen(prepared)


def _unseen(prepared: nn.Module) -> list[str]:
    return [name for name, low in _lows(prepared) if low.numel() == 0 or bool(torch.isinf(low).any())]


def _lows(prepared: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and least value of each observer of an activation."""
    for name, module in observers(prepared).items():
        low = getattr(getattr(module, "activation_post_process", module), "min_val", None)
        if low is not None and not sees_weights(prepared, name):
            yield name, low


def check_seen(prepared: nn.Module) -> None:
    """Refuse to convert what was neither calibrated nor trained.

    Raises:
        CalibrationError: An observer saw no data, or has a range that is NaN.
    """
    if info(prepared).method == "dynamic":
        return
    if unseen := _unseen(prepared):
        raise unseen_error(unseen)
    nan = [name for name, low in _lows(prepared) if bool(torch.isnan(low).any())]
    if nan:
        raise CalibrationError(
            f"{len(nan)} observers have a range that is NaN (the first: {nan[0]}). An average of weights (EMA, SWA) "
            "has that if it began before they had seen data, because they begin at infinity. Let it begin after the "
            "first batch that ran quantized; with Lightning's WeightAveraging: by should_update."
        )


def unseen_error(names: list[str]) -> CalibrationError:
    """What to say of observers that saw no data."""
    return CalibrationError(
        f"{len(names)} observers saw no data (the first: {names[0]}), so that there are no ranges to quantize "
        "with. Run the prepared module on calibration data before convert; with the callbacks: the validation "
        "dataloader was empty, or the training ended before quantization began."
    )


def try_out(
    prepare: Callable[[], Module], convert: Callable[[Module], nn.Module], call: Call
) -> tuple[Module, nn.Module]:
    """Prepare, run, convert and run once, to see that it can be done.

    Args:
        prepare: Gives the prepared graph.
        convert: The backend's.
        call: What both are run on.

    Returns:
        The prepared graph and the converted one.

    Raises:
        CaptureError: One of the four steps failed.
    """
    try:
        prepared = prepare().eval()
        data = info(prepared).interface.flatten(call.args, call.keywords)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            prepared(*copy.deepcopy(data))
            converted = convert(prepared)
            with engine(info(converted).config.engine), quiet():
                converted(*copy.deepcopy(data))
    except (CaptureError, ConfigError):
        raise
    except Exception as error:  # torch's own failures, and those of its kernels: whatever they raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise CannotRun(f"torch.ao cannot run it: {type(error).__name__}: {reason}") from error
    return prepared, converted


class CannotRun(CaptureError):
    """It was captured, but the library that quantizes it failed."""


def place_of(node: fx.Node) -> str:
    """Name of the module, inside of what was exported, in whose forward a node of an exported graph stood."""
    stack = [
        path for path, _ in node.meta.get("nn_module_stack", {}).values() if not path.startswith("_empty_nn_module")
    ]
    return str(stack[-1]) if stack else ""
