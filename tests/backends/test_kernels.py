"""Kernels are asked before they are used: what they are asked, what follows from the answer, and whether it is true."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY, calibrated, decibels, settle
from torch import nn
from torch.nn import functional as F

from lightning_quant import QuantConfig, convert, coverage
from lightning_quant.arguments import Call
from lightning_quant.backends import fx, kernels, reference
from lightning_quant.backends.graph import Prepared, info
from lightning_quant.backends.kernels import Layer, layer_of
from lightning_quant.config import Method

METHODS = pytest.mark.parametrize("method", ["static", "qat"])
ENGINES = torch.backends.quantized.supported_engines
X86 = pytest.mark.skipif("x86" not in ENGINES, reason="unavoidable: this build of torch has no x86 engine")


# ---- layers


@PROPERTY
@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_linear_layer_keeps_what_matters(inputs: int, outputs: int) -> None:
    with torch.device("meta"):
        layer = layer_of(nn.Linear(inputs, outputs))
    assert layer.kind is nn.Linear
    assert 1 <= layer.inputs <= min(inputs, 128)
    assert 1 <= layer.outputs <= min(outputs, 128)
    assert (layer.inputs == layer.outputs) == (inputs == outputs)


@PROPERTY
@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 300), st.booleans())
def test_a_convolution_keeps_what_matters(inputs: int, outputs: int, groups: int, transposed: bool) -> None:
    kind: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
    with torch.device("meta"):
        layer = layer_of(kind(inputs * groups, outputs * groups, (3, 5), stride=2, padding=(1, 0), groups=groups))
    assert layer.groups == min(groups, 128)
    per_group = layer.inputs / layer.groups, layer.outputs / layer.groups
    assert all(n == int(n) for n in per_group)
    assert 1 <= per_group[0] <= min(inputs, 128)
    assert 1 <= per_group[1] <= min(outputs, 128)
    assert (per_group[0] == per_group[1]) == (inputs == outputs)
    assert layer.kernel == (3, 5)
    options = dict(layer.options)
    assert options["stride"] == (2, 2)
    assert options["padding"] == (1, 0)
    assert options["dilation"] == (1, 1)
    assert ("output_padding" in options) == transposed


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(1000, 30), (104, 30, 1)),
        (nn.Linear(1000, 1000), (104, 104, 1)),
        (nn.Linear(1000, 900), (104, 68, 1)),
        (nn.Linear(1024, 512), (128, 112, 1)),
        (nn.Conv2d(3, 96, 7), (3, 96, 1)),
        (nn.Conv2d(300, 300, 3, groups=300), (128, 128, 128)),
        (nn.Conv2d(300, 600, 3, groups=300), (128, 256, 128)),
        (nn.Conv1d(16, 8, 3, groups=4), (16, 8, 4)),
        (nn.ConvTranspose2d(4, 3, 3), (4, 3, 1)),
        (nn.ConvTranspose3d(256, 128, 3), (128, 112, 1)),
    ],
    ids=str,
)
def test_layers_by_hand(module: nn.Module, expected: tuple[int, int, int]) -> None:
    layer = layer_of(module)
    assert layer.kind is type(module)
    assert (layer.inputs, layer.outputs, layer.groups) == expected


# ---- is_right

SOME_LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Linear(100, 30), (4, 100)),
    (lambda: nn.Conv1d(6, 4, 3, stride=2), (2, 6, 12)),
    (lambda: nn.Conv2d(3, 8, 3, padding=1), (2, 3, 8, 8)),
    (lambda: nn.Conv2d(128, 128, 3, padding=1, groups=128), (2, 128, 8, 8)),
    (lambda: nn.Conv2d(8, 4, 3, groups=2, dilation=2), (2, 8, 9, 9)),
    (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    (lambda: nn.ConvTranspose2d(4, 3, 3), (2, 4, 6, 6)),
    (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 9)),
]


@pytest.mark.parametrize(("engine", "largest"), [("qnnpack", 127), ("qnnpack", 63), ("fbgemm", 63)])
@pytest.mark.parametrize("make", [make for make, _ in SOME_LAYERS])
def test_kernels_that_accumulate_without_saturating_are_right(make: Any, engine: str, largest: int) -> None:
    """qnnpack has 32 bits; fbgemm adds two products of 255 * 63 in 16 bits, which they just do not fill."""
    if engine not in ENGINES:
        pytest.skip(f"unavoidable: this build of torch has no {engine}")
    assert kernels.is_right(engine, layer_of(make()), largest)


ask: Callable[[str, Layer, int], bool] = kernels.is_right.__wrapped__  # without what was answered before


def test_asking_leaves_no_trace() -> None:
    layer = layer_of(nn.Conv2d(3, 4, 3))
    before, rng = torch.backends.quantized.engine, torch.get_rng_state()
    other = next(e for e in ENGINES if e not in (before, "none"))
    assert ask(other, layer, 63) is True
    assert torch.backends.quantized.engine == before
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("wrong", [1.1, -1.0])
def test_a_wrong_kernel_is_found(kind: Any, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong by one percent is more than rounding already: 255 steps at the ends of the range."""
    layer = layer_of(kind(6, 4) if kind is nn.Linear else kind(6, 4, 3))
    engine = torch.backends.quantized.engine
    right = kernels._FLOAT[kind]
    if not ask(engine, layer, 63):
        engine = "fbgemm" if "fbgemm" in ENGINES else "qnnpack"
    assert ask(engine, layer, 63)
    monkeypatch.setitem(kernels._FLOAT, kind, lambda *args, **options: wrong * right(*args, **options))
    assert not ask(engine, layer, 63)


def test_an_engine_without_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> float:
        raise RuntimeError("Didn't find engine for operation")

    monkeypatch.setattr(kernels, "_worst_error", refuse)
    before = torch.backends.quantized.engine
    assert ask(ENGINES[0], layer_of(nn.Linear(2, 3)), 127) is False
    assert torch.backends.quantized.engine == before


IDLE_DILATION = nn.Conv1d(8, 4, 1, padding=1, stride=2, dilation=2)


@X86
def test_no_question_ends_the_process() -> None:
    """A padded kernel of size 1 with a stride and a dilation: oneDNN reads outside of its memory."""
    code = (
        "import torch; from torch import nn; from lightning_quant.backends.kernels import is_right, layer_of; "
        "is_right('x86', layer_of(nn.Conv1d(8, 4, 1, padding=1, stride=2, dilation=2)), 127)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (IDLE_DILATION, (1,)),
        (nn.Conv2d(8, 4, (1, 3), dilation=2), (1, 2)),
        (nn.Conv2d(8, 4, 3, dilation=(2, 3)), (2, 3)),
        (nn.ConvTranspose2d(8, 4, 1, dilation=3), (1, 1)),
        (nn.ConvTranspose2d(8, 4, 1, dilation=3, stride=(1, 3), output_padding=(1, 2)), (3, 1)),
    ],
    ids=str,
)
def test_a_dilation_that_says_nothing_is_asked_as_1(module: Any, expected: tuple[int, ...]) -> None:
    dilation = module.dilation
    layer = layer_of(module)
    assert dict(layer.options)["dilation"] == expected
    assert module.dilation == dilation
    x = torch.randn(2, layer.inputs, *[7] * len(expected), dtype=torch.float64)
    weight = module.weight.double()
    options = {**dict(layer.options), "groups": layer.groups}
    expected_output = kernels._FLOAT[type(module)](x, weight, None, **{**options, "dilation": dilation})
    assert torch.equal(kernels._FLOAT[type(module)](x, weight, None, **options), expected_output)


ODD_LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(5, 4),
    "strided": lambda: nn.Conv2d(3, 4, 3, stride=(2, 3), padding=1),
    "dilated": lambda: nn.Conv1d(3, 4, 3, dilation=4),
    "padded by more than it reaches": lambda: nn.Conv2d(3, 4, 1, padding=3),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=(0, 1), output_padding=1),
    "transposed and cut off": lambda: nn.ConvTranspose1d(3, 4, 2, padding=4),
}


@pytest.mark.parametrize("name", ODD_LAYERS)
def test_every_trial_has_an_output_and_some_have_one_or_two(name: str) -> None:
    """oneDNN's kernels for few outputs are others than those for many."""
    module = ODD_LAYERS[name]()
    layer = layer_of(module)
    if layer.kind is nn.Linear:
        return
    found = {}
    for trial in kernels._TRIALS:
        lengths = kernels._lengths(layer, trial)
        output = module(torch.zeros(1, layer.inputs, *lengths))
        assert output.numel() > 0
        found[trial] = tuple(output.shape[2:])
    few = {shape for trial, shape in found.items() if trial.outputs is not None and not trial.last}
    if layer.kind not in kernels.CONV_TRANSPOSES and name != "padded by more than it reaches":
        dims = len(layer.kernel)
        assert few == {(1,) * dims, (2,) * dims}
        (column,) = (shape for trial, shape in found.items() if trial.last)
        assert column[-1] == 1


# ---- what follows from the answer


class Mixed(nn.Module):
    """Takes ``(N, 3, 8, 8)``: a convolution with a batch norm, one that is called twice, a functional and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.weight = nn.Parameter(torch.randn(5, 4, 3, 3) / 6)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.twice(F.relu(self.twice(x)))
        return self.fc(F.conv2d(x, self.weight).mean((2, 3)))


CONVOLUTIONS = {"stem", "twice", "twice_call1", "function"}


def mixed() -> tuple[nn.Module, torch.Tensor]:
    return settle(Mixed()), torch.randn(8, 3, 8, 8)


def answer(monkeypatch: pytest.MonkeyPatch, right: Callable[[str, Layer, int], bool]) -> list[tuple[str, Layer, int]]:
    """Let the kernels answer with ``right``. Returns what they are asked."""
    asked: list[tuple[str, Layer, int]] = []

    def is_right(engine: str, layer: Layer, largest: int) -> bool:
        asked.append((engine, layer, largest))
        return right(engine, layer, largest)

    monkeypatch.setattr(kernels, "is_right", is_right)
    monkeypatch.setattr("lightning_quant.config.cpu_has_vnni", lambda: True)  # reduce_range=None becomes False
    return asked


def plan_of(method: Method = "static", config: QuantConfig | None = None) -> Prepared:
    """What is decided for ``Mixed``, by one graph: finding targets asks about each more than once."""
    model, x = mixed()
    return info(fx.prepare(model, config or QuantConfig(), method, Call((x,))))


def has_bits(largest: int, bits: int) -> bool:
    """Whether the largest integer of a weight is one of so many bits: its step may be a sixteenth larger."""
    most = 2 ** (bits - 1) - 1
    return most * 15 // 16 <= largest <= most


def largest_weights(int8: nn.Module) -> dict[str, int]:
    """Packed layer -> the largest of its integers."""
    return {
        name: int(module.weight().int_repr().abs().max())
        for name, module in int8.named_modules()
        if any("quantized" in kind.__module__ for kind in type(module).__mro__) and hasattr(module, "weight")
    }


@METHODS
@X86
def test_another_engine_where_x86_is_wrong(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, lambda engine, layer, largest: engine != "x86")
    model, x = mixed()
    before = torch.backends.quantized.engine
    prepared = calibrated(model, x, method=method, config=QuantConfig(engine="x86"))
    known = info(prepared)
    assert known.config.engine == "fbgemm"
    assert known.config.reduce_range is False
    assert known.float_layers == {}
    assert {engine for engine, _, _ in asked} == {"x86", "fbgemm"}
    # who asked for x86 left the choice to us
    int8 = convert(prepared, QuantConfig(engine="x86"))
    assert info(int8).config.engine == "fbgemm"
    assert torch.backends.quantized.engine == before
    assert coverage(int8, x).share == 1
    assert all(has_bits(value, 8) for value in largest_weights(int8).values())


@X86
def test_the_other_engine_is_not_asked_where_x86_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, lambda engine, layer, largest: True)
    assert plan_of(config=QuantConfig(engine="x86")).config.engine == "x86"
    assert {(engine, largest) for engine, _, largest in asked} == {("x86", 127)}


@pytest.mark.parametrize("engine", [e for e in ("fbgemm", "onednn", "qnnpack") if e in ENGINES])
def test_an_engine_that_was_asked_for_stays(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, lambda engine, layer, largest: layer.kind is not nn.Conv2d)
    known = plan_of(config=QuantConfig(engine=engine))
    assert known.config.engine == engine
    assert {e for e, _, _ in asked} == {engine}
    assert set(known.float_layers) == CONVOLUTIONS


@METHODS
@X86
def test_the_engine_that_leaves_fewer_layers_float(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    def right(engine: str, layer: Layer, largest: int) -> bool:
        return layer.kind is nn.Linear if engine == "x86" else layer.kind is nn.Conv2d

    answer(monkeypatch, right)
    known = plan_of(method, QuantConfig(engine="x86"))
    assert known.config.engine == "fbgemm"
    assert set(known.float_layers) == {"fc"}


def wide_convolutions_are_wrong(engine: str, layer: Layer, largest: int) -> bool:
    return layer.kind is not nn.Conv2d or largest <= 63


@METHODS
def test_seven_bits_where_eight_are_wrong(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, wide_convolutions_are_wrong)
    known = plan_of(method)
    assert known.float_layers == {}
    assert known.config.reduce_range is False
    assert len({engine for engine, _, _ in asked}) == 1  # nobody needs another engine
    model, x = mixed()
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    found = largest_weights(int8)
    assert len(found) == 5
    assert all(has_bits(value, 8 if name == "fc" else 7) for name, value in found.items()), found
    assert coverage(int8, x).share == 1
    # the batch norm fuses with a layer of 7 bits as with any other
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in int8.modules())
    assert decibels(reference(prepared)(x), int8(x)) > 30


@METHODS
def test_eight_bits_that_were_asked_for_stay(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says ``reduce_range=False`` may quantize for another machine."""
    answer(monkeypatch, wide_convolutions_are_wrong)
    model, x = mixed()
    prepared = calibrated(model, x, method=method, config=QuantConfig(reduce_range=False))
    assert info(prepared).float_layers == {}
    assert all(has_bits(value, 8) for value in largest_weights(convert(prepared)).values())


@METHODS
def test_seven_bits_that_were_asked_for_are_all_that_is_asked_about(
    method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answer(monkeypatch, wide_convolutions_are_wrong)
    config = QuantConfig(reduce_range=True)
    assert plan_of(method, config).float_layers == {}
    assert {largest for _, _, largest in asked} == {63}
    model, x = mixed()
    int8 = convert(calibrated(model, x, method=method, config=config))
    assert all(has_bits(value, 7) for value in largest_weights(int8).values())


@METHODS
def test_float_where_every_kernel_is_wrong(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, lambda engine, layer, largest: layer.kind is not nn.Conv2d)
    model, x = mixed()
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    known = info(int8)
    assert set(known.float_layers) == CONVOLUTIONS
    text = (
        f"the int8 kernel of engine {known.config.engine!r} for it is wrong on this CPU with torch {torch.__version__}"
    )
    assert set(known.float_layers.values()) == {text}
    rows = coverage(int8, x, reasons=known.float_layers).rows
    assert {row.name for row in rows if row.int8} == {"fc"}
    assert {row.name for row in rows if not row.int8} <= CONVOLUTIONS
    assert len(rows) == 5
    assert {row.reason for row in rows if not row.int8} == {text}
    if method == "static":  # training moves the batch norm
        assert torch.equal(int8.twice_call1.weight, model.twice.weight)
        assert decibels(model(x), int8(x)) > 30
    assert set(largest_weights(int8)) == {"fc"}


def test_layers_that_are_skipped_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(monkeypatch, lambda engine, layer, largest: layer.kind is not nn.Linear)
    assert plan_of(config=QuantConfig(skip=("fc",))).float_layers == {}
    assert {layer.kind for _, layer, _ in asked} == {nn.Conv2d}


def test_dynamic_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are others: they take the ranges of activations at run time."""
    asked = answer(monkeypatch, lambda engine, layer, largest: False)
    x = torch.randn(3, 4)
    int8 = convert(calibrated(nn.Sequential(nn.Linear(4, 2)).eval(), x, method="dynamic"))
    assert asked == []
    assert coverage(int8, x).share == 1


# ---- whether the answer is true


def assert_int8_is_reference(make: Callable[[], nn.Module], shape: tuple[int, ...], method: Method) -> None:
    """A single layer: int8 and float arithmetic between roundings differ where a float sits on a tie, by one step.

    Values whose range is 255 steps have a deviation of about 40 of them: one step in one value of a thousand is 62 dB
    below. A kernel that saturates, or reads other weights, is less than 20 dB below.
    """
    model, x = make().eval(), torch.randn(shape)
    prepared = calibrated(model, x, method=method)
    int8 = convert(prepared)
    assert decibels(model(x), reference(prepared)(x)) > 30
    assert decibels(reference(prepared)(x), int8(x)) > 30


class Computed(nn.Module):
    """A convolution with a standardised weight, with a dilation that says nothing. Takes ``(N, in, length)``."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight / self.weight.std()
        return F.conv1d(x, weight, padding=1, stride=2, dilation=2)


@METHODS
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        *SOME_LAYERS,
        (lambda: nn.Conv2d(128, 128, 3, groups=128), (2, 128, 8, 8)),
        (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 6, 6)),
        (lambda: nn.ConvTranspose3d(4, 3, 2), (2, 4, 4, 4, 4)),
        (lambda: nn.Conv1d(16, 16, 16, groups=4, padding=8), (2, 16, 40)),
        (lambda: nn.Conv1d(8, 8, 12, groups=4), (2, 8, 40)),
        (lambda: nn.Conv1d(4, 6, 8), (2, 4, 40)),
        (lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3), (2, 3, 32, 32)),
        (lambda: nn.Conv2d(1, 16, (3, 8)), (2, 1, 20, 8)),
    ],
    ids=lambda value: str(value()) if callable(value) else "",
)
def test_int8_of_a_layer_is_its_reference(make: Any, shape: tuple[int, ...], method: Method) -> None:
    assert_int8_is_reference(make, shape, method)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(10, 96, 3, padding=1, groups=2), (2, 10, 8, 8)),
        (lambda: nn.Conv2d(48, 96, 3, padding=1, groups=2), (2, 48, 8, 8)),
        (lambda: nn.Conv1d(64, 128, 16, stride=3, padding=2, groups=4), (2, 64, 25)),
        (lambda: nn.Conv2d(2, 160, (1, 3), groups=2), (2, 2, 10, 12)),
        (lambda: nn.Conv2d(8, 16, 3, stride=2, padding=1), (2, 8, 20, 1)),
        (lambda: nn.Conv2d(16, 160, 1, groups=2), (4, 16, 1, 1)),
        (lambda: nn.Conv2d(16, 160, 1, groups=2), (1, 16, 2, 2)),
        (lambda: nn.Conv1d(8, 4, 1, padding=1, stride=2, dilation=2), (2, 8, 9)),
        (lambda: Computed(4, 8, 1), (2, 8, 9)),
    ],
    ids=[
        "zero point",
        "zero point of larger groups",
        "size",
        "outputs per group",
        "one column",
        "one pixel",
        "two by two",
        "idle dilation",
        "idle dilation of a function",
    ],
)
@METHODS
@X86
def test_int8_of_an_unusual_layer_is_its_reference(make: Any, shape: tuple[int, ...], method: Method) -> None:
    """oneDNN's kernels for AMX are wrong for some zero points, sizes and numbers of channels."""
    assert_int8_is_reference(make, shape, method)


@X86
def test_a_depthwise_layer_of_eight_bits_is_right_or_has_seven() -> None:
    """The plan and the outcome fit each other: nobody has 7 bits for nothing, nobody a wrong kernel."""
    model, x = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1, groups=128)).eval(), torch.randn(2, 128, 8, 8)
    prepared = calibrated(model, x, config=QuantConfig(engine="x86"))
    known = info(prepared)
    layer = layer_of(model[0])
    limit = 63 if known.config.reduce_range else 127
    wide = kernels.is_right(known.config.engine, layer, limit)
    (found,) = largest_weights(convert(prepared)).values()
    assert has_bits(found, 8 if wide and limit == 127 else 7)


def test_the_reason_names_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, lambda engine, layer, largest: False)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    prepared = calibrated(model, x, config=QuantConfig(engine="qnnpack" if "qnnpack" in ENGINES else "auto"))
    engine = info(prepared).config.engine
    for reason in info(prepared).float_layers.values():
        assert re.match(f"^the int8 kernel of engine '{engine}' for it is wrong on this CPU with torch ", reason)
    assert torch.equal(convert(prepared)(x), model(x))
