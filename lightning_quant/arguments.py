"""How a call of ``forward`` becomes the inputs of a graph, and back.

A graph takes data (tensors, or containers of tensors) by position. A user's ``forward`` takes positional and keyword
arguments, with defaults and settings among them. An :class:`Interface` is the translation, made from one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_quant.errors import CaptureError


@dataclass(frozen=True)
class Call:
    """The arguments of one call of ``forward``."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments, never None."""
        return self.kwargs or {}


def is_data(value: Any) -> bool:
    """Whether an argument is data (a tensor, or a container with one in it), not a setting."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, dict):
        return any(is_data(v) for v in value.values())
    return isinstance(value, (list, tuple)) and any(is_data(v) for v in value)


def is_setting(value: Any) -> bool:
    """Whether an argument is a plain value that can be compared, or a container of such."""
    if isinstance(value, dict):
        return all(is_setting(v) for v in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_setting(v) for v in value)
    plain = (bool, int, float, complex, str, bytes, slice, range, Enum, torch.dtype, torch.device, torch.layout)
    return value is None or isinstance(value, plain)


def signature_of(module: nn.Module) -> inspect.Signature:
    """The signature of the class's ``forward`` without ``self``, whatever was bound to the instance."""
    signature = inspect.signature(type(module).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@dataclass(frozen=True)
class Interface:
    """The inputs of a graph, in order, and the values that every other parameter of ``forward`` has.

    Attributes:
        signature: Of ``forward``, without ``self``.
        inputs: Names of the data: a parameter's name, or ``args_0`` for the first one of ``*args``.
        constants: Parameters (and entries of ``**kwargs``) that are settings -> the value of the example call.
    """

    signature: inspect.Signature
    inputs: tuple[str, ...]
    constants: dict[str, Any]

    @classmethod
    def of(cls, signature: inspect.Signature, call: Call) -> Interface:
        """The interface that fits calls like ``call``.

        Raises:
            CaptureError: An argument is neither data nor a plain setting.
        """
        values = _named_values(signature, call.args, call.keywords)
        inputs = tuple(name for name, value in values.items() if is_data(value))
        for name, value in values.items():
            if name not in inputs and not is_setting(value):
                raise CaptureError(
                    f"its argument {name!r} is a {type(value).__name__}, which may hold tensors of its own"
                )
        return cls(signature, inputs, {name: value for name, value in values.items() if name not in inputs})

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The data of a call, in the order of ``inputs``.

        Raises:
            CaptureError: The call is not like the example: data is missing, or a setting has another value.
        """
        values = _named_values(self.signature, args, kwargs)
        for name, value in values.items():
            if name in self.inputs:
                continue
            if not is_setting(value) or name not in self.constants or not _same(value, self.constants[name]):
                how = f"with {name}={self.constants[name]!r}" if name in self.constants else f"without {name}"
                raise CaptureError(
                    f"forward was captured {how} and is called with {name}={_brief(value)}. An int8 graph has the "
                    "settings of the call that it was captured from: call it in that way, or leave this submodule in "
                    "float with QuantConfig(skip=...)."
                )
        for name in self.inputs:
            if not is_data(values.get(name)):
                raise CaptureError(
                    f"forward was captured with a tensor for {name!r} and is called without one. Call it with the same "
                    "arguments, or leave this submodule in float with QuantConfig(skip=...)."
                )
        return tuple(values[name] for name in self.inputs)

    def rebuild(self, data: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` for ``forward``: the reverse of :meth:`flatten`."""
        values = {**self.constants, **dict(zip(self.inputs, data, strict=True))}
        bound = self.signature.bind_partial()
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                indices = sorted(int(k.rpartition("_")[2]) for k in values if _is_positional(k, name))
                bound.arguments[name] = tuple(values[f"{name}_{i}"] for i in indices)
            elif parameter.kind is parameter.VAR_KEYWORD:
                known = self.signature.parameters
                variadic = [p for p, kind in known.items() if kind.kind is kind.VAR_POSITIONAL]
                bound.arguments[name] = {
                    k: v
                    for k, v in values.items()
                    if k not in known and not any(_is_positional(k, p) for p in variadic)
                }
            elif name in values:
                bound.arguments[name] = values[name]
        return bound.args, bound.kwargs


def _is_positional(name: str, parameter: str) -> bool:
    stem, _, number = name.rpartition("_")
    return stem == parameter and number.isdigit()


def _named_values(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        value = bound.arguments[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            values.update({f"{name}_{i}": v for i, v in enumerate(value)})
        elif parameter.kind is parameter.VAR_KEYWORD:
            values.update(value)
        else:
            values[name] = value
    return values


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


class Positional(nn.Module):
    """A module as a function of its data alone, by position: what exporters and graphs call.

    Args:
        module: Called through ``call``, with what the interface rebuilds.
        interface: Which of its arguments are data.
        call: How ``module`` is called. Default: ``module(*args, **kwargs)``.
    """

    def __init__(self, module: nn.Module, interface: Interface, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.module = module
        self.interface = interface
        self.call = call

    def forward(self, *data: Any) -> Any:
        """``module`` on ``data``."""
        args, kwargs = self.interface.rebuild(data)
        return self.call(self.module, *args, **kwargs) if self.call else self.module(*args, **kwargs)


class Captured(nn.Module):
    """A graph that is called as the module was from which it was captured: the reverse of :class:`Positional`."""

    def __init__(self, graph: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.graph = graph
        self.interface = interface

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The graph on the data of the call."""
        return self.graph(*self.interface.flatten(args, kwargs))


def batch_size(data: Any) -> int | None:
    """The number of rows of the first tensor that has a dimension, or None."""
    for x in tree_flatten(data)[0]:
        if isinstance(x, torch.Tensor) and x.dim():
            return int(x.shape[0])
    return None


def with_batch(data: tuple[Any, ...], size: int) -> tuple[Any, ...]:
    """``data`` with ``size`` rows, the first ones, repeated where there are too few.

    Rows are the first dimension of every tensor that has as many of them as the first tensor.
    """
    rows = batch_size(data)
    if not rows:
        return data
    index = torch.arange(size) % rows
    return tuple(
        tree_map(
            lambda x: x[index] if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == rows else x, list(data)
        )
    )
