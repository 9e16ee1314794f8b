"""Capture front ends, and the two verbs that are the same for all of them: :func:`prepare` and :func:`convert`.

A backend is a module with ``prepare(model, config, method, example)`` and ``convert(prepared)``, both on one target.
The functions here do a whole model: they find its targets and put each graph where its submodule was.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_quant.arguments import Call, Captured
from lightning_quant.backends import fx
from lightning_quant.capture import Capture, detached, find_targets, record_calls
from lightning_quant.config import Method, QuantConfig, check_method, resolve
from lightning_quant.errors import CaptureError, ConfigError


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
        A graph that takes the data among the arguments, by position, if ``model`` can be captured as a whole; else a
        copy of ``model`` in which the largest submodules that can be captured are graphs.

    Raises:
        ConfigError: The backend cannot do ``method``, or a pattern of the config matches nothing.
        CaptureError: Nothing that can be quantized was found.

    >>> import torch
    >>> prepared = prepare(torch.nn.Linear(4, 2), method="static", example_inputs=torch.randn(3, 4))
    >>> prepared(torch.randn(5, 4)).shape
    torch.Size([5, 2])
    """
    config = config or QuantConfig()
    check_method(config, method)
    call = as_call(example_inputs)
    recordings = record_calls(model, lambda twin: twin(*call.args, **call.keywords))
    capture = capture_targets(model, recordings, config, method)
    if [target.name for target in capture.targets] == [""]:
        return prepare_target(model, capture, capture.targets[0].name, config, method)
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if method == "qat" else {}
    twin = copy.deepcopy(model, memo)
    twin.train(method == "qat")
    for target in capture.targets:
        parent, _, child = target.name.rpartition(".")
        graph = prepare_target(model, capture, target.name, config, method)
        setattr(twin.get_submodule(parent), child, Captured(graph, fx.info(graph).interface))
    return twin


def capture_targets(
    model: nn.Module, recordings: Any, config: QuantConfig, method: Method, *, prefer_children: bool = False
) -> Capture:
    """:func:`lightning_quant.capture.find_targets` with the tracer of the config's backend."""
    return find_targets(
        model,
        recordings,
        lambda module, call: fx.check_traceable(module, call, method),
        method=method,
        targets=config.targets,
        skip=config.skip,
        prefer_children=prefer_children,
    )


def prepare_target(model: nn.Module, capture: Capture, name: str, config: QuantConfig, method: Method) -> Any:
    """The prepared graph of one target of ``model``."""
    target = next(t for t in capture.targets if t.name == name)
    own = replace(config, targets=(), skip=capture.relative_skips(target))
    return fx.prepare(model.get_submodule(name), own, method, target.call)


def convert(prepared: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """The int8 model of a calibrated or trained ``prepared`` one, on the CPU in eval mode. ``prepared`` is unchanged.

    Args:
        prepared: From :func:`prepare`.
        config: None, or the one that ``prepared`` was prepared with.

    Raises:
        ConfigError: ``config`` is another one.
        CaptureError: ``prepared`` does not come from :func:`prepare`.
        CalibrationError: An observer saw no data.
    """
    return _each_graph(prepared, config, fx.convert)


def reference(prepared: nn.Module, config: QuantConfig | None = None) -> nn.Module:
    """As :func:`convert`, with explicit quantize and dequantize operators around float arithmetic."""
    return _each_graph(prepared, config, fx.reference)


def _each_graph(prepared: nn.Module, config: QuantConfig | None, change: Any) -> nn.Module:
    if fx.is_graph(prepared):
        _check_same(prepared, config)
        changed: nn.Module = change(prepared)
        return changed
    names = [name for name, module in prepared.named_modules() if fx.is_graph(module)]
    if not names:
        raise CaptureError(f"{type(prepared).__name__} was not made by lightning_quant.prepare: prepare it first.")
    twin = copy.deepcopy(prepared).cpu().eval()
    for name in names:
        graph = prepared.get_submodule(name)
        _check_same(graph, config)
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, change(graph))
    return twin


def _check_same(graph: nn.Module, config: QuantConfig | None) -> None:
    if config is None:
        return
    used = fx.info(graph).config
    given = replace(resolve(config), targets=(), skip=used.skip)
    if given != used:
        raise ConfigError(
            f"convert was given {given}, but the model was prepared with {used}. Prepare it with the former."
        )
