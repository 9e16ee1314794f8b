"""LSQ+: scale and offset trained together, held by a formula written independently, up to the int8 model."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from modules import Classifier, Digits, convnet, different, qat, trainer
from torch import nn

from lightning_quant import ConfigError, ExportConfig, LayerConfig, QuantConfig, QuantizationAwareTraining, TensorSpec
from lightning_quant._torch_ao import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from lightning_quant.backends import convert, prepare
from lightning_quant.backends.graph import observers, sees_weights
from lightning_quant.learned_offset import Rounded, has_offset
from lightning_quant.learned_scale import LARGEST_STEP, LearnedFakeQuantize, gradient_factor, is_learned, qparams

OFFSET = TensorSpec(fake_quantize="learned_offset")
BACKENDS = ["fx", "eager", "pt2e"]


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def activation(bits: int = 8) -> LearnedFakeQuantize:
    return LearnedFakeQuantize(
        observer=MovingAverageMinMaxObserver, averaging_constant=0.1, dtype=torch.quint8, with_offset=True,
        qscheme=torch.per_tensor_affine, quant_min=0, quant_max=2**bits - 1,
    )  # fmt: skip


def weight(qscheme: Any, bits: int = 4) -> LearnedFakeQuantize:
    most = 2 ** (bits - 1) - 1
    per_channel = qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    return LearnedFakeQuantize(
        observer=MovingAveragePerChannelMinMaxObserver if per_channel else MovingAverageMinMaxObserver,
        averaging_constant=1.0, dtype=torch.qint8, with_offset=True, sees_weights=True, qscheme=qscheme,
        quant_min=-most, quant_max=most, **({"ch_axis": 0} if per_channel else {}),
    )  # fmt: skip


# ---- the formula


class Straight(torch.autograd.Function):
    """A rounding with a derivative of 1."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def by_autograd(x: np.ndarray, scale: np.ndarray, offset: np.ndarray, least: int, most: int, of: np.ndarray) -> Any:
    """Value and gradients ``(y, dx, dscale, doffset)`` in float64: LSQ+'s quantizer written out, by autograd."""
    tensors = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (x, scale, offset)]
    wide, s, b = tensors
    z = Straight.apply(-b / s)
    q = Straight.apply(wide / s) + z
    # an integer at an end is inside of the range; torch.clamp has no gradient there
    q = torch.where(q < least, float(least), torch.where(q > most, float(most), q))
    y = (q - z) * s
    y.backward(torch.tensor(of))
    return (y.detach().numpy(), *(tensor.grad.numpy() for tensor in tensors))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("least", "most"), [(0, 15), (0, 255), (-7, 7)])
def test_values_and_gradients(least: int, most: int, channels: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    # powers of two as scales: no division rounds, and float32 rounds where float64 does
    scale = 2.0 ** draw.integers(-4, 1, size=(channels, 1))
    offset = -scale * (draw.integers(least, most + 1, size=(channels, 1)) + draw.choice([-0.25, 0.0, 0.25]))
    offset = np.clip(offset, -most * scale, -least * scale)
    x = np.round(draw.normal(size=(channels, 200)) * (most - least) * 64) / 64 * scale + 2**-9
    of = np.round(draw.normal(size=x.shape) * 16) / 16
    factor = 0.25
    ours = [torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in (x, scale, offset)]
    y: Any = Rounded.apply(*ours, least, most, factor)
    y.backward(torch.tensor(of, dtype=torch.float32))
    value, dx, ds, db = by_autograd(x, scale, offset, least, most, of)
    assert np.array_equal(y.detach().numpy(), value)
    assert np.array_equal(ours[0].grad, dx)
    # 200 products in float32, of numbers up to most
    bound = 200 * 2.0**-24 * np.abs(of).max() * (most - least + 1) * 200**0.5
    np.testing.assert_allclose(ours[1].grad, factor * ds, atol=bound)
    np.testing.assert_allclose(ours[2].grad, factor * db, atol=bound)
    inside = dx != 0
    assert 0 < inside.sum() < (of != 0).sum()


def test_the_offset_of_what_is_clipped_goes_down_the_loss() -> None:
    """By finite differences, where the rounding of the zero point does not hide them: many steps at once."""
    x = torch.linspace(-3, 5, 4001)
    scale, target = torch.tensor([0.01]), torch.linspace(-3, 5, 4001)

    def loss(offset: torch.Tensor) -> torch.Tensor:
        y: Any = Rounded.apply(x, scale, offset, 0, 255, 1.0)
        return ((y - target) ** 2).sum()

    offset = torch.tensor([-1.0], requires_grad=True)
    loss(offset).backward()
    assert offset.grad is not None
    difference = (loss(torch.tensor([-1.0 + 0.1])) - loss(torch.tensor([-1.0 - 0.1]))) / 0.2
    assert offset.grad.item() == pytest.approx(difference.item(), rel=0.02)


# ---- where they begin


def begun(module: LearnedFakeQuantize, x: torch.Tensor) -> None:
    module(x.clone().requires_grad_())


def test_an_activation_begins_at_min_and_max() -> None:
    module = activation()
    begun(module, torch.tensor([-1.0, 0.3, 3.0]))
    scale = 4 / 255
    assert module.scale.item() == pytest.approx(scale, rel=1e-6)
    assert module.zero_point.item() == round(1 / scale)
    assert module.offset.item() == pytest.approx(-round(1 / scale) * scale, rel=1e-6)
    assert bool(module.learned)


@pytest.mark.parametrize("qscheme", [torch.per_channel_symmetric, torch.per_tensor_symmetric])
def test_a_weight_begins_by_its_deviation(qscheme: Any) -> None:
    """By the paper's formula in NumPy: ``max(|mean - 3 std|, |mean + 3 std|) / 2^(bits - 1)``."""
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.05
    module = weight(qscheme)
    begun(module, x)
    rows = x.numpy() if qscheme is torch.per_channel_symmetric else x.numpy().reshape(1, -1)
    mean, std = rows.mean(1), rows.std(1)
    expected = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std)) / 8
    np.testing.assert_allclose(module.scale.detach(), expected, rtol=1e-5)
    assert not has_offset(module)
    assert module.zero_point.eq(0).all()


def test_a_weight_with_a_zero_point_begins_by_its_deviation() -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.05
    module = weight(torch.per_channel_affine)
    begun(module, x)
    low, high = (x.numpy().mean(1) + side * 3 * x.numpy().std(1) for side in (-1, 1))
    np.testing.assert_allclose(module.scale.detach(), (high - low) / 14, rtol=1e-5)
    np.testing.assert_array_equal(module.zero_point, -7 - np.round(low / ((high - low) / 14)))
    np.testing.assert_allclose(module.offset.detach(), -module.zero_point * module.scale.detach(), rtol=1e-6)


# ---- a step


def test_the_zero_point_follows_the_offset_and_stays_an_integer() -> None:
    module = activation(bits=4)
    begun(module, torch.tensor([-1.0, 2.0]))
    scale = module.scale.item()
    for offset, expected in ((-7.4 * scale, 7), (-7.6 * scale, 8), (3 * scale, 0), (-40 * scale, 15)):
        with torch.no_grad():
            module.offset.fill_(offset)
        converted = qparams(module)
        y = module(torch.linspace(-9, 9, 200)).detach()
        assert module.zero_point.item() == expected == converted[1].item()
        steps = y / scale
        assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert steps.min().round() == -expected
        assert steps.max().round() == 15 - expected
    assert module.offset.item() == pytest.approx(-15 * scale, rel=1e-6)  # no further, or it would not come back


def test_the_gradient_is_multiplied_by_the_factor() -> None:
    module = activation()
    x = torch.tensor([[-1.0, 0.3, 3.0]])
    begun(module, x)
    module(torch.tensor([[-5.0, 0.3, 9.0]])).sum().backward()
    assert module.offset.grad is not None
    assert module.offset.grad.item() == pytest.approx(2 * gradient_factor(module, x), rel=1e-6)


@pytest.mark.parametrize("kind", ["activation", "weight"])
def test_in_a_compiled_graph(kind: str) -> None:
    """Also the first pass, in which there is no gradient of the offset yet; sums are in another order."""
    torch.manual_seed(0)
    module = activation() if kind == "activation" else weight(torch.per_channel_affine)
    with torch.no_grad():
        module(torch.randn(6, 30))  # sets shapes, as prepare does
    other = copy.deepcopy(module)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        x = torch.randn(6, 30)
        first = not bool(module.learned)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        results = [call(own) for call, own in zip((module, compiled), inputs, strict=True)]
        for of, y in zip((module, other), results, strict=True):
            of.zero_grad()
            y.square().sum().backward()
        assert torch.equal(*results)
        assert torch.equal(module.zero_point, other.zero_point)
        assert torch.equal(module.offset, other.offset)
        assert module.learned.item() == other.learned.item() == 1
        if first:
            continue
        assert inputs[0].grad is not None
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=0)
        torch.testing.assert_close(module.scale.grad, other.scale.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.offset.grad, other.offset.grad, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            module.scale.sub_(0.01 * module.scale.grad)
            module.offset.sub_(0.05 * module.offset.grad)
            other.scale.copy_(module.scale)
            other.offset.copy_(module.offset)


# ---- settings


def test_settings_that_cannot_be() -> None:
    text = (
        "QuantConfig(activation.fake_quantize='learned_offset', activation.qscheme='per_tensor_symmetric'): a "
        "symmetric range has no zero point to train. Use 'learned', or 'per_tensor_affine'."
    )
    spec = TensorSpec(fake_quantize="learned_offset", qscheme="per_tensor_symmetric")
    with pytest.raises(ConfigError, match=exactly(text)):
        QuantConfig(activation=spec)
    with pytest.raises(ConfigError, match=exactly(text.replace("QuantConfig", "LayerConfig"))):
        LayerConfig(name="head", activation=spec)
    text = (
        "TensorSpec(fake_quantize='learned_offset', observer='torch.ao.quantization.MinMaxObserver'): a learned scale "
        "begins at the min and max of the first batch. Leave observer at 'auto', or fake_quantize."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        TensorSpec(fake_quantize="learned_offset", observer="torch.ao.quantization.MinMaxObserver")


# ---- in training


def config(backend: Any = "fx", bits: int = 8) -> QuantConfig:
    spec = TensorSpec(fake_quantize="learned_offset", bits=bits)
    return QuantConfig(backend=backend, activation=spec, weight=spec)


def with_offsets(prepared: Any) -> dict[str, Any]:
    return {k: m for k, m in observers(prepared).items() if is_learned(m) and has_offset(m)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_computes_with_what_was_trained(backend: Any) -> None:
    """Offsets of large steps: int8 gives what fake quantize gave, but for values on the edge of a step."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 4, 3))
    x = torch.randn(16, 1, 8, 8)
    prepared = prepare(network.train(), config(backend), method="qat", example_inputs=x)
    found = with_offsets(prepared)
    assert found
    assert not any(sees_weights(prepared, name) for name in found)
    for module in observers(prepared).values():
        module.enable_fake_quant()
        module.enable_observer()
    prepared(x)
    before = {name: int(module.zero_point) for name, module in found.items()}
    parameters = [*network.parameters(), *(p for m in observers(prepared).values() for p in m.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        (prepared(x) - 1.5).square().mean().backward()
        for module in found.values():
            assert module.offset.grad is not None
        with torch.no_grad():
            for module in found.values():
                module.offset.sub_(0.3 * module.scale)
        optimizer.step()
    assert any(int(qparams(m)[1]) != before[name] for name, m in found.items())
    prepared.eval()
    network.eval()
    for module in observers(prepared).values():
        module.disable_observer()
    with torch.no_grad():
        trained, int8 = prepared(x), convert(prepared)(x)
    last = max(float(m.scale.detach().max()) for m in found.values())
    apart = (trained - int8).abs()
    assert apart.max() <= 2.01 * last
    assert (apart > 0.01 * last).float().mean() < 0.02


@pytest.mark.parametrize("backend", ["fx", "pt2e"])
def test_offsets_train_with_the_optimizer_of_the_module_and_resume(backend: Any, tmp_path: Any) -> None:
    formats: Any = ("pt2",) if backend == "pt2e" else ("torchscript",)

    class Adam(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    def run(epochs: int, ckpt_path: Any = None) -> Any:
        torch.manual_seed(5)
        model = Adam(convnet())
        callback = QuantizationAwareTraining(config(backend, 4), export=ExportConfig(formats=formats))
        runner = trainer(callback, max_epochs=epochs)
        runner.fit(model, datamodule=Digits(shuffle=False), ckpt_path=ckpt_path, weights_only=True)
        path = tmp_path / f"{epochs} {bool(ckpt_path)}.ckpt"
        runner.save_checkpoint(path)
        return torch.load(path, weights_only=True), path, callback

    whole, _, callback = run(3)
    _, path, _ = run(2)
    again, _, resumed = run(3, path)
    (own,) = whole["lightning_quant"]["observers"].values()
    (other,) = again["lightning_quant"]["observers"].values()
    offsets = [name for name in own if name.endswith(".offset")]
    assert len(offsets) >= 2
    assert different(own, other) == []
    assert different(whole["state_dict"], again["state_dict"]) == []
    (states,) = whole["lightning_quant"]["optimizer_states"].values()
    assert {name for name in states if name.endswith(".offset")} == set(offsets)
    assert (
        different(
            {name: values["exp_avg"] for name, values in states.items()},
            {n: v["exp_avg"] for n, v in next(iter(again["lightning_quant"]["optimizer_states"].values())).items()},
        )
        == []
    )
    assert callback.report.metrics_int8 == resumed.report.metrics_int8
    # a zero point of the file is that of the offset
    assert LARGEST_STEP == 1.1


def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path: Any) -> None:
    first = trainer(qat(config=QuantConfig(activation=TensorSpec(fake_quantize="learned"))), max_epochs=1)
    first.fit(Classifier(convnet()), datamodule=Digits())
    first.save_checkpoint(tmp_path / "learned.ckpt")
    second = trainer(qat(config=QuantConfig(activation=OFFSET)), max_epochs=2)
    with pytest.raises(ConfigError, match=r"the checkpoint has observers of another kind: .* has offset"):
        second.fit(Classifier(convnet()), datamodule=Digits(), ckpt_path=tmp_path / "learned.ckpt", weights_only=True)
