"""All backends give one answer: that of exact integer arithmetic with the qparams that each of them found."""

from __future__ import annotations

from typing import Any

import integer_net
import numpy as np
import pytest
import torch
from integer_net import Integers, Small
from torch import fx, nn

from lightning_quant import QuantConfig, TensorSpec, convert, prepare
from lightning_quant.backends import reference
from lightning_quant.exporters.torchscript import freeze

#: Of the largest value, where the output stays float: float32 sums of products that are exact in integers.
STEP = 1e-5
BACKENDS = ("fx", "eager", "torchscript", "pt2e")


def converted(backend: Any, data: torch.Tensor) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Small().eval()
    # min_max: what was seen is what counts, whoever looks
    spec = TensorSpec(observer="min_max")  # of weights as well: torchscript has no other
    config = QuantConfig(backend=backend, activation=spec, weight=spec)
    prepared = prepare(model, config, method="static", example_inputs=data[:2])
    with torch.no_grad():
        prepared(data)
    return convert(prepared), prepared


def integers(backend: str, int8: nn.Module, prepared: Any) -> Integers:
    if backend == "torchscript":
        return integer_net.of_script(freeze(int8, (torch.zeros(2, 2, 6, 6),)))
    if backend == "pt2e":
        program = reference(prepared)
        assert isinstance(program, fx.GraphModule)
        return integer_net.of_qdq(program)
    return integer_net.of_modules(int8)


@pytest.fixture(scope="module")
def data() -> torch.Tensor:
    return torch.randn(256, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def step_of(net: Integers, output: np.ndarray) -> float:
    """One step of the grid of the output; of one that is float, as much as a step of 8 bits would be."""
    return float(net.fc.scale or STEP * np.abs(output).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_is_exact_integer_arithmetic(backend: str, data: torch.Tensor) -> None:
    int8, prepared = converted(backend, data)
    net = integers(backend, int8, prepared)
    with torch.no_grad():
        found = int8(data).numpy()
    expected = integer_net.run(net, data.numpy())
    # kernels multiply sums by scales in float32: a value within 1e-6 of a half may be rounded to the other side
    steps = np.abs(found - expected) / step_of(net, expected)
    if backend in ("fx", "eager"):  # the step is one of what the last layer reads
        assert np.abs(found - expected).max() < 1.001 * net.conv.scale * np.abs(net.fc.weight_scale).max() * 127
    else:
        assert steps.max() < 1.001
    assert (steps > 0.5).mean() < 0.005


def test_all_backends_find_the_same_qparams_and_give_the_same_answer(data: torch.Tensor) -> None:
    found: dict[str, tuple[Integers, np.ndarray]] = {}
    for backend in BACKENDS:
        int8, prepared = converted(backend, data)
        with torch.no_grad():
            found[backend] = integers(backend, int8, prepared), int8(data).numpy()
    first, output = found["torchscript"]  # whose output is rounded
    assert first.fc.scale is not None
    for net, other in found.values():
        for a, b in ((first.conv, net.conv), (first.fc, net.fc)):
            assert np.array_equal(a.weight, b.weight)
            np.testing.assert_allclose(a.weight_scale, b.weight_scale, rtol=1e-6)
            if b.scale is not None:
                np.testing.assert_allclose((a.scale, a.zero_point), (b.scale, b.zero_point), rtol=1e-6)
        np.testing.assert_allclose(first.input_scale, net.input_scale, rtol=1e-6)
        assert first.input_zero_point == net.input_zero_point
        # one step of the output where a sum is within rounding of a half; half a step to where it stays float
        steps = np.abs(output - other) / first.fc.scale
        assert steps.max() < 1.001
        assert (steps > 0.501).mean() < 0.005


def test_the_reference_can_disagree(data: torch.Tensor) -> None:
    int8, prepared = converted("fx", data)
    net = integers("fx", int8, prepared)
    wrong = Integers(net.input_scale * 1.05, net.input_zero_point, net.conv, net.fc)
    expected = integer_net.run(net, data.numpy())
    steps = np.abs(integer_net.run(wrong, data.numpy()) - expected) / step_of(net, expected)
    assert (steps > 0.5).mean() > 0.1
