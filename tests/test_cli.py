"""The command: files of every format are inspected and compared; errors have no traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Residual, calibrated, settle
from test_runtime import with_metadata

from lightning_quant import ExportConfig, LayerConfig, QuantConfig, TensorSpec, export
from lightning_quant.cli import main
from lightning_quant.runtime import read_metadata

NAMES = ["model.ts", "model.onnx", "model.xml", "model.pt2"]
IMAGES = torch.randn(64, 3, 8, 8)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console on which no line is broken."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lightning-quant[openvino]'")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("files")
    layers = (LayerConfig(name="fc", weight=TensorSpec(qscheme="per_tensor_symmetric")),)
    # for a CPU without VNNI, so that loading warns on none
    config = QuantConfig(reduce_range=True, activation=TensorSpec(observer="min_max"), skip=("stem",), layers=layers)
    prepared = calibrated(settle(Residual()), IMAGES, config=config)
    settings = ExportConfig(directory=folder, formats=("torchscript", "onnx", "openvino", "pt2"))
    export(prepared, None, settings, example_inputs={"x": IMAGES})
    np.savez(folder / "images.npz", x=IMAGES[:10].numpy())
    return folder


def run(*args: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, output, and errors."""
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows(output: str) -> list[list[str]]:
    """The cells of all tables."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]


# ---- inspect


@pytest.mark.parametrize("name", NAMES)
def test_what_a_file_says_of_itself(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, errors = run("inspect", folder / name, capsys=capsys)
    assert (status, errors) == (0, "")
    metadata = read_metadata(folder / name)
    table = rows(output)
    assert output.splitlines()[0] == str(folder / name)
    assert ["format", metadata["format"]] in table
    assert ["method", "static"] in table
    assert ["target", "forward"] in table
    assert ["written by", f"lightning_quant {metadata['lightning_quant']}, torch {torch.__version__}"] in table
    shape = "(*, *, *, *)" if name == "model.ts" else "(*, 3, 8, 8)"
    assert ["x", shape, "(64, 3, 8, 8)", "torch.float32"] in table
    assert ["output", "torch.float32"] in table
    size = sum((folder / file).stat().st_size for file in ([name, "model.bin"] if name == "model.xml" else [name]))
    assert ["size", f"{size / 1e3:.1f} kB" if size < 1e5 else f"{size / 1e6:.2f} MB"] in table


@pytest.mark.parametrize("name", NAMES)
def test_int8_kernels_where_a_runtime_shows_them(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = run("inspect", folder / name, capsys=capsys)
    found = re.findall(r"int8 kernels: (\d) of (\d) \(convolutions and matrix products\)", output)
    # four convolutions of blocks and a linear layer; the stem is float
    assert found == ([("5", "6")] if name in ("model.onnx", "model.xml") else [])


def test_settings_that_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = run("inspect", folder / "model.ts", capsys=capsys)
    table = dict(row for row in rows(output) if len(row) == 2)
    assert "settings that differ from the defaults" in output
    assert table["activation.observer"] == '"min_max"'
    assert table["skip"] == '["stem"]'
    assert table["reduce_range"] == "true"
    assert table["layers[0].weight.qscheme"] == '"per_tensor_symmetric"'
    names = {"skip", "reduce_range", "engine", "activation.observer", "layers[0].name", "layers[0].weight.qscheme"}
    assert names == {name for name in table if name in metadata_names(folder)}


def test_all_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = run("inspect", folder / "model.ts", "--full", capsys=capsys)
    table = dict(row for row in rows(output) if len(row) == 2)
    assert table["backend"] == '"fx"'
    assert table["weight.observer"] == '"auto"'
    assert table["targets"] == "[]"
    assert table["layers[0].keep"] == "false"
    assert metadata_names(folder) <= table.keys()


def metadata_names(folder: Path) -> set[str]:
    """Names of all settings of the files."""
    config = read_metadata(folder / "model.ts")["config"]
    specs = {f"{kind}.{name}" for kind in ("activation", "weight") for name in config.pop(kind)}
    (layer,) = config.pop("layers")
    weight = {f"layers[0].weight.{name}" for name in layer.pop("weight")}
    return {*config, *specs, *weight, *(f"layers[0].{name}" for name in layer)}


@pytest.mark.parametrize("name", NAMES)
def test_metadata_as_json(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, output, _ = run("inspect", "--json", folder / name, capsys=capsys)
    assert status == 0
    assert json.loads(output) == read_metadata(folder / name)


def test_metrics_labels_and_layers_in_float(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {
        "metrics": {"float": {"val_acc": 0.97, "val_loss": 0.1}, "int8": {"val_acc": 0.9612}},
        "class_labels": ["cat", "[dog]"],
        "left_float": ["stem", "fc"],
        "target": "net",
    }
    path = with_metadata(folder / "model.ts", tmp_path, lambda metadata: {**metadata, **more})
    _, output, _ = run("inspect", path, capsys=capsys)
    table = rows(output)
    assert ["val_acc", "0.9700", "0.9612"] in table
    assert ["val_loss", "0.1000", ""] in table
    assert ["class labels", "cat, [dog]"] in table
    assert ["target", "net"] in table
    assert "in float in this file, because its runtime is faster so: stem, fc" in output


def test_a_file_without_its_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.xml"
    path.write_bytes((folder / "model.xml").read_bytes())
    status, output, errors = run("inspect", path, capsys=capsys)
    assert ["weights", "model.bin is not beside it"] in rows(output)
    assert (status, errors) == (1, f"error: {path}: its weights, model.bin, are not beside it. Copy both files.\n")
    assert run("inspect", path, "--json", capsys=capsys)[0] == 0


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("model.onnx", "onnxruntime", "onnx"), ("model.xml", "openvino", "openvino")]
)
def test_without_the_runtime(
    name: str, package: str, extra: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    status, output, errors = run("inspect", folder / name, capsys=capsys)
    assert (status, errors) == (0, "")
    assert f"int8 kernels: loading {name} needs the package '{package}', which is not installed." in output
    assert f"pip install 'lightning-quant[{extra}]'" in output


def test_without_onnx_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, output, _ = run("inspect", folder / "model.onnx", capsys=capsys)
    assert status == 0
    assert "int8 kernels: the package 'onnx' is not installed" in output


# ---- compare


@pytest.mark.parametrize("name", NAMES[1:])
def test_two_files(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folder / "model.ts", folder / name
    status, output, errors = run("compare", first, second, "--data", folder / "images.npz", capsys=capsys)
    assert (status, errors) == (0, "")
    assert output.splitlines()[0] == f"{second} against {first}, 10 samples"
    (outputs,) = [row for row in rows(output) if row[0] == "output" and len(row) == 4]
    assert outputs[1] == "exact" or float(outputs[1].removesuffix(" dB")) > 25
    assert float(outputs[2]) < 0.5
    assert outputs[3].endswith(" %")
    assert [row[0] for row in rows(output) if len(row) == 3] == [str(first), str(second)]
    assert "one call with a batch of 1, " in output
    assert "random" not in output


def test_random_data_is_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "model.ts"
    status, output, _ = run("compare", file, file, "--batch-size", 4, capsys=capsys)
    assert status == 0
    assert "exact" in output
    assert "one call with a batch of 4, " in output
    assert output.splitlines()[-1] == (
        "The data was random, and not what the ranges were taken from: these figures say little of real data. Give "
        "some with --data FILE."
    )


@pytest.mark.parametrize(("least", "status"), [("20", 0), ("400", 1)])
@pytest.mark.parametrize("option", ["--min-sqnr={}", "--min_sqnr={}"])
def test_a_least_sqnr(option: str, least: str, status: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = folder / "model.onnx", folder / "model.ts"
    args = ("compare", first, second, option.format(least))
    found, output, errors = run(*args, capsys=capsys)
    assert found == status
    assert str(second) in output  # the figures are there in any case
    expected = rf"error: {re.escape(str(second))}: [\d.]+ dB against {re.escape(str(first))}, "
    expected += r"and --min-sqnr asks for 400 dB\.\n"
    assert re.fullmatch(expected if status else "", errors)


# ---- errors


@pytest.mark.parametrize("command", ["inspect {}", "compare {} {}", "compare {0} {0} --data x.npz"])
def test_errors_have_no_traceback(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    args = command.format(path, path).split()
    assert run(*args, capsys=capsys) == (1, "", f"error: {path}: no such file.\n")
    path.write_bytes(b"hello")
    status, output, errors = run(*args, capsys=capsys)
    assert (status, output) == (1, "")
    assert errors.startswith(f"error: {path}: cannot be read as ONNX, it is damaged or foreign: ")


def test_data_for_other_inputs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", images=IMAGES.numpy())
    file = folder / "model.ts"
    status, output, errors = run("compare", file, file, "--data", tmp_path / "data.npz", capsys=capsys)
    assert (status, output) == (1, "")
    assert "has images; the inputs are called x." in errors


def test_the_command_that_is_installed(folder: Path) -> None:
    """The exit status is that of main."""
    code = "import sys; from lightning_quant.cli import main; sys.exit(main())"
    for file, status in ((folder / "model.ts", 0), (folder / "nothing.ts", 1)):
        command = [sys.executable, "-c", code, "inspect", str(file), "--json"]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert "Traceback" not in done.stderr
