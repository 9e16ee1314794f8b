"""Where quantize and dequantize stand for each runtime: pairs are dropped, and nothing else changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PROPERTY, Mlp, Residual, calibrated, decibels, settle
from torch import nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, TensorSpec
from lightning_quant.exporters import qdq
from lightning_quant.exporters.layouts import LAYOUTS, Layout, int8_layers, laid_out
from lightning_quant.exporters.qdq import to_program

Exported = torch.export.ExportedProgram

QDQ = torch.ops.quantized_decomposed
QUANTIZE, DEQUANTIZE = QDQ.quantize_per_tensor.default, QDQ.dequantize_per_tensor.default
DEQUANTIZE_WEIGHT = QDQ.dequantize_per_channel.default
BACKENDS = ("fx", "eager", "pt2e")
#: Layers and layouts are the same on every machine: weights of 8 bits, ranges that are those of the data.
STATIC = QuantConfig(activation=TensorSpec(observer="min_max"), reduce_range=False)


def written(model: nn.Module, x: torch.Tensor, backend: Any = "fx") -> Exported:
    weight = TensorSpec(observer="min_max")
    config = QuantConfig(backend=backend, activation=STATIC.activation, weight=weight, reduce_range=False)
    return to_program(qdq(calibrated(model.eval(), x, config=config)), (x[:2],), ())


def run(program: Exported, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return program.module(check_guards=False)(x)


def named(node: torch.fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``; ``x`` for the input."""
    return node.target.__name__.split(".")[0] if callable(node.target) else "x"


def pairs(program: Exported) -> list[tuple[str, list[str]]]:
    """Each pair by what it quantizes and what reads it."""
    found = []
    for node in program.graph.nodes:
        if node.target is QUANTIZE:
            users = [user for dequantize in node.users for user in dequantize.users]
            found.append((named(node.args[0]), [user.op if user.op == "output" else named(user) for user in users]))
    return found


def quantizers(program: Exported) -> set[tuple[str, Any]]:
    """The quantize nodes with what they quantize, and how."""
    return {(node.name, node.args[1:]) for node in program.graph.nodes if node.target is QUANTIZE}


def state(program: Exported) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in {**program.state_dict, **program.constants}.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        x.dtype == theirs[key].dtype and torch.equal(x, theirs[key]) for key, x in ours.items()
    )


class Gated(nn.Module):
    """``x * sigmoid(x)`` written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


class Activated(nn.Module):
    """A convolution, an activation, and a linear layer behind it."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.act = act
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.act(self.conv(x)).mean((2, 3)))


class Chain(nn.Module):
    """Four linear layers with a ReLU behind each but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.relu(layer(x))
        return self.d(x)


class Named(nn.Module):
    """Layers in containers, with and without a batch norm and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 1)
        )
        self.head = nn.ModuleDict({"fc": nn.Linear(4, 3), "out": nn.Linear(3, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head["out"](torch.relu(self.head["fc"](self.enc(x).mean((2, 3)))))


class Twice(nn.Module):
    """One layer that is called twice, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(torch.relu(self.first(x)))
        return self.last(torch.relu(self.shared(torch.relu(x))))


@functools.cache
def chain(backend: str) -> tuple[Exported, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    return written(Chain(), x, backend), x


@functools.cache
def residual() -> tuple[Exported, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    return written(settle(Residual()), x), x


# ---- the layout that changes nothing


@pytest.mark.parametrize("case", [lambda: chain("fx"), lambda: chain("pt2e"), residual])
def test_no_layout_is_the_program_itself(case: Callable[[], Any]) -> None:
    program, x = case()
    copied = laid_out(program, LAYOUTS["pt2"])
    assert copied is not program
    assert pairs(copied) == pairs(program)
    assert torch.equal(run(copied, x), run(program, x))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("in_float", [(), ("stem", "blocks.0.conv2")])
def test_the_original_is_not_changed_and_weights_are_shared(layout: Any, in_float: tuple[str, ...]) -> None:
    program, x = residual()
    before, code, expected = state(program), program.graph_module.code, run(program, x)
    result = laid_out(program, layout, in_float)
    assert same(state(program), before)
    assert program.graph_module.code == code
    assert torch.equal(run(program, x), expected)
    shared = {name for name, value in result.state_dict.items() if value is program.state_dict[name]}
    assert program.state_dict.keys() - shared == {f"module.{layer}.weight" for layer in in_float}


# ---- activations inside of a kernel


@pytest.mark.parametrize(
    ("act", "parting", "inside", "behind"),
    [
        (nn.SiLU(), ["silu"], [], [("silu", ["mean"])]),
        (Gated(), ["sigmoid", "mul"], [("sigmoid", ["mul"])], [("mul", ["mean"])]),
        (nn.GELU(), ["gelu"], [], []),
        (nn.Hardswish(), ["hardswish"], [], [("hardswish", ["mean"])]),
        (nn.Sigmoid(), ["sigmoid"], [], [("sigmoid", ["mean"])]),
        (nn.ReLU6(), ["hardtanh"], [], [("hardtanh", ["mean"])]),
        (nn.LeakyReLU(), ["leaky_relu"], [], [("leaky_relu", ["mean"])]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_pair_between_a_layer_and_its_activation_is_dropped(
    act: nn.Module, parting: list[str], inside: list[Any], behind: list[Any]
) -> None:
    x = torch.randn(16, 3, 8, 8)
    program = written(Activated(act), x)
    conv = ("conv2d", parting)
    assert pairs(program) == [("x", ["conv2d"]), conv, *inside, *behind, ("mean", ["linear"])]
    # ONNX Runtime has no int8 convolution that writes floats
    assert pairs(laid_out(program, LAYOUTS["onnx"])) == pairs(program)
    for name in ("openvino", "aoti"):
        assert pairs(laid_out(program, LAYOUTS[name])) == [("x", ["conv2d"]), *behind, ("mean", ["linear"])]


def test_the_layout_for_openvino_computes_what_its_pairs_say() -> None:
    """A convolution and GELU without a pair between them, by torch's own fake quantize and the known qparams."""
    torch.manual_seed(0)
    model, x = Activated(nn.GELU()), torch.randn(32, 3, 8, 8)
    program = written(model, x)
    qparams = [node.args[1:3] for node in program.graph.nodes if node.target is QUANTIZE]
    assert [source for source, _ in pairs(program)] == ["x", "conv2d", "mean"]

    def rounded(value: torch.Tensor, number: int) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(value, *qparams[number], 0, 255)

    def weight(layer: nn.Module) -> torch.Tensor:
        scale = layer.weight.detach().flatten(1).abs().amax(1) / 127
        return torch.fake_quantize_per_channel_affine(
            layer.weight.detach(), scale, torch.zeros(len(scale), dtype=torch.int), 0, -127, 127
        )

    def expected(conv_out: int | None) -> torch.Tensor:
        y = F.conv2d(rounded(x, 0), weight(model.conv), model.conv.bias)
        y = F.gelu(y if conv_out is None else rounded(y, conv_out))
        return F.linear(rounded(y.mean((2, 3)), 2), weight(model.fc), model.fc.bias)

    with torch.no_grad():
        for name, place in (("pt2", 1), ("onnx", 1), ("openvino", None), ("aoti", None)):
            # a sum of floats in another order now and then rounds to the next step, of which there are thousands here
            assert decibels(expected(place), run(laid_out(program, LAYOUTS[name]), x)) > 60
        # so that the one is not taken for the other
        assert decibels(expected(1), expected(None)) < 57


def test_an_activation_in_place_is_one() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x).sigmoid_())

    x = torch.randn(32, 8)
    program = written(InPlace(), x)
    before = [pair for pair in pairs(program) if pair[0] == "linear"]
    assert before[0] == ("linear", ["sigmoid_"])
    assert [pair for pair in pairs(laid_out(program, LAYOUTS["openvino"])) if pair[0] == "linear"] == []


@pytest.mark.parametrize("backend", ["fx", "pt2e"])
def test_a_pair_that_another_layer_reads_too_stays(backend: str) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.left(torch.sigmoid(y)) + self.right(y)

    x = torch.randn(32, 8)
    program = written(Forked(), x, backend)

    def behind_first(laid: Exported) -> list[Any]:
        return [pair for pair in pairs(laid) if pair[0] == "linear" and "linear" in pair[1]]

    assert len(behind_first(program)) == 1
    assert behind_first(laid_out(program, LAYOUTS["openvino"])) == behind_first(program)


def test_a_product_with_the_gate_of_another_value_is_a_step_of_integers() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.last = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x) * torch.sigmoid(self.gate(x)))

    x = torch.randn(32, 8)
    program = written(Other(), x)
    product = [("linear", ["mul"]), ("sigmoid", ["mul"]), ("mul", ["linear"])]
    gate = ("linear", ["sigmoid"])
    assert sorted(pairs(program)) == sorted([("x", ["linear", "linear"]), *product, gate])
    assert sorted(pairs(laid_out(program, LAYOUTS["openvino"]))) == sorted([("x", ["linear", "linear"]), *product])
    assert pairs(laid_out(program, LAYOUTS["onnx"])) == pairs(program)


# ---- the end


@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_a_pair_at_the_end_is_dropped(backend: str) -> None:
    x = torch.randn(32, 4, 6, 6)
    program = written(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), x, backend)
    assert pairs(program)[-1][1] == ["output"]
    assert pairs(laid_out(program, LAYOUTS["onnx"])) == pairs(program)
    assert pairs(laid_out(program, LAYOUTS["aoti"])) == pairs(program)[:-1]
    result = laid_out(program, LAYOUTS["openvino"])
    # half a step of the output inside of its range, and what float32 adds to it
    scale, zero_point = [node.args[1:3] for node in program.graph.nodes if node.target is QUANTIZE][-1]
    exact = run(result, x).clamp(-zero_point * scale, (255 - zero_point) * scale)
    assert (exact - run(program, x)).abs().max() <= scale * 0.5001


def test_an_output_that_a_layer_reads_as_well_keeps_its_pair() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.first(x)
            return y, self.second(y)

    x = torch.randn(32, 8)
    program = written(Both(), x)
    result = laid_out(program, LAYOUTS["openvino"])
    assert ("linear", ["output"]) not in pairs(result)
    assert any("linear" in users for source, users in pairs(result) if source == "linear")
    first, second = run(result, x)
    expected_first, expected_second = run(program, x)
    assert torch.equal(first, expected_first)
    assert decibels(expected_second, second) > 35


# ---- convolutions that write integers


def test_a_convolution_that_does_not_write_integers_is_left_in_float_for_onnx_runtime() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), None
    x = torch.randn(16, 3, 12, 12)
    program = written(model, x, "pt2e")  # which observes no value in front of SiLU, and none at the end
    assert list(int8_layers(program)) == ["0", "2", "4"]
    result = laid_out(program, LAYOUTS["onnx"])
    assert list(int8_layers(result)) == ["2"]
    # those around it read and write floats: pairs stand only around it
    assert pairs(result) == [("silu", ["conv2d"]), ("relu", ["conv2d"])]
    assert list(int8_layers(laid_out(program, LAYOUTS["openvino"]))) == ["0", "2", "4"]


def test_linear_layers_need_not_write_integers() -> None:
    program, _ = chain("pt2e")
    assert list(int8_layers(laid_out(program, LAYOUTS["onnx"]))) == ["a", "b", "c", "d"]


# ---- layers in float


def dequantized(program: Exported, layer: str) -> torch.Tensor:
    """The weight that a layer's integers stand for, from the operator that reads them."""
    node = next(
        node
        for node in program.graph.nodes
        if node.target is DEQUANTIZE_WEIGHT and f"{layer.replace('.', '_')}_weight" in node.args[0].name
    )
    names = program.graph_signature.inputs_to_buffers
    tensors = {**program.state_dict, **program.constants}
    weight, scale, zero_point = (tensors[names[arg.name]] for arg in node.args[:3])
    axis = (-1, *[1] * (weight.dim() - 1))
    return (weight.float() - zero_point.float().reshape(axis)) * scale.reshape(axis)


LAYERS = ("stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "fc")


@settings(PROPERTY, max_examples=25)
@given(st.sets(st.sampled_from(LAYERS)))
def test_layers_in_float(in_float: set[str]) -> None:
    program, x = residual()
    assert tuple(int8_layers(program)) == LAYERS
    result = laid_out(program, None, sorted(in_float))
    assert list(int8_layers(result)) == [layer for layer in LAYERS if layer not in in_float]
    for layer in LAYERS:
        stored = result.state_dict[f"module.{layer}.weight"]
        expected = dequantized(program, layer) if layer in in_float else program.state_dict[f"module.{layer}.weight"]
        assert stored.dtype == (torch.float32 if layer in in_float else torch.int8)
        assert torch.equal(stored, expected)
    assert quantizers(result) <= quantizers(program)
    # fewer roundings, and no others
    assert decibels(run(program, x), run(result, x)) > 25


@pytest.mark.parametrize("backend", BACKENDS)
@settings(PROPERTY, max_examples=16)
@given(in_float=st.sets(st.sampled_from("abcd")))
def test_pairs_stay_where_a_layer_beside_them_is_in_int8(backend: str, in_float: set[str]) -> None:
    program, _ = chain(backend)
    around = list(zip(" abcd", "abcd ", strict=True))  # the layers before and behind each pair
    around = around[:-1]  # the output is left in float
    assert len(pairs(program)) == len(around)
    int8 = set("abcd") - in_float
    expected = [pair for pair, (before, behind) in zip(pairs(program), around, strict=True) if {before, behind} & int8]
    assert pairs(laid_out(program, None, tuple(in_float))) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_in_float_is_float_arithmetic_on_the_weights(backend: str) -> None:
    program, x = chain(backend)
    result = laid_out(program, None, tuple("abcd"))
    assert not any("quantize" in str(node.target) for node in result.graph.nodes)
    tensors = {**program.state_dict, **program.constants}
    y = x
    for layer in "abcd":
        bias = next(tensors[name] for name in tensors if name.endswith(f"{layer}.bias"))
        y = F.linear(y, dequantized(program, layer), bias)
        y = y if layer == "d" else torch.relu(y)
    assert torch.allclose(run(result, x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [None, *(LAYOUTS[name] for name in ("onnx", "openvino", "aoti"))])
def test_a_layer_that_is_called_twice_keeps_the_pairs_of_both_calls(layout: Layout | None) -> None:
    x = torch.randn(32, 8)
    program = written(Twice(), x, "pt2e")  # the other backends store it twice
    assert list(int8_layers(program)) == ["first", "shared", "last"]
    before = pairs(program)
    assert before == [("x", ["linear"]), *[("relu", ["linear"])] * 3]
    assert pairs(laid_out(program, layout)) == before
    names = [node.name for node in program.graph.nodes if node.target is QUANTIZE]

    def left(*in_float: str) -> list[str]:
        kept = {name for name, _ in quantizers(laid_out(program, layout, in_float))}
        return [name for name in names if name in kept]

    # with no layout, what a layer in int8 wrote is still rounded; ONNX Runtime's kernels write integers
    behind = [] if layout and not layout.convs_write_integers else names[3:]
    assert left("last") == names[:3] + behind
    assert left("first", "last") == names[1:3] + behind
    assert left("shared") == [names[0], *(names[1:2] if behind else []), names[3]]
    assert list(int8_layers(laid_out(program, layout, ("shared",)))) == ["first", "last"]


def test_one_scale_for_a_whole_weight() -> None:
    x = torch.randn(32, 4)
    config = QuantConfig(weight=TensorSpec(qscheme="per_tensor_symmetric"), reduce_range=False)
    program = to_program(qdq(calibrated(Mlp().eval(), x, config=config)), (x[:2],), ())
    node = next(n for n in program.graph.nodes if n.target is DEQUANTIZE and "first_weight" in n.args[0].name)
    scale, zero_point = node.args[1:3]
    result = laid_out(program, None, ("first",))
    assert list(int8_layers(result)) == ["second"]
    integers = program.state_dict["module.first.weight"]
    assert torch.equal(result.state_dict["module.first.weight"], (integers.float() - zero_point) * scale)


# ---- names


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_have_the_names_of_the_modules(backend: Any, method: Any) -> None:
    model, x = settle(Named()), torch.randn(8, 3, 8, 8)
    prepared = calibrated(model, x, config=QuantConfig(backend=backend), method=method)
    program = to_program(qdq(prepared), (x[:2],), ())
    layers = [name for name, part in model.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    assert layers == ["enc.0", "enc.3", "enc.5", "head.fc", "head.out"]
    assert list(int8_layers(program)) == layers
    for name, node in int8_layers(program).items():
        assert named(node) == ("linear" if name.startswith("head") else "conv2d")
