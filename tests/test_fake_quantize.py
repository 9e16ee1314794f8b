"""Our fake quantize: its values are torch's bit for bit, with our kernels, with torch's, and inside of a graph."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY, Residual
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_quant import CalibrationError, QuantConfig, convert, native, prepare
from lightning_quant._torch_ao import FakeQuantize as TorchFakeQuantize
from lightning_quant._torch_ao import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from lightning_quant.backends.graph import observers
from lightning_quant.fake_quantize import FakeQuantize

TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
CHANNEL = (torch.per_channel_affine, torch.per_channel_symmetric)
#: (dtype, quant_min, quant_max)
GRIDS = ((torch.quint8, 0, 255), (torch.qint8, -128, 127), (torch.qint8, -127, 127), (torch.qint8, -63, 63))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Without a compiler most of this would compare torch with torch."""
    if native.kernels() is None:
        pytest.skip("no C compiler is there, or LIGHTNING_QUANT_NATIVE is 0")


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda: None)


def make(
    qscheme: torch.qscheme = torch.per_tensor_affine, grid: Any = GRIDS[0], kind: Any = FakeQuantize, **settings: Any
) -> Any:
    dtype, low, high = grid
    observer = MovingAveragePerChannelMinMaxObserver if qscheme in CHANNEL else MovingAverageMinMaxObserver
    settings = {"averaging_constant": 0.1, **settings}
    return kind(observer=observer, dtype=dtype, qscheme=qscheme, quant_min=low, quant_max=high, **settings)


def fixed(module: Any, low: Any, high: Any) -> Any:
    """The module with this range, which it keeps."""
    observer = module.activation_post_process
    observer.min_val.resize_(torch.as_tensor(low).shape).copy_(torch.as_tensor(low))
    observer.max_val.resize_(torch.as_tensor(high).shape).copy_(torch.as_tensor(high))
    module.disable_observer()
    return module


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of float32 and bfloat16, so that -0 is not 0 and NaN is NaN."""
    if not x.is_floating_point():
        return x
    return x.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def both(module: Any, x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``module`` gives, and the gradient of its input."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(leaf)
    y.backward(gradient)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "every second": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}
ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)


# ---- values and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@PROPERTY
@given(
    values=st.lists(ANY_FLOAT, min_size=1, max_size=70),
    scale=st.floats(2**-20, 128, width=32),
    zero_point=st.integers(0, 255),
)
def test_one_scale(dtype: torch.dtype, values: list[float], scale: float, zero_point: int) -> None:
    x = torch.tensor(values).to(dtype)
    module = make()
    fixed(module, -zero_point * scale, (255 - zero_point) * scale)
    y, gradient = both(module, x, torch.ones_like(x))
    # scale and zero point have gone through a range, which rounds: torch is asked with those that came out
    leaf = x.clone().requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(leaf, module.scale, module.zero_point, 0, 255)
    expected.backward(torch.ones_like(x))
    assert leaf.grad is not None
    assert same(y, expected.detach())
    assert same(gradient, leaf.grad)


@PROPERTY
@given(data=st.data(), channels=st.integers(1, 5), axis=st.integers(0, 2), inner=st.integers(1, 40))
def test_one_scale_for_each_channel(data: Any, channels: int, axis: int, inner: int) -> None:
    shape = [3, inner]
    shape.insert(axis, channels)
    size = math.prod(shape)
    x = torch.tensor(data.draw(st.lists(ANY_FLOAT, min_size=size, max_size=size))).reshape(shape)
    ends = torch.tensor(data.draw(st.lists(st.floats(0.125, 1024, width=32), min_size=channels, max_size=channels)))
    module = fixed(make(torch.per_channel_affine, GRIDS[1], ch_axis=axis), -ends / 3, ends)
    y, gradient = both(module, x, torch.ones_like(x))
    # with a scale per channel torch's integers overflow from 2**63 on, and give the least value; ours saturate
    shape = [1, 1, 1]
    shape[axis] = channels
    leaf = torch.where(x / module.scale.reshape(shape) > 2.0**62, 1e9, x).requires_grad_()
    expected = torch.fake_quantize_per_channel_affine(leaf, module.scale, module.zero_point, axis, -128, 127)
    expected.backward(torch.ones_like(x))
    assert leaf.grad is not None
    assert same(y, expected.detach())
    assert same(gradient, leaf.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("qscheme", [*TENSOR, *CHANNEL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout(layout: str, qscheme: torch.qscheme, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](torch.randn(4, 3, 6, 8).to(dtype))
    low = torch.full((x.shape[1],) if qscheme in CHANNEL else (), -1.0)
    ours = fixed(make(qscheme, GRIDS[1], **({"ch_axis": 1} if qscheme in CHANNEL else {})), low, -low)
    upstream = torch.randn(x.shape).to(dtype).transpose(0, -1).contiguous().transpose(0, -1)
    y, gradient = both(ours, x, upstream)
    leaf = x.detach().clone().requires_grad_()
    if qscheme in CHANNEL:
        wide = leaf.float()
        expected = torch.fake_quantize_per_channel_affine(wide, ours.scale, ours.zero_point, 1, -128, 127).to(dtype)
    else:
        expected = torch.fake_quantize_per_tensor_affine(leaf, ours.scale, ours.zero_point, -128, 127)
    expected.backward(upstream)
    assert leaf.grad is not None
    assert same(y, expected.detach())
    assert same(gradient, leaf.grad)
    assert 0 < (gradient == 0).float().mean() < 1  # some of it was clipped


@pytest.mark.parametrize("size", [1, 15, 16, 17, 32767, 32768, 32769, 200_003])
def test_any_size_and_number_of_threads(size: int) -> None:
    x = torch.randn(size)
    expected = None
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            module = make()
            y, gradient = both(module, x * 2, x)
            y, gradient = both(module, x * 3, x)
            found = (y, gradient, module.scale, module.activation_post_process.min_val)
            if expected is not None:
                assert all(same(a, b) for a, b in zip(found, expected, strict=True))
            expected = found
            leaf = (x * 3).requires_grad_()
            theirs = torch.fake_quantize_per_tensor_affine(leaf, module.scale, module.zero_point, 0, 255)
            theirs.backward(x)
            assert leaf.grad is not None
            assert same(y, theirs.detach())
            assert same(gradient, leaf.grad)
    finally:
        torch.set_num_threads(before)


# ---- ranges


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("qscheme", [*TENSOR, *CHANNEL], ids=str)
def test_ranges_are_those_of_torch(
    kernels: bool, grid: Any, qscheme: torch.qscheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(native, "kernels", lambda: None)
    ours, theirs = make(qscheme, grid), make(qscheme, grid, TorchFakeQuantize)
    for batch in range(6):
        x = torch.randn(3, 40) * (batch + 1) + (batch - 2)
        if batch == 4:
            x = x.abs()
        y, expected = ours(x), theirs(x)
        for name, value in theirs.state_dict().items():
            assert same(ours.state_dict()[name], value), name
        assert same(y, expected)
        for a, b in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
            assert torch.equal(a.flatten(), b.flatten())


@PROPERTY
@given(ends=st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(0, 2**100, width=32)))
def test_scales_of_any_range_are_those_that_conversion_takes(ends: tuple[float, float]) -> None:
    low = torch.tensor(ends[0])
    high = low + torch.tensor(ends[1])
    for qscheme in TENSOR:
        for grid in GRIDS:
            module = fixed(make(qscheme, grid), low, high)
            if not bool(torch.isfinite(high - low)):
                continue
            module(torch.zeros(1))
            scale, zero_point = module.calculate_qparams()
            assert same(module.scale, scale.reshape(module.scale.shape))
            assert torch.equal(module.zero_point, zero_point.reshape(module.zero_point.shape).int())


def test_the_range_of_weights_is_that_of_the_weights_now() -> None:
    module = make(torch.per_channel_symmetric, GRIDS[2], averaging_constant=1.0)
    for _ in range(3):
        weight = torch.randn(8, 3, 3, 3) * 0.1
        module(weight)
        assert torch.equal(module.activation_post_process.min_val, weight.flatten(1).amin(1))
        assert torch.equal(module.activation_post_process.max_val, weight.flatten(1).amax(1))


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_range_that_is_not_finite_moves_nothing(kernels: bool, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(native, "kernels", lambda: None)
    module = make()
    module(torch.randn(100))
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(100)
    x[17] = value
    module(x)
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)


def test_before_anything_was_seen() -> None:
    module = make()
    module.disable_observer()
    assert torch.equal(module(torch.tensor([0.4, 0.6, -3.0, 999.0])), torch.tensor([0.0, 1.0, 0.0, 255.0]))
    assert module(torch.zeros(0, 3)).shape == (0, 3)


def test_scale_and_zero_point_follow_a_range_that_was_set() -> None:
    """As after an average of weights (EMA), which averages ranges but cannot average integers."""
    module = make()
    module(torch.linspace(-1, 3, 50))
    fixed(module, -2.0, 2.0)
    module(torch.zeros(3))
    scale, zero_point = module.calculate_qparams()
    assert module.scale.item() == scale.item() == pytest.approx(4 / 255)
    assert module.zero_point.item() == zero_point.item()


AVERAGES: dict[str, Any] = {
    "equal weights": (None, lambda steps: sum(steps) / len(steps)),
    "ema": (get_ema_multi_avg_fn(0.75), lambda steps: functools.reduce(lambda a, x: 0.75 * a + 0.25 * x, steps)),
}


@pytest.mark.parametrize("averaging", AVERAGES)
@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_averages_of_weights_average_ranges(backend: Any, averaging: str) -> None:
    """As Lightning's ``WeightAveraging`` does: a copy from before the first step, and buffers by their places."""
    average, expected = AVERAGES[averaging]
    prepared = trainable(backend)
    shapes = {name: buffer.shape for name, buffer in prepared.named_buffers()}
    averaged = AveragedModel(prepared, multi_avg_fn=average, use_buffers=True)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in observers(prepared)}
    for step in range(4):
        optimizer.zero_grad()
        prepared(torch.randn(8, 3, 8, 8) * (1 + step) + step).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(prepared)
        assert {name: buffer.shape for name, buffer in prepared.named_buffers()} == shapes
        for name, module in observers(prepared).items():
            seen[name].append(ends(module))
    assert {steps[0].numel() for steps in seen.values()} >= {2, 16}  # of tensors, of channels
    found: dict[str, Any] = observers(averaged.module)
    for name, module in found.items():
        assert (module.observer_enabled.item(), module.fake_quant_enabled.item()) == (1, 1)
        torch.testing.assert_close(ends(module), expected(seen[name]), rtol=1e-5, atol=1e-6)
        module.disable_observer()
    before = {name: ends(module) for name, module in found.items()}
    averaged.eval()(torch.randn(2, 3, 8, 8))
    for name, module in found.items():
        assert torch.equal(ends(module), before[name])
        scale, zero_point = module.calculate_qparams()
        assert torch.equal(module.scale.reshape(-1), scale.reshape(-1)), name
        assert torch.equal(module.zero_point.reshape(-1).long(), zero_point.reshape(-1).long()), name


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_an_average_that_began_before_the_ranges_is_an_error(backend: Any) -> None:
    prepared = trainable(backend)
    averaged = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    averaged.update_parameters(prepared)
    prepared(torch.randn(8, 3, 8, 8))
    averaged.update_parameters(prepared)
    with pytest.raises(CalibrationError) as caught:
        convert(averaged.module)
    first = next(n for n, m in observers(prepared).items() if ends(m).numel() == 2)
    count = 10 if backend == "eager" else 9
    assert str(caught.value) == (
        f"{count} observers have a range that is NaN (the first: {first}). An average of weights (EMA, SWA) has that "
        "if it began before they had seen data, because they begin at infinity. Let it begin after the first batch "
        "that ran quantized; with Lightning's WeightAveraging: by should_update."
    )


def trainable(backend: Any) -> Any:
    x = torch.randn(4, 3, 8, 8)
    return prepare(Residual(), QuantConfig(backend=backend), method="qat", example_inputs=x)


def ends(module: Any) -> torch.Tensor:
    """Min and max, ``(2, ...)``, float64."""
    observer = module.activation_post_process
    return torch.stack([observer.min_val, observer.max_val]).double()


# ---- a clamp in front


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("clamp", [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)], ids=str)
def test_a_clamp_is_that_of_the_activation(
    kernels: bool, clamp: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(native, "kernels", lambda: None)

    def activation(x: torch.Tensor) -> torch.Tensor:
        return F.relu(x) if clamp[1] == math.inf else F.hardtanh(x, *clamp)

    ours, alone = make(), make()
    ours.clamp = clamp
    for step in range(4):
        x = torch.randn(50_000) * 4
        x[:6] = torch.tensor([0.0, -0.0, 6.0, 1.0, -1.0, 100.0])
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(leaf), alone(activation(other))
        weight = torch.randn_like(y)
        (y * weight).sum().backward()
        (expected * weight).sum().backward()
        assert torch.equal(y, expected)
        assert leaf.grad is not None
        assert other.grad is not None
        assert torch.equal(leaf.grad, other.grad)
        assert all(torch.equal(value, alone.state_dict()[name]) for name, value in ours.state_dict().items())
        if step == 2:
            ours.disable_fake_quant()
            alone.disable_fake_quant()
    ours.disable_observer()
    assert torch.equal(ours(x), activation(x))


# ---- with torch's operators


@pytest.mark.parametrize("qscheme", [*TENSOR, *CHANNEL], ids=str)
def test_a_compiled_graph_gives_the_same(qscheme: torch.qscheme) -> None:
    eager, inside = make(qscheme, GRIDS[1]), make(qscheme, GRIDS[1])
    for module in (eager, inside):
        module(torch.randn(4, 30))  # gives buffers their shapes
    inside.load_state_dict(eager.state_dict())
    compiled = torch.compile(inside, backend="aot_eager", fullgraph=True)
    for step in range(5):
        if step == 3:
            eager.disable_observer()
            inside.disable_observer()
        if step == 4:
            eager.disable_fake_quant()
            inside.disable_fake_quant()
        x, upstream = torch.randn(4, 30) * 2, torch.randn(4, 30)
        for a, b in zip(both(eager, x, upstream), both(compiled, x, upstream), strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(value, inside.state_dict()[name]) for name, value in eager.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.usefixtures("without_kernels")
def test_without_kernels_every_dtype_comes_back(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5).to(dtype)
    y, gradient = both(make(), x, torch.ones_like(x))
    assert y.dtype == gradient.dtype == dtype
    assert (y - x).abs().max() < 0.02


def test_a_gradient_of_the_gradient() -> None:
    module = fixed(make(), -1.0, 1.0)
    x = torch.randn(50, requires_grad=True)
    (first,) = torch.autograd.grad((module(x) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = (x.abs() < 0.99).detach()
    assert torch.allclose(second[inside], 6 * module(x).detach()[inside])


def test_what_is_clipped_nowhere_keeps_no_mask() -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        make(torch.per_channel_symmetric, GRIDS[2], averaging_constant=1.0)(torch.randn(8, 9, requires_grad=True))
        assert not kept
        fixed(make(), -1.0, 1.0)(torch.randn(99, requires_grad=True))
    assert [x.dtype for x in kept] == [torch.bool]


# ---- the module


def test_flags_are_read_when_they_change() -> None:
    module = make()
    x = torch.randn(100)
    module(x)
    assert not torch.equal(module(x), x)
    module.fake_quant_enabled[0] = 0
    assert torch.equal(module(x), x)
    state = copy.deepcopy(module.state_dict())
    module.fake_quant_enabled.fill_(1)
    twin = copy.deepcopy(module)
    module.load_state_dict(state)
    assert torch.equal(module(x), x)
    assert not torch.equal(twin(x), x)
    twin.apply(torch.ao.quantization.disable_fake_quant)
    assert torch.equal(twin(x), x)
    before = twin.activation_post_process.max_val.clone()
    twin.apply(torch.ao.quantization.disable_observer)
    twin(x * 100)
    assert torch.equal(twin.activation_post_process.max_val, before)


def test_a_copy_has_buffers_of_its_own() -> None:
    module = make(torch.per_channel_symmetric, GRIDS[2])
    module(torch.randn(4, 9))
    twin = copy.deepcopy(module)
    before = copy.deepcopy(module.state_dict())
    twin(torch.randn(4, 9) * 50)
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)
    fresh = make(torch.per_channel_symmetric, GRIDS[2])
    fresh.load_state_dict(before)
    x = torch.randn(4, 9)
    assert torch.equal(fresh(x), module(x))


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        module = make()
        module(torch.randn(100))
        module.disable_observer()
        before = module.scale.clone()
        module(torch.randn(100) * 50)
        assert torch.equal(module.scale, before)


# ---- the compiler


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder for compiled kernels in which there are none, and a process that has not looked for any."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv(native.CACHE, str(folder))
    monkeypatch.delenv("CC", raising=False)
    native.kernels.cache_clear()
    yield folder
    native.kernels.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_kernels_are_compiled_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.kernels() is not None
    (built,) = fresh.iterdir()
    time = built.stat().st_mtime_ns
    native.kernels.cache_clear()
    assert native.kernels() is not None
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [time]


def test_without_a_compiler_there_is_one_message(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.WARNING, "lightning_quant"):
        first = make()(torch.randn(10))
        make()(torch.randn(10))
    assert first.shape == (10,)
    (record,) = caplog.records
    assert record.getMessage() == (
        "fake quantize runs on torch's kernels, with which training takes up to twice as long: no C compiler was "
        "found. Install gcc or clang, or name a C compiler in the environment variable CC. To use torch's kernels "
        "without this message, set LIGHTNING_QUANT_NATIVE=0."
    )


def test_a_compiler_that_fails_is_quoted(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "cc", "[ $1 = --version ] || { echo 'no disk left' >&2; exit 3; }"))
    with caplog.at_level(logging.WARNING, "lightning_quant"):
        assert native.kernels() is None
    assert f"{tmp_path / 'cc'} failed (no disk left). Install" in caplog.text


def test_a_compiler_that_is_not_there_is_named(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "nowhere-cc -m64")
    with caplog.at_level(logging.WARNING, "lightning_quant"):
        assert native.kernels() is None
    assert "CC='nowhere-cc -m64' is not there." in caplog.text


def test_a_compiler_that_knows_no_openmp_will_do(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = native.compiler()[0]
    refuse = 'for a in "$@"; do case $a in -fopenmp*|-march=*) echo "unknown option" >&2; exit 1;; esac; done'
    monkeypatch.setenv("CC", script(tmp_path / "cc", f'{refuse}\nexec {real} "$@"'))
    assert native.kernels() is not None
    x = torch.randn(100_000)
    module = make()
    assert same(module(x), torch.fake_quantize_per_tensor_affine(x, module.scale, module.zero_point, 0, 255))


def test_kernels_can_be_switched_off(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.kernels() is None
    assert not caplog.records


@pytest.mark.skipif(hasattr(os, "getuid") and os.getuid() == 0, reason="unavoidable: root may write everywhere")
def test_a_folder_that_cannot_be_written(fresh: Path) -> None:
    fresh.mkdir()
    fresh.chmod(0o500)
    assert native.kernels() is not None


def test_a_place_that_is_no_folder(fresh: Path) -> None:
    fresh.write_text("", encoding="utf8")
    assert native.kernels() is not None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="unavoidable: reads /proc")
def test_threads_are_those_of_torch() -> None:
    """A second OpenMP would have threads of its own, which wait for work while torch's do theirs."""
    program = """
import torch
from lightning_quant.backends.graph import observers
from lightning_quant.fake_quantize import FakeQuantize
FakeQuantize()(torch.randn(100_000))
print(*{line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libiomp" in line})
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert len(loaded) == 1
