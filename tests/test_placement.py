"""A graph in the place of a submodule: the module that holds it, and its copies, do not notice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Mlp, Residual, TwoInputs, calibrated, settle
from torch import nn

from lightning_quant import CaptureError, convert
from lightning_quant.arguments import Call, Interface, signature_of
from lightning_quant.backends.graph import info
from lightning_quant.placement import Observed, ToGraph, divert, graft, restore, route_of

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Plus(nn.Module):
    """Adds a constant to its first input, and counts its calls."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant
        self.calls = 0

    def forward(self, *data: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return data[0] + self.constant


def interface(module: nn.Module, *args: Any, **kwargs: Any) -> Interface:
    return Interface.of(signature_of(module), Call(args, kwargs))


def test_divert_and_restore_leave_no_trace() -> None:
    model = nn.Sequential(Mlp(), nn.Linear(3, 2))
    before = [(name, sorted(m.__dict__)) for name, m in model.named_modules()]
    keys, expected = list(model.state_dict()), model(X)
    divert(model[0], ToGraph(Plus(0.5), interface(model[0], X)))
    assert list(model.state_dict()) == keys
    assert next(model[0].children()) is model[0].first
    assert torch.equal(model[0](X), X + 0.5)
    assert torch.equal(model[0].forward(X), X + 0.5)
    assert isinstance(route_of(model[0]), ToGraph)
    assert route_of(model[1]) is None
    for _ in range(2):  # the second does nothing
        restore(model[0])
        assert [(name, sorted(m.__dict__)) for name, m in model.named_modules()] == before
        assert torch.equal(model(X), expected)


def test_hooks_of_a_diverted_module_still_run() -> None:
    model, seen = Mlp(), []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    divert(model, ToGraph(Plus(1), interface(model, X)))
    assert model(X) is seen[0]


def test_a_copy_runs_its_own_graph() -> None:
    model, graph = Mlp(), Plus(1)
    divert(model, ToGraph(graph, interface(model, X)))
    twin = copy.deepcopy(model)
    route_of(twin).graph.constant = 5
    assert torch.equal(twin(X), X + 5)
    assert torch.equal(model(X), X + 1)
    assert graph.calls == 1
    restore(twin)
    assert route_of(model) is not None


def test_a_copy_of_an_observed_module_answers_with_its_own_weights() -> None:
    model = Mlp()
    divert(model, Observed(Plus(0), interface(model, X)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.second.bias.add_(1)
    torch.testing.assert_close(twin(X), model(X) + 1)


def test_observed_answers_to_the_last_bit() -> None:
    model, graph = Mlp(), Plus(0)
    expected = model(X)
    route = Observed(graph, interface(model, X))
    divert(model, route)
    assert torch.equal(model(X), expected)
    route.enabled = False
    assert torch.equal(model(X), expected)
    assert graph.calls == 1


def test_a_call_that_is_not_like_the_example_is_refused() -> None:
    model = TwoInputs()
    divert(model, ToGraph(Plus(0), interface(model, X, b=X)))
    with pytest.raises(CaptureError, match="captured with double=False and is called with double=True"):
        model(X, b=X, double=True)


def test_graft_takes_out_what_the_graph_stands_for() -> None:
    model = settle(Residual())
    x = torch.randn(4, 3, 8, 8)
    model.extra = nn.Parameter(torch.ones(1))  # not part of the graph
    int8 = convert(calibrated(model, x))
    known = info(int8)
    twin = copy.deepcopy(model)
    graft(twin, int8, known.interface, known.replaced)
    assert [name for name, _ in twin.named_children()] == ["int8"]
    assert [name for name, _ in twin.named_parameters()] == ["extra"]
    assert torch.equal(twin(x), int8(x))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in twin.modules())
    # the original is whole, and a copy is a whole int8 model
    assert type(model.stem) is nn.Conv2d
    assert torch.equal(copy.deepcopy(twin)(x), int8(x))


def test_graft_keeps_what_the_graph_does_not_use() -> None:
    model = nn.Sequential(Mlp(), nn.Sequential(nn.Linear(3, 3)))
    graft(model, Plus(1), interface(model, X), ("0.first", "0.act", "1.0"))
    assert [name for name, _ in model.named_modules()] == ["", "0", "0.second", "int8"]


def test_graft_of_a_layer_and_of_its_weight() -> None:
    """A graph uses a layer, and asks for the type of its weight."""
    model = nn.Sequential(Mlp(), nn.Linear(3, 2))
    graft(model, Plus(1), interface(model, X), ("0.first", "0.first.weight", "1", "1.weight", "1.bias"))
    assert [name for name, _ in model.named_parameters()] == [f"0.{name}" for name, _ in Mlp().named_parameters()][2:]


def test_graft_finds_a_free_name() -> None:
    model = nn.Module()
    model.int8 = nn.Linear(4, 4)
    graft(model, Plus(1), Interface.of(signature_of(Mlp()), Call((X,))), ())
    assert [name for name, _ in model.named_children()] == ["int8", "int8_"]


def test_graft_of_a_single_layer() -> None:
    layer = nn.Linear(4, 2)
    int8 = convert(calibrated(layer, X))
    known = info(int8)
    graft(layer, int8, known.interface, known.replaced)
    assert list(layer.parameters()) == []
    assert torch.equal(layer(X), int8(X))
