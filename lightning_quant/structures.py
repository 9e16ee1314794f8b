"""Containers of tensors taken apart into a flat list, and put together again.

Tuples, lists, dicts, named tuples and dataclasses (so also the ``ModelOutput`` of transformers, which is a dict and a
dataclass). What is inside is data (tensors) or a setting (a plain value that can be compared). torch's pytree knows
dataclasses only where somebody registered them, and has no word for a setting.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten

#: Plain values, which a graph takes as they were.
_PLAIN = (bool, int, float, complex, str, bytes, slice, range, Enum, torch.dtype, torch.device, torch.layout, type)


@dataclass(frozen=True)
class Leaf:
    """The place of data: a tensor, or a container of tensors that is not taken apart."""

    name: str


@dataclass(frozen=True)
class Setting:
    """A value that is no data, and is the same in every call."""

    value: Any


@dataclass(frozen=True)
class Container:
    """A container: its type, what its parts are called, and the parts."""

    type: Any
    keys: tuple[Any, ...]
    parts: tuple[Structure, ...]


Structure = Leaf | Setting | Container


class Mismatch(Exception):
    """A value does not have the structure that was expected. ``name`` says where, ``expected`` what was there."""

    def __init__(self, name: str, expected: Structure, value: Any) -> None:
        super().__init__(name)
        self.name, self.expected, self.value = name, expected, value


def is_data(value: Any) -> bool:
    """Whether ``value`` is a tensor, or a container with one in it."""
    if isinstance(value, (torch.Tensor, PackedSequence)):
        return True
    parts = _parts(value)
    return parts is not None and any(is_data(part) for _, part in parts)


def is_setting(value: Any) -> bool:
    """Whether ``value`` is plain and can be compared, or a container of such values."""
    if value is None or isinstance(value, _PLAIN):
        return True
    if isinstance(value, (set, frozenset)):
        return all(is_setting(v) for v in value)
    parts = _parts(value)
    return parts is not None and all(is_setting(part) for _, part in parts)


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """``(key, part)`` of each part of a container, or None for anything else."""
    if isinstance(value, PackedSequence):  # a named tuple whose constructor computes
        return None
    if isinstance(value, dict):  # before dataclasses: a ModelOutput leaves out the fields that are None
        return list(value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        if not all(field.init for field in fields):
            return None
        return [(field.name, getattr(value, field.name)) for field in fields]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    return None


def structure_of(value: Any, name: str) -> Structure:
    """The structure of ``value``; its leaves are called ``name``, or ``name_key`` inside a container.

    Raises:
        Mismatch: It is neither data nor a setting, nor a container of such.
    """
    if is_setting(value):
        return Setting(value)
    if isinstance(value, (torch.Tensor, PackedSequence)):
        return Leaf(name)
    parts = _parts(value)
    if parts is None:
        raise Mismatch(name, Leaf(name), value)
    inside = tuple(structure_of(part, _name(name, key)) for key, part in parts)
    if len(_leaves(inside)) == 1:  # one tensor needs no second name
        inside = tuple(_renamed(part, name) for part in inside)
    return Container(type(value), tuple(key for key, _ in parts), inside)


def _name(name: str, key: Any) -> str:
    word = "".join(c if c.isalnum() else "_" for c in str(key))
    return f"{name}_{word}"


def _leaves(parts: tuple[Structure, ...]) -> list[Leaf]:
    return [leaf for part in parts for leaf in leaves(part)]


def leaves(structure: Structure) -> Iterator[Leaf]:
    """The places of data, from left to right."""
    if isinstance(structure, Leaf):
        yield structure
    elif isinstance(structure, Container):
        for part in structure.parts:
            yield from leaves(part)


def settings(structure: Structure, name: str) -> Iterator[tuple[str, Any]]:
    """``(name, value)`` of every value that is no data."""
    if isinstance(structure, Setting):
        yield name, structure.value
    elif isinstance(structure, Container):
        for key, part in zip(structure.keys, structure.parts, strict=True):
            yield from settings(part, _name(name, key))


def _renamed(structure: Structure, name: str) -> Structure:
    if isinstance(structure, Leaf):
        return Leaf(name)
    if isinstance(structure, Container):
        return dataclasses.replace(structure, parts=tuple(_renamed(part, name) for part in structure.parts))
    return structure


def take_apart(structure: Structure, value: Any, name: str) -> Iterator[Any]:
    """The data in ``value``, in the order of :func:`leaves`.

    Raises:
        Mismatch: ``value`` does not have this structure.
    """
    if isinstance(structure, Leaf):
        if not is_data(value):
            raise Mismatch(name, structure, value)
        yield value
    elif isinstance(structure, Setting):
        if not is_setting(value) or not _same(value, structure.value):
            raise Mismatch(name, structure, value)
    else:
        parts = _parts(value)
        if parts is None or type(value) is not structure.type or {key for key, _ in parts} != set(structure.keys):
            raise Mismatch(name, structure, value)
        by_key = dict(parts)
        for key, part in zip(structure.keys, structure.parts, strict=True):
            yield from take_apart(part, by_key[key], _name(name, key))


def described(structure: Structure) -> Any:
    """A structure as JSON values: a leaf is its name, a setting is null, a container has ``keys`` and ``parts``."""
    if isinstance(structure, Leaf):
        return structure.name
    if isinstance(structure, Setting):
        return None
    return {"keys": list(structure.keys), "parts": [described(part) for part in structure.parts]}


def collect(description: Any, value: Any) -> Iterator[Any]:
    """The data in ``value``, which has the structure of which :func:`described` gave ``description``.

    Raises:
        KeyError: It has not.
    """
    if isinstance(description, str):
        yield value
    elif description is not None:
        parts = {str(key): part for key, part in _parts(value) or ()}
        for key, part in zip(description["keys"], description["parts"], strict=True):
            yield from collect(part, parts[str(key)])


def _same(a: Any, b: Any) -> bool:
    """Whether two settings are equal, types and NaN included, also inside of containers."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    ours, theirs = _parts(a), _parts(b)
    if ours is None or theirs is None:
        return bool(a == b) or (isinstance(a, float) and a != a and b != b)
    return len(ours) == len(theirs) and all(
        k == other and _same(x, y) for (k, x), (other, y) in zip(ours, theirs, strict=True)
    )


def put_together(structure: Structure, data: Iterator[Any]) -> Any:
    """A value of this structure with the next ones of ``data`` in the places of its leaves."""
    if isinstance(structure, Leaf):
        return next(data)
    if isinstance(structure, Setting):
        return structure.value
    parts = [put_together(part, data) for part in structure.parts]
    kind: Any = structure.type
    named = dict(zip(structure.keys, parts, strict=True))
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return kind(*parts)
    if dataclasses.is_dataclass(kind):
        build: Any = kind
        return build(**named)
    if issubclass(kind, dict):
        return OrderedDict(named) if issubclass(kind, OrderedDict) else named
    if not issubclass(kind, tuple):
        return parts
    try:  # torch.Size, and what torch.max gives
        return tuple(parts) if kind is tuple else kind(parts)
    except TypeError:
        return tuple(parts)


def plain(value: Any) -> Any:
    """What a graph and a file can return: tuples, lists and dicts in the place of other containers, and no None."""
    parts = _parts(value)
    if parts is None:
        return value
    inside = [(key, plain(part)) for key, part in parts if part is not None]
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
        return dict(inside)
    return [part for _, part in inside] if isinstance(value, list) else tuple(part for _, part in inside)


@dataclass(frozen=True)
class Shape:
    """What :func:`plain` took away from a value: the types of its containers. :meth:`restore` builds them again."""

    type: Any
    keys: tuple[Any, ...]
    parts: tuple[Shape | None, ...]
    absent: frozenset[Any] = frozenset()

    def restore(self, value: Any) -> Any:
        """The reverse of :func:`plain`, for a value with the same containers.

        Raises:
            KeyError: A part is missing.
            ValueError: There are more or fewer parts.
        """
        present = [key for key in self.keys if key not in self.absent]
        items = (
            {key: value[key] for key in present} if isinstance(value, dict) else dict(zip(present, value, strict=True))
        )
        parts = [
            None if key in self.absent else items[key] if part is None else part.restore(items[key])
            for key, part in zip(self.keys, self.parts, strict=True)
        ]
        inside: tuple[Structure, ...] = tuple(Leaf("") for _ in parts)
        return put_together(Container(self.type, self.keys, inside), iter(parts))


def shape_of(value: Any) -> Shape | None:
    """How to build ``value`` from ``plain(value)``, or None where they are the same."""
    found = _shape_of(value)
    return None if found is None or _is_plain(found) else found


def _shape_of(value: Any) -> Shape | None:
    parts = _parts(value)
    if parts is None:
        return None
    absent = frozenset(key for key, part in parts if part is None)
    return Shape(type(value), tuple(key for key, _ in parts), tuple(_shape_of(part) for _, part in parts), absent)


def _is_plain(shape: Shape) -> bool:
    if shape.type not in (tuple, list, dict) or shape.absent:
        return False
    return all(part is None or _is_plain(part) for part in shape.parts)


def agree(expected: Any, found: Any) -> bool:
    """Whether two outputs have one structure, and the same numbers but for rounding."""
    ours, spec = tree_flatten(expected)
    theirs, other = tree_flatten(found)
    if spec != other:
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            if not isinstance(b, torch.Tensor) or a.shape != b.shape:
                return False
            finite = a.isfinite()
            if not torch.equal(finite, b.isfinite()):
                return False
            error = (a[finite] - b[finite]).double().norm()
            # a wrong graph is wrong by much; another order of sums, amplified by a deep network, by little
            if error > 1e-3 * a[finite].double().norm() + 1e-7:
                return False
    return True


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, NaN among them, in one shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def all_same(before: Any, after: Any) -> bool:
    """Whether all tensors of two values of one structure are the :func:`same`."""
    pairs = zip(tree_flatten(before)[0], tree_flatten(after)[0], strict=True)
    return all(same(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
