"""What stands between layers with weights: in int8 where the data is in int8 anyhow, else in float.

Whether an operator ran in int8 is read from the tensors that it gave, not from the graph, but for a linear layer at
the end, whose kernel gives float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import calibrated, decibels
from torch import nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, convert, prepare
from lightning_quant._torch_ao import FakeQuantizeBase, get_native_backend_config
from lightning_quant.arguments import Call
from lightning_quant.backends import fx, islands
from lightning_quant.backends.float_results import LinearToFloat
from lightning_quant.backends.tracing import trace

IMAGES, ROWS = (4, 4, 8, 8), (16, 8)


class Net(nn.Module):
    """``function(self, x)`` with layers ``a``, ``b`` and ``c``: convolutions that keep sizes, or linear layers."""

    def __init__(self, function: Callable[..., Any], kind: str = "conv", head: int = 0, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name in "abc":
            setattr(self, name, nn.Conv2d(4, 4, 3, padding=1) if kind == "conv" else nn.Linear(8, 8))
        self.head = nn.Linear(head or 8, 5)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def convs(function: Callable[..., Any], **parts: Any) -> tuple[nn.Module, torch.Tensor]:
    return Net(function, **parts).eval(), torch.randn(IMAGES)


def linears(function: Callable[..., Any], **parts: Any) -> tuple[nn.Module, torch.Tensor]:
    return Net(function, "linear", **parts).eval(), torch.randn(ROWS)


class Watching(torch.fx.Interpreter):
    """Runs a graph and notes which operators ran in int8 and which in float, by name."""

    def __init__(self, graph: Any) -> None:
        super().__init__(graph)
        self.int8: list[str] = []
        self.float: list[str] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        name = str(n.target) if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
        moves = name in ("dequantize", "quantize_per_tensor")
        if n.op.startswith("call_") and not moves and isinstance(value, torch.Tensor):
            int8 = value.is_quantized or gives_float(self.module, n)
            (self.int8 if int8 else self.float).append(name)
        return value


def gives_float(graph: Any, node: torch.fx.Node) -> bool:
    """Whether it is an int8 kernel whose result is float."""
    return node.op == "call_module" and isinstance(graph.get_submodule(node.target), LinearToFloat)


def ran(graph: Any, x: torch.Tensor) -> tuple[list[str], list[str]]:
    """The operators that ran in int8, and those that ran in float, in the order in which they ran."""
    watching = Watching(graph)
    with torch.no_grad():
        watching.run(x)
    return watching.int8, watching.float


def boundaries(graph: Any) -> tuple[int, int]:
    """How often a graph goes to int8, and how often back."""
    nodes = list(graph.graph.nodes)
    targets = [node.target for node in nodes]
    back = targets.count("dequantize") + sum(gives_float(graph, node) for node in nodes)
    return targets.count(torch.quantize_per_tensor), back


def outputs(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_close(model: nn.Module, prepared: Any, int8: nn.Module, x: torch.Tensor) -> None:
    """To the float model: a few roundings to 8 bits, of 36 dB each. To float arithmetic between them: but for ties."""
    for expected, same, found in zip(*(outputs(m(x)) for m in (model, fx.reference(prepared), int8)), strict=True):
        assert not found.is_quantized
        assert decibels(expected, found) > 25
        assert decibels(same, found) > 35


# ---- sums


@pytest.mark.parametrize(
    ("add", "parts", "name"),
    [
        (lambda self, x, y: x + y, {}, "add"),
        (lambda self, x, y: torch.add(x, y), {}, "add"),
        (lambda self, x, y: F.relu(x + y), {}, "add_relu"),
        (lambda self, x, y: self.act(x + y), {"act": nn.ReLU()}, "add_relu"),
        (lambda self, x, y: torch.relu(torch.add(x, y)), {}, "add_relu"),
        (lambda self, x, y: x * y, {}, "mul"),
        (lambda self, x, y: torch.cat([x, y], 1)[:, :4], {}, None),
    ],
    ids=["+", "torch.add", "F.relu", "nn.ReLU", "torch.relu", "*", "slice"],
)
def test_residual_add_between_convolutions(add: Any, parts: dict[str, nn.Module], name: str | None) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.c(add(self, y, self.b(y)))

    model, x = convs(forward, **parts)
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    in_int8, in_float = ran(int8, x)
    if name is None:  # no int8 kernel cuts: the operator before it has a float reader
        assert "cat" in in_float
        return
    assert in_float == []
    assert boundaries(int8) == (1, 1)
    assert name in in_int8
    assert str(getattr(torch.ops.quantized, name)) in {str(node.target) for node in int8.graph.nodes}


def pre_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = x + self.a(self.first(x))
    x = x + self.b(self.second(x))
    return self.c(self.third(x))


def test_a_residual_stream_that_a_layer_norm_reads_stays_float() -> None:
    model, x = linears(pre_norm, first=nn.LayerNorm(8), second=nn.LayerNorm(8), third=nn.LayerNorm(8))
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    in_int8, in_float = ran(int8, x)
    assert in_float == ["first", "add", "second", "add", "third"]
    assert in_int8 == ["a", "b", "c"]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.c(self.a(x) + F.gelu(self.b(x))),
        lambda self, x: self.c(F.gelu(self.b(x)) + self.a(x)),
        lambda self, x: self.c(self.a(x) * F.gelu(self.b(x))),
        lambda self, x: self.c(self.a(x) + x),
        lambda self, x: self.c(self.a(x) + x.view(-1, 8)),
        lambda self, x: self.c(F.relu(self.a(x) + F.gelu(self.b(x)))),
        lambda self, x: self.c(self.a(x) + F.gelu(self.b(x)).reshape(-1, 2, 4).flatten(1)),
        lambda self, x: self.c(self.a(x) + torch.sin(self.b(x))),
    ],
    ids=["gelu", "gelu first", "product", "input", "moved input", "relu", "moved", "sin"],
)
def test_a_sum_of_int8_and_float_stays_float(function: Any) -> None:
    """Also where the float value was moved by an operator that could move int8 as well."""
    model, x = linears(function)
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    in_int8, in_float = ran(int8, x)
    assert {"add", "mul"} & set(in_float)
    assert not {"add", "mul", "add_relu"} & set(in_int8)
    assert "c" in in_int8


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: self.a(x) + self.b(x),
        lambda self, x: (self.c(y := self.a(x) + self.b(x)), y),
        lambda self, x: self.c(y := self.a(x) + self.b(x)) + F.gelu(y),
    ],
    ids=["output", "layer and output", "layer and gelu"],
)
def test_a_sum_with_a_float_reader_stays_float(function: Any) -> None:
    model, x = linears(function)
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    in_int8, in_float = ran(int8, x)
    assert "add" in in_float
    assert "add" not in in_int8


def test_a_sum_next_to_a_layer_that_is_skipped_stays_float() -> None:
    model, x = linears(lambda self, x: self.c(self.a(x) + self.b(x)))
    for skip, expected in ((("c",), ["add", "c"]), (("b",), ["b", "add"])):
        prepared = calibrated(model, x, config=QuantConfig(skip=skip))
        int8 = convert(prepared)
        assert_close(model, prepared, int8, x)
        assert ran(int8, x)[1] == expected


# ---- what moves data


@pytest.mark.parametrize(
    ("function", "parts", "expected"),
    [
        (
            lambda self, x: self.head(torch.flatten(self.pool(self.a(x)), 1)),
            {"head": 64, "pool": nn.MaxPool2d(2)},
            ["pool", "flatten"],
        ),
        (
            lambda self, x: self.head(F.max_pool2d(self.a(x), 2).reshape(-1, 64)),
            {"head": 64},
            ["max_pool2d", "reshape"],
        ),
        (
            lambda self, x: self.head(torch.flatten(self.pool(self.a(x)), 1)),
            {"head": 64, "pool": nn.AdaptiveAvgPool2d(4)},
            ["pool", "flatten"],
        ),
        (
            lambda self, x: self.head(self.a(x).reshape(x.shape[0], -1)),
            {"head": 256},
            ["reshape"],
        ),
        (
            lambda self, x: self.head((y := self.a(x)).reshape(y.size(0), y.size(1) * 64)),
            {"head": 256},
            ["reshape"],
        ),
        (
            lambda self, x: self.head(self.a(x).reshape(-1, 4, 64).transpose(1, 2).contiguous()),
            {"head": 4},
            ["reshape", "transpose", "contiguous"],
        ),
        (
            lambda self, x: self.c(torch.cat([self.a(x), self.b(x)], 2)),
            {},
            ["cat"],
        ),
    ],
    ids=["max pool", "function", "average", "shape", "size", "chain", "cat"],
)
def test_what_stands_between_two_layers_stays_int8(function: Any, parts: Any, expected: list[str]) -> None:
    model, x = convs(function, **parts)
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    in_int8, in_float = ran(int8, x)
    assert in_float == []
    assert [name for name in in_int8 if name not in ("a", "b", "c", "head")] == expected
    assert boundaries(int8) == (1, 1)


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: x.flatten(start_dim=1),
        lambda x: x.flatten(2).flatten(-2),
        lambda x: torch.reshape(x, (-1, 64)),
        lambda x: torch.reshape(input=x, shape=(x.shape[0], -1)),
    ],
    ids=["flatten", "start_dim", "flatten of the last", "torch.reshape", "named"],
)
def test_other_ways_to_move_data_stay_int8(flatten: Any) -> None:
    model, x = convs(lambda self, x: self.head(flatten(F.max_pool2d(self.a(x), 2))), head=64)
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert ran(int8, x)[1] == []
    assert_close(model, prepared, int8, x)


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("flatten", [nn.Flatten(), nn.Flatten(start_dim=-3)], ids=["", "from the end"])
def test_a_flatten_module_stays_int8(flatten: nn.Module, method: Any) -> None:
    model, x = convs(lambda self, x: self.head(self.flat(F.max_pool2d(self.a(x), 2))), head=64)
    model.flat = flatten
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    in_int8, in_float = ran(int8, x)
    assert in_float == []
    assert in_int8[-2:] == ["flatten", "head"]
    assert boundaries(int8) == (1, 1)
    assert_close(model, prepared, int8, x)


@pytest.mark.parametrize("view", [lambda x: x.view(-1, 64), lambda x: x.view(x.size(0), -1)], ids=["-1", "size"])
def test_a_view_of_an_int8_convolution(view: Any) -> None:
    """The classifier of many small networks, as tutorials write it."""
    model, x = convs(lambda self, x: self.head(view(F.max_pool2d(F.relu(self.a(x)), 2))), head=64)
    prepared = calibrated(model, x)
    assert_close(model, prepared, convert(prepared), x)


TWO_READERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "view": lambda y: y.view(-1, 4, 2),
    "reshape": lambda y: y.reshape(-1, 4, 2),
    "transpose": lambda y: y.reshape(-1, 2, 4).transpose(1, 2),
    "flatten": lambda y: torch.flatten(y.unsqueeze(2), 1).reshape(-1, 4, 2),
    "squeeze": lambda y: y.unsqueeze(1).squeeze(1).reshape(-1, 4, 2),
    "contiguous": lambda y: y.contiguous().reshape(-1, 4, 2),
    "repeat": lambda y: y.repeat(2, 1).reshape(-1, 4, 2),
    "max pool": lambda y: F.max_pool1d(y.repeat(1, 2), 2).reshape(-1, 4, 2),
    "stack": lambda y: torch.stack([y, y], 2)[:, :4],
    "nothing": lambda y: y.reshape(-1, 4, 2) + 0,
}


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("name", TWO_READERS)
def test_moved_data_with_an_int8_and_a_float_reader(name: str, method: Any) -> None:
    """torch.ao lowers it for one of them, and hands int8 to the other."""
    move = TWO_READERS[name]
    model, x = linears(lambda self, x: (self.head(y := move(self.a(x))), F.gelu(y)), head=2)
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    in_int8, in_float = ran(int8, x)
    assert in_int8[0] == "a"
    assert in_int8[-1] == "head"
    assert in_float[-1] == "gelu"


def test_moved_data_is_moved_once_for_readers_of_each_kind() -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y = self.a(x).view(-1, 2, 8).transpose(1, 2).contiguous().view(-1, 8)
        return self.b(y), self.c(y), F.gelu(y), y

    model, x = linears(forward)
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    in_int8, in_float = ran(int8, x)
    chain = ["reshape", "transpose", "contiguous", "reshape"]
    assert [name for name in in_int8 if name in chain] == chain
    assert in_float == [*chain, "gelu"]
    # one rounding serves both: what the float reader gets is what the layer a gave
    assert boundaries(int8) == (1, 3)


def test_moved_input_with_an_int8_and_a_float_reader() -> None:
    """Float until the layer: the other reader gets what came in, without a rounding."""
    model, x = linears(lambda self, x: (self.head(y := x.view(-1, 2, 4)), F.gelu(y)), head=4)
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    torch.testing.assert_close(int8(x)[1], F.gelu(x.view(-1, 2, 4)), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize(
    "move",
    [
        lambda y: y.reshape(-1, 4, 2),
        lambda y: y.view(-1, 4, 2),
        lambda y: y.view(-1, 2, 4).transpose(1, 2).contiguous().view(-1, 4, 2),
    ],
    ids=["reshape", "view", "chain"],
)
def test_a_layer_behind_float_data_that_is_moved_is_int8(move: Any, method: Any) -> None:
    """As the channel shuffle of ShuffleNet."""
    model, x = linears(lambda self, x: self.head(move(F.gelu(self.a(x)))), head=2)
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    in_int8, in_float = ran(int8, x)
    assert {"a", "head"} <= set(in_int8)
    assert in_float == ["gelu"]


def pooled(self: Any, x: torch.Tensor) -> Any:
    y = self.operator(self.a(x))
    return self.c(y), F.gelu(y), y


#: They compute or collect, so that they are not done twice.
COMPUTING: dict[str, Any] = {
    "cat": lambda y: torch.cat([y, y], 2),
    "mean": lambda y: y.mean((2, 3), keepdim=True),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(1),
    "interpolate": lambda y: F.interpolate(y, scale_factor=2),
    "relu": lambda y: y.relu(),
    "ReLU6": nn.ReLU6(),
    "sigmoid": torch.sigmoid,
    "Hardswish": nn.Hardswish(),
    "LayerNorm": nn.LayerNorm(8),
}


@pytest.mark.parametrize("name", COMPUTING)
def test_computed_data_with_an_int8_and_a_float_reader(name: str) -> None:
    model, x = convs(pooled, operator=COMPUTING[name])
    prepared = calibrated(model, x, passes=2)
    assert_close(model, prepared, convert(prepared), x)


def test_a_dropout_with_an_int8_and_a_float_reader_draws_once() -> None:
    model, x = linears(lambda self, x: (self.c(y := self.drop(self.a(x))), y), drop=nn.Dropout(0.5))
    with torch.no_grad():
        model.c.weight.copy_(torch.eye(8))
        model.c.bias.zero_()
    prepared = prepare(model, method="qat", example_inputs=x)
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeBase):
            module.disable_fake_quant()
    through, beside = prepared.train()(x)
    assert 0 < int((beside == 0).sum()) < beside.numel()
    assert torch.equal(through == 0, beside == 0)


# ---- operators that are float by design


@pytest.mark.parametrize("operator", [nn.GELU(), nn.SiLU(), nn.GroupNorm(2, 4)], ids=lambda m: type(m).__name__)
def test_operators_without_an_int8_kernel_stay_float(operator: nn.Module) -> None:
    model, x = convs(lambda self, x: self.c(self.operator(self.a(x))), operator=operator)
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    assert ran(int8, x) == (["a", "c"], ["operator"])


@pytest.mark.parametrize(
    "operator", [nn.LayerNorm(8), nn.InstanceNorm2d(4), nn.Softmax(1)], ids=lambda m: type(m).__name__
)
def test_normalisation_between_two_layers_stays_float(operator: nn.Module) -> None:
    model, x = convs(lambda self, x: self.c(self.operator(self.a(x))), operator=operator)
    prepared = calibrated(model, x)
    int8 = convert(prepared)
    assert_close(model, prepared, int8, x)
    assert ran(int8, x) == (["a", "c"], ["operator"])


@pytest.mark.filterwarnings("ignore:PReLU's weight observer should have dtype quint8")
def test_prelu_between_two_layers() -> None:
    model, x = convs(lambda self, x: self.c(self.operator(self.a(x))), operator=nn.PReLU())
    prepared = calibrated(model, x)
    assert_close(model, prepared, convert(prepared), x)


# ---- averages of all there is


AVERAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "module": (lambda self, x: torch.flatten(self.pool(self.a(x)), 1), {"pool": nn.AdaptiveAvgPool2d(1)}),
    "pair": (lambda self, x: torch.flatten(self.pool(self.a(x)), 1), {"pool": nn.AdaptiveAvgPool2d((1, 1))}),
    "function": (lambda self, x: torch.flatten(F.adaptive_avg_pool2d(self.a(x), (1, 1)), 1), {}),
    "keyword": (lambda self, x: torch.flatten(F.adaptive_avg_pool2d(self.a(x), output_size=1), 1), {}),
    "method": (lambda self, x: self.a(x).mean((2, 3)), {}),
    "mean": (lambda self, x: torch.mean(self.a(x), dim=(-2, -1)), {}),
    "tokens": (lambda self, x: self.a(x).flatten(2).transpose(1, 2).mean(1), {}),
    "sizes": (lambda self, x: (y := self.a(x)).mean((2, 3)).reshape(y.shape[0], y.size(1)), {}),
}


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_all_positions_has_a_range_of_its_own(name: str, backend: Any) -> None:
    function, parts = AVERAGES[name]
    model, x = convs(lambda self, x: self.c(function(self, x)), c=nn.Linear(4, 4), **parts)
    prepared = prepare(model, QuantConfig(backend=backend), method="static", example_inputs=x)
    with torch.no_grad():
        prepared(x)
        averages = function(model, x)
        assert decibels(model(x), convert(prepared)(x)) > 30
    ends = [(m.min_val.item(), m.max_val.item()) for m in prepared.modules() if hasattr(m, "search")]
    assert pytest.approx((averages.min().item(), averages.max().item()), abs=1e-6) in ends


@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_the_average_of_a_gate_stays_int8(backend: Any) -> None:
    """Its large input is in int8 for the product, and would be dequantized for the average alone."""

    def gate(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.c(y * torch.sigmoid(self.b(self.pool(y))))

    model, x = convs(gate, b=nn.Conv2d(4, 4, 1), pool=nn.AdaptiveAvgPool2d(1))
    prepared = prepare(model, QuantConfig(backend=backend), method="static", example_inputs=x)
    with torch.no_grad():
        prepared(x)
    in_int8, in_float = ran(convert(prepared), x)
    assert "pool" in in_int8
    assert [name for name in in_float if not name.startswith("int8_dequantize")] == []


# ---- float_nodes by itself


def float_nodes(function: Any, skip: tuple[str, ...] = (), **parts: Any) -> list[str]:
    model, x = linears(function, **parts)
    traced = trace(model, Call((x,)))
    found = islands.float_nodes(traced.graph_module, get_native_backend_config(), lambda node: node.target in skip)
    traced.graph_module.graph.lint()
    return [node.name for node in found]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda self, x: self.c(self.b(self.a(x))), []),
        (lambda self, x: self.c(self.a(x) + self.b(x)), []),
        (lambda self, x: self.a(x) + self.b(x), ["add"]),
        (lambda self, x: self.c(F.gelu(self.a(x))), []),
        (lambda self, x: self.c(F.gelu(self.a(x)) + self.b(x)), ["add"]),
        (lambda self, x: F.relu(self.a(x)), ["relu"]),
        (lambda self, x: self.c(F.relu(self.a(x))), []),
        (lambda self, x: self.c(x.view(-1, 8)), []),
        (lambda self, x: self.c(x.view(-1, 8) + self.a(x)), ["add", "view"]),
        (lambda self, x: self.c((y := self.a(x)).view(y.size(0), 8)), []),
    ],
)
def test_float_nodes(function: Any, expected: list[str]) -> None:
    """Operators that have an int8 kernel: GELU has none, and is not asked for."""
    found = float_nodes(function)
    assert sorted(found) == sorted(expected)


def test_a_layer_that_is_left_out_is_a_float_reader() -> None:
    function = lambda self, x: self.c(self.a(x) + self.b(x))  # noqa: E731
    assert float_nodes(function, ("c",)) == ["add"]
    assert float_nodes(function, ("a",)) == ["add"]
    assert float_nodes(function) == []


def test_a_model_without_layers_between_runs_no_operator_in_float() -> None:
    model, x = linears(lambda self, x: self.c(self.b(self.a(x))))
    int8 = convert(calibrated(model, x))
    assert ran(int8, x) == (["a", "b", "c"], [])
    assert boundaries(int8) == (1, 1)
