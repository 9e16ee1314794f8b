"""What the backends that work on a traced graph do first, and what they all ask of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import fx, nn
from torch.nn import functional as F

from lightning_quant import qat_modules
from lightning_quant._torch_ao import BackendConfig, BackendPatternConfig, get_native_backend_config
from lightning_quant.arguments import Call
from lightning_quant.backends import embeddings, kernels, swapping
from lightning_quant.backends.graph import CannotRun, Feasible, info, try_out, twin_of
from lightning_quant.backends.tracing import Traced, trace
from lightning_quant.config import Method, QuantConfig, resolve
from lightning_quant.fusion import FusedGroup
from lightning_quant.qconfig import config_of_layer, largest_weight

Graph = TypeVar("Graph", bound=nn.Module)


@dataclass(frozen=True)
class Begun:
    """A traced graph, and what the int8 kernels of this machine say about its layers.

    Attributes:
        traced: The layers that have to stay float are among its ``float_layers``.
        config: Resolved, with the engine that runs the graph.
        narrow: Layers that need weights of 7 bits on this machine.
    """

    traced: Traced
    config: QuantConfig
    narrow: frozenset[str]


def begin(model: nn.Module, config: QuantConfig, method: Method, example: Call) -> Begun:
    """Trace a copy of ``model`` and choose the kernels. To be called while :func:`graph.working`.

    Args:
        model: Keeps its structure, buffers and mode. For ``qat`` its Parameter objects are those of the graph.
        config: As the user gave it; ``skip`` are names of submodules of ``model``.
        method: dynamic, static or qat.
        example: One call of ``model.forward``.

    Raises:
        CaptureError: ``forward`` cannot be traced.
    """
    asked, config = config, resolve(config)
    training = method == "qat"
    twin = twin_of(model, share=training)
    twin.train(training)
    traced = trace(twin, example, training=training, whole=swapping.whole(config))
    traced = swapping.with_observed(traced, config, training=training)
    skipped = {*config.skip, *(name for name, origin in traced.origins.items() if origin in config.skip)}
    reasons = embeddings.place(traced.graph_module, skipped, training=training)
    traced = replace(traced, float_layers=traced.float_layers | reasons)
    narrow: frozenset[str] = frozenset()
    if method != "dynamic":
        plan = kernels.plan(traced.graph_module, config, largest_weight(config), config.skip)
        config = kernels.with_engine(config, plan)
        traced = replace(traced, float_layers=traced.float_layers | plan.float_layers)
        # who says reduce_range=False may quantize for another machine
        narrow = plan.narrow if asked.reduce_range is None else narrow
    return Begun(traced, config, narrow)


def own_settings(begun: Begun) -> dict[str, QuantConfig]:
    """The modules of a graph that are not quantized as the rest is -> the config that is theirs."""
    traced, config = begun.traced, begun.config
    named = {layer.name for layer in config.layers if layer.activation or layer.weight}
    own: dict[str, QuantConfig] = {}
    for name, _ in traced.graph_module.named_modules():
        origin = traced.origins.get(name, name)
        if name in begun.narrow or name in named or origin in named:
            given = config_of_layer(config, name if name in named else origin)
            own[name] = replace(given, reduce_range=True) if name in begun.narrow else given
    return own


def feasible(prepare: Callable[[bool], Graph], convert: Callable[[Graph], nn.Module], call: Call) -> Feasible:
    """Prepare, run, convert and run once, to see that it can be done.

    Args:
        prepare: Gives the prepared graph; is told whether operators between the layers may run in int8.
        convert: The backend's.
        call: One call of the ``forward`` of the model.

    Raises:
        CaptureError: The model cannot be captured as one graph.
    """
    try:
        prepared, _ = try_out(lambda: prepare(True), convert, call)
    except CannotRun:
        # an operator between the layers has no kernel for what it is given
        prepared, _ = try_out(lambda: prepare(False), convert, call)
        return Feasible(info(prepared).kept, between=False)
    return Feasible(info(prepared).kept)


@functools.cache
def native_patterns(method: Method) -> BackendConfig:
    """Torch's table of the patterns that its int8 kernels run. Not to be changed: it is made once."""
    stock = _with_silu(get_native_backend_config())
    return qat_modules.with_own_modules(stock) if method == "qat" else stock


def _with_silu(config: BackendConfig) -> BackendConfig:
    """``config`` with SiLU as a step between integers, as hard swish is one.

    Torch has no int8 kernel for it, and computes it between a dequantize and a quantize. Other runtimes have one, and
    what reads its integers is in int8 everywhere: the pooling and the product of squeeze-and-excitation.
    """
    like = next(c for c in config.configs if c.pattern is nn.Hardswish)
    more = [BackendPatternConfig.from_dict({**like.to_dict(), "pattern": kind}) for kind in (nn.SiLU, F.silu)]
    return BackendConfig(config.name).set_backend_pattern_configs([*config.configs, *more])


def float_names(traced: Traced, config: QuantConfig) -> set[str]:
    """Modules of a traced graph that stay float with all that is inside of them: skipped, kept, or without a kernel."""
    skipped = (*config.skip, *(name for name, origin in traced.origins.items() if origin in config.skip))
    # torch.ao looks into modules that no pattern of it matches
    alone = tuple(f"{name}." for name in (*traced.kept, *traced.float_layers, *traced.swapped))
    inside = (name for name, _ in traced.graph_module.named_modules() if f"{name}.".startswith(alone))
    return {*skipped, *inside}


def is_inside(node: fx.Node, scopes: Mapping[str, tuple[str, type]], names: Collection[str]) -> bool:
    """Whether ``node`` calls one of the modules ``names``, or was traced inside of one."""
    place = str(node.target) if node.op == "call_module" else scopes.get(node.name, ("",))[0]
    return any(place == name or place.startswith(name + ".") for name in names)


def batch_norms_inside(prepared: nn.Module, traced: Traced, groups: tuple[FusedGroup, ...]) -> dict[str, str]:
    """Each batch norm that still stands inside of a fused module -> the one of the float model that it is."""
    return {part: traced.origins.get(member, member) for group in groups for part, member in _inside(prepared, group)}


def _inside(prepared: nn.Module, group: FusedGroup) -> Iterator[tuple[str, str]]:
    name = group.members[0]
    fused = _get(prepared, name)
    if isinstance(fused, qat_modules.WITH_BATCH_NORM) and len(group.members) > 1:
        yield f"{name}.bn", group.members[1]
    elif isinstance(fused, nn.Sequential):
        for number, (part, member) in enumerate(zip(fused, group.members, strict=False)):
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                yield f"{name}.{number}", member


def _get(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None
