"""How a call of ``forward`` becomes the inputs of a graph, and back.

A graph takes tensors by position, and gives tuples, lists and dicts of them. A user's ``forward`` takes positional and
keyword arguments with defaults, settings and containers among them, and may give an object of a class of its own. An
:class:`Interface` is the translation, made from one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from lightning_quant.errors import CaptureError
from lightning_quant.scripted import is_scripted, program_of, signature_of_program
from lightning_quant.structures import (
    Leaf,
    Mismatch,
    Setting,
    Shape,
    Structure,
    leaves,
    plain,
    put_together,
    structure_of,
    take_apart,
)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of ``forward``."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None

    @property
    def keywords(self) -> dict[str, Any]:
        """The keyword arguments, never None."""
        return self.kwargs or {}


def signature_of(module: nn.Module) -> inspect.Signature:
    """The signature of the class's ``forward`` without ``self``, whatever was bound to the instance."""
    if is_scripted(module):
        return signature_of_program(program_of(module))
    signature = inspect.signature(type(module).forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@dataclass(frozen=True)
class Interface:
    """The inputs of a graph, in order, and what every other parameter of ``forward`` is.

    Attributes:
        signature: Of ``forward``, without ``self``.
        structures: Parameter -> where its data is, and the values that are no data. Each of ``*args`` is called
            ``args_0`` and so on, each of ``**kwargs`` by its key.
        returns: How the module's output is built from what the graph returns; None: they are the same.
        owner: Name of the module, for messages; ``""`` for the model itself.
    """

    signature: inspect.Signature
    structures: dict[str, Structure]
    returns: Shape | None = None
    owner: str = ""

    @classmethod
    def of(cls, signature: inspect.Signature, call: Call) -> Interface:
        """The interface that fits calls like ``call``.

        Raises:
            CaptureError: An argument is neither data nor a plain setting.
        """
        values = _named_values(signature, call.args, call.keywords)
        structures: dict[str, Structure] = {}
        for name, value in values.items():
            try:
                structures[name] = structure_of(value, name)
            except Mismatch as error:
                raise CaptureError(
                    f"its argument {error.name!r} is a {type(error.value).__name__}, which may hold tensors of its own"
                ) from None
        interface = cls(signature, structures)
        if len(set(interface.inputs)) < len(interface.inputs):
            raise CaptureError(f"two of its inputs would have one name: {', '.join(interface.inputs)}")
        return interface

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the data: the parameter's, with the key or index behind it inside a container of several."""
        return tuple(leaf.name for structure in self.structures.values() for leaf in leaves(structure))

    @property
    def constants(self) -> dict[str, Any]:
        """Parameters that are settings -> the value of the example call."""
        return {name: s.value for name, s in self.structures.items() if isinstance(s, Setting)}

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The data of a call, in the order of ``inputs``.

        Raises:
            CaptureError: The call is not like the example: data is missing, or a setting has another value.
        """
        values = _named_values(self.signature, args, kwargs)
        data: list[Any] = []
        try:
            for name, value in values.items():
                if name not in self.structures:
                    raise Mismatch(name, Setting(inspect.Parameter.empty), value)
                data += take_apart(self.structures[name], value, name)
            missing = [name for name in self.structures if name not in values]
            if missing:
                raise Mismatch(missing[0], self.structures[missing[0]], None)
        except Mismatch as error:
            raise CaptureError(_refusal(error, f"{self.owner}.forward" if self.owner else "forward")) from None
        return tuple(data)

    def rebuild(self, data: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` for ``forward``: the reverse of :meth:`flatten`."""
        rest = iter(data)
        values = {name: put_together(structure, rest) for name, structure in self.structures.items()}
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

    @property
    def is_plain(self) -> bool:
        """Whether a graph takes and returns what ``forward`` does: tensors in, tuples, lists and dicts out."""
        return self.returns is None and all(isinstance(s, (Leaf, Setting)) for s in self.structures.values())

    def returning(self, shape: Shape | None) -> Interface:
        """This interface with another ``returns``."""
        return replace(self, returns=shape)

    def restore(self, output: Any) -> Any:
        """What ``forward`` would return, from what the graph returned."""
        return output if self.returns is None else self.returns.restore(output)


def _refusal(error: Mismatch, forward: str) -> str:
    remedy = "or leave this submodule in float with QuantConfig(skip=...)."
    if isinstance(error.expected, Leaf):
        return (
            f"{forward} was captured with a tensor for {error.name!r} and is called without one. Call it with the same "
            f"arguments, {remedy}"
        )
    if not isinstance(error.expected, Setting):
        parts = ", ".join(map(str, error.expected.keys))
        how = f"with a {error.expected.type.__name__} of {parts} for {error.name!r}"
        return (
            f"{forward} was captured {how} and is called with {error.name}={_brief(error.value)}. Call it with the "
            f"same arguments, {remedy}"
        )
    known = error.expected.value is not inspect.Parameter.empty
    how = f"with {error.name}={error.expected.value!r}" if known else f"without {error.name}"
    return (
        f"{forward} was captured {how} and is called with {error.name}={_brief(error.value)}. An int8 graph has the "
        f"settings of the call that it was captured from: call it in that way, {remedy}"
    )


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


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 80 else f"a {type(value).__name__}"


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
        """What ``module`` gives for ``data``, as tuples, lists and dicts."""
        args, kwargs = self.interface.rebuild(data)
        return plain(self.call(self.module, *args, **kwargs) if self.call else self.module(*args, **kwargs))


class Captured(nn.Module):
    """A graph that is called as the module was from which it was captured: the reverse of :class:`Positional`."""

    def __init__(self, graph: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.graph = graph
        self.interface = interface

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The graph on the data of the call."""
        return self.interface.restore(self.graph(*self.interface.flatten(args, kwargs)))


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
