"""One graph: held against int8 arithmetic written in NumPy, against the float module, and against its own promises."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from models import Mlp, Residual, calibrated, decibels, settle
from torch import nn
from torch.nn import functional as F

from lightning_quant import CalibrationError, CaptureError, QuantConfig, TensorSpec, convert, prepare
from lightning_quant._torch_ao import FakeQuantizeBase, dynamic_modules
from lightning_quant.backends import fx
from lightning_quant.backends.graph import info, is_graph, is_initialised
from lightning_quant.config import Method, resolve
from lightning_quant.phases import set_observing

METHODS: tuple[Method, ...] = ("dynamic", "static", "qat")


class Mixed(nn.Module):
    """Something for each method. Takes ``(N, 3, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm1d(4)
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.rnn(torch.relu(self.bn(self.conv(x))).transpose(1, 2))
        return self.fc(self.drop(y))


# ---- int8 arithmetic by hand


TO_THE_ENDS = TensorSpec(observer="min_max")


def qparams(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Scale and zero point of unsigned 8 bits over the range of ``x`` and zero."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / 255)
    return scale, round(float(-low / scale))


def quantized_weight(weight: np.ndarray, bits_lost: int, per_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    """Integers, and one scale per output channel or one for all: symmetric, the largest weight is exact."""
    limit = 2 ** (7 - bits_lost) - 1
    flat = np.abs(weight.reshape(len(weight), -1))
    scale = (flat.max(1) if per_channel else np.full(len(weight), flat.max())).astype(np.float32) / limit
    return np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int32), scale


def windows(x: np.ndarray, kernel: int, stride: int, padding: int) -> np.ndarray:
    """``(N, H', W', C * kernel * kernel)``: what each output of a convolution sees."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    seen = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]
    return seen.transpose(0, 2, 3, 1, 4, 5).reshape(*seen[:, 0, :, :, 0, 0].shape, -1)


def int8_layer(x: np.ndarray, layer: Any, y: np.ndarray | None, config: QuantConfig) -> np.ndarray:
    """Integers of a layer's output: quantize, accumulate in int32, requantize. ``y`` is the float output.

    Without ``y``: the accumulated integers times their scale, in float.
    """
    x_scale, x_zero = qparams(x)
    per_channel = config.engine != "qnnpack"
    weight, w_scale = quantized_weight(layer.weight.detach().numpy(), bool(config.reduce_range), per_channel)
    q = np.clip(np.rint(x / x_scale) + x_zero, 0, 255).astype(np.int32) - x_zero
    if isinstance(layer, nn.Conv2d):
        q = windows(q, layer.kernel_size[0], layer.stride[0], layer.padding[0])
    accumulated = q @ weight.reshape(len(weight), -1).T
    assert accumulated.dtype == np.int32
    bias = layer.bias.detach().numpy()
    if y is None:
        return accumulated * (x_scale * w_scale) + bias
    accumulated += np.rint(bias / (x_scale * w_scale)).astype(np.int32)
    y_scale, y_zero = qparams(y)
    result = np.clip(np.rint(accumulated * (x_scale * w_scale / y_scale)) + y_zero, 0, 255)
    return result.transpose(0, 3, 1, 2) if isinstance(layer, nn.Conv2d) else result


@pytest.mark.parametrize("reduce_range", [True, None])
@pytest.mark.parametrize("engine", ["auto", "qnnpack"])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()), (4, 3, 16, 16)),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 1)), (4, 4, 8, 8)),
        (lambda: nn.Sequential(nn.Linear(32, 24)), (64, 32)),
        (lambda: nn.Sequential(nn.Linear(32, 24), nn.ReLU()), (64, 32)),
    ],
    ids=["conv-relu", "conv", "linear", "linear-relu"],
)
def test_int8_is_the_integer_arithmetic_that_numpy_does(
    model: Any, shape: tuple[int, ...], engine: Any, reduce_range: bool | None
) -> None:
    if engine not in ("auto", *torch.backends.quantized.supported_engines):
        pytest.skip(f"unavoidable: this build of torch has no {engine}")
    config = QuantConfig(engine=engine, reduce_range=reduce_range, activation=TO_THE_ENDS, weight=TO_THE_ENDS)
    net, x = model().eval(), torch.randn(shape)
    int8 = convert(calibrated(net, x, config=config))
    if isinstance(net[-1], nn.Linear) and resolve(config).engine == "x86":  # what is returned is not rounded
        exact = int8_layer(x.numpy(), net[0], None, resolve(config))
        np.testing.assert_allclose(int8(x).numpy(), exact, rtol=1e-6, atol=1e-6 * np.abs(exact).max())
        return
    y = net(x).detach().numpy()
    scale, zero = qparams(y)
    ours = int8(x).numpy() / scale + zero
    assert np.abs(ours - np.rint(ours)).max() < 1e-2  # it is on the grid of that scale: 255 steps of 1e-5 of a step
    difference = np.abs(np.rint(ours) - int8_layer(x.numpy(), net[0], y, resolve(config)))
    # kernels requantize in float32 or in fixed point, so that what lies between two steps may be rounded otherwise
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.99


def test_the_comparison_with_numpy_can_fail() -> None:
    net, x = nn.Sequential(nn.Linear(32, 24)).eval(), torch.randn(64, 32)
    config = resolve(QuantConfig(activation=TO_THE_ENDS, weight=TO_THE_ENDS))
    y = net(x).detach().numpy()
    expected = int8_layer(x.numpy(), net[0], y, config)
    with torch.no_grad():
        net[0].weight.add_(0.01)
    assert (np.abs(int8_layer(x.numpy(), net[0], y, config) - expected) > 0).mean() > 0.5


# ---- prepare and convert leave what they are given


def fingerprint(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "ids": [id(x) for x in (*model.parameters(), *model.buffers())],
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "instance": [sorted(m.__dict__) for m in model.modules()],
        "grad": [p.requires_grad for p in model.parameters()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before["state"]:
        assert torch.equal(before["state"][key], after["state"][key]), key
    assert {k: v for k, v in before.items() if k != "state"} == {k: v for k, v in after.items() if k != "state"}


@pytest.mark.parametrize("method", METHODS)
def test_prepare_leaves_its_input_and_convert_leaves_prepared(method: Method) -> None:
    model, x = Mixed(), torch.randn(4, 3, 8)
    model.bn.eval()  # frozen by the user
    model.rnn.weight_hh_l0.requires_grad_(False)
    model.fc.register_forward_hook(lambda *_: None)
    before, rng = fingerprint(model), torch.get_rng_state()
    prepared = prepare(model, method=method, example_inputs=x)
    assert_same(before, fingerprint(model))
    assert torch.equal(torch.get_rng_state(), rng)

    prepared(x)
    if method != "qat":  # which trains the batch norms of the model that it is attached to
        assert_same(before, fingerprint(model))
    before = fingerprint(prepared)
    rng = torch.get_rng_state()
    first, second = convert(prepared), convert(prepared)
    assert_same(before, fingerprint(prepared))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("method", METHODS)
def test_qat_shares_parameters_and_the_others_copy_them(method: Method) -> None:
    model = Mixed()
    prepared = prepare(model, method=method, example_inputs=torch.randn(4, 3, 8))
    ours = {id(p) for p in prepared.parameters()}
    shared = [id(p) in ours for p in model.parameters()]
    assert all(shared) if method == "qat" else not any(shared)
    assert prepared.training is (method == "qat")
    buffers = {id(b) for b in prepared.buffers()}
    assert not any(id(b) in buffers for b in model.buffers())


@pytest.mark.parametrize("method", METHODS)
def test_int8_is_on_the_cpu_in_eval_mode_and_deterministic(method: Method) -> None:
    x = torch.randn(4, 3, 8)
    int8 = convert(calibrated(Mixed(), x, method=method))
    assert not any(m.training for m in int8.modules())
    assert torch.equal(int8(x), int8(x))
    assert torch.equal(copy.deepcopy(int8)(x), int8(x))
    for batch in (1, 3, 9):
        assert int8(torch.randn(batch, 3, 8)).shape == (batch, 8, 2)


# ---- accuracy

#: 8 bits give about 50 dB to one uniform tensor of full range (6.02 dB a bit); normal values use a part of the range
#: (-8 dB), 7-bit weights add as much noise again (-6), and ten layers add theirs (-10).
ENOUGH_DB = 25


@pytest.mark.parametrize("method", ["static", "qat"])
def test_int8_is_close_to_float(method: Method) -> None:
    model, x = settle(Residual()), torch.randn(32, 3, 8, 8)
    expected = model(x)
    prepared = calibrated(model, x, method=method, passes=1)
    if method == "qat":
        prepared.train()
        for _ in range(10):
            prepared(torch.randn(32, 3, 8, 8))
        prepared.eval()
    int8 = convert(prepared)
    assert decibels(expected, int8(x)) >= ENOUGH_DB
    # the fake-quantized model predicts the int8 one: what differs is rounding at ties
    if method == "qat":
        assert decibels(prepared(x), int8(x)) >= ENOUGH_DB


def test_reduce_range_keeps_weights_in_seven_bits() -> None:
    x = torch.randn(16, 3, 8, 8)
    for reduce_range, limit in ((True, 63), (False, 127)):
        config = QuantConfig(reduce_range=reduce_range)
        graph = fx.reference(calibrated(settle(Residual()), x, config=config))
        layers = [m for m in graph.modules() if hasattr(m, "get_quantized_weight")]
        assert len(layers) == 6
        assert max(int(m.get_quantized_weight().abs().max()) for m in layers) == limit


OPERATORS: dict[str, Any] = {
    "scalar mul": lambda x: x * 10,
    "small scalar mul": lambda x: 0.1 * x,
    "scalar add": lambda x: x + 5,
    "scalar sub": lambda x: 5 - x,
    "scalar div": lambda x: x / 10,
    "in place": lambda x: x.mul_(3),
    "sum": lambda x: x + torch.sigmoid(x),
    "product": lambda x: x * x,
    "matmul": lambda x: torch.matmul(x.unsqueeze(1), x.unsqueeze(2)).flatten(1) + x,
    "cat": lambda x: torch.cat([x[:, :4], 3 * x[:, 4:]], 1),
    "chunks": lambda x: torch.cat([part * part for part in torch.chunk(x, 2, dim=1)[:1]] * 2, 1),
    "slice of chunks": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "permute": lambda x: x.reshape(-1, 2, 4).permute(0, 2, 1).flatten(1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "maximum": lambda x: torch.maximum(x, -x),
    "clamp": lambda x: x.clamp(-0.3, 0.3),
    "relu6": F.relu6,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda x: x.softmax(-1),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "constant": lambda x: x * torch.tensor([0.5, 2.0]).repeat(4),
}


class Between(nn.Module):
    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.after = nn.Linear(8, 8)
        self.operator = operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.operator(self.before(x)))


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_between_layers(name: str, method: Method) -> None:
    """Two linear layers and an operator have at most four roundings to 8 bits of about 36 dB each: 30 dB in all."""
    model, x = Between(OPERATORS[name]).eval(), torch.randn(64, 8)
    prepared = calibrated(model, x, method=method, passes=3)
    int8 = convert(prepared)
    # an operator that squares loses twice
    assert decibels(model(x), int8(x)) >= ENOUGH_DB
    if method == "qat":
        assert decibels(prepared(x), int8(x)) >= 30
    assert [n for n, m in int8.named_modules() if type(m) is nn.Linear] == []


# ---- training


def without_quantization(prepared: nn.Module) -> nn.Module:
    for module in prepared.modules():
        if isinstance(module, FakeQuantizeBase):
            module.disable_fake_quant()
            module.disable_observer()
    return prepared


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Residual, (6, 3, 8, 8)),
        (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)), (6, 4)),
        (
            lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
            (6, 3, 4, 4),
        ),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, bias=True), nn.BatchNorm1d(4)), (6, 3, 8)),
    ],
    ids=["residual", "linear-bn", "transposed", "conv1d-bias"],
)
def test_a_qat_graph_without_quantization_is_the_float_module(
    model: Any, shape: tuple[int, ...], training: bool
) -> None:
    """Outputs, gradients and running statistics.

    Conv + BN of training scales the weight by gamma / sigma, and divides the output by it: the same in real numbers.
    In float32 that is a few roundings of 6e-8 per layer, and gradients of weights are sums of hundreds of terms.
    """
    float_model = settle(model(), (32, *shape[1:]))
    prepared = without_quantization(prepare(float_model, method="qat", example_inputs=torch.randn(shape)))
    alone = copy.deepcopy(float_model)
    x = torch.randn(shape)
    prepared.train(training)
    alone.train(training)
    expected, actual = alone(x), prepared(x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    target = torch.randn_like(expected)
    (expected * target).sum().backward()
    (actual * target).sum().backward()
    for (name, a), b in zip(alone.named_parameters(), float_model.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None, f"{name} gets no gradient"
        # relative to the largest of the tensor: a bias before a batch norm has a gradient of zero, but for rounding
        largest = max(float(a.grad.abs().max()), 1.0)
        torch.testing.assert_close(b.grad / largest, a.grad / largest, rtol=1e-4, atol=2e-5, msg=name)

    statistics = dict(alone.named_buffers())
    for name, norm in info(prepared).batch_norms.items():
        torch.testing.assert_close(prepared.get_submodule(name).running_mean, statistics[f"{norm}.running_mean"])
        torch.testing.assert_close(prepared.get_submodule(name).running_var, statistics[f"{norm}.running_var"])


def test_a_qat_graph_trains_the_parameters_of_its_model() -> None:
    model = Mlp()
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    prepared = prepare(model, method="qat", example_inputs=x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(prepared(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert decibels(model(x), convert(prepared)(x)) > ENOUGH_DB


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        (nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        (nn.Flatten(), nn.Linear(75, 4), nn.BatchNorm1d(4)),
    ],
    ids=["conv", "transposed", "linear"],
)
def test_a_batch_norm_that_starts_at_zero_trains(layers: tuple[nn.Module, ...]) -> None:
    """Residual branches are often initialised so: ``nn.init.zeros_(bn.weight)``."""
    model = nn.Sequential(*copy.deepcopy(layers))
    norm = next(m for m in model if isinstance(m, nn.modules.batchnorm._BatchNorm))
    nn.init.zeros_(norm.weight)
    prepared = prepare(model, method="qat", example_inputs=torch.randn(4, 3, 5, 5))
    x = torch.randn(4, 3, 5, 5)
    y = prepared(x)
    assert torch.isfinite(y).all()
    y.square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(convert(prepared)(x)).all()


@pytest.mark.parametrize("method", ["static", "qat"])
def test_weights_that_change_after_the_last_pass_are_those_that_are_converted(method: Method) -> None:
    """An optimizer steps after each forward: the last ranges that training saw are one step old."""
    x = torch.randn(32, 4)
    prepared = prepare(Mlp(), method=method, example_inputs=x)
    prepared(x)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(3)
    set_observing(prepared, activations=True, weights=False)
    prepared.eval()(x) if method == "static" else [prepared(x) for _ in range(300)]
    graph = fx.reference(prepared)
    weight = graph.first if hasattr(graph, "first") else None
    layer = weight[0] if isinstance(weight, nn.Sequential) else weight
    limit = 63 if info(prepared).config.reduce_range else 127
    assert int(layer.get_quantized_weight().abs().max()) == limit
    if layer.weight_qscheme == torch.per_channel_symmetric:
        torch.testing.assert_close(
            layer.weight_scale * limit, layer.weight.detach().abs().amax(1).to(layer.weight_scale)
        )


# ---- convert asks for ranges


@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize("change", [fx.convert, fx.reference, convert])
def test_convert_without_calibration(method: Method, change: Any) -> None:
    prepared = prepare(Mlp(), method=method, example_inputs=torch.randn(2, 4))
    assert not is_initialised(prepared)
    text = (
        r"^2 observers saw no data \(the first: activation_post_process_0\), so that there are no ranges to quantize "
        r"with\. Run the prepared module on calibration data before convert; with the callbacks: the validation "
        r"dataloader was empty, or the training ended before quantization began\.$"
    )
    with pytest.raises(CalibrationError, match=text):
        change(prepared)
    prepared(torch.randn(2, 4))
    assert is_initialised(prepared)
    change(prepared)


def test_a_module_that_was_not_prepared() -> None:
    text = "Mlp was not made by lightning_quant.prepare: prepare it first."
    for ask in (info, convert):
        with pytest.raises(CaptureError, match=f"^{re.escape(text)}$"):
            ask(Mlp())
    assert not is_graph(torch.fx.symbolic_trace(Mlp()))


# ---- what stays float


@pytest.mark.parametrize("method", METHODS)
def test_skip_leaves_the_layer_float(method: Method) -> None:
    model, x = Mlp(), torch.randn(16, 4)
    int8 = convert(calibrated(model, x, method=method, config=QuantConfig(skip=("second",))))
    assert type(int8.second) is nn.Linear
    assert torch.equal(int8.second.weight, model.second.weight)
    assert "quantized" in type(int8.first).__module__


def test_skip_of_a_layer_that_is_reused_skips_every_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.fc(self.first(x))))

    int8 = convert(calibrated(Twice(), torch.randn(16, 4), config=QuantConfig(skip=("fc",))))
    names = {name for name, module in int8.named_modules() if "quantized" in type(module).__module__}
    assert {name.split(".")[0] for name in names} == {"first"}


def test_normalisation_and_softmax_stay_float() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4), nn.Softmax(-1))
    int8 = convert(calibrated(model, torch.randn(16, 4)))
    kinds = {type(m) for m in int8.children()}
    assert {nn.LayerNorm, nn.GELU, nn.Softmax} <= kinds


def test_dynamic_quantizes_linear_and_recurrent_layers_only() -> None:
    x = torch.randn(4, 3, 8)
    model = Mixed().eval()
    int8 = convert(calibrated(model, x, method="dynamic"))
    assert type(int8.rnn) is dynamic_modules.LSTM
    assert isinstance(int8.fc, dynamic_modules.Linear)
    assert isinstance(int8.conv, nn.Conv1d)
    # 30 dB: weights of 7 bits per tensor in the LSTM (6.02 * 7 - 8), through gates that squash
    assert decibels(model(x), int8(x)) > 30


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_every_recurrent_layer_runs_dynamic(kind: type[nn.Module]) -> None:
    model = nn.ModuleList([kind(4, 6)])[0].eval()
    x = torch.randn(3, 4) if "Cell" in kind.__name__ else torch.randn(5, 3, 4)
    int8 = convert(calibrated(model, x, method="dynamic"))
    assert any("quantized" in type(m).__module__ for m in int8.children())
    expected, actual = model(x), int8(x)
    if isinstance(expected, tuple):
        expected, actual = expected[0], actual[0]
    assert decibels(expected, actual) > 30


def test_the_quantized_engine_of_the_process_stays() -> None:
    before = torch.backends.quantized.engine
    for engine in torch.backends.quantized.supported_engines:
        if engine in ("fbgemm", "qnnpack"):
            convert(calibrated(Mlp(), torch.randn(3, 4), config=QuantConfig(engine=engine)))
            assert torch.backends.quantized.engine == before


def test_what_does_nothing_outside_of_training_does_not_part_layers() -> None:
    """Dropout and stochastic depth before a residual addition left the addition in float."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            z = F.dropout(self.second(y), 0.2, self.training)
            return self.last(z + y)

    model, x = Residual().eval(), torch.randn(2, 3, 8, 8)
    prepared = prepare(model, method="static", example_inputs=x)
    prepared(x)
    targets = {node.target for node in convert(prepared).graph.nodes}  # type: ignore[union-attr]
    assert torch.ops.quantized.add in targets
    assert F.dropout not in targets
