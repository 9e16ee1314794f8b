"""Two files on the same data: figures against NumPy, and what cannot be compared."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Mlp, TwoInputs, calibrated, decibels
from torch import nn

from lightning_quant import ArtifactError, ConfigError, ExportConfig, QuantConfig, export, load
from lightning_quant.analysis.comparison import RANDOM_SAMPLES, compare, compare_output, read_data
from lightning_quant.config import FormatName

X = torch.randn(10, 4)


class Tokens(nn.Module):
    """Takes ``(N, 5)`` integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.table(tokens))


class Wide(nn.Module):
    """As ``Mlp``, with other sizes."""

    def __init__(self, inputs: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Bag(nn.Module):
    """Its two inputs have first dimensions of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.fc(rows).sum(0)


def write(
    model: nn.Module, folder: Path, data: dict[str, torch.Tensor], config: QuantConfig | None = None,
    formats: tuple[FormatName, ...] = ("torchscript",),
) -> list[Path]:  # fmt: skip
    prepared = calibrated(model, config=config, **data)
    settings = ExportConfig(directory=folder, formats=formats)
    return list(export(prepared, None, settings, example_inputs=data).values())


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A network with 8 and with 7 bits in its weights, as TorchScript, and the first as ONNX."""
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(64, 4)
    folder = tmp_path_factory.mktemp("mlp")
    script, onnx = write(model, folder / "8", {"x": x}, QuantConfig(reduce_range=False), ("torchscript", "onnx"))
    other = write(model, folder / "7", {"x": x}, QuantConfig(reduce_range=True))
    return [script, *other, onnx]


@pytest.fixture(autouse=True)
def _vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this CPU has: networks so small do not saturate."""
    monkeypatch.setattr("lightning_quant.runtime.cpu_has_vnni", lambda: True)


# ---- figures


@pytest.mark.parametrize("batch_size", [None, 1, 3, 10, 64])
def test_figures_are_those_of_numpy(batch_size: int | None, mlp: list[Path]) -> None:
    found = compare(mlp[0], mlp[1], [X], batch_size=batch_size)
    a, b = load(mlp[0])(X), load(mlp[1])(X)
    assert not torch.equal(a, b)
    (output,) = found.outputs
    assert output.name == "output"
    assert output.sqnr_db == pytest.approx(decibels(a, b), abs=1e-3)
    assert found.sqnr_db == output.sqnr_db
    assert output.max_abs_difference == pytest.approx(float(np.abs(a.numpy() - b.numpy()).max()))
    assert output.agreement == pytest.approx(float((a.numpy().argmax(1) == b.numpy().argmax(1)).mean()))
    assert found.samples == 10
    assert found.batch_size == min(batch_size or 1, 10)
    assert found.size_bytes == (mlp[0].stat().st_size, mlp[1].stat().st_size)
    assert min(found.latency_ms) > 0
    assert found.num_threads == torch.get_num_threads()
    assert not found.random


def test_a_file_against_itself(mlp: list[Path]) -> None:
    found = compare(mlp[0], str(mlp[0]), [X])
    assert found.sqnr_db == math.inf
    assert (found.outputs[0].max_abs_difference, found.outputs[0].agreement) == (0.0, 1.0)


@pytest.mark.parametrize(("batch_size", "samples"), [(None, RANDOM_SAMPLES), (5, 20), (30, 30)])
def test_without_data_random_numbers_of_the_recorded_shapes(
    batch_size: int | None, samples: int, mlp: list[Path]
) -> None:
    found = compare(mlp[0], mlp[2], batch_size=batch_size)
    assert found.random
    assert (found.samples, found.batch_size) == (samples, batch_size or 1)
    assert found.sqnr_db > 25


def test_two_inputs_and_a_dict(tmp_path: Path) -> None:
    a, b = torch.randn(2, 6, 4)
    script, onnx = write(TwoInputs(), tmp_path, {"a": a, "b": b}, formats=("torchscript", "onnx"))
    found = compare(script, onnx, [a, b], batch_size=4)
    assert [output.name for output in found.outputs] == ["sum", "left"]
    assert found.sqnr_db == min(output.sqnr_db for output in found.outputs if output.sqnr_db is not None)


def test_inputs_that_are_no_batch_are_given_in_one_call(tmp_path: Path) -> None:
    data = {"x": torch.randn(6, 4), "rows": torch.randn(2, 4)}
    (path,) = write(Bag(), tmp_path, data)
    found = compare(path, path, list(data.values()))
    assert (found.samples, found.batch_size) == (6, 6)
    assert compare(path, path).samples == 6
    text = (
        "batch_size=2: the inputs have different first dimensions (2, 6), so that they cannot be cut into batches. "
        "Leave it out: all is given in one call."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        compare(path, path, list(data.values()), batch_size=2)


def test_integers_are_compared_value_by_value() -> None:
    a, b = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 7]])
    output = compare_output("classes", [a, a], [a, b])
    assert (output.sqnr_db, output.max_abs_difference, output.agreement) == (None, 3.0, 0.875)


@pytest.mark.parametrize(
    ("shape", "scores"), [((6,), False), ((6, 1), False), ((6, 2), True), ((2, 3, 4), True), ((1, 2, 3, 4), False)]
)
def test_what_looks_like_scores(shape: tuple[int, ...], scores: bool) -> None:
    x = torch.randn(shape)
    assert (compare_output("y", [x], [-x]).agreement is not None) is scores


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([math.nan, 1.0], [math.nan, 1.5], 0.5),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([0.0, 1.0], [math.nan, 1.0], math.inf),
    ],
)
def test_differences_of_what_is_no_number(a: list[float], b: list[float], expected: float) -> None:
    assert compare_output("y", [torch.tensor(a)], [torch.tensor(b)]).max_abs_difference == expected


# ---- what cannot be compared


def test_other_names_of_inputs(mlp: list[Path], tmp_path: Path) -> None:
    a, b = torch.randn(2, 6, 4)
    (other,) = write(TwoInputs(), tmp_path, {"a": a, "b": b})
    text = (
        f"{mlp[2]} and {other} take different inputs, and cannot be compared: x (*, 4) torch.float32 against "
        "a (*, *) torch.float32, b (*, *) torch.float32."
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        compare(mlp[2], other)


def test_other_shapes_of_inputs(mlp: list[Path], tmp_path: Path) -> None:
    (other,) = write(Wide(6), tmp_path, {"x": torch.randn(8, 6)}, formats=("onnx",))
    text = r"take different inputs, and cannot be compared: x \(\*, 4\) torch.float32 against x \(\*, 6\) torch.float32"
    with pytest.raises(ArtifactError, match=text):
        compare(mlp[2], other)


def test_other_outputs(mlp: list[Path], tmp_path: Path) -> None:
    (other,) = write(Wide(4, 2), tmp_path, {"x": torch.randn(8, 4)})
    text = f"{mlp[0]} and {other} give different outputs, and cannot be compared: output (5, 3) against output (5, 2)."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        compare(mlp[0], other, [X], batch_size=5)


def test_data_that_a_file_does_not_take(mlp: list[Path]) -> None:
    with pytest.raises(ArtifactError, match=r"^x has the shape \(1, 6\); this artifact takes \(\*, 4\)"):
        compare(mlp[0], mlp[2], [torch.randn(3, 6)])
    with pytest.raises(ArtifactError, match=r"^x is torch.float64; this artifact takes torch.float32"):
        compare(mlp[0], mlp[1], [X.double()])
    text = f"{mlp[0]}: TorchScript cannot run inputs of the shapes [[3, 6]]; the file was made with [[64, 4]], "
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}"):
        compare(mlp[0], mlp[1], [torch.randn(3, 6)], batch_size=3)


def test_random_integers_are_refused(tmp_path: Path) -> None:
    tokens = torch.randint(7, (6, 5))
    (path,) = write(Tokens(), tmp_path, {"tokens": tokens})
    text = (
        f"{path}: its input tokens holds torch.int64, for which random numbers mean nothing. Give data: "
        "compare(..., data), or --data FILE."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        compare(path, path)
    assert compare(path, path, [tokens]).sqnr_db == math.inf


@pytest.mark.parametrize(
    ("data", "batch_size", "text"),
    [(X, 0, "batch_size=0: give at least 1."), (X[:0], None, "the data has no samples.")],
)
def test_batches_that_cannot_be(data: torch.Tensor, batch_size: int | None, text: str, mlp: list[Path]) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        compare(mlp[0], mlp[1], [data], batch_size=batch_size)


def test_without_data_a_batch_of_none_is_refused(mlp: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"^batch_size=0: give at least 1\.$"):
        compare(mlp[0], mlp[1], batch_size=0)


# ---- files of data

ONE, TWO = {"tensors": ["x"]}, {"tensors": ["a", "b"]}


def test_arrays_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", b=np.ones(2), a=np.zeros(3))
    assert [x.tolist() for x in read_data(tmp_path / "data.npz", TWO)] == [[0.0] * 3, [1.0] * 2]


def test_one_array(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", X.numpy())
    assert torch.equal(read_data(str(tmp_path / "data.npy"), ONE)[0], X)


@pytest.mark.parametrize("content", [(X, X + 1), [X, X + 1], {"b": X + 1, "a": X}])
def test_tensors(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "data.pt")
    a, b = read_data(tmp_path / "data.pt", TWO)
    assert torch.equal(a, X)
    assert torch.equal(b, X + 1)


def test_one_tensor(tmp_path: Path) -> None:
    torch.save(X, tmp_path / "data.pt")
    assert torch.equal(read_data(tmp_path / "data.pt", ONE)[0], X)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.npz", {"x": X.numpy(), "y": X.numpy()}, "has x, y; the inputs are called a, b. Give each input by its "
         "name, and nothing else."),
        ("a.npy", X.numpy(), "has 1 tensors; the inputs are 2: a, b."),
        ("a.pt", [X], "has 1 tensors; the inputs are 2: a, b."),
        ("a.pt", [X, "text"], "give a tensor, a tuple or list of tensors, or a dict of tensors by name."),
        ("a.pt", 1.5, "give a tensor, a tuple or list of tensors, or a dict of tensors by name."),
        ("a.csv", None, "give an .npz, .npy or .pt file."),
    ],
)  # fmt: skip
def test_data_for_other_inputs(name: str, content: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.npz":
        np.savez(path, **content)
    elif name == "a.npy":
        np.save(path, content)
    else:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=f"^{re.escape(f'data {path}: {text}')}$"):
        read_data(path, TWO)


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data .*nothing\.npz: no such file\.$"):
        read_data(tmp_path / "nothing.npz", ONE)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
@pytest.mark.parametrize("suffix", ["npz", "npy", "pt"])
def test_data_that_is_damaged(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'data {path}: cannot be read: ')}"):
        read_data(path, ONE)


def test_data_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    torch.save(Mlp(), tmp_path / "data.pt")
    for name in ("data.npy", "data.pt"):
        with pytest.raises(ConfigError, match=rf"{name}: cannot be read: "):
            read_data(tmp_path / name, ONE)
