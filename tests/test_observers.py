"""Ranges from histograms: what is counted, how histograms add up, and which range is chosen."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY
from onnxruntime.quantization.calibrate import HistogramCollector
from torch import nn
from torch.nn import functional as F

from lightning_quant import CalibrationError, QuantConfig, TensorSpec, native, prepare
from lightning_quant._torch_ao import HistogramObserver as TorchHistogramObserver
from lightning_quant.demo import Digits
from lightning_quant.observers import HALF, PARTS, SAMPLES, SEARCHES, HistogramObserver, coarser, merge
from lightning_quant.range_search import Counts, least_error

DATA: dict[str, Any] = {
    "normal": lambda: torch.randn(4000),
    "relu": lambda: torch.relu(torch.randn(4000)),
    "few": lambda: torch.randn(7),
    "outlier": lambda: torch.cat([torch.randn(500) * 1e-3, torch.tensor([1000.0])]),
    "heavy tail": lambda: torch.exp(torch.randn(300) * 3),
    "one value": lambda: torch.full((9,), 2.5),
    "negative": lambda: -torch.rand(500) - 1,
    "zeros": lambda: torch.zeros(5),
}


def observer(*tensors: torch.Tensor, **settings: Any) -> Any:
    """An observer that has seen these."""
    made = HistogramObserver(**settings)
    for x in tensors:
        made(x)
    return made


def error(x: torch.Tensor, made: Any) -> float:
    """Mean squared error of quantizing ``x``."""
    scale, zero_point = made.calculate_qparams()
    rounded = torch.fake_quantize_per_tensor_affine(
        x, scale.item(), int(zero_point.item()), made.quant_min, made.quant_max
    )
    return (rounded - x).double().square().mean().item()


@pytest.fixture(params=["kernels", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip("no C compiler is there, or LIGHTNING_QUANT_NATIVE is 0")


# ---- counting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DATA)
@pytest.mark.usefixtures("either")
def test_counts_are_those_of_numpy(name: str, dtype: torch.dtype) -> None:
    batches = [DATA[name]().to(dtype) * (i + 1) for i in range(3)]
    made = observer(*batches)
    values = torch.cat(batches).double().numpy()
    width = 2.0 ** int(made.exponent)
    edges = np.arange(-HALF, HALF + 1) * width
    expected, _ = np.histogram(values[values != 0], edges)
    assert np.array_equal(made.histogram.numpy(), expected)
    assert made.zeros.item() == (values == 0).sum()
    assert (made.min_val.item(), made.max_val.item()) == (values.min(), values.max())
    most = np.abs(values).max()
    assert most == 0 or width * HALF / 4 <= most < width * HALF  # bins as fine as the range allows


@pytest.mark.parametrize(
    "x", [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last),
          torch.randn(8, 6).t(), torch.randn(9, 9)[:, ::2], torch.arange(12).reshape(3, 4), torch.randn(6).double()],
    ids=["plain", "channels_last", "transposed", "strided", "integers", "float64"],
)  # fmt: skip
@pytest.mark.usefixtures("either")
def test_any_tensor_can_be_counted(x: torch.Tensor) -> None:
    made = observer(x)
    assert made.histogram.sum().item() + made.zeros.item() == x.numel()
    assert made.max_val.item() == x.max().float().item()
    assert observer(torch.zeros(0, 4)).histogram.numel() == 0


@pytest.mark.parametrize("name", ["normal", "relu", "sorted"])
@pytest.mark.usefixtures("either")
def test_large_tensors_are_sampled_within_the_bound(name: str) -> None:
    x = torch.randn(10, 300_000).sort().values if name == "sorted" else torch.randn(10, 300_000)
    x = torch.relu(x) if name == "relu" else x
    made = observer(*x)
    assert made.histogram.sum().item() + made.zeros.item() == pytest.approx(x.numel())
    found = np.cumsum(made.histogram.numpy())
    found[HALF:] += made.zeros.item()
    edges = np.arange(-HALF + 1, HALF + 1) * 2.0 ** int(made.exponent)
    expected = np.searchsorted(np.sort(x.flatten().numpy()), edges, side="left") / x.numel()
    bound = math.sqrt(math.log(2 / 0.01) / (2 * 10 * SAMPLES))
    assert bound < 0.0041
    assert np.abs(found / x.numel() - expected).max() < bound


@pytest.mark.usefixtures("either")
def test_counts_are_multiples_of_one_part() -> None:
    made = observer()
    for size in (1_000_003, 131_073, 65_537, 40_001, 32_771, 100_003, 20_011, 16_385, 16_385, 9):
        made(torch.randn(size))
        for counts in (made.histogram, made.zeros):
            assert torch.equal(counts * PARTS, torch.round(counts * PARTS))
    assert not torch.equal(made.histogram, made.histogram.round())


def test_all_of_a_tensor_is_looked_at_for_min_and_max() -> None:
    x = torch.randn(1_000_000)
    x[123_457], x[765_432] = 50.0, -40.0
    made = observer(x)
    assert (made.min_val.item(), made.max_val.item()) == (-40.0, 50.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("either")
def test_values_that_are_not_finite_are_an_error(value: float) -> None:
    x = torch.randn(50_000)
    x[49_999] = value
    with pytest.raises(CalibrationError) as caught:
        observer(x)
    assert str(caught.value) == (
        "an activation has values that are NaN or infinite, so that it has no range. Look for the batch of the "
        "calibration data that gives them, by evaluating the float model."
    )


# ---- sums


@PROPERTY
@given(
    parts=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=12), min_size=1, max_size=5),
    order=st.randoms(),
)
def test_histograms_add_up_exactly_in_any_order(parts: list[list[float]], order: Any) -> None:
    tensors = [torch.tensor(part) for part in parts]
    whole = observer(*tensors)
    shuffled = list(tensors)
    order.shuffle(shuffled)
    total = observer()
    for x in shuffled:
        merge(total, observer(x))
    for name in ("histogram", "zeros", "exponent", "min_val", "max_val"):
        assert torch.equal(getattr(total, name), getattr(whole, name)), name
    assert torch.equal(total.calculate_qparams()[0], whole.calculate_qparams()[0])


@PROPERTY
@given(doublings=st.integers(0, 20), seed=st.integers(0, 1000))
def test_wider_bins_hold_the_same_values(doublings: int, seed: int) -> None:
    counts = torch.randint(0, 9, (2 * HALF,), generator=torch.Generator().manual_seed(seed)).double()
    result = coarser(counts, doublings)
    values = torch.arange(-HALF, HALF).repeat_interleave(counts.long()) >> doublings
    assert torch.equal(result, torch.bincount(values + HALF, minlength=2 * HALF).double())


def test_what_has_seen_nothing_adds_nothing() -> None:
    made = observer(torch.randn(100))
    before = copy.deepcopy(made.state_dict())
    merge(made, observer())
    assert all(torch.equal(made.state_dict()[name], value) for name, value in before.items())


# ---- ranges


@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric], ids=str)
@pytest.mark.parametrize("name", [name for name in DATA if name not in ("zeros", "one value")])
def test_no_other_range_has_a_lower_error(name: str, qscheme: torch.qscheme) -> None:
    """Of 2,500 ranges, by quantizing the data with each."""
    x = DATA[name]()
    made = observer(x, dtype=torch.qint8, quant_min=-128, quant_max=127, qscheme=qscheme)
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    least = math.inf
    for share_low in np.linspace(0.02, 1, 50):
        for share_high in np.linspace(0.02, 1, 50):
            ends = torch.tensor(low * share_low), torch.tensor(high * share_high)
            scale, zero_point = made._calculate_qparams(*ends)
            y = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point.item()), -128, 127)
            least = min(least, (y - x).double().square().mean().item())
    # the error of rounding is taken for its average; the luckiest of 2,500 grids is better, the more the fewer values
    assert error(x, made) <= least * (1.5 if name in ("few", "heavy tail", "outlier") else 1.06)


def test_the_error_on_real_activations_is_not_above_torchs() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32), nn.Hardswish(), nn.Flatten(), nn.Linear(32 * 64, 64), nn.GELU(), nn.Linear(64, 10),
    )  # fmt: skip
    data = Digits(batch_size=64)
    data.setup("fit")
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for x, y in data.train_dataloader():
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    batches = [x for x, _ in data.val_dataloader()]
    ratios = []
    with torch.no_grad():
        for layers in range(1, len(net) + 1):
            seen = [net[:layers](x) for x in batches]
            theirs = TorchHistogramObserver()
            for x in seen:
                theirs(x)
            ratios.append(error(torch.cat(seen), observer(*seen)) / error(torch.cat(seen), theirs))
    assert max(ratios) < 1.05
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) <= 1.0


@pytest.mark.parametrize("name", ["normal", "relu", "heavy tail"])
def test_percentiles_are_those_of_numpy(name: str) -> None:
    x = DATA[name]()
    made = observer(x, search="percentile", percentile=99.0)
    scale, zero_point = (v.item() for v in made.calculate_qparams())
    low, high = (min(float(np.quantile(x, 0.01)), 0.0), max(float(np.quantile(x, 0.99)), 0.0))
    width = 2.0 ** int(made.exponent)
    spread = np.sort(x.numpy())
    gap = float(np.diff(spread[-len(spread) // 50 :]).max())  # between the values at the quantile
    assert (255 - zero_point) * scale == pytest.approx(high, abs=2 * width + scale + gap)
    assert -zero_point * scale == pytest.approx(low, abs=2 * width + scale + gap)


@pytest.mark.parametrize("name", ["normal", "laplace"])
def test_entropy_agrees_with_onnx_runtime(name: str) -> None:
    torch.manual_seed(0)
    x = {
        "normal": lambda: torch.randn(200_000),
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((200_000,)),
    }[name]()
    made = HistogramObserver(
        "entropy", dtype=torch.qint8, quant_min=-127, quant_max=127, qscheme=torch.per_tensor_symmetric
    )
    for part in x.split(SAMPLES):
        made(part)
    scale, _ = made.calculate_qparams()
    collector = HistogramCollector(
        method="entropy", symmetric=True, num_bins=2048, num_quantized_bins=255, percentile=99.99, scenario="same"
    )
    collector.collect_absolute_value({"x": [x.numpy()]})
    theirs = collector.get_entropy_threshold(collector.histogram_dict["x"], 255)[1]
    assert 127 * scale.item() == pytest.approx(float(theirs), rel=0.25)


def test_entropy_cuts_off_what_is_far_away() -> None:
    x = torch.cat([torch.randn(200_000), torch.full((4,), 40.0)])
    made = observer(*x.split(SAMPLES), search="entropy", qscheme=torch.per_tensor_symmetric)
    assert made.max_val.item() == 40.0
    assert 127 * made.calculate_qparams()[0].item() < 12


def test_before_anything_was_seen() -> None:
    with pytest.warns(UserWarning, match="must run observer"):
        scale, zero_point = observer().calculate_qparams()
    assert (scale.item(), zero_point.item()) == (1.0, 0)


def test_a_share_of_the_way_to_the_ends() -> None:
    scale, zero_point = observer(torch.tensor([-1.0, 0.5, 3.0]), search="share", percentile=75.0).calculate_qparams()
    assert (scale.item(), zero_point.item()) == (pytest.approx(0.75 * 4 / 255), 64)
    scale, zero_point = observer(torch.tensor([1.0, 2.0]), search="share", percentile=50.0).calculate_qparams()
    assert (scale.item(), zero_point.item()) == (pytest.approx(1 / 255), 0)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", DATA)
def test_every_search_gives_a_range_for_everything(search: str, name: str) -> None:
    x = DATA[name]()
    for qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero_point = observer(x, search=search, qscheme=qscheme).calculate_qparams()
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert 0 <= zero_point.item() <= 255
        assert scale.item() * 255 <= max(2 * x.abs().max().item(), 1e-4) * 1.01


def test_a_search_of_few_bins() -> None:
    counts = np.zeros(2 * HALF)
    counts[HALF + 3] = 1.0
    low, high = least_error(Counts(counts, 0.5, 0.0, 1.7, 1.7), 255, symmetric=False)
    assert (low, high) == (0.0, pytest.approx(1.7, rel=0.02))


# ---- settings


@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
@pytest.mark.parametrize("search", ["histogram", "percentile", "entropy"])
def test_settings_reach_the_observers(backend: Any, search: str) -> None:
    config = QuantConfig(backend=backend, activation=TensorSpec(observer=search, percentile=99.5))
    prepared = prepare(nn.Sequential(nn.Linear(4, 3)), config, method="static", example_inputs=torch.randn(2, 4))
    found = [module for module in prepared.modules() if hasattr(module, "search")]
    assert {(module.search, module.percentile) for module in found} == {(search, 99.5)}
