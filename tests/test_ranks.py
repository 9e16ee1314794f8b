"""Ranges of several processes become one: three real ranks, which run every scenario of this file once."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import own_classes
import pytest
import torch
import torch.distributed as dist
from models import Mlp, Residual
from processes import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchao.quantization import pt2e as torchao

import lightning_quant
from lightning_quant import CaptureError, ConfigError, LayerConfig, QuantConfig, TensorSpec, convert, prepare, ranks
from lightning_quant import _torch_ao as torch_ao
from lightning_quant.backends.graph import observers
from lightning_quant.backends.pt2e_classes import fake_quantize_class, histogram_class
from lightning_quant.fake_quantize import FakeQuantize
from lightning_quant.observers import HALF, HistogramObserver, merge
from lightning_quant.qconfig import AVERAGING_CONSTANT
from lightning_quant.ranks import merge_ranks

RANKS = 3
ORDERS = ((0, 1, 2), (2, 0, 1), (1, 0, 2))
BINS = 2048


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ConfigError as error:
        return str(error)
    return ""


# ---- histograms: each alone

#: What each part of the data shows to one observer; None: nothing. The large ones are counted with a weight.
HISTOGRAMS: dict[str, Callable[[torch.Generator, int], torch.Tensor | None]] = {
    "large": lambda g, part: torch.randn(300_007 + part, generator=g) * 3.0**part,
    "relu": lambda g, part: torch.relu(torch.randn(200_003 + 7 * part, generator=g)),
    "scales": lambda g, part: torch.randn(999, generator=g) * 1000.0 ** (part - 1),
    "zeros": lambda g, part: torch.zeros(11) if part else torch.randn(30, generator=g),
    "image": lambda g, part: torch.randint(40 * part, 120 + 40 * part, (3, 90, 90), generator=g) / 255,
    "many on one": lambda g, part: torch.randn(5000, generator=g) if part == 1 else torch.ones(9),
    "one part": lambda g, part: torch.randn(50, generator=g) if part == 1 else None,
    "nothing": lambda g, part: None,
}


def counted(part: int, kind: Any) -> nn.ModuleDict:
    """Observers of one kind that have seen one part of the data."""
    made = nn.ModuleDict({name.replace(" ", "_"): kind() for name in HISTOGRAMS})
    for observer, show in zip(made.values(), HISTOGRAMS.values(), strict=True):
        generator = torch.Generator().manual_seed(part)
        for _ in range(2):
            x = show(generator, part)
            if x is not None:
                observer(x)
    return made


def merge_histograms(rank: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for order in ORDERS:
        for kind in (HistogramObserver, histogram_class()):
            made = counted(order[rank], kind)
            merge_ranks(made)
            found.append(buffers(made))
    return found


def test_histograms_are_those_of_all_data_in_any_order(results: dict[str, list[Any]]) -> None:
    every = [found for of_rank in results["merge_histograms"] for found in of_rank]
    assert len(every) == RANKS * len(ORDERS) * 2
    for order in itertools.permutations(range(RANKS)):
        whole = nn.ModuleDict({name.replace(" ", "_"): HistogramObserver() for name in HISTOGRAMS})
        for part in order:
            for name, observer in counted(part, HistogramObserver).items():
                merge(whole[name], observer)
        expected = buffers(whole)
        assert all(same(found, expected) for found in every)
    assert expected["nothing.histogram"].numel() == 0
    assert torch.isinf(expected["nothing.min_val"])
    assert expected["one_part.histogram"].sum() == 100
    assert expected["image.levels"].tolist() == [x / 255 for x in torch.arange(1, 200)]
    assert torch.isinf(expected["many_on_one.levels"]).all()
    # the weights are no integers
    assert not torch.equal(expected["large.histogram"], expected["large.histogram"].round())
    assert expected["large.histogram"].sum().item() == pytest.approx(2 * (3 * 300_007 + 3), rel=1e-6)


# ---- histograms of a graph

STATIC = {
    "fx": QuantConfig(),
    "pt2e": QuantConfig(backend="pt2e"),
    "min_max": QuantConfig(activation=TensorSpec(observer="min_max")),
}
CALIBRATIONS = [("fx", ORDERS[0]), ("fx", ORDERS[1]), ("pt2e", ORDERS[1]), ("min_max", ORDERS[0])]


@functools.cache
def fresh(config: QuantConfig) -> nn.Module:
    torch.manual_seed(0)
    return prepare(Residual().eval(), config, method="static", example_inputs=torch.randn(6, 3, 8, 8))


def calibrated(config: QuantConfig, parts: tuple[int, ...]) -> nn.Module:
    """Calibrated with some of the three parts of the data; the part 2 is empty."""
    prepared = copy.deepcopy(fresh(config))
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for part in parts:
        for step in range(2 if part < 2 else 0):
            prepared(x.roll(step, 0) * (1 + part) + 6 * part)
    return prepared


def calibrate_shards(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, order in CALIBRATIONS:
        config = STATIC[name]
        prepared = calibrated(config, (order[rank],))
        before = prepared_copy(prepared)
        with counting() as calls:
            merge_ranks(prepared)
        found[f"{name} {order}"] = (
            before,
            buffers(prepared),
            convert(prepared)(torch.ones(2, 3, 8, 8)),
            len(calls),
            len(observers(prepared)),
        )
    return found


def prepared_copy(prepared: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return {name: buffers(module) for name, module in observers(prepared).items()}


class counting:
    """The collectives that are called meanwhile."""

    def __enter__(self) -> list[str]:
        calls: list[str] = []
        self.before = {name: getattr(dist, name) for name in ("all_gather", "all_reduce", "broadcast")}
        for name, function in self.before.items():

            def counted(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
                calls.append(name)
                return function(*args, **kwargs)

            setattr(dist, name, counted)
        return calls

    def __exit__(self, *_: object) -> None:
        for name, function in self.before.items():
            setattr(dist, name, function)


@pytest.mark.parametrize("name", STATIC)
def test_calibration_of_shards_is_calibration_of_all(name: str, results: dict[str, list[Any]]) -> None:
    found = [
        of_rank[f"{name} {order}"] for of_rank in results["calibrate_shards"] for n, order in CALIBRATIONS if n == name
    ]
    whole = calibrated(STATIC[name], ())
    for part in range(RANKS):
        alone = observers(calibrated(STATIC[name], (part,)))
        for key, observer in observers(whole).items():
            if hasattr(observer, "histogram"):
                merge(observer, alone[key])
            else:  # of weights, and "min_max"
                one, other = observer.min_val, alone[key].min_val
                if other.numel() and one.numel() != other.numel():
                    one.resize_(other.numel()).fill_(float("inf"))
                    observer.max_val.resize_(other.numel()).fill_(-float("inf"))
                if other.numel():
                    one.copy_(torch.minimum(one, other))
                    observer.max_val.copy_(torch.maximum(observer.max_val, alone[key].max_val))
    expected, answer = buffers(whole), convert(whole)(torch.ones(2, 3, 8, 8))
    for before, after, output, calls, number in found:
        assert same(after, expected)
        assert torch.equal(output, answer)
        ends = itertools.product(before, ("min_val", "max_val"))
        assert not all(torch.equal(after[f"{key}.{end}"], before[key][end]) for key, end in ends)
        assert number >= 8
        assert calls == (3 if name == "min_max" else 5)


# ---- min and max, and moving averages


def shown(part: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + part)
    return [torch.randn(4, 6, generator=generator) * (1 + part) + part for _ in range(3)]


def simple() -> nn.ModuleDict:
    averaging = {"observer": torch_ao.MovingAverageMinMaxObserver, "averaging_constant": 0.25}
    channels = {"observer": torch_ao.MovingAveragePerChannelMinMaxObserver, "averaging_constant": 0.25, "ch_axis": 1}
    symmetric = {"qscheme": torch.per_channel_symmetric, "dtype": torch.qint8, "quant_min": -127, "quant_max": 127}
    torchao_averaging = averaging | {"observer": torchao.MovingAverageMinMaxObserver}
    union_inside = {"observer": torch_ao.MinMaxObserver}
    return nn.ModuleDict(
        {
            "union": torch_ao.MinMaxObserver(),
            "union_channels": torch_ao.PerChannelMinMaxObserver(ch_axis=1),
            "union_torchao": torchao.MinMaxObserver(),
            "union_channels_torchao": torchao.PerChannelMinMaxObserver(ch_axis=1),
            "mean": torch_ao.MovingAverageMinMaxObserver(averaging_constant=0.25),
            "mean_channels": torch_ao.MovingAveragePerChannelMinMaxObserver(averaging_constant=0.25, ch_axis=1),
            "mean_torchao": torchao.MovingAverageMinMaxObserver(averaging_constant=0.25),
            "mean_ours": FakeQuantize(**averaging),
            "mean_channels_ours": FakeQuantize(**channels, **symmetric),
            "mean_ours_torchao": fake_quantize_class()(**torchao_averaging),
            "mean_torch_fake": torch_ao.FakeQuantize(**averaging),
            "mean_fused": torch_ao.FusedMovingAvgObsFakeQuantize(**averaging),
            "union_torch_fake": torch_ao.FakeQuantize(**union_inside),
        }
    )


def merge_ranges(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for order in ORDERS:
        for seeing in ((0, 1, 2), (1, 2), (1,), ()):
            made = simple()
            for module in made.values():
                for x in shown(order[rank]) if order[rank] in seeing else ():
                    module(x)
            merge_ranks(made)
            for name, module in made.items():
                if name.endswith(("fake", "fused")) or "ours" in name:
                    scale, zero_point = module.scale.clone(), module.zero_point.clone()
                    if seeing:
                        expected = module.calculate_qparams()
                        assert torch.equal(scale, expected[0].reshape(scale.shape)), name
                        assert torch.equal(zero_point, expected[1].reshape(scale.shape).to(zero_point.dtype)), name
            found[f"{order} {seeing}"] = buffers(made)
    return found


@pytest.mark.parametrize("seeing", [(0, 1, 2), (1, 2), (1,), ()], ids=str)
def test_ranges_are_unions_and_means(seeing: tuple[int, ...], results: dict[str, list[Any]]) -> None:
    every = [found[f"{order} {seeing}"] for found in results["merge_ranges"] for order in ORDERS]
    assert all(same(found, every[0]) for found in every)
    for name in simple():
        inside = ".activation_post_process" if name.endswith(("fake", "fused")) or "ours" in name else ""
        low, high = (every[0][f"{name}{inside}.{end}"].numpy() for end in ("min_val", "max_val"))
        if not seeing:
            assert low.size == 0 or np.isinf(low).all()
            continue
        axes = 0 if "channels" in name else None
        lows = np.stack([[x.numpy().min(axes) for x in shown(part)] for part in seeing]).astype(np.float64)
        highs = np.stack([[x.numpy().max(axes) for x in shown(part)] for part in seeing]).astype(np.float64)
        if name.startswith("union"):
            assert np.array_equal(low, lows.min((0, 1)))
            assert np.array_equal(high, highs.max((0, 1)))
            continue
        # one process that follows the mean of what the ranks see at each step
        for got, steps in ((low, lows.mean(0)), (high, highs.mean(0))):
            average = steps[0]
            for step in steps[1:]:
                average = average + 0.25 * (step - average)
            # float32 rounds once a step and once at the end
            np.testing.assert_allclose(got, average, rtol=4 * 2.0**-24 * len(steps), atol=1e-6)


# ---- torch's own histograms


def merge_bins(rank: int) -> dict[str, Any]:
    made = nn.ModuleDict({"plain": torch_ao.HistogramObserver(), "constant": torch_ao.HistogramObserver()})
    for x in shown(rank):
        made["plain"](x)
    made["constant"](torch.full((5,), float(rank)))
    merge_ranks(made)
    config = QuantConfig(backend="torchscript")
    prepared = calibrated(config, (rank,))
    merge_ranks(prepared)
    return {"alone": buffers(made), "graph": buffers(prepared), "output": convert(prepared)(torch.ones(2, 3, 8, 8))}


def test_histograms_of_torch_are_brought_to_one_range(results: dict[str, list[Any]]) -> None:
    first, *others = results["merge_bins"]
    for other in others:
        assert same(other["alone"], first["alone"])
        assert same(other["graph"], first["graph"])
        assert torch.equal(other["output"], first["output"])
    every = torch.cat([torch.cat(shown(part)) for part in range(RANKS)]).flatten()
    low, high = first["alone"]["plain.min_val"], first["alone"]["plain.max_val"]
    assert (low, high) == (every.min(), every.max())
    below = first["alone"]["plain.histogram"].cumsum(0).numpy()
    assert below[-1] == pytest.approx(every.numel())
    # a value is at most two bins from where it was: one of its own histogram, as wide, and one of the union
    width = (high - low).item() / BINS
    edges = low.item() + width * np.arange(1, BINS + 1)
    values = np.sort(every.double().numpy())
    assert (np.searchsorted(values, edges - 2 * width) <= below + 1e-3).all()
    assert (below <= np.searchsorted(values, edges + 2 * width) + 1e-3).all()
    constant = first["alone"]["constant.histogram"]
    assert constant.nonzero().flatten().tolist() == [0, BINS // 2, BINS - 1]
    assert constant.sum() == 15
    scripted = {name.rpartition(".")[2] for name in first["graph"]}
    assert {"histogram", "min_val"} <= scripted
    assert not any(torch.isinf(b).any() for name, b in first["graph"].items() if name.endswith("_val"))


# ---- training


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(4, 3, 8, 8, generator=generator) * (1 + rank) + 2 * rank


def of_input(prepared: Any) -> str:
    """The fake quantize that the input of a graph goes to."""
    (source,) = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    (target,) = {str(user.target) for user in source.users}
    assert target in observers(prepared)
    return target


STEPS = 5
TRAININGS = [(backend, broadcast) for backend in ("fx", "pt2e") for broadcast in (True, False)]


@functools.cache
def trainable(backend: Any) -> nn.Module:
    torch.manual_seed(0)
    return prepare(Residual(), QuantConfig(backend=backend), method="qat", example_inputs=torch.randn(4, 3, 8, 8))


def train(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for backend, broadcast in TRAININGS:
        prepared = copy.deepcopy(trainable(backend))
        start = {name: p.detach().clone() for name, p in prepared.named_parameters()}
        parallel = DistributedDataParallel(prepared, broadcast_buffers=broadcast)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.02)
        losses = []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = (parallel(batch(rank, step)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        before = prepared_copy(prepared)
        merge_ranks(parallel)
        after = prepared_copy(prepared)
        prepared.eval()
        found[f"{backend} {broadcast}"] = {
            "input": of_input(prepared),
            "losses": losses,
            "moved": any(not torch.equal(p, start[name]) for name, p in prepared.named_parameters()),
            "parameters": {name: p.detach().clone() for name, p in prepared.named_parameters()},
            "before": before,
            "after": after,
            "agree": all(
                torch.equal(m.calculate_qparams()[0].reshape(-1), m.scale.reshape(-1))  # type: ignore[operator, union-attr]
                for m in observers(prepared).values()
            ),
        }
    return found


@pytest.mark.parametrize(("backend", "broadcast"), TRAININGS)
def test_training_in_parallel(backend: str, broadcast: bool, results: dict[str, list[Any]]) -> None:
    found = [of_rank[f"{backend} {broadcast}"] for of_rank in results["train"]]
    mean_losses = np.mean([of_rank["losses"] for of_rank in found], axis=0)
    assert mean_losses[-1] < mean_losses[0]
    assert all(of_rank["moved"] and of_rank["agree"] for of_rank in found)
    for of_rank in found[1:]:
        assert same(of_rank["parameters"], found[0]["parameters"])
        for name in found[0]["after"]:
            assert same(of_rank["after"][name], found[0]["after"][name]), name
    # the fake quantize of the input sees what we know
    low, high = "activation_post_process.min_val", "activation_post_process.max_val"
    name = found[0]["input"]
    ends: dict[str, Any] = {low: torch.amin, high: torch.amax}
    for end, extreme in ends.items():
        seen = np.array([[extreme(batch(r, s)).item() for s in range(STEPS)] for r in range(RANKS)])
        averages = seen[:, 0]
        for step in range(1, STEPS):
            start = averages[0] if broadcast else averages  # that of rank 0 is given to all
            averages = start + AVERAGING_CONSTANT * (seen[:, step] - start)
        for rank in range(RANKS):
            assert found[rank]["before"][name][end].item() == pytest.approx(averages[rank], rel=1e-5)
        assert found[0]["after"][name][end].item() == pytest.approx(averages.mean(), rel=1e-5)
    # and has more of it than rank 0 alone
    assert found[0]["after"][name][high] > found[0]["before"][name][high]
    # ranges of weights, which are the same everywhere, are not changed by a bit
    weights = [n for n, state in found[0]["before"].items() if state[low].numel() > 1]
    assert weights
    for n in weights:
        assert same(found[0]["before"][n], found[0]["after"][n])


# ---- classes that are not known


class Agreeing(own_classes.HalfRange):
    """Says how it is merged."""

    def merge_ranks(self, group: Any) -> None:
        dist.all_reduce(self.min_val, dist.ReduceOp.MIN, group)
        dist.all_reduce(self.max_val, dist.ReduceOp.MAX, group)


class Renamed(HistogramObserver):
    """Could mean something else by the same buffers."""


def merge_own(rank: int) -> dict[str, Any]:
    x = torch.linspace(-1.0 - rank, 1.0 + rank, 9)
    found: dict[str, Any] = {}
    made = {
        "observer": own_classes.HalfRange(),
        "of a histogram of ours": Renamed(),
        "fake quantize": own_classes.CountingFakeQuantize(),
        "inside": torch_ao.FakeQuantize(observer=own_classes.HalfRange),
    }
    for name, observer in made.items():
        both = nn.ModuleDict({"known": torch_ao.MinMaxObserver(), "own": observer})
        for module in both.values():
            module(x)
        before = buffers(both)
        text = error_of(lambda both=both: merge_ranks(both))  # type: ignore[misc]
        found[name] = text, same(buffers(both), before)
    equal = own_classes.HalfRange()
    equal(torch.ones(3))
    merge_ranks(equal)
    found["equal"] = equal.max_val.item()
    agreeing = nn.ModuleDict({"alone": Agreeing(), "inside": torch_ao.FakeQuantize(observer=Agreeing)})
    for module in agreeing.values():
        module(x)
    merge_ranks(agreeing)
    found["agreeing"] = buffers(agreeing)
    scripted = calibrated(
        QuantConfig(backend="torchscript", activation=TensorSpec(observer="own_classes.Wider")), (rank,)
    )
    found["scripted"] = error_of(lambda: merge_ranks(scripted))
    entry = LayerConfig(name="own", observed="own_classes.ObservedDoubled", quantized="own_classes.QuantizedDoubled")
    torch.manual_seed(0)
    data = torch.randn(2, 3, 8, 8)
    swapped = prepare(own_classes.Network(), QuantConfig(layers=(entry,)), method="static", example_inputs=data)
    swapped(data * (1 + rank))
    found["swapped"] = error_of(lambda: merge_ranks(swapped))
    return found


WHAT = (
    "{} ({}) differs between ranks, and how the buffers of several ranks ({}) become one is known of the observers and "
    "fake quantizes of torch, torchao and lightning_quant alone, not of classes that derive from them. "
)
METHOD = (
    "Give the class a method merge_ranks(self, group): it is called on every rank with the process group (None: all "
    "ranks) and has to leave the same buffers on all of them."
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("observer", WHAT.format("own_classes.HalfRange", "own", "eps, min_val, max_val") + METHOD),
        (
            "of a histogram of ours",
            WHAT.format("test_ranks.Renamed", "own", "eps, histogram, zeros, exponent, min_val, max_val, levels")
            + METHOD,
        ),
        (
            "fake quantize",
            WHAT.format(
                "own_classes.CountingFakeQuantize",
                "own",
                "fake_quant_enabled, observer_enabled, scale, zero_point, activation_post_process.eps, "
                "activation_post_process.min_val, activation_post_process.max_val",
            )
            + METHOD,
        ),
        ("inside", WHAT.format("own_classes.HalfRange", "own", "eps, min_val, max_val") + METHOD),
    ],
)
def test_a_class_that_is_not_known_is_an_error(name: str, expected: str, results: dict[str, list[Any]]) -> None:
    for of_rank in results["merge_own"]:
        text, unchanged = of_rank[name]
        assert text == expected
        assert unchanged


def test_classes_of_other_places_that_are_not_known(results: dict[str, list[Any]]) -> None:
    for of_rank in results["merge_own"]:
        assert of_rank["scripted"].startswith("own_classes.Wider (script.traced.")
        assert of_rank["scripted"].endswith("Use one of those: a compiled class cannot say it.")
        assert of_rank["swapped"] == WHAT.format("own_classes.ObservedDoubled", "own.module", "largest") + METHOD


def test_a_class_that_says_how(results: dict[str, list[Any]]) -> None:
    for of_rank in results["merge_own"]:
        assert of_rank["equal"] == 1.0
        found = of_rank["agreeing"]
        assert (found["alone.min_val"].item(), found["alone.max_val"].item()) == (-3.0, 3.0)
        # half of the range, in 255 steps
        assert found["inside.scale"].item() == pytest.approx(3 / 255)


# ---- groups, and ranks that do not fit


def groups(rank: int) -> dict[str, Any]:
    pair = dist.new_group([0, 1])
    alone = [dist.new_group([other]) for other in range(RANKS)][rank]
    found: dict[str, Any] = {}
    observer = torch_ao.MinMaxObserver()
    observer(torch.tensor([-1.0 - rank, 1.0 + rank]))
    merge_ranks(observer, alone)
    found["alone"] = observer.max_val.item()
    found["outside"] = error_of(lambda: merge_ranks(observer, pair))
    found["pair"] = observer.max_val.item()
    with torch.inference_mode():
        made = HistogramObserver()
        made(torch.full((4,), 1.0 + rank))
    merge_ranks(made)
    found["inference"] = made.histogram.sum().item(), made.max_val.item()
    kind = Mlp if rank else Residual
    x = torch.randn(3, 4) if rank else torch.randn(3, 3, 8, 8)
    found["graphs"] = error_of(lambda: merge_ranks(prepare(kind(), method="static", example_inputs=x)))
    channels = torch_ao.PerChannelMinMaxObserver(ch_axis=1)
    channels(torch.randn(4, 2 + rank))
    found["channels"] = error_of(lambda: merge_ranks(nn.ModuleDict({"weight": channels})))
    dynamic = prepare(Mlp(), method="dynamic", example_inputs=torch.randn(3, 4))
    found["dynamic"] = error_of(lambda: merge_ranks(dynamic))
    return found


def test_groups_and_what_does_not_fit(results: dict[str, list[Any]]) -> None:
    found = results["groups"]
    assert [of_rank["alone"] for of_rank in found] == [1.0, 2.0, 3.0]
    assert [of_rank["pair"] for of_rank in found] == [2.0, 2.0, 3.0]
    assert [of_rank["outside"] for of_rank in found] == [
        "",
        "",
        "merge_ranks was called on a rank that is not in the group: call it on those that are.",
    ]
    for of_rank in found:
        assert of_rank["inference"] == (12.0, 3.0)
        assert of_rank["dynamic"] == ""
        assert of_rank["graphs"] == (
            "the ranks have different graphs (9, 2, 2 observers, by rank), so that their ranges cannot be merged. "
            "Prepare the same model with the same QuantConfig on every rank."
        )
        assert of_rank["channels"] == (
            "weight has ranges of 2 channels on one rank and of 3 on another, so that they cannot be merged. Train or "
            "calibrate the same model on every rank."
        )


# ---- one process


def test_alone_nothing_changes() -> None:
    prepared = calibrated(STATIC["fx"], (0, 1))
    before = buffers(prepared)
    merge_ranks(prepared)
    assert same(buffers(prepared), before)
    assert before[f"{next(iter(observers(prepared)))}.histogram"].numel() == 2 * HALF


def test_what_has_no_observers_is_an_error() -> None:
    with pytest.raises(CaptureError) as caught:
        merge_ranks(Mlp())
    assert str(caught.value) == (
        "Mlp has no observers that could be merged: prepare it with lightning_quant.prepare first."
    )


@pytest.mark.parametrize(
    ("backends", "expected"), [("cpu:gloo,meta:nccl", "cpu"), ("meta:nccl", "meta")], ids=["gloo", "nccl"]
)
def test_tensors_are_sent_from_where_the_group_works(
    backends: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: ``meta`` stands for it."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    parts = ranks.parts_of(nn.ModuleDict({"a": torch_ao.MinMaxObserver(), "b": torch_ao.MinMaxObserver().to("meta")}))
    assert ranks._device(None, parts) == torch.device(expected)


def test_the_comparison_can_fail() -> None:
    one = buffers(calibrated(STATIC["fx"], (0,)))
    other = copy.deepcopy(one)
    name = next(name for name in one if name.endswith("max_val"))
    other[name] = torch.nextafter(one[name], one[name] + 1)
    assert same(one, one)
    assert not same(one, other)


# ---- the ranks

SCENARIOS = (merge_histograms, calibrate_shards, merge_ranges, merge_bins, train, merge_own, groups)


def everything(rank: int) -> dict[str, Any]:
    with torch_ao.quiet():
        return {"file": lightning_quant.__file__} | {scenario.__name__: scenario(rank) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Scenario -> what each rank gave."""
    found = run(everything, RANKS, tmp_path_factory.mktemp("ranks"))
    assert {of_rank["file"] for of_rank in found} == {lightning_quant.__file__}
    return {name: [of_rank[name] for of_rank in found] for name in found[0]}
