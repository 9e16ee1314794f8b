"""Which layers stay in float because a runtime is slower in int8: by a clock that the tests make."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PROPERTY, Mlp, calibrated, decibels
from modules import Classifier, Digits, convnet, trainer
from torch import nn

from lightning_quant import ExportConfig, PostTrainingQuantization, QuantConfig, export, load
from lightning_quant.exporters import qdq, skip_slow
from lightning_quant.exporters.layouts import int8_layers, laid_out
from lightning_quant.exporters.qdq import to_program
from lightning_quant.exporters.skip_slow import GAIN, GROUPS, is_slower, search

Names = tuple[str, ...]
DEPTH = 8
LAYERS = tuple(f"{i}" for i in range(DEPTH))


@functools.cache
def program(depth: int = DEPTH) -> torch.export.ExportedProgram:
    x = torch.randn(8, 4)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    return to_program(qdq(calibrated(model.eval(), x, config=QuantConfig(reduce_range=False))), (x[:2],), ())


class File(nn.Module):
    """Stands for a file: it only knows which layers are in float in it."""

    def __init__(self, in_float: Names) -> None:
        super().__init__()
        self.in_float = in_float


class Clock:
    """Milliseconds of a file by its layers in float, in the place of a measurement; by the number of samples, too."""

    def __init__(self, *costs: Callable[[Names], float]) -> None:
        self.costs = costs
        self.written: list[Names] = []
        self.timed: list[tuple[int, int]] = []  # how many samples, how many files

    def export(self, written: torch.export.ExportedProgram, folder: Path) -> File:
        assert folder.is_dir()
        assert list(folder.iterdir()) == []
        int8 = int8_layers(written)
        file = File(tuple(name for name in int8_layers(program()) if name not in int8))
        self.written.append(file.in_float)
        return file

    def latency_ms(self, calls: dict[str, Any], **_: Any) -> dict[str, float]:
        (samples,) = {len(call.args[0]) for call in calls.values()}
        self.timed.append((samples, len(calls)))
        return {name: self.costs[samples - 1](call.func.in_float) for name, call in calls.items()}


def searched(*costs: Callable[[Names], float], **settings: Any) -> tuple[Names, Clock]:
    """The costs are those with one sample, with two, ..."""
    clock = Clock(*costs)
    data = [(torch.zeros(samples, 4),) for samples in range(1, len(costs) + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skip_slow, "latency_ms", clock.latency_ms)
        found = search(program(), None, clock.export, data, **settings)
    return found, clock


def by_layer(in_int8: list[float], in_float: list[float], border: float = 0.0) -> Callable[[Names], float]:
    """The sum over the layers, and what it takes to convert a tensor where int8 and float meet."""

    def cost(names: Names) -> float:
        kinds = [name in names for name in LAYERS]
        times = sum(in_float[i] if kinds[i] else in_int8[i] for i in range(DEPTH))
        return times + border * sum(a != b for a, b in pairwise(kinds))

    return cost


# ---- the search


def test_nothing_is_slow() -> None:
    found, _ = searched(by_layer([1.0] * DEPTH, [2.0] * DEPTH))
    assert found == ()


def test_everything_is_slow() -> None:
    found, _ = searched(by_layer([2.0] * DEPTH, [1.0] * DEPTH))
    assert found == LAYERS


def test_what_is_as_fast_stays_in_int8() -> None:
    found, _ = searched(by_layer([1.0] * DEPTH, [1.0 - GAIN / 2] * DEPTH))
    assert found == ()


@pytest.mark.parametrize("slow", [0, 3, DEPTH - 1])
def test_one_slow_layer_is_left_in_float_with_its_group(slow: int) -> None:
    in_int8 = [1.0] * DEPTH
    in_int8[slow] = 8.0
    found, _ = searched(by_layer(in_int8, [1.5] * DEPTH))
    assert LAYERS[slow] in found
    assert len(found) <= -(-DEPTH // GROUPS)


def test_borders_that_cost_more_than_they_bring() -> None:
    in_int8 = [1.0] * DEPTH
    in_int8[3] = 2.0
    found, _ = searched(by_layer(in_int8, [1.5] * DEPTH, border=5.0))
    assert found == ()


def test_groups_that_help_are_joined() -> None:
    in_int8 = [9.0, 9.0, *[1.0] * (DEPTH - 4), 9.0, 9.0]
    found, _ = searched(by_layer(in_int8, [2.0] * DEPTH))
    assert set(found) >= {LAYERS[0], LAYERS[-1]}
    assert LAYERS[DEPTH // 2] not in found


def test_from_float_a_group_goes_back_to_int8() -> None:
    in_int8 = [3.0] * DEPTH
    in_int8[0] = 0.1
    found, _ = searched(by_layer(in_int8, [2.0] * DEPTH))
    assert LAYERS[0] not in found
    assert set(found) >= set(LAYERS[2:])


TIMES = st.lists(st.floats(0.1, 10.0), min_size=DEPTH, max_size=DEPTH)


@settings(PROPERTY, max_examples=20)
@given(TIMES, TIMES, st.floats(0.0, 3.0))
def test_it_is_never_slower_than_all_in_int8_or_all_in_float(
    in_int8: list[float], in_float: list[float], border: float
) -> None:
    cost = by_layer(in_int8, in_float, border)
    found, clock = searched(cost)
    assert cost(found) <= min(cost(()), cost(LAYERS)) * (1 + GAIN)
    assert found in clock.written
    # names in the order of the program, each set written once, and not more sets than it says
    assert found == tuple(name for name in LAYERS if name in found)
    assert len(set(clock.written)) == len(clock.written) <= 2 + GROUPS + 1


@settings(PROPERTY, max_examples=20)
@given(TIMES, TIMES)
def test_the_whole_alone(in_int8: list[float], in_float: list[float]) -> None:
    cost = by_layer(in_int8, in_float)
    found, clock = searched(cost, whole=True)
    assert clock.written == [(), LAYERS]
    assert found == (LAYERS if cost(LAYERS) < cost(()) * (1 - GAIN) else ())


def test_a_program_without_int8_has_nothing_to_leave() -> None:
    in_float = laid_out(program(), None, LAYERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skip_slow, "latency_ms", lambda calls, **_: dict.fromkeys(calls, 1.0))
        assert search(in_float, None, lambda *_: File(()), [(torch.zeros(1, 4),)]) == ()


@pytest.mark.parametrize(("times", "slower"), [((2.0, 1.0), True), ((1.0, 0.99), False), ((1.0, 2.0), False)])
def test_is_slower(times: tuple[float, float], slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def latency_ms(calls: dict[str, Any]) -> dict[str, float]:
        for call in calls.values():
            call()
        return dict(zip(calls, times, strict=True))

    monkeypatch.setattr(skip_slow, "latency_ms", latency_ms)
    assert is_slower(lambda x: called.append(("one", x)), lambda x: called.append(("other", x)), [(3,)]) is slower
    assert called == [("one", 3), ("other", 3)]


def test_is_slower_with_any_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def latency_ms(calls: dict[str, Any]) -> dict[str, float]:
        return {name: call() for name, call in calls.items()}

    monkeypatch.setattr(skip_slow, "latency_ms", latency_ms)

    def one(samples: int) -> float:
        return {1: 1.0, 16: 20.0}[samples]

    assert not is_slower(one, lambda samples: 2.0 * samples, [(1,), (16,)])
    assert is_slower(one, lambda samples: 1.2 * samples, [(1,), (16,)])


# ---- one file for several numbers of samples


def test_what_helps_one_sample_and_costs_more_with_many_stays_in_int8() -> None:
    one = [1.0] * DEPTH
    one[0] = 2.0  # in float: 1.5
    many = [16.0] * DEPTH
    found, _ = searched(by_layer(one, [1.5] * DEPTH), by_layer(many, [32.0] * DEPTH))
    assert found == ()
    assert LAYERS[0] in searched(by_layer(one, [1.5] * DEPTH))[0]


def test_slower_than_float_with_many_is_not_taken_however_fast_one_is() -> None:
    found, _ = searched(by_layer([1.0] * DEPTH, [4.0] * DEPTH), by_layer([20.0] * DEPTH, [16.0] * DEPTH))
    assert found == LAYERS


def test_a_call_with_many_that_takes_long_is_compared_at_the_ends_alone() -> None:
    slow = [2.0, *[1.0] * (DEPTH - 1)]
    _, clock = searched(by_layer(slow, [1.4] * DEPTH), by_layer([100.0 * ms for ms in slow], [140.0] * DEPTH))
    by_samples = {samples: [files for n, files in clock.timed if n == samples] for samples in (1, 2)}
    assert len(by_samples[1]) == 3
    assert len(by_samples[2]) == 2
    assert max(by_samples[2]) < max(by_samples[1]) == 1 + GROUPS


# ---- files


FORMATS = ("torchscript", "onnx", "openvino", "pt2")


@pytest.fixture
def slow_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every runtime is slower with its first layer in int8, and torch's is slower in int8."""
    monkeypatch.setattr(skip_slow, "search", lambda program, *_, **__: tuple(int8_layers(program))[:1])
    monkeypatch.setattr(skip_slow, "is_slower", lambda *_: True)


@pytest.mark.usefixtures("slow_first")
def test_a_file_says_what_it_leaves_in_float(tmp_path: Path) -> None:
    model, x = Mlp().eval(), torch.randn(32, 4)
    prepared = calibrated(model, x)
    config = ExportConfig(directory=tmp_path, formats=FORMATS[1:], skip_slow=True)
    with torch.no_grad():
        for name, path in export(prepared, None, config, x).items():
            loaded = load(path)
            # pt2 has no runtime of its own
            assert loaded.metadata["left_float"] == ([] if name == "pt2" else ["first"])
            assert decibels(model(x), loaded(x)) > 25


@pytest.mark.usefixtures("slow_first")
def test_the_report_says_what_files_leave_in_float() -> None:
    callback = PostTrainingQuantization(export=ExportConfig(formats=FORMATS, skip_slow=True))
    trainer(callback).validate(Classifier(convnet()), datamodule=Digits())
    report = callback.report
    assert report is not None
    assert report.formats["torchscript"].left_float == ("",)  # all of it
    assert report.formats["pt2"].left_float == ()
    for name in ("onnx", "openvino"):
        assert (report.formats[name].int8_kernels, report.formats[name].float_kernels) == (1, 1)
        (layer,) = report.formats[name].left_float
        assert (layer[:4], layer[-2:]) == ("net.", ".0")
        assert load(report.artifacts[name]).metadata["left_float"] == [layer]
    # all of TorchScript's file is the float model
    assert report.formats["torchscript"].metrics == pytest.approx(report.metrics_float, rel=1e-5)
    page = Path("quantized/report.md").read_text(encoding="utf8")
    assert "- onnx: in float in this file, because it is faster so on this machine: net." in page
    assert "- torchscript: everything is in float in this file: nothing is faster in int8 on this machine." in page


def test_a_wrong_file_with_layers_in_float_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_quant import ExportError
    from lightning_quant.exporters import onnx
    from lightning_quant.exporters.writing import EXPORTERS

    def wrong(written: torch.export.ExportedProgram, path: Path, metadata: Any) -> None:
        written.state_dict["module.first.weight"].mul_(1.2)
        onnx.export(written, path, metadata)
        written.state_dict["module.first.weight"].div_(1.2)

    monkeypatch.setattr(skip_slow, "search", lambda *_, **__: ("first",))
    monkeypatch.setitem(EXPORTERS, "onnx", wrong)
    x = torch.randn(32, 4)
    config = ExportConfig(directory=tmp_path, formats=("onnx",), skip_slow=True)
    with pytest.raises(ExportError, match="the file computes something else"):
        export(calibrated(Mlp().eval(), x), None, config, x)


def test_files_are_timed_with_each_number_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []

    def noted(program: Any, layout: Any, write: Any, data: Any, **_: Any) -> Names:
        sizes.append([len(inputs[0]) for inputs in data])
        return ()

    monkeypatch.setattr(skip_slow, "search", noted)
    x = torch.randn(4, 4)
    for batch_sizes in ((16, 1), (8,)):
        config = ExportConfig(directory=tmp_path, formats=("onnx",), skip_slow=True, batch_sizes=batch_sizes)
        export(calibrated(Mlp().eval(), x), None, config, x)
    assert sizes == [[1, 16], [8]]
