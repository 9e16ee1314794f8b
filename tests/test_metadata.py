"""What a file says of itself, read without the runtime of the file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TwoInputs, calibrated

from lightning_quant import ArtifactError, ExportConfig, QuantConfig, export, load
from lightning_quant._torch_ao import quiet
from lightning_quant.runtime import METADATA_FILE, METADATA_KEY, read_metadata

ROOT = Path(__file__).parents[1]
A, B = torch.linspace(-1, 1, 16).reshape(2, 2, 4)


@pytest.fixture(scope="module")
def every_file(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lightning-quant[openvino]'")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("every")
    prepared = calibrated(TwoInputs(), A, method="static", config=QuantConfig(reduce_range=True), b=B)
    settings = ExportConfig(directory=folder, formats=("torchscript", "onnx", "openvino", "pt2"))
    return export(prepared, None, settings, example_inputs={"a": A, "b": B})


@pytest.mark.parametrize("name", ["torchscript", "onnx", "openvino", "pt2"])
def test_metadata_without_a_runtime(name: str, every_file: dict[str, Path]) -> None:
    """In a process that cannot import any: what it reads is what a runtime reads."""
    path = every_file[name]
    code = f"""
import json, sys
for module in ("onnx", "onnxruntime", "openvino"):
    sys.modules[module] = None
from lightning_quant.runtime import read_metadata
print(json.dumps(read_metadata({str(path)!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    metadata = json.loads(done.stdout)
    assert metadata["format"] == name
    assert metadata["outputs"] == ["sum", "left"]
    assert metadata == load(path).metadata == metadata_by_its_runtime(path)


def metadata_by_its_runtime(path: Path) -> dict[str, Any]:
    if path.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        return json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    if path.suffix == ".xml":
        model = pytest.importorskip("openvino").Core().read_model(str(path))
        return json.loads(model.get_rt_info([METADATA_KEY]).value)
    if path.suffix == ".pt2":
        torch.export.load(path, extra_files=(found := {METADATA_FILE: ""}))
        return json.loads(found[METADATA_FILE])
    with quiet():
        torch.jit.load(str(path), _extra_files=(found := {METADATA_FILE: ""}))
    return json.loads(found[METADATA_FILE])


@pytest.mark.parametrize("cut", range(0, 100, 7))
def test_an_onnx_file_that_was_cut_off_anywhere(cut: int, every_file: dict[str, Path], tmp_path: Path) -> None:
    content = every_file["onnx"].read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: len(content) * cut // 100])
    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(path))}: "):
        read_metadata(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has no graph"),
        (b"\x08\x0a", "it has no graph"),  # ir_version alone
        (b"\x3a\x05ab", "it has a field that reaches beyond its end"),
        (b"\x02\x01a", "it has a field that reaches beyond its end"),  # field 0
        (b"\x0b", "it has a field of kind 3"),
        (b"\x08" + b"\xff" * 11, "a number is too long"),
        (b"\x08\xff", "it ends within a number"),
    ],
)
def test_bytes_that_are_no_onnx_file(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    text = f"{path}: cannot be read as ONNX, it is damaged or foreign: {reason}"
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        read_metadata(path)


def test_fields_of_an_onnx_file_that_are_not_wanted_are_passed_over(tmp_path: Path) -> None:
    """Fields of 32 and 64 bits, metadata of others, and a graph behind all of it."""
    pair = b"\x0a" + bytes([len(METADATA_KEY)]) + METADATA_KEY.encode() + b'\x12\x14{"format_version":1}'
    other = b"\x0a\x03abc\x12\x01d"
    path = tmp_path / "model.onnx"
    entries = b"".join(b"\x72" + bytes([len(entry)]) + entry for entry in (other, pair))
    path.write_bytes(b"\x7d" + b"\x00" * 4 + b"\x79" + b"\x00" * 8 + entries + b"\x3a\x80\x01" + b"\x00" * 128)
    assert read_metadata(path) == {"format_version": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<net><rt_info>", "no element found"),
        ("<html/>", "it is XML of another kind, <html>"),
        ("", "no element found"),
    ],
)
def test_text_that_is_no_openvino_file(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_text(content)
    text = f"{path}: cannot be read as OpenVINO IR, it is damaged or foreign: {reason}"
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}"):
        read_metadata(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "onnx"}', '{"format_version": "new"}'])
def test_damaged_metadata(text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_text(f"<net><rt_info><{METADATA_KEY} value='{text}'/></rt_info></net>")
    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(path))}: its metadata is damaged: "):
        read_metadata(path)


def test_openvino_that_somebody_else_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_text("<net><rt_info/></net>")
    with pytest.raises(ArtifactError, match=r"not written by lightning_quant \(it has no metadata\)"):
        read_metadata(path)


def test_openvino_without_its_weights(every_file: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_bytes(every_file["openvino"].read_bytes())
    text = f"{path}: its weights, model.bin, are not beside it. Copy both files."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(path)
    assert read_metadata(path)["format"] == "openvino"
