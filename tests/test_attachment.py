"""A model that trains through graphs stays the float model that its user, its optimizer and its checkpoints know."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from models import Mlp, Residual
from torch import nn

from lightning_quant import QuantConfig, prepare
from lightning_quant.attachment import (
    CHILD,
    after_method,
    attach,
    attached_to,
    detach,
    relink,
    run_quantized,
    unbind,
)
from lightning_quant.backends.graph import observers

X = torch.linspace(-2, 2, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


class Network(nn.Module):
    """Two targets, and something that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.body = Residual()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.body(x * self.scale)))


def graphs(model: nn.Module, config: QuantConfig | None = None) -> dict[str, Any]:
    return {
        "body": prepare(model.body, config, method="qat", example_inputs=X),
        "head": prepare(model.head, config, method="qat", example_inputs=torch.randn(4, 5)),
    }


def attached(quantized: bool = True) -> Network:
    model = Network()
    attach(model, graphs(model))
    run_quantized(model, quantized)
    return model


@pytest.mark.parametrize("quantized", [True, False])
def test_parameters_and_state_dict_stay(quantized: bool) -> None:
    model = Network()
    keys = list(model.state_dict())
    values = copy.deepcopy(model.state_dict())
    parameters = [(name, id(p)) for name, p in model.named_parameters()]
    attach(model, graphs(model))
    run_quantized(model, quantized)
    assert list(model.state_dict()) == keys
    assert list(model.state_dict(prefix="model.")) == [f"model.{key}" for key in keys]
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
    assert [id(p) for p in model.parameters()] == [i for _, i in parameters]
    assert CHILD not in " ".join(model.state_dict()._metadata)
    child = attached_to(model)
    assert child.state_dict() == {}
    assert list(child.parameters()) == list(child.named_parameters()) == []


@pytest.mark.parametrize("strict", [True, False])
def test_a_float_checkpoint_loads(strict: bool) -> None:
    model, other = attached(), Network()
    nn.init.normal_(other.body.bn.running_mean)
    result = model.load_state_dict(other.state_dict(), strict=strict)
    assert result.missing_keys == result.unexpected_keys == []
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    # and the graphs run with what was loaded
    graph = attached_to(model).named()["body"]
    assert torch.equal(graph.stem.weight, other.body.stem.weight)
    assert torch.equal(graph.stem.bn.running_mean, other.body.bn.running_mean)


def test_what_is_missing_in_a_checkpoint_is_still_reported() -> None:
    model = attached()
    state = Network().state_dict()
    del state["head.weight"]
    state["other"] = torch.ones(1)
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "head.weight".' in str(raised.value)
    assert 'Unexpected key(s) in state_dict: "other".' in str(raised.value)
    assert CHILD not in str(raised.value)


def test_the_model_runs_float_until_it_is_told() -> None:
    torch.manual_seed(1)
    model = Network().eval()
    expected = model(X)
    attach(model, graphs(model))
    assert torch.equal(model(X), expected)
    run_quantized(model, True)
    assert not torch.equal(model(X), expected)
    run_quantized(model, False)
    assert torch.equal(model(X), expected)


def test_a_step_of_the_graph_trains_the_model() -> None:
    model = attached()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    model.train()(X).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(before)  # weights, running statistics, and counts of batches
    assert int(model.body.bn.num_batches_tracked) == 1


def test_running_statistics_are_those_that_float_training_would_have() -> None:
    model = Network()
    other = copy.deepcopy(model)
    attach(model, graphs(model))
    graph = attached_to(model).named()["body"]
    for module in observers(graph).values():
        module.disable_fake_quant()
    run_quantized(model, True)
    for _ in range(3):
        model.train()(X)
        other.train()(X)
    for key, value in other.body.state_dict().items():
        torch.testing.assert_close(model.body.state_dict()[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["torch", pytest.param("timm", marks=pytest.mark.torchvision)])
def test_a_batch_norm_without_a_layer_before_it_trains_and_stays_frozen(kind: str) -> None:
    """As in networks that normalise first; timm's is one module with its activation."""
    if kind == "timm":
        layers = pytest.importorskip("timm.layers")
        norm: nn.Module = layers.BatchNormAct2d(3)
    else:
        norm = nn.BatchNorm2d(3)
    model = nn.Module()
    model.body = nn.Sequential(OrderedDict(bn=norm, relu=nn.ReLU(), conv=nn.Conv2d(3, 4, 3)))
    attach(model, {"body": prepare(model.body, method="qat", example_inputs=X)})
    run_quantized(model, True)
    model.train()
    model.body(X)
    moved = norm.running_mean.clone()
    assert moved.any()
    norm.eval()
    attached_to(model).follow()
    model.body(X)
    assert torch.equal(norm.running_mean, moved)


def test_a_batch_norm_that_the_user_froze_stays_frozen() -> None:
    model = attached()
    model.train()
    model.body.bn.eval()
    model.body.blocks[0].eval()
    frozen = copy.deepcopy(model.body.bn.state_dict())
    inner = copy.deepcopy(model.body.blocks[0].bn1.state_dict())
    model(X)
    assert all(torch.equal(value, frozen[key]) for key, value in model.body.bn.state_dict().items())
    assert all(torch.equal(value, inner[key]) for key, value in model.body.blocks[0].bn1.state_dict().items())
    assert int(model.body.blocks[1].bn1.num_batches_tracked) == 1


def test_a_train_that_keeps_batch_norm_frozen_is_obeyed() -> None:
    class Frozen(Network):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.body.bn.eval()
            return self

    model = Frozen()
    attach(model, graphs(model))
    run_quantized(model, True)
    model.train()(X)
    assert int(model.body.bn.num_batches_tracked) == 0
    assert int(model.body.blocks[0].bn1.num_batches_tracked) == 1


@pytest.mark.parametrize("mode", [True, False])
def test_modes_reach_the_graphs(mode: bool) -> None:
    model = attached()
    model.train(not mode)
    model.train(mode)
    assert all(m.training is mode for m in model.modules() if not isinstance(m, nn.ModuleList))
    before = copy.deepcopy(model.body.bn.state_dict())
    model(X)
    moved = not torch.equal(before["running_mean"], model.body.bn.running_mean)
    assert moved is mode


def test_a_copy_trains_itself() -> None:
    model = attached()
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin.train()(X).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert int(twin.body.bn.num_batches_tracked) == 1
    graph = attached_to(twin).named()["body"]
    assert graph.stem.weight is twin.body.stem.weight
    assert attached_to(twin) is not attached_to(model)


def test_relink_after_buffers_were_replaced() -> None:
    """As ``model.to(device)`` does."""
    model = attached()
    model._apply(torch.clone)
    relink(model)
    model.train()(X)
    assert int(model.body.bn.num_batches_tracked) == 1
    assert not torch.equal(model.body.bn.running_mean, torch.zeros(8))


@pytest.mark.parametrize("twice", [True, False])
def test_detach_leaves_nothing(twice: bool) -> None:
    model = Network()

    def traces() -> Any:
        return [(name, id(m), type(m), sorted(m.__dict__), sorted(m._modules)) for name, m in model.named_modules()]

    before = traces()
    hooks = [len(m._load_state_dict_post_hooks) for m in model.modules()]
    attach(model, graphs(model))
    if twice:
        attach(model, graphs(model))
        assert [name for name, _ in model.named_children()].count(CHILD) == 1
    run_quantized(model, True)
    model.train()(X)
    detach(model)
    assert traces() == before
    assert [len(m._load_state_dict_post_hooks) for m in model.modules()] == hooks
    assert attached_to(model) is None
    for change in (detach, relink, lambda m: run_quantized(m, True)):  # on a model without graphs: nothing
        change(model)
    assert traces() == before


def test_a_model_whose_own_forward_is_the_target() -> None:
    model = Mlp()
    x = torch.randn(4, 4)
    keys = list(model.state_dict())
    attach(model, {"": prepare(model, method="qat", example_inputs=x)})
    run_quantized(model, True)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert list(model.state_dict()) == keys
    detach(model)
    assert list(dict(model.named_children())) == ["first", "act", "second"]


def test_a_reused_batch_norm_moves_once_per_call() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.fc(self.bn(self.fc(x))))

    model, x = Reused(), torch.randn(8, 4)
    attach(model, {"": prepare(model, method="qat", example_inputs=x)})
    run_quantized(model, True)
    model.train()(x)
    assert int(model.bn.num_batches_tracked) == 2


# ---- methods


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def save(self, *args: Any, **kwargs: Any) -> str:
        self.seen.append(("save", args, kwargs))
        return "saved"


def test_after_method_runs_after_the_method() -> None:
    model = Caller()
    after_method(model, "save", lambda module, *args, **kwargs: module.seen.append(("then", args, kwargs)))
    assert model.save(1, b=2) == "saved"
    assert model.seen == [("save", (1,), {"b": 2}), ("then", (1,), {"b": 2})]
    unbind(model)
    model.save()
    assert len(model.seen) == 3
    assert sorted(model.__dict__) == sorted(Caller().__dict__)
    unbind(model)


def test_what_was_bound_before_is_called_and_comes_back() -> None:
    model = Caller()
    model.save = lambda: "bound by somebody else"
    bound = model.save
    after_method(model, "save", lambda module: module.seen.append("first"))
    after_method(model, "save", lambda module: module.seen.append("second"))
    assert model.save() == "bound by somebody else"
    assert model.seen == ["first", "second"]
    unbind(model)
    assert model.save is bound


def test_a_copy_calls_its_own_method() -> None:
    model = Caller()
    after_method(model, "save", lambda module: module.seen.append("then"))
    twin = copy.deepcopy(model)
    twin.save()
    assert model.seen == []
    assert twin.seen == [("save", (), {}), "then"]
