"""Observers and fake quantizes as they are built for a config: ``x ~ (q - zero_point) * scale``, held by properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY
from torch import nn

from lightning_quant import QuantConfig, TensorSpec
from lightning_quant._torch_ao import (
    FakeQuantizeBase,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from lightning_quant.balanced import BalancedObserver
from lightning_quant.config import Method, resolve
from lightning_quant.observers import HistogramObserver
from lightning_quant.qconfig import FLOAT_BY_DESIGN, qconfig_mapping

#: Values that float32 has: 0, and from about 1e-6 to 1e6 on both sides.
numbers = st.one_of(
    st.just(0.0),
    st.floats(2.0**-20, 2.0**20, width=32, allow_subnormal=False),
    st.floats(-(2.0**20), -(2.0**-20), width=32, allow_subnormal=False),
)
tensors = st.lists(numbers, min_size=1, max_size=40).map(torch.tensor)

#: ``round(x / scale)`` takes the reciprocal of the scale, multiplies up to 255 steps, and multiplies again: three
#: roundings of 2**-24, relative, of 255 steps.
ROUNDING = 255 * 3 * 2.0**-24


def qconfig(method: Method = "qat", kind: Any = None, **settings: Any) -> Any:
    mapping = qconfig_mapping(resolve(QuantConfig(**settings)), method)
    return mapping.object_type_qconfigs[kind] if kind else mapping.global_qconfig


def fake_quantize(observer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(result, scale, low, high)`` after ``observer`` saw ``x``; what can be represented lies in ``[low, high]``."""
    if isinstance(observer, FakeQuantizeBase):
        result = observer(x)
        scale, zero_point = observer.scale, observer.zero_point
    else:
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        limits = (observer.quant_min, observer.quant_max)
        if len(scale) > 1:
            result = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, *limits)
        else:
            result = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)
    shape = [-1] + [1] * (x.dim() - 1) if len(scale) > 1 else [1]
    scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    low, high = ((limit - zero_point) * scale for limit in (observer.quant_min, observer.quant_max))
    return result, scale, low, high


def assert_quantized(observer: Any, x: torch.Tensor, *, all_inside: bool = False) -> None:
    result, scale, low, high = fake_quantize(observer, x)
    inside = (x >= low) & (x <= high)
    error = (result - x).abs() / scale
    assert (error[inside] <= 0.5 + ROUNDING).all()
    assert torch.equal(result[~inside], torch.minimum(torch.maximum(x, low), high)[~inside])
    assert (result[x == 0] == 0).all()
    if all_inside:  # to half a step, by which rounding the zero point moves the range
        assert (error <= 0.5 + ROUNDING).all()
    if isinstance(observer, FakeQuantizeBase):
        observer.disable_observer()
        assert torch.equal(observer(result), result)
        assert torch.equal(observer(torch.zeros_like(x)), torch.zeros_like(x))


@PROPERTY
@given(
    tensors,
    st.sampled_from(["static", "qat"]),
    st.booleans(),
    st.sampled_from(["per_tensor_affine", "per_tensor_symmetric"]),
)
def test_activations(x: torch.Tensor, method: Any, reduce_range: bool, qscheme: Any) -> None:
    spec = TensorSpec(qscheme=qscheme, observer="auto" if method == "qat" else "min_max")
    assert_quantized(qconfig(method, activation=spec, reduce_range=reduce_range).activation(), x)


@PROPERTY
@given(st.lists(tensors, min_size=2, max_size=5))
def test_a_moving_average_lies_within_what_it_saw(batches: list[torch.Tensor]) -> None:
    fake = qconfig().activation()
    for x in batches:
        fake(x)
    observer = fake.activation_post_process
    seen = torch.cat(batches)
    slack = 1e-6 * float(seen.abs().max())  # an average of n float32 is off by n roundings
    assert float(seen.min()) - slack <= float(observer.min_val) <= float(observer.max_val) <= float(seen.max()) + slack


@PROPERTY
@given(
    st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=2, max_size=5)
    ),
    st.sampled_from(["static", "qat"]),
    st.booleans(),
    st.sampled_from(["per_channel_symmetric", "per_tensor_symmetric"]),
)
def test_weights(rows: list[list[float]], method: Any, reduce_range: bool, qscheme: Any) -> None:
    """Symmetric weights lie all inside: the largest of a channel is an integer."""
    config = {"weight": TensorSpec(qscheme=qscheme), "reduce_range": reduce_range}
    assert_quantized(qconfig(method, **config).weight(), torch.tensor(rows), all_inside=True)


def test_the_property_can_fail() -> None:
    class Off:
        quant_min, quant_max = 0, 255

        def __call__(self, x: torch.Tensor) -> None: ...

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.tensor([0.1]), torch.tensor([300], dtype=torch.int32)

    with pytest.raises((AssertionError, RuntimeError)):
        assert_quantized(Off(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(("reduce_range", "limit"), [(True, 63), (False, 127)])
@pytest.mark.parametrize("method", ["dynamic", "static", "qat"])
def test_weights_have_as_many_bits_as_the_cpu_can_add(method: Method, reduce_range: bool, limit: int) -> None:
    made = qconfig(method, nn.Linear if method == "dynamic" else None, reduce_range=reduce_range)
    weight = made.weight()
    assert (weight.quant_min, weight.quant_max) == (-limit, limit)
    if method != "dynamic":
        activation = made.activation()
        assert (activation.quant_min, activation.quant_max) == (0, 255)


def test_sums_of_two_products_fit_into_16_bits() -> None:
    """The reason for 7 bits: kernels without VNNI add pairs of uint8 * int8 in 16 bits that saturate."""
    weight = qconfig(reduce_range=True).weight()
    assert 2 * 255 * weight.quant_max <= 2**15 - 1
    assert 2 * 255 * qconfig(reduce_range=False).weight().quant_max > 2**15 - 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", HistogramObserver),
        ("histogram", HistogramObserver),
        ("min_max", MinMaxObserver),
        ("moving_average", MovingAverageMinMaxObserver),
    ],
)
def test_observers_of_static_activations(name: Any, kind: type) -> None:
    assert type(qconfig("static", activation=TensorSpec(observer=name)).activation()) is kind


@pytest.mark.parametrize(
    ("engine", "spec", "kind", "qscheme"),
    [
        ("auto", TensorSpec(), BalancedObserver, torch.per_channel_symmetric),
        ("auto", TensorSpec(observer="balanced"), BalancedObserver, torch.per_channel_symmetric),
        ("auto", TensorSpec(observer="min_max"), PerChannelMinMaxObserver, torch.per_channel_symmetric),
        ("qnnpack", TensorSpec(), MinMaxObserver, torch.per_tensor_symmetric),
        (
            "auto",
            TensorSpec(observer="moving_average"),
            MovingAveragePerChannelMinMaxObserver,
            torch.per_channel_symmetric,
        ),
        ("auto", TensorSpec(qscheme="per_tensor_symmetric"), MinMaxObserver, torch.per_tensor_symmetric),
        ("auto", TensorSpec(qscheme="per_channel_affine"), PerChannelMinMaxObserver, torch.per_channel_affine),
    ],
)
def test_observers_of_static_weights(engine: Any, spec: TensorSpec, kind: type, qscheme: torch.qscheme) -> None:
    if engine not in ("auto", *torch.backends.quantized.supported_engines):
        pytest.skip(f"unavoidable: this build of torch has no {engine}")
    made = qconfig("static", weight=spec, engine=engine).weight()
    assert type(made) is kind
    assert made.qscheme == qscheme
    assert made.dtype == torch.qint8


@pytest.mark.parametrize("method", ["static", "qat"])
def test_transposed_convolutions_have_one_scale(method: Method) -> None:
    """No int8 kernel takes more."""
    for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, torch.nn.functional.conv_transpose2d):
        made = qconfig(method, kind, weight=TensorSpec(qscheme="per_channel_symmetric"))
        assert made.weight().qscheme == torch.per_tensor_symmetric


@pytest.mark.parametrize("method", ["static", "qat"])
def test_what_is_float_by_design_has_no_observer(method: Method) -> None:
    mapping = qconfig_mapping(resolve(QuantConfig()), method)
    assert all(mapping.object_type_qconfigs[kind] is None for kind in FLOAT_BY_DESIGN)


def test_weights_in_training_have_the_range_of_now() -> None:
    fake = qconfig("qat", reduce_range=False).weight()
    for factor in (8.0, 1.0):
        fake(factor * torch.tensor([[1.0, -127.0], [127.0, 0.0]]))
    torch.testing.assert_close(fake.scale, torch.ones(2))


@PROPERTY
@given(
    # a row of zeros is zero on any grid
    st.lists(st.lists(numbers, min_size=3, max_size=3).filter(any), min_size=2, max_size=4),
    st.sampled_from(["activation", "weight"]),
    st.sampled_from(["per_tensor_symmetric", "auto"]),
    st.booleans(),
)
def test_training_sees_the_grid_that_is_converted(rows: Any, kind: str, qscheme: Any, reduce_range: bool) -> None:
    fake = getattr(qconfig("qat", **{kind: TensorSpec(qscheme=qscheme)}, reduce_range=reduce_range), kind)()
    fake(torch.tensor(rows))
    scale, zero_point = fake.calculate_qparams()
    # a relative 1e-5 of 127 steps cannot move a value by a step
    torch.testing.assert_close(fake.scale, scale, rtol=1e-5, atol=0)
    assert torch.equal(fake.zero_point.int(), zero_point.int())


@pytest.mark.parametrize("method", ["static", "qat"])
def test_a_constructor_makes_modules_that_share_nothing(method: Any) -> None:
    first, second = (qconfig(method).activation() for _ in range(2))
    assert type(first) is type(second)
    assert qconfig(method).activation == qconfig(method).activation
    assert first.state_dict().keys() == second.state_dict().keys()
    before = {key: value.clone() for key, value in second.state_dict().items()}
    first(torch.randn(9))
    first.register_forward_hook(lambda *_: None)
    after = second.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not second._forward_hooks
    assert not {id(x) for x in first.buffers()} & {id(x) for x in second.buffers()}
    assert not {id(x) for x in first.modules()} & {id(x) for x in second.modules()}
    # as torch makes them
    made = qconfig(method).activation
    plain = made.kind(**dict(made.settings))
    assert plain.state_dict().keys() == after.keys()
    assert plain.__dict__.keys() == second.__dict__.keys()
