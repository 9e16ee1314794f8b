"""What a prepared graph need not run is hidden from it, and back when it is converted."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from models import Residual
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant import QuantConfig, TensorSpec, convert, prepare
from lightning_quant._torch_ao import is_observer
from lightning_quant.analysis.sqnr import sqnr_db
from lightning_quant.backends.constants import is_constant
from lightning_quant.backends.graph import is_graph, sees_weights
from lightning_quant.backends.hiding import hide, restore
from lightning_quant.fake_quantize import is_ours

X = torch.randn(8, 3, 12, 12)


class Clamps(nn.Module):
    """Takes ``(N, 3, 12, 12)``: every clamp, as module and as function."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(6))
        self.bn = nn.BatchNorm2d(6)
        self.relu6 = nn.ReLU6(inplace=True)
        self.hardtanh = nn.Hardtanh(-0.5, 0.5)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu6(self.bn(self.convs[0](x)))
        x = self.hardtanh(self.convs[1](x))
        x = self.relu(self.convs[2](x))
        x = F.relu6(self.convs[3](x))
        x = F.hardtanh(self.convs[4](x), -0.25, 0.75)
        return torch.relu(self.convs[5](x) + x)


def graph_of(prepared: nn.Module) -> Any:
    return next(module for module in (prepared, *prepared.modules()) if is_graph(module))


def targets(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes]


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_training_gives_what_it_gives_with_the_clamps_in_their_places(backend: Any) -> None:
    """Without fake quantize: the float network, and its gradients."""
    model = Clamps()
    prepared: Any = prepare(model, QuantConfig(backend=backend), method="qat", example_inputs=X)
    for module in prepared.modules():
        if is_ours(module):
            module.disable_fake_quant()
    prepared.train()
    expected = model(X)
    found = prepared(X)
    assert torch.allclose(expected, found, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
@pytest.mark.parametrize("method", ["static", "qat"])
def test_conversion_sees_what_was_hidden(backend: Any, method: Any) -> None:
    model = Clamps().eval() if method == "static" else Clamps()
    prepared: Any = prepare(model, QuantConfig(backend=backend), method=method, example_inputs=X)
    with torch.no_grad():
        for _ in range(3):
            prepared(X)
    prepared.eval()
    for module in prepared.modules():
        if is_ours(module):
            module.disable_observer()
    with torch.no_grad():
        expected = prepared(X)
        converted: Any = convert(prepared)
        assert sqnr_db(expected, converted(X)) > 28
        assert torch.equal(prepared(X), expected)  # which is as it was
        assert converted(X).min() >= 0


def test_all_clamps_are_hidden_in_training() -> None:
    graph = graph_of(prepare(Clamps(), method="qat", example_inputs=X))
    # the last of them run in float: what follows gives a float result
    left = [name for name in targets(graph) if any(kind in name for kind in ("relu", "hardtanh"))]
    assert len(left) == 2
    clamps = [module.clamp for module in graph.modules() if is_ours(module)]
    for clamp in ((0.0, 6.0), (-0.5, 0.5), (0.0, float("inf"))):
        assert clamp in clamps


def test_what_a_relu6_cuts_off_is_not_in_its_range() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1)).eval()
    prepared: Any = prepare(model, method="static", example_inputs=X)
    with torch.no_grad():
        prepared(X * 10)
    seen = [module for module in prepared.modules() if is_observer(module) and hasattr(module, "search")]
    behind = [module for module in seen if module.max_val == 6.0]
    assert len(behind) == 1
    assert behind[0].min_val == 0.0


def test_a_value_that_two_read_is_not_clamped_for_the_other() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.second(F.relu(y)) + y

    model = Both()
    for backend in ("fx", "eager", "pt2e"):
        prepared: Any = prepare(model, QuantConfig(backend=backend), method="qat", example_inputs=X)  # type: ignore[arg-type]
        for module in prepared.modules():
            if is_ours(module):
                module.disable_fake_quant()
        assert torch.allclose(prepared(X), model(X), atol=1e-5)


def test_hidden_nodes_come_back_in_order() -> None:
    traced = fx.symbolic_trace(Residual())
    before = [(n.op, n.name, str(n.target), [str(a) for a in n.args], dict(n.kwargs)) for n in traced.graph.nodes]
    chain = [n for n in traced.graph.nodes if len(n.all_input_nodes) == 1 and len(n.users) == 1]
    hidden = [n for n in chain if len(next(iter(n.users)).all_input_nodes) == 1 and n.op == "call_module"]
    assert len(hidden) >= 2
    x = torch.randn(2, 3, 8, 8)
    expected = traced.eval()(x)
    for node in hidden:
        hide(node)
    traced.recompile()
    assert len(traced.graph.nodes) == len(before) - len(hidden)
    traced = copy.deepcopy(traced)  # as conversion does: names are free in a copy
    restore(traced)
    after = [(n.op, n.name, str(n.target), [str(a) for a in n.args], dict(n.kwargs)) for n in traced.graph.nodes]
    assert after == before
    assert torch.equal(traced(x), expected)


def described(graph: fx.Graph) -> list[Any]:
    return [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs), dict(n.meta)) for n in graph.nodes]


class Shares(nn.Module):
    """Takes ``(N, 3)``: a hidden node may be read by several, beside other inputs, in containers and by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.inner, self.outer = nn.Tanh(), nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.outer(self.inner(self.weight))
        both = torch.cat([weight, self.weight, x, weight])
        return torch.add(F.linear(both, weight), F.linear(both, self.weight), alpha=2)


def test_a_hidden_node_comes_back_to_the_places_that_read_it() -> None:
    traced = fx.symbolic_trace(Shares())
    before = described(traced.graph)
    x = torch.randn(5, 3)
    expected = traced(x)
    for order in (("inner", "outer"), ("outer", "inner")):
        less = copy.deepcopy(traced)
        for name in order:
            hide(next(node for node in less.graph.nodes if node.target == name))
        less.recompile()
        assert not any(node.op == "call_module" for node in less.graph.nodes)
        assert not torch.allclose(less(x), expected)
        for _ in range(2):  # a copy is restored, and what it is a copy of is not
            back = copy.deepcopy(less)
            restore(back)
            assert described(back.graph) == before
            assert torch.equal(back(x), expected)


def test_a_node_with_two_inputs_is_not_hidden() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    twice = graph.call_function(torch.add, (x, x))
    graph.output(twice)
    with pytest.raises(ValueError, match=r"add.*cannot be hidden: its first argument has to be its only input\."):
        hide(twice)


class Weights(nn.Module):
    """Takes ``(N, 3, 12, 12)``: layers with and without a batch norm, transposed, linear, and one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.linear = nn.Linear(4, 6)
        self.tied = nn.Parameter(torch.randn(6, 6))
        with torch.no_grad():
            self.bn.running_var.uniform_(0.5, 2)
            self.bn.running_mean.normal_()
            self.bn.weight.uniform_(0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(torch.relu(self.bn(self.conv(x)))))
        x = self.linear(x.mean((2, 3)))
        return F.linear(torch.relu(F.linear(x, self.tied)), self.tied)


def count_calls(prepared: nn.Module) -> Counter[str]:
    """Calls of each observer of a weight, from now on."""
    calls: Counter[str] = Counter()
    graph = graph_of(prepared)
    for name, module in graph.named_modules():
        if is_observer(module) and sees_weights(graph, name):
            calls[name] = 0
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_observers_of_exported_weights_run_once_for_all(method: Any) -> None:
    prepared: Any = prepare(Weights().eval(), QuantConfig(backend="pt2e"), method=method, example_inputs=X)
    graph = graph_of(prepared)
    on_constants = [node for node in graph.graph.nodes if node.op.startswith("call") and is_constant(graph, node)]
    assert on_constants == []
    calls = count_calls(prepared)
    with torch.no_grad():
        prepared(X)
    # only linear layers are dynamic
    assert len(calls) == {"static": 4, "dynamic": 2}[method]
    assert sum(calls.values()) == 0


def test_fake_quantizes_of_exported_weights_run_in_every_pass() -> None:
    prepared: Any = prepare(Weights(), QuantConfig(backend="pt2e"), method="qat", example_inputs=X)
    calls = count_calls(prepared)
    prepared(X)
    prepared(X)
    assert set(calls.values()) == {2}


@pytest.mark.parametrize("own", [None, "own_torchao_classes.HalfRange"])
def test_a_conversion_is_the_same_as_with_weights_that_are_observed_in_every_pass(own: Any) -> None:
    weight = TensorSpec() if own is None else TensorSpec(observer=own)
    config = QuantConfig(backend="pt2e", weight=weight)
    prepared: Any = prepare(Weights().eval(), config, method="static", example_inputs=X)
    every: Any = copy.deepcopy(prepared)
    restore(graph_of(every))
    calls = count_calls(every)
    with torch.no_grad():
        for x in (X, 2 * X):
            assert torch.equal(prepared(x), every(x))
    assert set(calls.values()) == {2}
    found, expected = convert(prepared), convert(every)
    assert torch.equal(found(X), expected(X))
    assert str(graph_of(found).graph) == str(graph_of(expected).graph)
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_exported_weights_are_rounded_as_they_are_at_conversion() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    prepared: Any = prepare(model, QuantConfig(backend="pt2e"), method="static", example_inputs=X)
    with torch.no_grad():
        graph_of(prepared).get_parameter("0.weight").mul_(3)
        model[0].weight.mul_(3)
        prepared(X)
        assert sqnr_db(model(X), convert(prepared)(X)) > 30


class Padded(nn.Module):
    """Takes ``(N, 3, 12, 12)``. Torch has no int8 kernel for what reads the ReLU6: it is float, and has no observer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu6, self.last = nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.pad(self.relu6(self.conv(x)), (0, 1, 0, 1)))


def plain() -> nn.Module:
    net = nn.Sequential()
    net.conv, net.relu6, net.last = nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 2, 1)
    return net


@pytest.mark.parametrize("make", [plain, Padded])
@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_the_range_behind_a_clamp_is_that_of_what_it_lets_through(backend: Any, make: Any) -> None:
    """Of a layer in front of a ReLU6: values that are cut off, and negative ones, get none of the integers."""
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        net.conv.weight.mul_(20)
        prepared = prepare(net, QuantConfig(backend=backend), method="static", example_inputs=X)
        prepared(X)
        int8: Any = convert(prepared)
        assert float(int8.get_submodule("conv").scale) == pytest.approx(6 / 255, rel=0.01)
        assert torch.equal(prepared(X), net(X))


def test_a_range_that_is_trained_is_that_of_what_a_clamp_lets_through() -> None:
    torch.manual_seed(0)
    net = Padded()
    with torch.no_grad():
        net.conv.weight.mul_(20)
    prepared: Any = prepare(net, method="qat", example_inputs=X)
    prepared(X)
    int8: Any = convert(prepared.eval())
    assert float(int8.get_submodule("conv").scale) == pytest.approx(6 / 255, rel=0.01)
    assert sqnr_db(prepared(X), int8(X)) > 30


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_calibration_in_eager_mode_clamps_what_a_layer_gives_without_a_copy() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3)).eval()
    x = 20 * torch.randn(4, 3, 8, 8)
    kept = x.clone()
    twins = [prepare(model, QuantConfig(backend="eager"), method="static", example_inputs=x) for _ in range(2)]
    with torch.no_grad(), _Calls() as calls:
        without = twins[0](x)
    with_gradients = twins[1](x)
    with_gradients.sum().backward()
    assert "clamp_.default" in calls.names
    assert "clamp.default" not in calls.names
    assert torch.equal(without, with_gradients)
    assert torch.equal(x, kept)  # the input is not overwritten
    with torch.no_grad():
        assert torch.equal(convert(twins[0])(x), convert(twins[1])(x))
