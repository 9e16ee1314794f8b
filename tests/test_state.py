"""Models that change their buffers in forward: in memory, in files of every format, and through the callbacks."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import calibrated, decibels
from torch import nn

from lightning_quant import (
    ArtifactError,
    ExportConfig,
    ExportError,
    QuantConfig,
    convert,
    export,
    load,
    prepare,
)
from lightning_quant.config import BackendName, FormatName
from lightning_quant.exporters import skip_slow, verification, writing
from lightning_quant.runtime import read_metadata

#: Of int8 against float, over three calls: what these nets have without state as well. State that is not kept gives
#: less than 15 dB (see the last test of the first part).
DB = 25.0

WAYS = pytest.mark.parametrize("way", ["copy", "assign", "in_place"])
BACKENDS: tuple[BackendName, ...] = ("fx", "eager", "pt2e", "torchscript")


def change(module: nn.Module, name: str, value: torch.Tensor, way: str) -> None:
    if way == "copy":
        module.get_buffer(name).copy_(value)
    elif way == "assign":
        setattr(module, name, value)
    else:
        module.get_buffer(name).mul_(0).add_(value)


class Average(nn.Module):
    """Takes ``(N, 4)``; what it gives depends on an average of its features and on the number of calls."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(16, 3)
        self.register_buffer("average", torch.full((1, 8), 0.25))
        self.register_buffer("calls", torch.tensor(0))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        y = self.second(torch.cat([h, self.average.expand(h.shape[0], -1)], 1)) * (1 + self.calls)
        change(self, "average", 0.5 * self.average + 0.5 * h.mean(0, keepdim=True).detach(), self.way)
        change(self, "calls", self.calls + 1, self.way)
        return y


class Causal(nn.Module):
    """A convolution over a stream: the last samples of one call come before those of the next."""

    def __init__(self, inputs: int, outputs: int, way: str) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3)
        self.register_buffer("cache", torch.zeros(1, inputs, 2))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([self.cache, x], 2)
        change(self, "cache", padded[:, :, -2:].detach(), self.way)
        return self.conv(padded)


class Stream(nn.Module):
    """Takes ``(1, 2, T)``, gives ``(1, 3, T)``: one sample at a time."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.early = Causal(2, 6, way)
        self.late = Causal(6, 3, way)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.late(torch.relu(self.early(x)))


MODELS: dict[type[nn.Module], tuple[tuple[int, ...], tuple[str, ...]]] = {
    Average: ((64, 4), ("average", "calls")),
    Stream: ((1, 2, 64), ("early.cache", "late.cache")),
}
KINDS = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)


def made(kind: Callable[[str], nn.Module], way: str = "copy") -> tuple[nn.Module, torch.Tensor]:
    """A model, and what it is calibrated with."""
    torch.manual_seed(1)
    model = kind(way).eval()
    return model, torch.randn(MODELS[kind][0])


def three_calls(data: torch.Tensor) -> list[torch.Tensor]:
    if data.dim() == 2:
        return [data[:5], data[5:14], data[14:15]]
    return [data[:, :, :64], 0.5 * data, -data]


@torch.no_grad()
def run(module: Any, data: torch.Tensor) -> list[torch.Tensor]:
    return [module(x) for x in three_calls(data)]


@torch.no_grad()
def state_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, torch.Tensor]:
    return {name: model.get_buffer(name).clone() for name in MODELS[kind][1]}


def check_calls(expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    assert [x.shape for x in expected] == [x.shape for x in found]
    assert min(decibels(a, b) for a, b in zip(expected, found, strict=True)) > DB


def check_state(expected: dict[str, torch.Tensor], found: Any) -> None:
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert decibels(value, found[name]) > DB, name
        else:
            assert torch.equal(value, found[name])


# ---- in memory


@KINDS
@WAYS
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_int8_model_begins_where_the_float_model_was(backend: BackendName, way: str, kind: type[nn.Module]) -> None:
    model, data = made(kind, way)
    first = state_of(model, kind)
    prepared = calibrated(model, data, config=QuantConfig(backend=backend), passes=3)
    assert all(torch.equal(value, first[name]) for name, value in state_of(model, kind).items())
    int8 = convert(prepared)
    check_calls(run(model, data), run(int8, data))
    # conversion works on a copy, which begins at the beginning again
    model.load_state_dict(first, strict=False)
    check_calls(run(model, data), run(convert(prepared), data))


def test_training_goes_on_with_the_state() -> None:
    model, data = made(Average)
    prepared = prepare(model, method="qat", example_inputs=data)
    for _ in range(4):
        prepared(data)
    int8: Any = convert(prepared)
    assert int(int8.calls) == 4
    assert decibels(prepared.eval().average, int8.average) > 40
    assert torch.equal(prepared.average, int8.average)


def test_what_these_tests_would_say_of_state_that_stands_still() -> None:
    for kind in MODELS:
        model, data = made(kind)
        first = state_of(model, kind)
        expected = run(model, data)
        found = []
        for x in three_calls(data):
            model.load_state_dict(first, strict=False)
            with torch.no_grad():
                found.append(model(x))
        assert decibels(expected[0], found[0]) == np.inf
        assert decibels(expected[1], found[1]) < 15


# ---- files


def files_of(
    kind: type[nn.Module],
    way: str,
    backend: BackendName,
    formats: tuple[FormatName, ...],
    folder: Path,
    **settings: Any,
) -> tuple[nn.Module, torch.Tensor, dict[str, Path]]:
    for name in {"onnx", "openvino"} & set(formats):
        pytest.importorskip({"onnx": "onnxruntime"}.get(name, name))
    model, data = made(kind, way)
    prepared = calibrated(model, data, config=QuantConfig(backend=backend, reduce_range=True), passes=2)
    settings = {"directory": folder, "formats": formats, **settings}
    return model, data, export(prepared, None, ExportConfig(**settings), example_inputs=data)


def check_file(path: Path, model: nn.Module, data: torch.Tensor, kind: type[nn.Module]) -> None:
    model = copy.deepcopy(model)
    loaded = load(path)
    first = state_of(model, kind)
    assert loaded.state.keys() == first.keys()
    assert all(torch.equal(loaded.state[name], value) for name, value in first.items())
    expected = run(model, data)
    check_calls(expected, run(loaded, data))
    check_state(state_of(model, kind), loaded.state)
    twin = copy.deepcopy(loaded)
    loaded.reset_state()
    assert all(torch.equal(loaded.state[name], value) for name, value in first.items())
    check_calls(expected, run(loaded, data))
    # a copy has a state of its own, and goes on from where it was taken
    with torch.inference_mode():
        (again,) = (model(three_calls(data)[0]),)
        assert decibels(again, twin(three_calls(data)[0])) > DB
        assert decibels(again, loaded(three_calls(data)[0])) > DB
    # a file does not remember who has run it
    assert all(torch.equal(load(path).state[name], value) for name, value in first.items())


CELLS: list[tuple[BackendName, tuple[FormatName, ...]]] = [
    ("fx", ("torchscript", "onnx", "openvino", "pt2")),
    ("eager", ("torchscript", "onnx", "openvino", "pt2")),
    ("pt2e", ("pt2", "onnx", "openvino")),
    ("torchscript", ("torchscript",)),
]


#: The other cells of the table are for those who have more time.
FAST = {
    ("fx", "copy", Average), ("fx", "assign", Stream), ("eager", "in_place", Average),
    ("pt2e", "assign", Average), ("torchscript", "copy", Average),
    ("torchscript", "assign", Stream),
}  # fmt: skip
ALL = [
    pytest.param(
        backend, formats, way, kind,
        id=f"{backend}-{way}-{kind.__name__}", marks=() if (backend, way, kind) in FAST else pytest.mark.slow,
    )
    for backend, formats in CELLS for way in ("copy", "assign", "in_place") for kind in MODELS
]  # fmt: skip


@pytest.mark.parametrize(("backend", "formats", "way", "kind"), ALL)
def test_three_calls_of_a_file(
    backend: BackendName, formats: tuple[FormatName, ...], way: str, kind: type[nn.Module], tmp_path: Path
) -> None:
    model, data, files = files_of(kind, way, backend, formats, tmp_path)
    assert tuple(files) == formats
    for path in files.values():
        check_file(path, model, data, kind)


@pytest.mark.slow
@KINDS
def test_three_calls_of_a_compiled_file(kind: type[nn.Module], tmp_path: Path) -> None:
    model, data, files = files_of(kind, "assign", "fx", ("aoti",), tmp_path)
    check_file(files["aoti"], model, data, kind)


def test_three_calls_of_a_file_with_dynamic_ranges(tmp_path: Path) -> None:
    model, data = made(Average, "assign")
    prepared = prepare(model, method="dynamic", example_inputs=data)
    files = export(prepared, None, ExportConfig(directory=tmp_path), example_inputs=data)
    check_file(files["torchscript"], model, data, Average)


@pytest.mark.slow
def test_a_file_with_layers_that_are_slow_left_in_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_in_float(self: Any, candidates: list[tuple[str, ...]]) -> dict[tuple[str, ...], tuple[float, ...]]:
        for names in candidates:  # written and run as always
            folder = self.folder / str(len(names))
            folder.mkdir(exist_ok=True)
            loaded = self.export(skip_slow.laid_out(self.program, self.layout, names), folder)
            for inputs in self.data:
                loaded(*inputs)
        return {names: (1.0 / (1 + len(names)),) * len(self.data) for names in candidates}

    monkeypatch.setattr(skip_slow._Trial, "times", all_in_float)
    model, data, files = files_of(Average, "assign", "fx", ("onnx",), tmp_path, skip_slow=True)
    assert read_metadata(files["onnx"])["left_float"]
    check_file(files["onnx"], model, data, Average)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files_of(Average, "copy", "fx", ("torchscript", "onnx", "openvino", "pt2"), tmp_path_factory.mktemp("s"))[2]


def test_the_state_can_be_read_and_set(files: dict[str, Path]) -> None:
    _, data = made(Average)
    for path in files.values():
        loaded, other = load(path), load(path)
        run(loaded, data)
        kept = {name: value.clone() for name, value in loaded.state.items()}
        other.state = loaded.state
        assert torch.equal(loaded(data), other(data))
        other.state["average"] = kept["average"]
        other.state["calls"] = torch.tensor(3)
        loaded.state = kept
        assert torch.equal(loaded(data), other(data))
        # of what was given, a copy is kept
        loaded.state["average"] = given = torch.zeros(1, 8)
        given += 1
        assert not loaded.state["average"].any()


def test_state_that_does_not_fit_is_refused(files: dict[str, Path]) -> None:
    loaded = load(files["onnx"])
    with pytest.raises(ArtifactError, match=r"state\['mean'\]: the state of this file is average, calls\."):
        loaded.state["mean"] = torch.zeros(1, 8)
    with pytest.raises(
        ArtifactError,
        match=r"state\['average'\] is torch\.float32 of the shape \(1, 8\); it was given torch\.float32 of the shape "
        r"\(8,\)\.",
    ):
        loaded.state["average"] = torch.zeros(8)
    with pytest.raises(ArtifactError, match=r"it was given torch\.float64 of the shape \(1, 8\)\."):
        loaded.state["average"] = torch.zeros(1, 8).double()
    with pytest.raises(ArtifactError, match=r"state\['calls'\]: give a tensor, not a int\."):
        loaded.state["calls"] = 3  # type: ignore[assignment]
    with pytest.raises(ArtifactError, match=r"the state of this file is average, calls; it was given average\."):
        loaded.state = {"average": torch.zeros(1, 8)}
    with pytest.raises(ArtifactError, match=r"state\['calls'\] cannot be removed; reset_state\(\)"):
        del loaded.state["calls"]
    assert int(loaded.state["calls"]) == 0


def test_a_file_without_state_has_none(tmp_path: Path) -> None:
    prepared = calibrated(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(32, 4))
    files = export(prepared, None, ExportConfig(directory=tmp_path, formats=("torchscript",)), torch.randn(8, 4))
    loaded = load(files["torchscript"])
    assert "state" not in loaded.metadata
    assert dict(loaded.state) == {}
    loaded.reset_state()
    with pytest.raises(ArtifactError, match=r"the state of this file is nothing; it was given last\."):
        loaded.state = {"last": torch.zeros(1)}


def test_a_stream_takes_one_sample_at_a_time(tmp_path: Path) -> None:
    _, _, files = files_of(Stream, "assign", "fx", ("torchscript", "onnx"), tmp_path)
    for path in files.values():
        with pytest.raises(ArtifactError, match=r"x has the shape \(2, 2, 64\); this artifact takes \(1, "):
            load(path)(torch.zeros(2, 2, 64))


def test_damaged_state_in_the_metadata(files: dict[str, Path]) -> None:
    from lightning_quant.runtime.state import described, initial

    for value in (torch.tensor([True, False]), torch.tensor(3), torch.zeros(0, 2), torch.randn(2, 3).bfloat16()):
        assert torch.equal(initial(described("x", value, "a", "b")), value)
    entry = described("x", torch.zeros(2), "a", "b")
    for change in ({"shape": [3]}, {"dtype": "torch.none"}, {"initial": "?"}, {"initial": "AAA="}):
        with pytest.raises(ArtifactError, match=r"the file's metadata has damaged state"):
            initial({**entry, **change})


# ---- files in their own runtimes


def initial_arrays(metadata: dict[str, Any]) -> dict[str, np.ndarray]:
    """As docs/deploy.md says it."""
    arrays = {}
    for entry in metadata["state"]:
        content = np.frombuffer(base64.b64decode(entry["initial"]), entry["dtype"].removeprefix("torch."))
        arrays[entry["input"]] = content.reshape(entry["shape"]).copy()
    return arrays


def test_onnx_runtime_by_hand(files: dict[str, Path]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, data = made(Average)
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["lightning_quant"])
    assert [value.name for value in session.get_inputs()] == ["x", "state_average", "state_calls"]
    assert [value.name for value in session.get_outputs()] == ["output", "next_state_average", "next_state_calls"]
    state = initial_arrays(metadata)
    outputs = []
    for x in three_calls(data):
        names = ["output", *(entry["output"] for entry in metadata["state"])]
        output, *new = session.run(names, {"x": x.numpy(), **state})
        state = dict(zip(state, new, strict=True))
        outputs.append(torch.from_numpy(output))
    check_calls(run(model, data), outputs)


def test_openvino_by_hand(files: dict[str, Path]) -> None:
    openvino = pytest.importorskip("openvino")
    model, data = made(Average)
    metadata = read_metadata(files["openvino"])
    compiled = openvino.Core().compile_model(str(files["openvino"]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    state = initial_arrays(metadata)
    outputs = []
    for x in three_calls(data):
        results = compiled({"x": x.numpy(), **state})
        state = {entry["input"]: results[entry["output"]].copy() for entry in metadata["state"]}
        outputs.append(torch.from_numpy(results["output"].copy()))
    check_calls(run(model, data), outputs)


@pytest.mark.parametrize("format_name", ["torchscript", "pt2"])
def test_torch_by_hand(format_name: str, files: dict[str, Path]) -> None:
    model, data = made(Average)
    path = files[format_name]
    program: Any
    if format_name == "torchscript":
        torch.backends.quantized.engine = read_metadata(path)["config"]["engine"]
        program = torch.jit.load(path)
    else:
        program = torch.export.load(path).module()
    state = tuple(torch.from_numpy(x) for x in initial_arrays(read_metadata(path)).values())
    outputs = []
    with torch.no_grad():
        for x in three_calls(data):
            output, state = program(x, *state)
            outputs.append(output)
    check_calls(run(model, data), outputs)


class Clashing(nn.Module):
    """Its input has the name that its state would have in a file."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("x", torch.ones(1, 4))

    def forward(self, state_x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.fc(state_x) + self.x
        self.x = h.mean(0, keepdim=True)
        return {"next_state_x": h}


def test_names_in_a_file_are_different(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, data = Clashing().eval(), torch.randn(32, 4)
    files = export(
        calibrated(model, data), None, ExportConfig(directory=tmp_path, formats=("onnx",)), example_inputs=data
    )
    (entry,) = read_metadata(files["onnx"])["state"]
    assert (entry["input"], entry["output"]) == ("state_x_", "next_state_x_")
    loaded = load(files["onnx"])
    for x in three_calls(data):
        with torch.no_grad():
            assert decibels(model(x)["next_state_x"], loaded(state_x=x)["next_state_x"]) > DB


# ---- what a wrong file is


@pytest.mark.parametrize("format_name", ["onnx", "pt2"])
def test_a_file_that_forgets_its_state_fails(
    format_name: FormatName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right in the first call, because it begins with the right state, and wrong in the second one."""
    forgetful = writing.Explicit.forward

    def forward(self: Any, *inputs: Any) -> Any:
        first = tuple(value for value in self.artifact.state.values())
        return forgetful(self, *inputs[: -len(first)], *first)

    monkeypatch.setattr(writing.Explicit, "forward", forward)
    with pytest.raises(ExportError, match=r"the file computes something else than the model that it was written from"):
        files_of(Average, "copy", "fx", (format_name,), tmp_path)
    assert verification.MIN_SQNR_DB >= DB


# ---- what cannot be held


class Rows(nn.Module):
    """Its state has a row for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("previous", torch.zeros(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x) + self.previous
        self.previous = h.detach()
        return h


class Fixed(Rows):
    """The same for one number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.previous = torch.zeros(32, 4)


class Hidden(nn.Module):
    """Its state is no buffer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.hidden: Any = torch.zeros(1, 4)
        if way == "list":
            self.hidden = [self.hidden]
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden[0] if self.way == "list" else self.hidden
        h = self.fc(x) + hidden
        if self.way == "assign":
            self.hidden = h.mean(0, keepdim=True).detach()
        else:
            hidden.copy_(h.mean(0, keepdim=True).detach())
        return h


class Late(nn.Module):
    """Its state is made in the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("last", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        if self.last is not None:
            h = h + self.last
        self.last = h.mean(0, keepdim=True).detach()
        return h


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "rows": (
        Rows,
        r"forward carries the buffer 'previous' from call to call, and it is torch\.float32 of the shape \(1, 4\) "
        r"before one and torch\.float32 of the shape \(32, 4\) after it\. .*export with data of one sample",
    ),
    "fixed": (
        Fixed,
        r"forward carries the buffer 'previous' from call to call, and with it forward cannot run a batch of 2\.|"
        r"forward carries the buffer 'previous' from call to call, and after a batch of 1 it is",
    ),
    "hidden": (
        lambda: Hidden("assign"),
        r"forward carries hidden from call to call, which is no buffer\. .*register_buf",
    ),
    "hidden_copy": (lambda: Hidden("copy"), r"forward carries hidden from call to call, which is no buffer\."),
    "hidden_list": (lambda: Hidden("list"), r"forward carries hidden from call to call, which is no buffer\."),
    "late": (
        Late,
        r"forward carries the buffer 'last' from call to call, and it is None, or not there, before the first one",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", REFUSED)
def test_state_that_no_file_holds_is_refused(case: str, backend: BackendName, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    torch.manual_seed(0)
    model, data = make().eval(), torch.randn(32, 4)
    prepared = calibrated(model, data, config=QuantConfig(backend=backend))
    with pytest.raises(ExportError, match=message):
        export(prepared, None, ExportConfig(directory=tmp_path), example_inputs=data)
    assert list(tmp_path.iterdir()) == []
    # the int8 model in memory has it
    int8 = convert(prepared)
    with torch.no_grad():
        for _ in range(3):
            assert decibels(model(data), int8(data)) > DB


class Shared(nn.Module):
    """One of its buffers is a part of another one, which it writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("two", torch.zeros(2, 4))
        self.register_buffer("first", self.two[:1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x) + self.first
        self.two.copy_(torch.stack([h.mean(0), h.amax(0)]).detach())
        return h


def test_buffers_that_share_memory_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Shared().eval(), torch.randn(32, 4)
    prepared = calibrated(model, data)
    with pytest.raises(ExportError, match=r"forward changes 'first', 'two' and carries more than that .* share memory"):
        export(prepared, None, ExportConfig(directory=tmp_path), example_inputs=data)
    int8 = convert(prepared)
    with torch.no_grad():
        for _ in range(3):
            assert decibels(model(data), int8(data)) > DB


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_inside_of_a_program_is_refused(backend: BackendName, tmp_path: Path) -> None:
    """A TorchScript program keeps its state in memory, and nobody can make it an argument of it."""
    torch.manual_seed(0)
    data = torch.randn(32, 4)
    scripted = torch.jit.script(Centred().eval())
    model = nn.Sequential(nn.Linear(4, 4), scripted).eval()
    prepared = calibrated(model, data, config=QuantConfig(backend=backend), passes=3)
    assert not scripted.mean.any()
    int8 = convert(prepared)
    message = r"a program of TorchScript changes its buffer '1\.mean', which cannot be made"
    with pytest.raises(ExportError, match=message):
        export(prepared, None, ExportConfig(directory=tmp_path), example_inputs=data)
    with torch.no_grad():
        for x in (data, 0.5 * data, data[:3]):
            assert decibels(model(x), int8(x)) > DB


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x - self.mean
        self.mean.copy_(x.mean(0, keepdim=True).detach())
        return y


class Noted(nn.Module):
    """It notes things that no later call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(0, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc(x)
        self.seen = h.detach()
        return h


def test_what_no_call_reads_is_no_state(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    data = torch.randn(32, 4)
    formats = ExportConfig(directory=tmp_path, formats=("torchscript", "onnx"))
    for path in export(calibrated(Noted().eval(), data), None, formats, example_inputs=data).values():
        assert "state" not in read_metadata(path)
        assert load(path)(torch.randn(7, 4)).shape == (7, 4)
