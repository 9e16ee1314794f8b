"""Tensors of few values: which they are, and the grid that is laid over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY
from sklearn.datasets import load_sample_image
from torch import nn

from lightning_quant import QuantConfig, choose_ranges, levels, prepare
from lightning_quant.demo import Digits
from lightning_quant.observers import HistogramObserver, merge

BYTES = torch.arange(256.0)
#: The means and deviations of ImageNet.
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def observer(*tensors: torch.Tensor, **settings: Any) -> Any:
    """An observer that has seen these."""
    made = HistogramObserver(**settings)
    for x in tensors:
        made(x)
    return made


def rounded(x: torch.Tensor, made: Any) -> torch.Tensor:
    """By torch's own quantize; torchao's observers have the integers of plain tensors."""
    scale, zero_point = made.calculate_qparams()
    dtype = {torch.int8: torch.qint8, torch.uint8: torch.quint8}.get(made.dtype, made.dtype)
    return torch.quantize_per_tensor(x, scale.item(), int(zero_point), dtype).dequantize()


def error(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean squared error."""
    return (y - x).double().square().mean().item()


def photo() -> torch.Tensor:
    """``(3, 427, 640)``, 0 ... 255."""
    return torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1).float()


def least_and_most(x: torch.Tensor) -> torch.Tensor:
    """``x`` on the grid from its least to its greatest value."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    return torch.quantize_per_tensor(x, scale.item(), int(-low / scale + 0.5), torch.quint8).dequantize()


# ---- grids


def test_images_from_minus_one_to_one_are_no_longer_half_a_step_off() -> None:
    x = photo() / 127.5 - 1
    assert error(x, least_and_most(x)) == pytest.approx((1 / 255) ** 2, rel=1e-3)  # half of 2 / 255, everywhere
    found = error(x, rounded(x, observer(x)))
    assert found < 0.4 * (1 / 255) ** 2


def test_what_is_white_and_black_stays_it() -> None:
    digits = Digits(batch_size=64)
    digits.setup("fit")
    pages = [((x > 0.5) * 1.0) * 2 - 1 for x, _ in digits.val_dataloader()]
    made = observer(*pages)
    assert torch.allclose(rounded(pages[0], made), pages[0], atol=1e-6, rtol=0)
    assert made.calculate_qparams()[0].item() <= 2 / 255 * 17 / 16  # and grey has as many steps as before


@pytest.mark.parametrize("top", [1.0, 200 / 255], ids=["all levels", "dark"])
@pytest.mark.parametrize("shift", [0, 127], ids=["from 0", "both signs"])
def test_a_grid_that_has_every_value_is_found(top: float, shift: int) -> None:
    x = ((photo() * top).floor() - shift) / 128
    assert error(x, rounded(x, observer(x))) < 1e-14


def test_three_colours_normalized_apart() -> None:
    x = (photo() / 255 - MEAN[:, None, None]) / STD[:, None, None]
    made = observer(x)
    assert 3 * 200 < made.levels.numel() <= 3 * 256
    assert error(x, rounded(x, made)) < 0.9 * error(x, least_and_most(x))


def test_a_white_pixel_that_is_in_no_sample_has_its_place() -> None:
    x = (photo() * 0.7).floor().contiguous() / 255
    x.view(-1)[123_457] = 1.0
    made = observer(x)
    assert made.levels.max() < 0.75
    assert rounded(torch.ones(1), made).item() == pytest.approx(1.0, abs=1 / 255)
    assert error(x, rounded(x, made)) < 1e-14


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.qint8, -128, 127), (torch.quint8, 0, 255)])
def test_symmetric_ranges(dtype: torch.dtype, low: int, high: int) -> None:
    x = photo() / 127.5 - 1
    made = observer(x, dtype=dtype, quant_min=low, quant_max=high, qscheme=torch.per_tensor_symmetric)
    assert int(made.calculate_qparams()[1]) == (low + high) // 2 + (low < 0)
    assert error(x, rounded(x, made)) < 0.4 * (1 / 255) ** 2


VALUES = st.floats(-100, 100, width=32).filter(lambda x: abs(x) > 1e-3)


@PROPERTY
@given(
    values=st.lists(VALUES, min_size=1, max_size=40, unique=True),
    steps=st.sampled_from((15, 127, 255)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_no_range_that_holds_all_values_has_a_lower_error(values: list[float], steps: int, seed: int) -> None:
    x = np.sort(np.array(values))
    counts = np.random.default_rng(seed).integers(1, 50, len(x)).astype(float)
    first = min(x[0], 0.0), max(x[-1], 0.0)

    def error_of(low: float, high: float) -> float:
        scale = (high - low) / steps
        zero_point = np.rint(-low / scale)
        q = np.clip(np.rint(x / scale) + zero_point, 0, steps)
        return float((((q - zero_point) * scale - x) ** 2 * counts).sum())

    low, high = levels.least_error(x, counts, first, steps)
    assert low <= 0 <= high
    # a value in the middle of two steps may be rounded to either
    assert error_of(low, high) <= error_of(*first) * (1 + 1e-6) + 1e-12
    for number in range(steps - steps // 17, steps + 1):
        scale = (first[1] - first[0]) / number
        for end in (np.floor(first[0] / scale), np.ceil(first[0] / scale)):
            if -steps <= end <= 0:
                assert error_of(low, high) <= error_of(end * scale, (end + steps) * scale) * (1 + 1e-6) + 1e-12


# ---- which tensors have few values


@pytest.mark.parametrize(
    "x",
    [torch.randn(4, 3, 64, 64), torch.relu(torch.randn(4, 3, 64, 64)), torch.randn(9), torch.randn(3, 64).bfloat16()],
    ids=["normal", "relu", "a few", "coarse"],
)
def test_a_continuous_tensor_has_the_range_of_its_histogram(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = observer(x).calculate_qparams()
    monkeypatch.setattr(levels, "counts_of", lambda *_: None)
    assert found == observer(x).calculate_qparams()


def test_many_values_are_given_up() -> None:
    made = observer(torch.randn(2000))
    assert levels.is_many(made.levels)
    made(BYTES)
    assert levels.is_many(made.levels)
    assert not levels.is_many(observer(BYTES).levels)


def test_values_that_histograms_saw_and_levels_did_not() -> None:
    made = observer(BYTES.repeat(100))
    counts, width = made.histogram.numpy(), 2.0 ** int(made.exponent)
    assert levels.counts_of(made.levels, counts, width) == pytest.approx(np.full(255, 100.0))
    assert levels.counts_of(made.levels[::2], counts, width) is None  # half of the values are others


def test_levels_of_one_bin_share_its_counts() -> None:
    counts = np.zeros(8)
    counts[4] = 64.0
    assert levels.counts_of(torch.tensor([0.25, 0.5]), counts, 1.0) == pytest.approx([32.0, 32.0])


@PROPERTY
@given(parts=st.lists(st.lists(st.integers(-300, 900), max_size=400), min_size=1, max_size=5), order=st.randoms())
def test_in_any_order_they_are_the_same(parts: list[list[int]], order: Any) -> None:
    tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]
    whole = observer(*tensors)
    order.shuffle(tensors)
    total = observer()
    for x in tensors:
        merge(total, observer(x))
    assert torch.equal(total.levels, whole.levels)
    values = {value for part in parts for value in part} - {0}
    assert total.levels.tolist() == ([float("inf")] if len(values) > levels.MOST else sorted(values))
    sent = torch.stack([levels.padded(observer(x).levels) for x in tensors])
    assert torch.equal(levels.of_padded(sent), whole.levels)


# ---- models


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_the_input_of_a_model(backend: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    images = photo()[None, :, :224, :224] / 127.5 - 1
    prepared = prepare(net, QuantConfig(backend=backend), method="static", example_inputs=images)
    prepared(images)
    for graph in (prepared, choose_ranges(prepared, [images])):
        (made,) = [m for m in graph.modules() if getattr(m, "levels", torch.zeros(0)).numel() > 1]
        assert error(images, rounded(images, made)) < 0.5 * error(images, least_and_most(images))
