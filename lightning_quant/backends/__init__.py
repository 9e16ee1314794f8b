"""Capture front ends, and the two verbs that are the same for all of them: :func:`prepare` and :func:`convert`.

A backend is a module of this package with the functions of :class:`~lightning_quant.backends.graph.Backend`, all on one
target. The functions here do a whole model: they find its targets and put each graph where its submodule was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import fx as torch_fx
from torch import nn

from lightning_quant.arguments import Call, Captured, Interface
from lightning_quant.backends.graph import Backend, Feasible, Prepared, info, is_graph, named, put, with_info
from lightning_quant.backends.initial import Watched, begin_again, remember
from lightning_quant.backends.normals import normals_of
from lightning_quant.backends.swapping import KEPT_WHOLE
from lightning_quant.backends.tracing import LAYER
from lightning_quant.capture import Capture, detached, find_targets, record_calls
from lightning_quant.config import SWAPPING, Method, ObserverName, QuantConfig, check_method, resolve
from lightning_quant.devices import CPU, device_of, on_cpu
from lightning_quant.errors import CaptureError, ConfigError
from lightning_quant.layers import check_bits, check_int8, left_float, nearest, relative
from lightning_quant.placement import imitate, uncompile
from lightning_quant.qconfig import own_classes


def backend_of(config: QuantConfig) -> Backend:
    """The module of this package that has the backend."""
    backend: Backend = import_module(f"{__name__}.{config.backend}")
    return backend


def check_classes(config: QuantConfig) -> None:
    """Refuse a user's own observers and fake quantizes that the backend cannot take.

    Raises:
        ConfigError: One derives from nothing that it knows.
        MissingExtraError: The backend needs a package that is not installed.
    """
    layers = [spec for layer in config.layers for spec in (layer.activation, layer.weight) if spec is not None]
    for spec in (config.activation, config.weight, *layers):
        if "." not in spec.observer + spec.fake_quantize:
            continue  # no need to import torchao
        if config.backend == "pt2e":
            from lightning_quant.backends import pt2e_quantizer

            pt2e_quantizer.own_classes(spec)
        else:
            own_classes(spec)


def as_call(example_inputs: Any) -> Call:
    """``example_inputs`` as the arguments of a call: a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(example_inputs, Call):
        return example_inputs
    if isinstance(example_inputs, dict):
        return Call((), detached(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return Call(tuple(detached(list(example_inputs))), {})
    return Call((detached(example_inputs),), {})


def prepare(model: nn.Module, config: QuantConfig | None = None, *, method: Method, example_inputs: Any) -> nn.Module:
    """Insert observers (``static``), fake quantizes (``qat``) or marks (``dynamic``) into a copy of ``model``.

    Args:
        model: Keeps its structure, buffers and mode. For ``qat`` its Parameter objects are also those of the result,
            so that training the result trains ``model``; for ``static`` and ``dynamic`` the result has copies.
        config: Default: ``QuantConfig()``.
        method: ``dynamic``, ``static`` or ``qat``.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments of ``model.forward``.

    Returns:
        A graph that takes the data among the arguments, by position or name, if the forward of ``model`` can be
        captured; else a copy of ``model`` in which the largest submodules that can be captured are graphs. It is on
        the device of ``model``.

    Raises:
        ConfigError: The backend cannot do ``method``, a pattern of the config matches nothing, or ``model`` is on
            several devices.
        CaptureError: Nothing that can be quantized was found.

    >>> import torch
    >>> prepared = prepare(torch.nn.Linear(4, 2), method="static", example_inputs=torch.randn(3, 4))
    >>> prepared(torch.randn(5, 4)).shape
    torch.Size([5, 2])
    """
    config = config or QuantConfig()
    check_method(config, method)
    device = device_of(model)
    call = as_call(example_inputs)
    watched = Watched()
    with on_cpu(model):
        recordings = record_calls(model, lambda twin: watched.run(twin, call.args, call.keywords))
        capture = capture_targets(model, recordings, config, method)
        memo: dict[int, Any] = {id(p): p for p in model.parameters()} if method == "qat" else {}
        twin = copy.deepcopy(model, memo)
        twin.train(method == "qat")
        uncompile(twin)
        graphs = {
            target.name: prepare_target(model, capture, target.name, config, method) for target in capture.targets
        }
        prepared = assemble(twin, graphs, {name: info(graph) for name, graph in graphs.items()})
        remember(prepared, watched.of(model, trained=method == "qat"))
    return prepared if device == CPU else prepared.to(device)


def inner_first(names: Iterable[str]) -> list[str]:
    """Names of submodules, each before those that it is inside of."""
    return sorted(names, key=lambda name: name.count(".") + bool(name), reverse=True)


def assemble(model: nn.Module, graphs: Mapping[str, nn.Module], infos: Mapping[str, Prepared]) -> nn.Module:
    """Put graphs into ``model``, which is changed in place, in the places of the submodules that they stand for.

    What the graph of a target keeps is taken from ``model`` too, with the graphs inside it.

    Args:
        model: Float, of the structure that the targets were captured from.
        graphs: Target name -> its graph.
        infos: Target name -> what is known of it.

    Returns:
        ``model``; or the graph of the target ``""``, which stands for all of it: bare, if it takes and returns what
        the forward of ``model`` does.
    """
    # the inner ones first: they are inside of what the outer ones keep
    for name in inner_first(graphs):
        graph, known = graphs[name], infos[name]
        for kept in known.kept:
            put(graph, kept, model.get_submodule(f"{name}.{kept}" if name else kept))
        if not name:
            return graph if known.interface.is_plain else Captured(graph, known.interface)
        put(model, name, stand_in(graph, known.interface, model.get_submodule(name)))
    return model


def capture_targets(
    model: nn.Module, recordings: Any, config: QuantConfig, method: Method, *, prefer_children: bool = False
) -> Capture:
    """:func:`lightning_quant.capture.find_targets` with the tracer of the config's backend."""
    backend = backend_of(config)
    layers = nearest(config.layers, model)
    # ranges do not matter yet, and those of a histogram cost more
    observer: ObserverName = "min_max" if method == "static" else "auto"
    own = config.activation.observer if "." in config.activation.observer else observer
    activation = replace(config.activation, observer=own)
    weight = config.weight if "." in config.weight.observer else replace(config.weight, observer=observer)
    trial = replace(config, targets=(), skip=(), activation=activation, weight=weight)
    whole = {name: KEPT_WHOLE for name, layer in layers.items() if layer.keep}

    def check(name: str, module: nn.Module, call: Call) -> Feasible:
        inside = relative(layers, name, LAYER)
        if config.backend not in SWAPPING and (keep := next((e.name for e in inside if e.keep), None)) is not None:
            raise CaptureError(f"{keep} is to be kept whole, and backend {config.backend!r} captures all that is in it")
        return backend.check(module, call, method, replace(trial, layers=inside))

    with on_cpu(model):
        found = find_targets(
            model,
            recordings,
            check,
            method=method,
            targets=config.targets,
            left=left_float(config, model),
            whole=whole,
            prefer_children=prefer_children,
        )
    check_int8(config, found.float_layers, model, method)
    check_bits(config, model)
    return replace(found, layers=layers)


def prepare_target(model: nn.Module, capture: Capture, name: str, config: QuantConfig, method: Method) -> Any:
    """The prepared graph of one target of ``model``: on the CPU, but for the Parameters that it shares with it."""
    target = next(t for t in capture.targets if t.name == name)
    own = replace(
        config, targets=(), skip=capture.relative_skips(target), layers=relative(capture.layers, target.name, LAYER)
    )
    module = model.get_submodule(name) if name else model  # a ScriptModule has no get_submodule
    with on_cpu(module):
        prepared = backend_of(config).prepare(module, own, method, target.call, between=target.between)
        if method == "static":
            with_info(prepared, replace(info(prepared), normals=normals_of(module, info(prepared))))
    inside = {f"{name}.{layer}" if name else layer: why for layer, why in info(prepared).float_layers.items()}
    check_int8(config, inside, model, method)
    return named(prepared, name)


def convert(prepared: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """The int8 model of a calibrated or trained ``prepared`` one, on the CPU in eval mode. ``prepared`` is unchanged.

    Args:
        prepared: From :func:`prepare`.
        config: None, or the one that ``prepared`` was prepared with.

    Raises:
        ConfigError: ``config`` is another one; or its corrections were not made.
        CaptureError: ``prepared`` does not come from :func:`prepare`.
        CalibrationError: An observer saw no data.
    """
    for module in prepared.modules():
        if is_graph(module) and info(module).config.corrections and not info(module).corrected:
            raise ConfigError(
                f"convert(prepared): its config asks for corrections {info(module).config.corrections!r}, which need "
                "data, and there were none. Call prepared = correct(prepared, batches) first."
            )
    return each_graph(prepared, config, convert_graph)


def stand_in(graph: nn.Module, interface: Interface, module: nn.Module) -> Captured:
    """A graph to be called in the place of ``module``, which looks like it to code that asks for ``weight.dtype``."""
    captured = Captured(graph, interface)
    imitate(captured, module)
    return captured


def convert_graph(prepared: nn.Module, kept: dict[str, nn.Module] | None = None) -> nn.Module:
    """The int8 graph of one prepared graph, by the backend that made it."""
    return backend_of(info(prepared).config).convert(prepared, kept)


def reference_graph(prepared: nn.Module, kept: dict[str, nn.Module] | None = None) -> torch_fx.GraphModule:
    """As :func:`convert_graph`, with explicit quantize and dequantize operators around float arithmetic."""
    return backend_of(info(prepared).config).reference(prepared, kept)


def graph_with_float_weights(
    prepared: nn.Module, kept: dict[str, nn.Module] | None = None
) -> tuple[torch_fx.GraphModule, dict[str, torch.Tensor]]:
    """As :func:`reference_graph`, with the float weights still there: in the graph, or beside it by layer."""
    return backend_of(info(prepared).config).with_float_weights(prepared, kept)


def reference(prepared: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """As :func:`convert`, with explicit quantize and dequantize operators around float arithmetic."""
    return each_graph(prepared, config, reference_graph)


def each_graph(
    prepared: nn.Module,
    config: QuantConfig | None,
    change: Callable[[Any, dict[str, nn.Module]], nn.Module],
) -> nn.Module:
    """A copy of what :func:`prepare` gave, on the CPU in eval mode, with each graph in it changed.

    Args:
        prepared: Not changed.
        config: None, or the one that ``prepared`` was prepared with.
        change: Given a prepared graph, and what stands in the places of the modules that it keeps.

    Raises:
        ConfigError: ``config`` is another one.
        CaptureError: ``prepared`` does not come from :func:`prepare`.
    """
    names = [name for name, module in prepared.named_modules() if is_graph(module)]
    if not names:
        raise CaptureError(f"{type(prepared).__name__} was not made by lightning_quant.prepare: prepare it first.")
    twin = copy.deepcopy(prepared).cpu().eval()
    begin_again(twin)
    # the inner ones first: they are inside of what the outer ones keep
    for name in inner_first(names):
        graph = twin.get_submodule(name)
        _check_same(graph, config)
        changed = change(graph, {kept: graph.get_submodule(kept) for kept in info(graph).kept})
        if not name:
            return changed
        put(twin, name, changed)
    return twin


def _check_same(graph: nn.Module, config: QuantConfig | None) -> None:
    if config is None:
        return
    used = info(graph).config
    given = replace(resolve(config), targets=(), skip=used.skip, layers=used.layers)
    if given.engine == "x86":  # it may have been narrowed to the one that works
        given = replace(given, engine=used.engine)
    if given != used:
        raise ConfigError(
            f"convert was given {given}, but the model was prepared with {used}. Prepare it with the former."
        )
