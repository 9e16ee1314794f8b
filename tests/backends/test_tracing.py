"""What FX stumbles over: functional layers, functions that follow the mode, reused modules, kinds of batch norm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Branching, Mlp, TwoInputs, calibrated, decibels, settle
from torch import nn
from torch.nn import functional as F

from lightning_quant import CaptureError, convert, prepare
from lightning_quant.arguments import Call
from lightning_quant.backends import fx
from lightning_quant.backends.graph import info, is_graph
from lightning_quant.backends.tracing import LAYER, ModeDependent, trace, trace_around
from lightning_quant.config import Method
from lightning_quant.phases import set_observing

METHODS = pytest.mark.parametrize("method", ["static", "qat"])


class Functional(nn.Module):
    """One function with a Parameter."""

    def __init__(self, function: Any, *weights: torch.Tensor, **options: Any) -> None:
        super().__init__()
        self.function = function
        self.options = options
        self.weight = nn.Parameter(weights[0])
        self.bias = nn.Parameter(weights[1]) if len(weights) > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return self.function(x, self.weight, **self.options)
        return self.function(x, self.weight, self.bias, **self.options)


def operators(graph: nn.Module) -> set[str]:
    """What a converted graph runs: where modules' types and their bases are defined, and functions."""
    found = {kind.__module__ for m in graph.children() for kind in type(m).__mro__}
    return found | {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


# ---- functions with weights


@METHODS
@pytest.mark.parametrize(
    ("function", "shapes", "x_shape", "options"),
    [
        (F.linear, [(5, 4)], (8, 4), {}),
        (F.linear, [(5, 4), (5,)], (8, 4), {}),
        (F.conv1d, [(5, 3, 3)], (8, 3, 9), {"padding": "same"}),
        (F.conv2d, [(5, 3, 3, 3)], (8, 3, 6, 6), {}),
        (F.conv2d, [(5, 3, 3, 3), (5,)], (8, 3, 6, 6), {"stride": 2, "padding": 1}),
        (F.conv2d, [(5, 3, 3, 3)], (8, 3, 6, 6), {"padding": "same", "dilation": 2}),
        (F.conv2d, [(5, 3, 3, 3)], (8, 3, 6, 6), {"padding": "valid"}),
        (F.conv2d, [(6, 1, 3, 3)], (8, 3, 6, 6), {"groups": 3}),
        (F.conv3d, [(5, 3, 1, 1, 1)], (8, 3, 2, 3, 3), {}),
        (F.conv_transpose1d, [(3, 5, 2)], (8, 3, 6), {"stride": 2}),
        (F.conv_transpose2d, [(3, 5, 2, 2)], (8, 3, 4, 4), {"stride": 2, "output_padding": 1}),
        (F.conv_transpose2d, [(3, 5, 2, 2), (5,)], (8, 3, 4, 4), {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_functional_layers_run_in_int8(
    function: Any, shapes: Any, x_shape: tuple[int, ...], options: Any, method: Method
) -> None:
    model, x = Functional(function, *map(torch.randn, shapes), **options), torch.randn(x_shape)
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    assert decibels(model(x), int8(x)) > 25
    assert any("quantized" in name for name in operators(int8))
    assert decibels(fx.reference(prepared)(x), int8(x)) > 35


@METHODS
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(3, 4, 3, padding="same"),
        lambda: nn.Conv2d(3, 4, 3, padding="same", bias=False, dilation=2),
        lambda: nn.Conv2d(3, 4, 2, padding="valid"),
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="replicate"),
    ],
    ids=["same", "same dilated", "valid", "reflect", "circular", "replicate"],
)
def test_padding_of_layers(layer: Any, method: Method) -> None:
    model = layer()
    x = torch.randn(8, 3, 6) if isinstance(model, nn.Conv1d) else torch.randn(8, 3, 6, 6)
    int8 = convert(calibrated(model, x, method=method))
    assert int8(x).shape == model(x).shape
    assert decibels(model(x), int8(x)) > 25


@METHODS
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_padding_that_differs_between_the_sides(method: Method) -> None:
    """No int8 kernel has it: whatever runs, the result is right."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.ReLU()), torch.randn(8, 3, 6, 6)
    int8 = convert(calibrated(model, x, method=method))
    assert decibels(model(x), int8(x)) > 25


# ---- the mode


class WithDropout(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.fc(x), self.p, training=self.training)


def assert_follows_mode(model: nn.Module, x: torch.Tensor) -> None:
    prepared = prepare(model, method="qat", example_inputs=x)
    prepared.eval()(x)
    set_observing(prepared, activations=False, weights=False)
    assert not torch.equal(prepared.train()(x), prepared(x))
    assert torch.equal(prepared.eval()(x), prepared(x))
    assert decibels(model.eval()(x), prepared(x)) > 25
    int8 = convert(prepared)
    assert torch.equal(int8(x), int8(x))
    assert decibels(model(x), int8(x)) > 25


def test_functional_dropout_follows_the_mode() -> None:
    model, x = WithDropout(), torch.randn(64, 8)
    assert_follows_mode(model, x)
    prepared = prepare(model, method="qat", example_inputs=x)
    for _ in range(2):
        zeros = (prepared.train()(x) == 0).float().mean()
    assert 0.4 < float(zeros) < 0.6  # 512 draws of p = 0.5: five standard deviations are 0.11


@pytest.mark.torchvision
def test_a_function_with_a_training_flag_follows_the_mode() -> None:
    torchvision = pytest.importorskip("torchvision")

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.drop = torchvision.ops.StochasticDepth(0.5, "row")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.drop(self.fc(x))

    assert_follows_mode(Residual(), torch.randn(64, 8))


def test_the_mode_of_a_replaced_function() -> None:
    calls: list[Any] = []
    module = ModeDependent(lambda *args, **kwargs: calls.append((args, kwargs)), (1,), ("flag",))
    for mode in (True, False):
        module.train(mode)(3, None, other=2, flag="x")
    assert calls == [((3, True), {"other": 2, "flag": True}), ((3, False), {"other": 2, "flag": False})]


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.body(x)
        return (self.head(y), self.extra(y)) if self.training else self.head(y)


def test_a_branch_on_the_mode_cannot_be_trained_as_one_graph() -> None:
    text = (
        r"^forward computes other things in training than in evaluation \(a branch on self\.training, such as an "
        r"auxiliary output\)$"
    )
    with pytest.raises(CaptureError, match=text):
        trace(Auxiliary(), Call((torch.ones(1, 4),)), training=True)
    # and where nothing is trained, the graph is that of evaluation
    traced = trace(Auxiliary(), Call((torch.ones(1, 4),)))
    assert traced.replaced == ("body", "head")


def test_tracing_puts_modes_back() -> None:
    model = nn.Sequential(WithDropout(), nn.Linear(8, 2))
    model[0].eval()
    modes = [m.training for m in model.modules()]
    for training in (True, False):
        trace(model, Call((torch.ones(1, 8),)), training=training)
        assert [m.training for m in model.modules()] == modes


@METHODS
def test_a_constant_tensor_in_forward(method: Method) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.place = nn.Embedding(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + self.place(torch.arange(3)))

    model, x = Scaled(), torch.randn(8, 3, 4)
    names = set(model.state_dict()) | set(model.__dict__)
    prepared = calibrated(model, x, method=method)
    assert is_graph(prepared)
    assert decibels(model(x), convert(prepared)(x)) > 25
    assert set(model.state_dict()) | set(model.__dict__) == names


# ---- reused modules


@METHODS
def test_each_call_of_a_reused_layer_has_its_own_range(method: Method) -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.act = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.fc(100 * self.act(self.fc(x))))

    model, x = Reused(), torch.randn(64, 4)
    prepared = calibrated(model, x, method=method)
    assert info(prepared).origins == {"fc_call1": "fc", "act_call1": "act"}
    if method == "qat":
        assert prepared.fc_call1.weight is prepared.fc.weight is model.fc.weight
    int8 = convert(prepared)
    assert float(int8.fc_call1.scale) > 10 * float(int8.fc.scale)
    assert decibels(model(x), int8(x)) > 25


@METHODS
def test_a_layer_under_two_names(method: Method) -> None:
    model = Mlp()
    tied = nn.Sequential(model, nn.Linear(3, 4), model)
    x = torch.randn(64, 4)
    int8 = convert(calibrated(tied, x, method=method))
    assert decibels(tied(x), int8(x)) > 20


# ---- batch norms


@METHODS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.BatchNorm2d(4, track_running_stats=False),
        lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        lambda: nn.BatchNorm2d(4, momentum=None),
        lambda: nn.BatchNorm2d(4, eps=0.1),
    ],
    ids=["no affine", "no statistics", "neither", "cumulative", "eps"],
)
@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_batch_norms_of_all_kinds(conv: Any, norm: Any, bias: bool, method: Method) -> None:
    model = nn.Sequential(conv(3, 4, 3, bias=bias), norm(), nn.ReLU())
    x = torch.randn(16, 3, 6, 6)
    model(x)
    model.eval()
    expected = model(x)
    prepared = calibrated(model, x, method=method)
    if method == "qat":
        prepared.train()(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        if model[1].running_mean is not None:  # training moved them
            expected = None
    prepared.eval()
    actual = convert(prepared)(x)
    assert decibels(prepared(x) if expected is None else expected, actual) > 25


@METHODS
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolution_with_batch_norm_and_relu(dims: int, method: Method) -> None:
    conv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    shape = (8, 3, *[4] * dims)
    model = settle(nn.Sequential(conv(3, 4, 2, stride=2), norm(4), nn.ReLU()), shape)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    nn.init.normal_(model[1].bias)
    x = torch.randn(shape)
    expected = model(x)
    prepared = calibrated(model, x, method=method)
    if method == "qat":
        prepared.train()(x).square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        prepared.eval()
    assert decibels(expected, convert(prepared)(x)) > 25


@METHODS
@pytest.mark.parametrize("size", [None, "constant", "of the input"])
def test_output_size_of_a_transposed_convolution(size: str | None, method: Method) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes = {None: None, "constant": [8, 8], "of the input": x.shape[-2:]}
            return self.up(self.down(x), output_size=sizes[size])

    model, x = Up(), torch.randn(8, 3, 8, 8)
    int8 = convert(calibrated(model, x, method=method))
    assert int8(x).shape == model(x).shape
    assert decibels(model(x), int8(x)) > 25


# ---- the graph and its interface


def test_a_layer_of_torch_is_one_node() -> None:
    traced = trace(nn.Linear(4, 2), Call((torch.ones(1, 4),)))
    assert [node.target for node in traced.graph_module.graph.nodes if node.op == "call_module"] == [LAYER]
    assert traced.replaced == ("weight", "bias")
    assert traced.origins == {LAYER: ""}


def test_arguments_that_were_not_given_are_their_defaults() -> None:
    model = TwoInputs()
    a, b = torch.randn(2, 8, 4)
    for call, double in ((Call((a,), {"b": b}), False), (Call((a,), {"b": b, "double": True}), True)):
        traced = trace(model, call)
        assert [node.name for node in traced.graph_module.graph.nodes if node.op == "placeholder"] == ["a", "b"]
        assert traced.interface.constants == {"double": double}
        torch.testing.assert_close(traced.graph_module(a, b), model(a, b=b, double=double))


def test_containers_of_tensors_are_inputs() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, batch: dict[str, torch.Tensor], pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return self.fc(batch["x"] + pair[0]) * pair[1][:, :2]

    model, x = Nested(), torch.randn(8, 4)
    prepared = calibrated(model, {"x": x}, (x, x))
    assert decibels(model({"x": x}, (x, x)), convert(prepared)({"x": x}, (x, x))) > 25


def test_what_cannot_be_traced_says_where() -> None:
    with pytest.raises(CaptureError, match=r"^cannot be traced as one graph: .*models\.py:\d+: TraceError: "):
        trace(Branching(), Call((torch.ones(1, 4),)))


def test_tracing_leaves_the_module() -> None:
    model = Functional(F.conv2d, torch.randn(4, 3, 3, 3), padding="same")
    layers = nn.Sequential(model, nn.Conv2d(4, 4, 3, padding="same"))
    before = copy.deepcopy(layers)
    for method in ("static", "qat"):
        prepare(layers, method=method, example_inputs=torch.randn(2, 3, 6, 6))
    assert layers[1].padding == before[1].padding == "same"
    assert str(layers) == str(before)


def test_trace_around_keeps_targets_whole() -> None:
    model = nn.Sequential(Mlp(), nn.Linear(3, 3))
    traced = trace_around(model, Call((torch.ones(2, 4),)), ("0",))
    assert "0" in traced.replaced
    assert not any(name.startswith("0.") for name in traced.replaced)
    with pytest.raises(CaptureError, match=r"^forward does not call 0\.act, 7$"):
        trace_around(model, Call((torch.ones(2, 4),)), ("0", "0.act", "7"))
