"""A call of ``forward`` becomes the inputs of a graph, and back, whatever the signature."""

from __future__ import annotations

import inspect
import re
from collections import namedtuple
from inspect import Parameter, Signature
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY, TwoInputs
from torch import nn

from lightning_quant import CaptureError
from lightning_quant.arguments import (
    Call,
    Captured,
    Interface,
    Positional,
    batch_size,
    signature_of,
    with_batch,
)
from lightning_quant.structures import is_data

Pair = namedtuple("Pair", "a b")  # a tuple that is not called like one


def signature(text: str) -> Signature:
    """``signature("x, *args")``."""
    space: dict[str, Any] = {}
    exec(f"def forward({text}): ...", space)
    return inspect.signature(space["forward"])


# ---- round trip

tensors = st.integers(1, 3).map(torch.zeros)
settings = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["mean", (1, 2), 0.5])
values = tensors | settings | st.tuples(tensors, settings) | st.fixed_dictionaries({"k": tensors})


@st.composite
def calls(draw: st.DrawFn) -> tuple[Signature, tuple[Any, ...], dict[str, Any]]:
    """Any signature, and a call that fits it."""
    parameters: list[Parameter] = []
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    by_position, has_default = True, False
    for i in range(draw(st.integers(0, 3))):
        has_default = has_default or draw(st.booleans())
        default = draw(settings) if has_default else Parameter.empty
        parameters.append(Parameter(f"p{i}", Parameter.POSITIONAL_OR_KEYWORD, default=default))
        if has_default and draw(st.booleans()):
            by_position = False  # left out: those after it can only be named
            continue
        by_position = by_position and draw(st.booleans())
        if by_position:
            args.append(draw(values))
        else:
            kwargs[f"p{i}"] = draw(values)
    if draw(st.booleans()):
        parameters.append(Parameter("args", Parameter.VAR_POSITIONAL))
        if len(args) == len(parameters) - 1:
            args += draw(st.lists(values, max_size=3))
    for i in range(draw(st.integers(0, 2))):
        optional = draw(st.booleans())
        default = draw(settings) if optional else Parameter.empty
        parameters.append(Parameter(f"k{i}", Parameter.KEYWORD_ONLY, default=default))
        if not optional or draw(st.booleans()):
            kwargs[f"k{i}"] = draw(values)
    if draw(st.booleans()):
        parameters.append(Parameter("extra", Parameter.VAR_KEYWORD))
        kwargs.update(draw(st.dictionaries(st.sampled_from(["mask", "lengths", "other"]), values, max_size=2)))
    return Signature(parameters), tuple(args), kwargs


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or (not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b)


def complete(form: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What each parameter gets, defaults included."""
    bound = form.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@PROPERTY
@given(calls())
def test_a_call_survives_flatten_and_rebuild(case: tuple[Signature, tuple[Any, ...], dict[str, Any]]) -> None:
    form, args, kwargs = case
    interface = Interface.of(form, Call(args, kwargs))
    data = interface.flatten(args, kwargs)
    assert len(data) == len(interface.inputs)
    assert all(is_data(value) for value in data)
    assert not any(is_data(value) for value in interface.constants.values())
    again = interface.rebuild(data)
    assert same(complete(form, *again), complete(form, args, kwargs))
    # and what was rebuilt is a call that the interface takes
    assert same(interface.flatten(*again), data)


def test_the_round_trip_check_can_fail() -> None:
    assert not same({"x": torch.ones(1)}, {"x": torch.ones(1)})
    assert not same((1,), (True,))


@pytest.mark.parametrize(
    ("text", "args", "kwargs", "inputs"),
    [
        ("x, y=None", (torch.ones(1),), {}, ("x",)),
        ("x, y=None", (torch.ones(1),), {"y": torch.ones(1)}, ("x", "y")),
        ("x, *rest", (torch.ones(1), torch.ones(2), 3), {}, ("x", "rest_0")),
        ("x, **more", (torch.ones(1),), {"mask": torch.ones(1), "x_1": torch.ones(2)}, ("x", "mask", "x_1")),
        ("*rest, **more", (torch.ones(1),), {"flag": torch.ones(1)}, ("rest_0", "flag")),
        ("pair, scale=2.0", ([torch.ones(1), 1],), {}, ("pair",)),
    ],
)
def test_inputs_have_the_names_of_the_parameters(
    text: str, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: tuple[str, ...]
) -> None:
    form = signature(text)
    interface = Interface.of(form, Call(args, kwargs))
    assert interface.inputs == inputs
    assert same(complete(form, *interface.rebuild(interface.flatten(args, kwargs))), complete(form, args, kwargs))


# ---- a call that is not like the example


@pytest.mark.parametrize(
    ("captured", "called"), [(True, False), (None, 3), (2, 3), (1, True), ("mean", "sum"), (None, torch.ones(2, 3))]
)
def test_a_setting_with_another_value_is_refused_by_name(captured: Any, called: Any) -> None:
    interface = Interface.of(signature("x, setting=None"), Call((torch.ones(1),), {"setting": captured}))
    assert interface.flatten((torch.zeros(1),), {"setting": captured})
    shown = "a tensor of shape (2, 3)" if isinstance(called, torch.Tensor) else repr(called)
    text = (
        f"forward was captured with setting={captured!r} and is called with setting={shown}. An int8 graph has the "
        "settings of the call that it was captured from: call it in that way, or leave this submodule in float with "
        "QuantConfig(skip=...)."
    )
    with pytest.raises(CaptureError, match=f"^{re.escape(text)}$"):
        interface.flatten((torch.ones(1),), {"setting": called})


@pytest.mark.parametrize("args", [(torch.ones(1), None), (torch.ones(1),), (torch.ones(1), 5)])
def test_data_that_is_missing_is_refused_by_name(args: tuple[Any, ...]) -> None:
    interface = Interface.of(signature("x, mask=None"), Call((torch.ones(1), torch.ones(1))))
    text = (
        "forward was captured with a tensor for 'mask' and is called without one. Call it with the same arguments, or "
        "leave this submodule in float with QuantConfig(skip=...)."
    )
    with pytest.raises(CaptureError, match=f"^{re.escape(text)}$"):
        interface.flatten(args, {})


def test_data_beyond_the_example_is_refused() -> None:
    interface = Interface.of(signature("*xs"), Call((torch.ones(1),)))
    with pytest.raises(CaptureError, match=re.escape("xs_1=a tensor of shape (2,)")):
        interface.flatten((torch.ones(1), torch.ones(2)), {})
    with pytest.raises(CaptureError, match="captured with a tensor for 'xs_0' and is called without one"):
        interface.flatten((), {})


def test_the_signature_is_that_of_the_class() -> None:
    model = TwoInputs()
    model.forward = lambda: None  # as hooks and wrappers of other libraries do
    assert list(signature_of(model).parameters) == ["a", "b", "double"]


# ---- modules that translate


def test_positional_and_captured_are_each_others_reverse() -> None:
    model = TwoInputs()
    a, b = torch.randn(2, 2, 4)
    interface = Interface.of(signature_of(model), Call((a,), {"b": b, "double": True}))
    graph = Positional(model, interface)
    expected = model(a, b=b, double=True)
    assert torch.equal(graph(a, b)["sum"], expected["sum"])
    assert torch.equal(Captured(graph, interface)(a, b=b, double=True)["sum"], expected["sum"])
    by_hand = Positional(model, interface, lambda module, a, *, b, double: module.left(a))
    assert torch.equal(by_hand(a, b), model.left(a))


# ---- rows


@pytest.mark.parametrize(("size", "rows"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 0, 1])])
def test_with_batch(size: int, rows: list[int]) -> None:
    x, table, step = torch.arange(6.0).reshape(3, 2), torch.ones(4, 2), torch.tensor(7)
    data = (x, {"mask": x.bool(), "table": table, "step": step, "mode": "mean"}, Pair(x, 1))
    first, second, third = with_batch(data, size)
    assert torch.equal(first, x[rows])
    assert torch.equal(second["mask"], x.bool()[rows])
    assert second["table"] is table
    assert second["step"] is step
    assert second["mode"] == "mean"
    assert isinstance(third, Pair)
    assert torch.equal(third.a, x[rows])
    assert batch_size((first, second)) == size


@pytest.mark.parametrize("data", [(), (torch.tensor(1.0),), (torch.ones(0, 3),)])
def test_data_without_rows_stays(data: tuple[Any, ...]) -> None:
    assert with_batch(data, 5) is data


def test_batch_size_is_of_the_first_tensor_with_a_dimension() -> None:
    assert batch_size((torch.tensor(1), [torch.ones(7, 2)], torch.ones(3))) == 7
    assert batch_size((3, "x")) is None
    assert batch_size(nn.Identity()) is None
