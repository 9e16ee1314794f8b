"""Containers taken apart and put together: nothing is lost, nothing is copied, and what differs is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_quant.structures import (
    Container,
    Leaf,
    Mismatch,
    Setting,
    collect,
    described,
    is_data,
    is_setting,
    leaves,
    plain,
    put_together,
    shape_of,
    structure_of,
    take_apart,
)

A, B, C = (torch.tensor(float(i)) for i in range(3))


class Side(Enum):
    LEFT = 1


class Pair(NamedTuple):
    first: Any
    second: Any = None


@dataclasses.dataclass
class Boxes:
    corners: Any
    label: Any = "box"


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any


@dataclasses.dataclass
class Output(OrderedDict):
    """As a ``ModelOutput`` of transformers: a dataclass whose keys are those of its fields that are not None."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value


@dataclasses.dataclass
class Derived:
    """Its constructor does not take all of its fields."""

    value: Any
    twice: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.twice = self.value + self.value


def packed() -> PackedSequence:
    return pack_sequence([torch.ones(2, 3), torch.ones(1, 3)])


def containers(part: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.one_of(st.text("ab_ .", max_size=2), st.integers(0, 3))
    # not None: an Output leaves it out
    some = part.filter(lambda value: value is not None)
    return st.one_of(
        st.lists(part, max_size=3),
        st.lists(part, max_size=3).map(tuple),
        st.dictionaries(keys, part, max_size=3),
        st.dictionaries(keys, part, max_size=3).map(OrderedDict),
        st.builds(Pair, part, part),
        st.builds(Boxes, part, part),
        st.builds(Frozen, part),
        st.builds(Output, some, part),
    )


TENSORS = st.one_of(st.builds(lambda: torch.zeros(2)), st.builds(packed))
PLAIN = st.sampled_from(
    [None, True, 0, 1.5, 2j, "word", b"raw", slice(1, 2), range(3), Side.LEFT, torch.float16, torch.device("cpu"),
     torch.strided, int, frozenset({1, 2})]
)  # fmt: skip
VALUES = st.recursive(st.one_of(TENSORS, PLAIN), containers, max_leaves=6)
WITH_SIZES = st.recursive(st.one_of(TENSORS, PLAIN, st.just(torch.Size([2, 3]))), containers, max_leaves=6)


def same(a: Any, b: Any) -> bool:
    """One type throughout, the very same tensors, and equal settings."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (torch.Tensor, PackedSequence)):
        return a is b
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def tensors_in(value: Any) -> list[Any]:
    """The tensors of ``value`` from left to right."""
    if isinstance(value, (torch.Tensor, PackedSequence)):
        return [value]
    if isinstance(value, dict):
        parts = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, f.name) for f in dataclasses.fields(value)]
    else:
        parts = list(value) if isinstance(value, (list, tuple)) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


def identical(found: list[Any], expected: list[Any]) -> bool:
    return [id(x) for x in found] == [id(x) for x in expected]


def test_the_comparison_of_values_can_fail() -> None:
    for one, other in [
        ([A], (A,)),
        ([A], [A.clone()]),
        ({"a": A, "b": B}, {"b": B, "a": A}),
        (Pair(A), (A,)),
        (Boxes(A), Boxes(A, "other")),
        ([1], [True]),
        ([A], [A, A]),
    ]:
        assert same(one, one)
        assert not same(one, other)


# ---- taken apart and put together


@PROPERTY
@given(WITH_SIZES)
def test_put_together_is_the_reverse_of_take_apart(value: Any) -> None:
    structure = structure_of(value, "x")
    data = list(take_apart(structure, value, "x"))
    assert identical(data, tensors_in(value))
    assert len(list(leaves(structure))) == len(data)
    rest = iter(data)
    assert same(put_together(structure, rest), value)
    assert next(rest, None) is None


@PROPERTY
@given(WITH_SIZES)
def test_what_is_put_together_has_the_structure_that_it_was_built_from(value: Any) -> None:
    structure = structure_of(value, "x")
    data = [torch.ones(3) for _ in leaves(structure)]
    again = put_together(structure, iter(data))
    assert identical(list(take_apart(structure, again, "x")), data)
    assert structure_of(again, "x") == structure


@PROPERTY
@given(WITH_SIZES)
def test_a_value_is_data_or_a_setting(value: Any) -> None:
    assert is_data(value) == bool(tensors_in(value))
    assert is_setting(value) != is_data(value)
    assert isinstance(structure_of(value, "x"), Setting) == is_setting(value)


@PROPERTY
@given(WITH_SIZES)
def test_collect_finds_what_take_apart_finds(value: Any) -> None:
    structure = structure_of(value, "x")
    description = json.loads(json.dumps(described(structure)))
    assert identical(list(collect(description, value)), list(take_apart(structure, value, "x")))


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (A, ["x"]),
        (3, []),
        ([], []),
        ({"k": [None, 1]}, []),
        ([A], ["x"]),
        ({"deep": [{"down": A}], "size": 3}, ["x"]),
        ([A, B], ["x_0", "x_1"]),
        ((A, 1, B), ["x_0", "x_2"]),
        ({"a": A, "b": {"c": B}}, ["x_a", "x_b"]),
        ({"a": A, "b": {"c": B, "d": C}}, ["x_a", "x_b_c", "x_b_d"]),
        ({"a.b": A, 0: B}, ["x_a_b", "x_0"]),
        (Pair(A, B), ["x_first", "x_second"]),
        (Boxes(A, B), ["x_corners", "x_label"]),
        (Boxes(A), ["x"]),
        (Output(A, (B, C)), ["x_logits", "x_hidden_0", "x_hidden_1"]),
        (Output(hidden=(A, B)), ["x_hidden_0", "x_hidden_1"]),
    ],
    ids=str,
)
def test_names_of_leaves(value: Any, names: list[str]) -> None:
    """A container with one tensor passes its own name on."""
    assert [leaf.name for leaf in leaves(structure_of(value, "x"))] == names


def test_a_packed_sequence_is_one_leaf() -> None:
    """It is a named tuple, but its constructor sorts and checks: it is not taken apart."""
    sequence = packed()
    assert is_data(sequence)
    assert structure_of(sequence, "x") == Leaf("x")
    assert structure_of([sequence, A], "x") == Container(list, (0, 1), (Leaf("x_0"), Leaf("x_1")))
    assert plain([sequence])[0] is sequence
    assert shape_of(sequence) is None
    assert list(take_apart(Leaf("x"), sequence, "x")) == [sequence]


def test_a_size_is_a_setting() -> None:
    size = torch.Size([2, 3])
    structure = structure_of(size, "x")
    assert structure == Setting(size)
    assert put_together(structure, iter(())) is size
    assert list(take_apart(structure, torch.Size([2, 3]), "x")) == []
    for other in (torch.Size([3, 2]), (2, 3), [2, 3]):
        with pytest.raises(Mismatch):
            list(take_apart(structure, other, "x"))


def test_a_dict_in_another_order_gives_its_data_in_the_order_of_the_structure() -> None:
    structure = structure_of({"a": A, "b": B}, "x")
    assert identical(list(take_apart(structure, {"b": B, "a": A}, "x")), [A, B])


def test_fields_of_an_output_that_are_none_are_not_part_of_it() -> None:
    structure = structure_of(Output(A), "x")
    assert structure == Container(Output, ("logits",), (Leaf("x"),))
    again = put_together(structure, iter([B]))
    assert type(again) is Output
    assert list(again) == ["logits"]
    assert again.hidden is None
    with pytest.raises(Mismatch):
        list(take_apart(structure, Output(A, B), "x"))


# what an environment without torchvision lacks is transformers, too
@pytest.mark.torchvision
def test_outputs_of_transformers() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs", reason="pip install 'lightning-quant[zoo]'")
    kind = outputs.BaseModelOutputWithPooling
    value = kind(last_hidden_state=A, hidden_states=(B, C))
    structure = structure_of([value, 3], "x")
    names = ["x_0_last_hidden_state", "x_0_hidden_states_0", "x_0_hidden_states_1"]
    assert [leaf.name for leaf in leaves(structure)] == names
    data = list(take_apart(structure, [value, 3], "x"))
    assert identical(data, [A, B, C])
    again = put_together(structure, iter(data))[0]
    assert plain(value) == {"last_hidden_state": A, "hidden_states": (B, C)}
    assert type(plain(value)) is dict
    shape = shape_of(value)
    assert shape is not None
    for built in (again, shape.restore(plain(value))):
        assert type(built) is kind
        assert built.to_tuple()[0] is A
        assert built.hidden_states[1] is C
        assert built.pooler_output is None
        assert list(built) == ["last_hidden_state", "hidden_states"]


# ---- what is refused


class Opaque:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Opaque(A), "x"),
        ([A, Opaque(A)], "x_1"),
        ({"a": A, "b": {"c": [Opaque(B)]}}, "x_b_c_0"),
        (Pair(A, Opaque(A)), "x_second"),
        (Boxes(Opaque(A)), "x_corners"),
        (Output(A, Opaque(B)), "x_hidden"),
        (Derived(A), "x"),
        ({A}, "x"),
        (iter([A]), "x"),
        (lambda: A, "x"),
    ],
    ids=["object", "in list", "deep", "named tuple", "dataclass", "output", "derived", "set", "iterator", "function"],
)
def test_what_is_neither_data_nor_a_setting_has_no_structure(value: Any, name: str) -> None:
    with pytest.raises(Mismatch) as found:
        structure_of(value, "x")
    assert found.value.name == name
    assert found.value.expected == Leaf(name)
    assert str(found.value) == name
    if name == "x":
        assert found.value.value is value


@pytest.mark.parametrize(
    ("example", "other", "name"),
    [
        (A, None, "x"),
        (A, 3, "x"),
        (A, [1, 2], "x"),
        (3, 4, "x"),
        (3, None, "x"),
        (3, A, "x"),
        (1, True, "x"),
        (1, 1.0, "x"),
        (None, A, "x"),
        ((1, 2), [1, 2], "x"),
        ([A], (A,), "x"),
        ([A], [A, B], "x"),
        ([A], [], "x"),
        ([A], A, "x"),
        ([A], None, "x"),
        ([A, B], [A, 2], "x_1"),
        ([A, 1], [A, 2], "x_1"),
        ([A, 1], [A, B], "x_1"),
        ({"a": A}, {"b": A}, "x"),
        ({"a": A}, {"a": A, "b": 1}, "x"),
        ({"a": A, "b": 1}, {"a": A}, "x"),
        ({"a": A}, OrderedDict(a=A), "x"),
        ({"a": {"b": A, "c": 1}}, {"a": {"b": A, "c": 2}}, "x_a_c"),
        ({"a": [A, (B, C)]}, {"a": [A, (B, None)]}, "x_a_1_1"),
        ({"a": [A, (B, C)]}, {"a": [A, [B, C]]}, "x_a_1"),
        (Pair(A, B), (A, B), "x"),
        (Pair(A, B), Pair(A), "x_second"),
        (Boxes(A), Boxes(A, "other"), "x_label"),
        (Boxes(A), Frozen(A), "x"),
        (Output(A), Output(hidden=A), "x"),
        ([A, Side.LEFT], [A, 1], "x_1"),
    ],
    ids=repr,
)
def test_a_value_of_another_structure(example: Any, other: Any, name: str) -> None:
    structure = structure_of(example, "x")
    with pytest.raises(Mismatch) as found:
        list(take_apart(structure, other, "x"))
    assert found.value.name == name
    assert str(found.value) == name
    # who reads the error is told what was there and what came
    place, value = structure, other
    for key in name.split("_")[1:]:
        assert isinstance(place, Container)
        index = [str(k) for k in place.keys].index(key)
        value = getattr(value, key) if hasattr(value, key) else value[place.keys[index]]
        place = place.parts[index]
    assert found.value.expected == place
    assert found.value.value is value


def test_a_container_may_stand_where_one_tensor_is_expected() -> None:
    """A leaf is a place of data: what is there besides a tensor, the graph sees."""
    assert list(take_apart(Leaf("x"), [A], "x")) == [[A]]


def test_too_little_data() -> None:
    with pytest.raises(StopIteration):
        put_together(structure_of([A, B], "x"), iter([A]))


# ---- plain values, and the way back


@PROPERTY
@given(VALUES)
def test_restore_is_the_reverse_of_plain(value: Any) -> None:
    flat, shape = plain(value), shape_of(value)
    assert identical(tensors_in(flat), tensors_in(value))
    if shape is None:
        assert same(flat, value)
    else:
        assert same(shape.restore(flat), value)


@PROPERTY
@given(VALUES)
def test_plain_has_no_containers_but_those_of_python(value: Any) -> None:
    flat = plain(value)
    assert shape_of(flat) is None
    assert same(plain(flat), flat)

    def kinds(part: Any) -> set[type]:
        if isinstance(part, PackedSequence):
            return set()
        assert not dataclasses.is_dataclass(part) or isinstance(part, type)
        if isinstance(part, dict):
            return {type(part)}.union(*map(kinds, part.values()))
        return {type(part)}.union(*map(kinds, part)) if isinstance(part, (list, tuple)) else set()

    assert kinds(flat) <= {dict, list, tuple}


@pytest.mark.parametrize("value", [A, 3, None, [A], (A, {"a": [B]}), {}, packed()], ids=lambda v: type(v).__name__)
def test_what_is_plain_has_no_shape(value: Any) -> None:
    assert shape_of(value) is None
    assert same(plain(value), value)


@pytest.mark.parametrize(
    ("value", "flat"),
    [
        (OrderedDict(b=A, a=B), {"b": A, "a": B}),
        (Pair(A), (A,)),
        (Boxes(A), {"corners": A, "label": "box"}),
        (Frozen([Pair(A, B)]), {"value": [(A, B)]}),
        (Output(A), {"logits": A}),
        ([Output(A, (B,))], [{"logits": A, "hidden": (B,)}]),
        (torch.Size([2, 3]), (2, 3)),
        ((None, A, None), (A,)),
        ({"a": None, "b": [A, None]}, {"b": [A]}),
    ],
    ids=["OrderedDict", "named tuple", "dataclass", "frozen", "output", "in list", "size", "None", "None in dict"],
)
def test_plain_by_hand(value: Any, flat: Any) -> None:
    assert same(plain(value), flat)
    shape = shape_of(value)
    assert shape is not None
    assert same(shape.restore(flat), value)


def test_restore_takes_other_data() -> None:
    """What a graph returns is new in each call, and a list may come where a tuple went in."""
    shape = shape_of(Boxes((A, B), "kept"))
    assert shape is not None
    assert same(shape.restore({"corners": [B, C], "label": 5}), Boxes((B, C), 5))
    assert same(shape.restore({"label": 5, "corners": [B, C]}), Boxes((B, C), 5))


@pytest.mark.parametrize("flat", [{"corners": A}, [A], [A, B, C], (A, (B, C), 1)], ids=["key", "one", "three", "tuple"])
def test_restore_of_another_structure(flat: Any) -> None:
    shape = shape_of(Boxes(A, B))
    assert shape is not None
    with pytest.raises((KeyError, ValueError)):
        shape.restore(flat)


# ---- as JSON


def test_described_by_hand() -> None:
    value = {"a": A, "b": (3, Pair(B, C)), 7: "word"}
    assert described(structure_of(value, "x")) == {
        "keys": ["a", "b", 7],
        "parts": [
            "x_a",
            {"keys": [0, 1], "parts": [None, {"keys": ["first", "second"], "parts": ["x_b_1_first", "x_b_1_second"]}]},
            None,
        ],
    }
    assert described(structure_of(3, "x")) is None
    assert described(structure_of(A, "x")) == "x"


def test_collect_does_not_ask_for_types() -> None:
    """Whoever reads a file need not have the class that was exported."""
    description = described(structure_of(Boxes(A, [B, 1]), "x"))
    assert identical(list(collect(description, {"corners": B, "label": (C, 2)})), [B, C])
    assert list(collect(None, A)) == []


@pytest.mark.parametrize("value", [{"a": A}, [A], A, 3, {"b": [B], "a": A}], ids=["key", "list", "leaf", "int", "deep"])
def test_collect_of_another_structure(value: Any) -> None:
    description = described(structure_of({"a": A, "b": [B, C]}, "x"))
    with pytest.raises(KeyError):
        list(collect(description, value))


# ---- known limits


@pytest.mark.parametrize(
    "value",
    [torch.max(torch.ones(2, 2), 1), torch.return_types.topk((A, B))],
    ids=["torch.max", "topk"],
)
def test_subclasses_of_tuple_and_dict_come_back(value: Any) -> None:
    structure = structure_of(value, "x")
    again = put_together(structure, take_apart(structure, value, "x"))
    assert type(again) is type(value)
    shape = shape_of(value)
    assert shape is not None
    assert type(shape.restore(plain(value))) is type(value)


def test_a_size_comes_back_from_plain() -> None:
    size = torch.Size([2, 3])
    shape = shape_of(size)
    assert shape is not None
    assert type(shape.restore(plain(size))) is torch.Size


@pytest.mark.parametrize(("example", "other"), [((1,), (True,)), ([2], [2.0]), ({"a": 0}, {"a": False})])
def test_settings_inside_containers_are_compared_with_their_types(example: Any, other: Any) -> None:
    with pytest.raises(Mismatch):
        list(take_apart(structure_of(example, "x"), other, "x"))


def test_a_setting_of_nan_is_the_same_in_the_next_call() -> None:
    structure = structure_of(float("nan"), "x")
    assert list(take_apart(structure, float("nan"), "x")) == []
