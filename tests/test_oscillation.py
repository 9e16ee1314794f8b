"""Oscillating weights: how they are counted, when and where they are frozen, and that nothing moves them then."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from modules import Classifier, Digits, convnet, different, trainer
from roots import pl
from torch import nn

from lightning_quant import (
    ConfigError,
    ExportConfig,
    OscillationFreezing,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    prepare,
)
from lightning_quant.oscillation import Oscillations, begin, count, freeze, grid_of, threshold_at

EARLY = OscillationFreezing(threshold=0.25, final_threshold=None, momentum=0.2)


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


# ---- of one weight


def by_hand(steps: np.ndarray, momentum: float, threshold: float) -> dict[str, np.ndarray]:
    """Algorithm 1 of Nagel et al. 2022, element by element, in float64. ``steps`` ``(time, weights)``."""
    found: dict[str, list[Any]] = {"frequency": [], "frozen": [], "integers": []}
    for integers in steps.T:
        before, direction, frequency, mean, frozen = int(integers[0]), 0, 0.0, float(integers[0]), False
        for integer in integers[1:]:
            integer = before if frozen else int(integer)
            change = np.sign(integer - before)
            oscillates = change != 0 and direction != 0 and change != direction
            frequency = momentum * oscillates + (1 - momentum) * frequency
            mean = momentum * integer + (1 - momentum) * mean
            direction = change or direction
            before = integer
            if not frozen and frequency > threshold:
                frozen, before = True, round(mean)
        for name, value in (("frequency", frequency), ("frozen", frozen), ("integers", before)):
            found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("momentum", [0.05, 0.3])
def test_counts_are_those_of_the_algorithm(momentum: float) -> None:
    """Random walks, among them elements that go back and forth in every step and elements that never move."""
    draw = np.random.default_rng(0)
    steps = draw.integers(-1, 2, size=(60, 200)).cumsum(0)
    steps[:, 0] = 3
    steps[:, 1] = np.arange(60) % 2
    steps[:, 2] = np.arange(60)
    threshold = 1.5 * momentum
    state = begin(torch.tensor(steps[0]))
    for integers in steps[1:]:
        count(state, torch.tensor(integers), momentum)
        freeze(state, threshold)
    expected = by_hand(steps, momentum, threshold)
    assert 0 < expected["frozen"].sum() < 200
    assert np.array_equal(state.frozen, expected["frozen"])
    assert np.array_equal(state.integers, expected["integers"])
    # 60 products in float32
    np.testing.assert_allclose(state.frequency, expected["frequency"], atol=60 * 2.0**-24)
    assert [bool(x) for x in state.frozen[:3]] == [False, True, False]


def test_what_may_not_be_frozen_is_free() -> None:
    state = begin(torch.zeros(2))
    for step in range(8):
        count(state, torch.tensor([1.0, 1.0]) * ((step + 1) % 2), 0.3)
    assert freeze(state, 0.4, torch.tensor([True, False])).tolist() == [True, False]
    assert freeze(state, 0.4).tolist() == [False, True]
    assert freeze(state, 0.4).tolist() == [False, False]


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.9, 1.0])
def test_the_threshold_goes_down_by_a_half_cosine(progress: float) -> None:
    settings = OscillationFreezing(threshold=0.06, final_threshold=0.02, momentum=0.01)
    expected = 0.04 + 0.02 * np.cos(np.pi * progress)
    assert threshold_at(settings, progress) == pytest.approx(expected, rel=1e-12)
    constant = OscillationFreezing(threshold=0.06, final_threshold=None)
    assert threshold_at(constant, progress) == pytest.approx(0.06, rel=1e-12)


def test_one_oscillation_freezes_nothing_at_a_threshold_of_momentum() -> None:
    settings = OscillationFreezing(threshold=0.01, final_threshold=None, momentum=0.01)
    state = begin(torch.zeros(1))
    for integer in (1.0, 0.0):
        count(state, torch.tensor([integer]), settings.momentum)
    assert not freeze(state, threshold_at(settings, 0.0)).any()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"threshold": 0}, "OscillationFreezing(threshold=0): give a share of the steps, between 0 and 1."),
        ({"momentum": True}, "OscillationFreezing(momentum=True): give a share of the steps, between 0 and 1."),
        (
            {"final_threshold": 1.0},
            "OscillationFreezing(final_threshold=1.0): give a share of the steps, between 0 and 1.",
        ),
        (
            {"final_threshold": 0.01, "momentum": 0.02},
            "OscillationFreezing(final_threshold=0.01, momentum=0.02): one oscillation makes the average as large as "
            "momentum, and would freeze a weight for good. Give a final_threshold that is not below it.",
        ),
    ],
)
def test_what_makes_no_sense_is_an_error(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=exactly(text)):
        OscillationFreezing(**settings)


def test_the_callback_takes_settings_only() -> None:
    with pytest.raises(ConfigError, match=exactly("freeze_oscillations=0.1: give an OscillationFreezing, or None.")):
        QuantizationAwareTraining(freeze_oscillations=0.1)  # type: ignore[arg-type]


# ---- the grid


SCHEMES = ["per_channel_symmetric", "per_tensor_symmetric", "per_channel_affine", "per_tensor_affine"]


@pytest.mark.parametrize("rounding", ["auto", "learned"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_on_the_grid_are_what_the_next_pass_gives(scheme: Any, rounding: Any) -> None:
    """With the fake quantize itself as the oracle, also after what is not frozen has moved."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 6))
    spec = TensorSpec(bits=4, qscheme=scheme, fake_quantize=rounding)
    prepared: Any = prepare(network, QuantConfig(weight=spec), method="qat", example_inputs=torch.randn(4, 12))
    module = prepared.get_submodule("0").weight_fake_quant
    weight = network[0].weight
    prepared(torch.randn(4, 12))
    frozen = torch.rand_like(weight) < 0.5
    grid = grid_of(module, weight.data, None)
    inside = grid.inside(weight.data)
    if inside is not None:  # the largest ones are free
        frozen &= inside
    integers = grid.integers(weight.data)
    expected = torch.round(module(weight).detach() / grid.scale)
    assert torch.equal(expected, integers)
    for _ in range(3):
        with torch.no_grad():
            weight.mul_(torch.where(frozen, 1.0, 1 + 0.3 * torch.rand_like(weight)))
            if rounding == "learned":
                module.scale.mul_(1.05)
            grid = grid_of(module, weight.data, frozen)
            weight.copy_(torch.where(frozen, grid.values(integers), weight))
        rounded = module(weight).detach()
        got = torch.round(rounded / module.scale.detach().reshape(grid.scale.shape))
        assert torch.equal(got[frozen], integers[frozen])
        # the value is that of the grid but for the range's own end
        assert torch.allclose(rounded[frozen], weight[frozen].detach(), atol=0.51 * grid.scale.max().item())
        if "symmetric" in scheme:
            assert torch.allclose(rounded[frozen], weight[frozen].detach(), rtol=1e-6, atol=0)


# ---- in training


class Momentum(Classifier):
    """Large steps with momentum and weight decay, of a network of few bits: it oscillates."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(convnet())
        self.lr = lr

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.01)


class Watch(pl.Callback):
    """What is known after each batch: state of the callback, and integers of the weights by their scales."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.seen.append(self.of._oscillations.state() if self.of._oscillations else None)


def few_bits(backend: Any = "fx", rounding: Any = "auto", **settings: Any) -> Any:
    spec = TensorSpec(bits=3, fake_quantize=rounding)
    config = QuantConfig(backend=backend, weight=spec)
    formats: Any = ("pt2",) if backend == "pt2e" else ("torchscript",)
    return QuantizationAwareTraining(
        config, **{"freeze_oscillations": EARLY, "export": ExportConfig(formats=formats), **settings}
    )


def net() -> Any:
    torch.manual_seed(3)
    return Momentum()


def fit(callback: Any, *others: Any, model: Any = None, **settings: Any) -> Any:
    model = model or net()
    trainer(callback, *others, **{"max_epochs": 4, **settings}).fit(model, datamodule=Digits(shuffle=False))
    return model


def flat(state: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {name: kept for target in state.values() for name, kept in target.items()}


def weights_of_int8(callback: Any) -> list[torch.Tensor]:
    """The integers of the int8 model, as torch packed them."""
    found = []
    for module in callback.quantized_model.modules():
        weight = getattr(module, "weight", None)
        if callable(weight) and isinstance(weight(), torch.Tensor) and weight().is_quantized:
            found.append(weight().int_repr())
    return found


@pytest.mark.parametrize("rounding", ["auto", "learned"])
@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_frozen_weights_stay_at_their_integers_up_to_int8(backend: Any, rounding: Any) -> None:
    callback = few_bits(backend, rounding)
    watch = Watch(callback)
    fit(callback, watch)
    last = flat(watch.seen[-1])
    assert len(last) == 2
    for before, after in zip(watch.seen, watch.seen[1:], strict=False):
        for name, kept in flat(before).items():
            frozen, now = kept["frozen"], flat(after)[name]
            assert torch.equal(now["integers"][frozen], kept["integers"][frozen])
            assert bool((now["frozen"] >= frozen).all())
    share = sum(int(kept["frozen"].sum()) for kept in last.values()) / sum(k["frozen"].numel() for k in last.values())
    assert 0.02 < share < 0.9
    converted = weights_of_int8(callback)
    assert len(converted) == 2
    for name, kept in last.items():
        of_int8 = next(x for x in converted if x.shape == kept["integers"].shape)
        frozen = kept["frozen"]
        assert torch.equal(of_int8[frozen].to(torch.int16), kept["integers"][frozen]), name
    assert callback.report.notes[-1] == f"{share:.2%} of the weights oscillated and were frozen."


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
@pytest.mark.parametrize("rounding", ["auto", "learned"])
def test_the_optimizer_does_not_move_them(backend: Any, rounding: Any) -> None:
    """Their values are whole numbers of scales after each step, whatever momentum and weight decay did."""
    callback = few_bits(backend, rounding)

    class Check(pl.Callback):
        checked = 0

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            for index, state in callback._oscillations._states.items():
                weight = callback._oscillations._weights[index]
                values = weight.parameter.detach()
                grid = grid_of(weight.fake_quantize, values, state.frozen)
                wanted = grid.values(state.integers.float())
                torch.testing.assert_close(values[state.frozen], wanted[state.frozen], rtol=0, atol=0)
                self.checked += int(state.frozen.sum())

    check = Check()
    fit(callback, check)
    assert check.checked > 100


def test_without_it_the_same_weights_move() -> None:
    """The check above can fail: nothing is frozen, and the training is another one."""
    callback, without = few_bits(), few_bits(freeze_oscillations=None)
    frozen, free = fit(callback), fit(without)
    assert different(dict(frozen.state_dict()), dict(free.state_dict())) != []
    assert not any("oscillated" in note for note in without.report.notes)


def test_one_count_is_one_step_of_the_optimizer() -> None:
    """With gradients of two batches, 96 / 16 / 2 steps an epoch; and before quantization begins there is none."""
    calls: list[int] = []
    callback = few_bits(start_epoch=1)
    own = Oscillations._look_at

    def noted(self: Any, index: int, weight: Any) -> None:
        calls.append(index)
        own(self, index, weight)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Oscillations, "_look_at", noted)
        fit(callback, max_epochs=3, accumulate_grad_batches=2)
    assert len(calls) == 2 * (2 * 3)  # two weights, two quantized epochs


def test_manual_optimization_counts_too() -> None:
    class Manual(Momentum):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    callback = few_bits()
    torch.manual_seed(3)
    watch, expected = Watch(callback), few_bits()
    fit(callback, watch, model=Manual())
    other = Watch(expected)
    fit(expected, other)
    for name, kept in flat(watch.seen[-1]).items():
        assert different(kept, flat(other.seen[-1])[name]) == []


def test_the_threshold_follows_where_the_training_is() -> None:
    seen: list[float] = []
    settings = OscillationFreezing(threshold=0.5, final_threshold=0.3, momentum=0.2)
    callback = few_bits(freeze_oscillations=settings, start_epoch=1)

    class Threshold(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(callback._oscillations.threshold)

    fit(callback, Threshold(), max_epochs=3)
    batches = 6
    expected = [threshold_at(settings, step / (2 * batches)) for step in range(2 * batches)]
    assert seen[batches:] == pytest.approx(expected, rel=1e-12)
    seen.clear()
    few = few_bits(freeze_oscillations=settings)
    callback = few
    fit(few, Threshold(), max_epochs=-1, max_steps=4)
    assert seen == pytest.approx([threshold_at(settings, step / 4) for step in range(4)], rel=1e-12)


# ---- what cannot be


def test_a_training_without_an_end_needs_a_constant_threshold() -> None:
    text = (
        "freeze_oscillations=...: the threshold goes to final_threshold at the end of the training, and this one has "
        "none that is known before. Give the Trainer max_epochs or max_steps, or "
        "OscillationFreezing(final_threshold=None)."
    )
    endless = {"max_epochs": -1, "max_time": {"seconds": 1}}
    with pytest.raises(ConfigError, match=exactly(text)):
        fit(few_bits(freeze_oscillations=OscillationFreezing()), **endless)


def test_where_a_batch_norm_is_in_the_product_there_is_an_error() -> None:
    class Only(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Conv2d(1, 10, 8, bias=False), nn.BatchNorm2d(10), nn.Flatten()))

    spec = TensorSpec(bits=4, qscheme="per_tensor_symmetric")
    callback = QuantizationAwareTraining(QuantConfig(weight=spec), freeze_oscillations=EARLY)
    text = (
        "freeze_oscillations=...: there is no weight to look at. A weight can be frozen where its fake quantize (auto "
        "or learned) reads a Parameter that an optimizer trains; with one scale for a weight that has a batch norm "
        "after it, what is rounded is a product (net.0.weight_fake_quant). Use qscheme='per_channel_symmetric', or "
        "leave freeze_oscillations out."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        fit(callback, model=Only())


def test_what_is_not_looked_at_is_said(caplog: Any) -> None:
    spec = TensorSpec(bits=4, qscheme="per_tensor_symmetric")
    callback = QuantizationAwareTraining(
        QuantConfig(weight=spec),
        freeze_oscillations=OscillationFreezing(threshold=0.9, final_threshold=None),
        export=ExportConfig(formats=("torchscript",)),
    )
    fit(callback, max_epochs=1)
    said = [record.getMessage() for record in caplog.records]
    assert any(
        text.startswith("freeze_oscillations: 1 weights are rounded as part of a product or by a class of your own")
        for text in said
    )
    assert "freeze_oscillations froze no weight: none oscillated as often as the threshold says." in said
    assert callback.report.notes[-1] == "0.00% of the weights oscillated and were frozen."
