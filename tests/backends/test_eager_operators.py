"""The table of operators that run on int8 tensors: each beside the same operator on float tensors."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from models import decibels
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, TensorSpec
from lightning_quant._torch_ao import DeQuantStub, QuantStub
from lightning_quant.arguments import Call
from lightning_quant.backends import eager, eager_operators
from lightning_quant.backends.eager_operators import FIXED, OBSERVED, is_able, record_values
from lightning_quant.backends.eager_stubs import Functional
from lightning_quant.backends.islands import kind_of
from lightning_quant.backends.rewriting import add_scalar, mul_scalar

EAGER = QuantConfig(backend="eager", activation=TensorSpec(observer="min_max"))

#: Name -> (operator, dimensions of the data behind the batch and the channels). Between two layers in int8.
MOVES: dict[str, tuple[Any, int]] = {
    "torch.flatten": (lambda x: torch.flatten(x, 1), 2),
    "flatten": (lambda x: x.flatten(1), 2),
    "nn.Flatten": (nn.Flatten(), 2),
    "torch.reshape": (lambda x: torch.reshape(x, (-1, 72, 2)), 2),
    "reshape": (lambda x: x.reshape(-1, 144), 2),
    "view": (lambda x: x.view(-1, 8, 18), 2),
    "torch.permute": (lambda x: torch.permute(x, (0, 2, 3, 1)), 2),
    "permute": (lambda x: x.permute(0, 3, 1, 2), 2),
    "torch.transpose": (lambda x: torch.transpose(x, 1, 2), 2),
    "transpose": (lambda x: x.transpose(2, 3), 2),
    "torch.unsqueeze": (lambda x: torch.unsqueeze(x, 2), 2),
    "unsqueeze": (lambda x: x.unsqueeze(-1), 2),
    "torch.squeeze": (lambda x: torch.squeeze(x[:, :1], 1), 2),
    "squeeze": (lambda x: x[:, :, :1].squeeze(2), 2),
    "torch.narrow": (lambda x: torch.narrow(x, 1, 1, 2), 2),
    "narrow": (lambda x: x.narrow(2, 0, 3), 2),
    "torch.movedim": (lambda x: torch.movedim(x, 1, 3), 2),
    "movedim": (lambda x: x.movedim(1, 2), 2),
    "slice": (lambda x: x[:, 1:3, ::2], 2),
    "index": (lambda x: x[:, 0], 2),
    "torch.chunk": (lambda x: torch.chunk(x, 2, 1)[1], 2),
    "chunk": (lambda x: x.chunk(2, dim=1)[0], 2),
    "torch.split": (lambda x: torch.split(x, 3, 1)[1], 2),
    "split": (lambda x: x.split([1, 3], 1)[1], 2),
    "expand": (lambda x: x[:, :1].expand(-1, 3, -1, -1), 2),
    "expand_as": (lambda x: x[:, :1].expand_as(x), 2),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), 2),
    "torch.repeat_interleave": (lambda x: torch.repeat_interleave(x, 2, 1), 2),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 2), 2),
    "clone": (lambda x: x.clone(), 2),
    "torch.clone": (torch.clone, 2),
    "contiguous": (lambda x: x.permute(0, 2, 3, 1).contiguous(), 2),
    "detach": (lambda x: x.detach(), 2),
    "F.relu": (lambda x: F.relu(x.flatten(1)), 2),
    "nn.ReLU": (nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), 2),
    "relu": (lambda x: x.permute(0, 2, 3, 1).relu(), 2),
    "relu in place": (lambda x: x.permute(0, 2, 3, 1).relu_(), 2),
    "torch.relu in place": (lambda x: torch.relu_(x.permute(0, 2, 3, 1)), 2),
    "torch.relu": (lambda x: torch.relu(x.flatten(1)), 2),
    "F.max_pool1d": (lambda x: F.max_pool1d(x, 2), 1),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), 2),
    "F.max_pool3d": (lambda x: F.max_pool3d(x, 2), 3),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, 2), 2),
    "torch.max_pool1d": (lambda x: torch.max_pool1d(x, 2), 1),
    "torch.max_pool3d": (lambda x: torch.max_pool3d(x, 2), 3),
    "nn.MaxPool1d": (nn.MaxPool1d(2), 1),
    "nn.MaxPool2d": (nn.MaxPool2d(3, 2, ceil_mode=True), 2),
    "nn.MaxPool3d": (nn.MaxPool3d(2), 3),
    "F.interpolate": (lambda x: F.interpolate(x, scale_factor=2), 2),
    "F.interpolate size": (lambda x: F.interpolate(x, size=(9, 7)), 2),
    "F.interpolate exact": (lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact"), 2),
    "F.interpolate 3d": (lambda x: F.interpolate(x, scale_factor=2), 3),
    "nn.Upsample": (nn.Upsample(scale_factor=2), 2),
    "nn.UpsamplingNearest2d": (nn.UpsamplingNearest2d(scale_factor=2), 2),
    "F.pad": (lambda x: F.pad(x, (1, 2, 0, 1)), 2),
    "F.pad negative": (lambda x: F.pad(x, (-1, 2)), 2),
    "nn.ZeroPad2d": (nn.ZeroPad2d(1), 2),
    "F.pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), 2),
    "F.pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), 2),
    "F.channel_shuffle": (lambda x: F.channel_shuffle(x, 2), 2),
    "nn.PixelShuffle": (nn.PixelShuffle(2), 2),
    "nn.PixelUnshuffle": (nn.PixelUnshuffle(2), 2),
    "nn.ChannelShuffle": (nn.ChannelShuffle(2), 2),
    "nn.Unflatten": (nn.Unflatten(1, (2, 2)), 2),
    "nn.Dropout": (nn.Dropout(0.5), 2),
    "F.dropout": (lambda x: F.dropout(x, 0.5, training=False), 2),
    "nn.Dropout1d": (nn.Dropout1d(0.5), 1),
    "nn.Dropout2d": (nn.Dropout2d(0.5), 2),
    "nn.Dropout3d": (nn.Dropout3d(0.5), 3),
}

#: The result is rounded, or a bound of it is.
ROUNDS: dict[str, tuple[Any, int]] = {
    "F.relu6": (lambda x: F.relu6(x.flatten(1)), 2),
    "nn.ReLU6": (nn.ReLU6(), 2),
    "F.hardtanh": (lambda x: F.hardtanh(x, -0.3, 0.4), 2),
    "nn.Hardtanh": (nn.Hardtanh(-0.3, 0.4), 2),
    "torch.clamp": (lambda x: torch.clamp(x, -0.3, 0.4), 2),
    "clamp": (lambda x: x.clamp(min=-0.3), 2),
    "F.avg_pool1d": (lambda x: F.avg_pool1d(x, 2), 1),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), 2),
    "F.avg_pool3d": (lambda x: F.avg_pool3d(x, 2), 3),
    "nn.AvgPool1d": (nn.AvgPool1d(2), 1),
    "nn.AvgPool2d": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), 2),
    "nn.AvgPool3d": (nn.AvgPool3d(2), 3),
    "F.adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 3), 1),
    "F.adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (4, 3)), 2),
    "F.adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 2), 3),
    "nn.AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(3), 1),
    "nn.AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(3), 2),
    "nn.AdaptiveAvgPool3d": (nn.AdaptiveAvgPool3d(2), 3),
    "torch.mean": (lambda x: torch.mean(x, -1), 2),
    "mean": (lambda x: x.mean((2, 3)), 2),
    "mean of channels": (lambda x: x.mean(dim=1, keepdim=True), 2),
    "nn.Sigmoid": (nn.Sigmoid(), 2),
    "torch.sigmoid": (torch.sigmoid, 2),
    "sigmoid": (lambda x: x.sigmoid(), 2),
    "nn.Tanh": (nn.Tanh(), 2),
    "torch.tanh": (torch.tanh, 2),
    "tanh": (lambda x: x.tanh(), 2),
    "F.sigmoid": (F.sigmoid, 2),
    "F.tanh": (F.tanh, 2),
    "nn.Hardsigmoid": (nn.Hardsigmoid(), 2),
    "F.hardsigmoid": (F.hardsigmoid, 2),
    "nn.Hardswish": (nn.Hardswish(), 2),
    "F.hardswish": (F.hardswish, 2),
    "nn.ELU": (nn.ELU(0.7), 2),
    "F.elu": (lambda x: F.elu(x, 0.7), 2),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2, inplace=True), 2),
    "F.leaky_relu": (lambda x: F.leaky_relu(x, 0.2), 2),
    "nn.BatchNorm2d": (nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4)), 2),
    "nn.BatchNorm2d + ReLU": (nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU()), 2),
    "nn.BatchNorm3d": (nn.Sequential(nn.MaxPool3d(2), nn.BatchNorm3d(4)), 3),
    "add": (lambda x: x + x.transpose(2, 3), 2),
    "torch.add": (lambda x: torch.add(x, x.relu()), 2),
    "add method": (lambda x: x.add(x.transpose(2, 3)), 2),
    "add of one column": (lambda x: x + x[..., :1], 2),
    "add + relu": (lambda x: F.relu(x + x.transpose(2, 3)), 2),
    "add by operator": (lambda x: operator.iadd(x.transpose(2, 3).contiguous(), x), 2),
    "add in place": (lambda x: x.transpose(2, 3).contiguous().add_(x), 2),
    "mul": (lambda x: x * x.transpose(2, 3), 2),
    "mul of one value": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), 2),
    "mul method": (lambda x: x.mul(x), 2),
    "mul in place": (lambda x: x.transpose(2, 3).contiguous().mul_(x), 2),
    "mul by operator": (lambda x: operator.imul(x.transpose(2, 3).contiguous(), x), 2),
    "multiply": (lambda x: x.multiply(x), 2),
    "torch.multiply": (lambda x: torch.multiply(x, x), 2),
    "torch.mul": (lambda x: torch.mul(x, torch.sigmoid(x)), 2),
    "matmul": (lambda x: x @ x.transpose(2, 3), 2),
    "torch.matmul": (lambda x: torch.matmul(x.relu(), x), 2),
    "matmul method": (lambda x: x.matmul(x), 2),
    "bmm method": (lambda x: x[:, 0].bmm(x[:, 1]), 2),
    "torch.bmm": (lambda x: torch.bmm(x[:, 0], x[:, 1]), 2),
    "cat": (lambda x: torch.cat([x, 3 * x], 1), 2),
    "cat by name": (lambda x: torch.cat(tensors=(x, torch.sigmoid(x)), dim=2), 2),
    "torch.concatenate": (lambda x: torch.concatenate([x, x], dim=1), 2),
    "torch.concat": (lambda x: torch.concat([x[:, :1], x], dim=1), 2),
    "scalar mul": (lambda x: x * 10, 2),
    "negative scalar mul": (lambda x: -0.3 * x, 2),
    "scalar add": (lambda x: x + 0.2, 2),
    "large scalar add": (lambda x: 50 + x, 2),
    "small scalar add": (lambda x: x + 0.01 + 1e-5, 2),
}

#: No int8 kernel, or a wrong one: they run in float.
FLOAT: dict[str, tuple[Any, int]] = {
    "replicate": (lambda x: F.pad(x, (1, 1, 0, 1), mode="replicate"), 2),
    "circular": (lambda x: F.pad(x, (1, 1, 0, 1), mode="circular"), 2),
    "other value": (lambda x: F.pad(x, (1, 1), value=9.0), 2),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 2),
    "interpolate 1d": (lambda x: F.interpolate(x, scale_factor=2), 1),
    "stack": (lambda x: torch.stack([x, 9 * x]), 2),
    "divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), 2),
    "nn.AvgPool2d with divisor": (nn.AvgPool2d(2, divisor_override=3), 2),
    "nn.AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(2), 2),
    "sum": (lambda x: x.sum(1), 2),
    "softmax": (lambda x: x.softmax(1), 2),
    "layer norm": (nn.LayerNorm(6), 2),
    "nn.GELU": (nn.GELU(), 2),
    "nn.PReLU": (nn.PReLU(), 2),
    "nn.SiLU": (nn.SiLU(), 2),
    "times zero": (lambda x: x * 0 + x, 2),
    "roll": (lambda x: x.roll(1, 2), 2),
    "sizes": (lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2] + 0, -1) / x.shape[1], 2),
    "weighted sum": (lambda x: torch.add(x, x.relu(), alpha=2), 2),
    "matmul of other dims": (lambda x: torch.matmul(x, x[0, 0]), 2),
    "constant": (lambda x: x * torch.tensor([0.5, 2.0]).repeat(3), 2),
    "changed in place and read": (lambda x: (y := x.transpose(2, 3).contiguous()).add_(x) * y, 2),
    "mask": (lambda x: x.masked_fill(x > 0.1, 0.0), 2),
    "tensor index": (lambda x: x[:, torch.tensor([0, 2])], 2),
}


class Between(nn.Module):
    """A convolution, an operator, a linear layer."""

    def __init__(self, between: Any, dims: int) -> None:
        super().__init__()
        self.before = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](3, 4, 3, padding=1)
        self.between = between
        with torch.no_grad():
            size = between(self.before(torch.randn(2, 3, *[6] * dims)))
        self.after = nn.Linear(size.shape[-1], 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.between(self.before(x)))


def quantized(name: str, table: dict[str, tuple[Any, int]]) -> tuple[nn.Module, Any, torch.Tensor]:
    between, dims = table[name]
    model, x = Between(between, dims).eval(), torch.randn(8, 3, *[6] * dims)
    prepared = eager.prepare(model, EAGER, "static", Call((x,)))
    with torch.no_grad():
        prepared(x)
    return model, prepared, x


class Recorder(fx.Interpreter):
    """The value of every node."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@pytest.mark.parametrize("name", [*MOVES, *ROUNDS])
def test_an_operator_between_layers_runs_in_int8_as_in_float(name: str) -> None:
    """What is moved is exact; each rounding is half a step, and the operators that these make up have up to three."""
    between, _ = {**MOVES, **ROUNDS}[name]
    _, prepared, x = quantized(name, {**MOVES, **ROUNDS})
    kinds = [type(m) for m in prepared.modules()]
    # means run between two more stubs, where nothing else reads their input
    stubs = 2 if "mean" in name else 1
    assert (kinds.count(QuantStub), kinds.count(DeQuantStub)) == (stubs, stubs)
    int8 = eager.convert(prepared)
    recorder = Recorder(int8)
    with torch.no_grad():
        recorder.run(x)
        last = next(node for node in int8.graph.nodes if node.target == "after")
        given, found = recorder.values["before"], recorder.values[last.args[0].name]
        expected = between(given.dequantize().contiguous())
    # a rounded weight may move a value out of the range that calibration saw in float
    ends = [(end - found.q_zero_point()) * found.q_scale() for end in (0, 255)]
    expected = expected.clamp(*ends)
    steps = float((expected - found.dequantize()).abs().max()) / found.q_scale()
    assert steps <= (1e-4 if name in MOVES else 1.5 if "+" in name or "add" in name or "mul" in name else 1.01)
    # the same in the neutral form, where the values of the kernel lie between two steps a step apart
    other = Recorder(eager.reference(prepared))
    other.run(x)
    theirs = other.values[next(n for n in other.module.graph.nodes if n.target == "after").args[0].name]
    difference = ((theirs - found.dequantize()) / found.q_scale()).abs()
    assert difference.max() <= 1.01
    # of the means of n integers every n-th lies between two steps, for an even n
    is_mean = "avg" in name.lower() or "mean" in name
    assert (difference > 0.01).float().mean() <= (0.5 if is_mean else 0.02)


@pytest.mark.parametrize("name", FLOAT)
def test_what_has_no_kernel_stays_float(name: str) -> None:
    model, prepared, x = quantized(name, FLOAT)
    kinds = [type(m) for m in prepared.modules()]
    assert kinds.count(QuantStub) == kinds.count(DeQuantStub) == 2
    # four roundings of about 40 dB each, one of which a softmax or a sum may amplify
    assert decibels(model(x), eager.convert(prepared)(x)) >= 25


def test_every_operator_of_the_table_is_tried() -> None:
    """The tables above reach all that :mod:`eager_operators` names, so that nothing in it is a guess."""
    found: set[Any] = set()
    for between, dims in (*MOVES.values(), *ROUNDS.values()):
        model = Between(between, dims).eval()
        graph_module = fx.symbolic_trace(model)
        found |= {kind_of(graph_module, node) for node in graph_module.graph.nodes}
    known = {*eager_operators.KEEP, *eager_operators.FUNCTIONALS, *eager_operators.ACTIVATIONS, *OBSERVED, *FIXED}
    # these two stand for sums and products with numbers, which are tried as they are written
    assert known - found == {add_scalar, mul_scalar}


def test_sizes_and_integers_are_no_candidates() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[0] + 1
        return x + x.argmax(-1, keepdim=True) + size

    graph_module = fx.symbolic_trace(forward)
    record_values(graph_module, (torch.randn(2, 3),))
    able = [node.name for node in graph_module.graph.nodes if is_able(graph_module, node)]
    assert able == []


def test_functional_says_what_it_is() -> None:
    assert repr(Functional("add")).startswith("Functional(\n  add")
