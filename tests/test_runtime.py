"""load(path): what it takes, and what it says about files that it does not take."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TwoInputs, calibrated
from torch import nn

from lightning_quant import ArtifactError, ExportConfig, QuantConfig, export, load, runtime
from lightning_quant._torch_ao import quiet
from lightning_quant.runtime import FORMAT_VERSION, METADATA_FILE, METADATA_KEY, read_metadata

ROOT = Path(__file__).parents[1]

FORMATS = {"torchscript": "model.ts", "onnx": "model.onnx"}
A, B = torch.linspace(-1, 1, 16).reshape(2, 2, 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("files")
    # for a CPU without VNNI, so that loading warns on none
    prepared = calibrated(TwoInputs(), A, method="static", config=QuantConfig(reduce_range=True), b=B)
    formats = ExportConfig(directory=folder, formats=tuple(FORMATS))
    return export(prepared, None, formats, example_inputs={"a": A, "b": B})


@pytest.fixture(params=list(FORMATS))
def file(request: pytest.FixtureRequest, files: dict[str, Path]) -> Path:
    return files[request.param]


def with_metadata(path: Path, folder: Path, change: Any) -> Path:
    """A copy of a file with other metadata."""
    target = folder / path.name
    if path.suffix == ".ts":
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name.endswith(f"extra/{METADATA_FILE}"):
                    content = json.dumps(change(json.loads(content))).encode()
                new.writestr(name, content)
        return target
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    for prop in model.metadata_props:
        if prop.key == METADATA_KEY:
            prop.value = json.dumps(change(json.loads(prop.value)))
    onnx.save(model, target)
    return target


# ---- what is loaded


def test_a_loaded_file_is_a_module_in_eval_mode(file: Path) -> None:
    loaded = load(str(file))
    assert isinstance(loaded, nn.Module)
    assert not loaded.training
    assert list(loaded.parameters()) == []
    assert load(file).metadata == loaded.metadata
    output = loaded(A, B)
    assert output.keys() == {"sum", "left"}
    assert all(not x.requires_grad for x in output.values())
    assert torch.equal(copy.deepcopy(loaded)(A, B)["sum"], output["sum"])
    with torch.inference_mode():
        assert torch.equal(loaded(A, b=B)["sum"], output["sum"])


def test_the_engine_of_the_process_stays(file: Path) -> None:
    before = torch.backends.quantized.engine
    load(file)(A, B)
    assert torch.backends.quantized.engine == before


# ---- inputs


@pytest.mark.parametrize(
    ("args", "kwargs", "given"),
    [
        ((), {}, "0 positional and [] keyword"),
        ((A,), {}, "1 positional and [] keyword"),
        ((A, B, A), {}, "3 positional and [] keyword"),
        ((A,), {"c": B}, "1 positional and ['c'] keyword"),
        ((), {"a": A}, "0 positional and ['a'] keyword"),
        ((A, B), {"b": B}, "2 positional and ['b'] keyword"),
    ],
)
def test_wrong_inputs(file: Path, args: Any, kwargs: Any, given: str) -> None:
    text = f"this artifact takes a, b; it was given {given} arguments."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(file)(*args, **kwargs)


# ---- files that are not ours


@pytest.mark.parametrize("name", ["model.ts", "model.onnx", "folder"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with pytest.raises(ArtifactError, match=f"^{re.escape(str(path))}: no such file\\.$"):
        load(path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_a_truncated_file(file: Path, share: float, tmp_path: Path) -> None:
    content = file.read_bytes()
    path = tmp_path / file.name
    path.write_bytes(content[: int(share * len(content))])
    kind = "TorchScript" if path.suffix == ".ts" else "ONNX"
    with pytest.raises(
        ArtifactError, match=rf"^{re.escape(str(path))}: cannot be read as {kind}, it is damaged or foreign: "
    ):
        load(path)


def test_a_damaged_archive(files: dict[str, Path], tmp_path: Path) -> None:
    """The end of the file is whole, what it points at is not."""
    content = bytearray(files["torchscript"].read_bytes())
    for i in range(0, len(content) // 2):
        content[i] ^= 0x55
    path = tmp_path / "model.ts"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(path))}: cannot be read as TorchScript, it is damaged"):
        load(path)


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 100, b"PK\x03\x04"])
@pytest.mark.parametrize("name", FORMATS.values())
def test_a_file_of_another_kind(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(path))}: .*(damaged or foreign|no metadata)"):
        load(path)


def test_torchscript_that_somebody_else_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.ts"
    torch.jit.save(torch.jit.trace(nn.Linear(4, 2), torch.ones(1, 4)), str(path))
    text = f"{path}: not written by lightning_quant (it has no metadata). Load it with its own runtime."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(path)


def test_another_archive(tmp_path: Path) -> None:
    path = tmp_path / "model.ts"
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match=r"not written by lightning_quant \(it has no metadata\)"):
        load(path)


def test_onnx_that_somebody_else_wrote(files: dict[str, Path], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(files["onnx"])
    del model.metadata_props[:]
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    text = f"{path}: not written by lightning_quant (it has no metadata). Load it with its own runtime."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(path)


def test_a_file_of_a_later_version(file: Path, tmp_path: Path) -> None:
    later = with_metadata(file, tmp_path, lambda metadata: {**metadata, "format_version": FORMAT_VERSION + 1})
    text = (
        f"{later}: format version {FORMAT_VERSION + 1}, and this lightning_quant reads up to {FORMAT_VERSION}. "
        "Update it: pip install -U lightning-quant"
    )
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(later)


# ---- the CPU


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("reduce_range", [True, False])
@pytest.mark.parametrize("engine", ["x86", "fbgemm", "qnnpack"])
def test_a_file_for_another_cpu_warns(
    file: Path, engine: str, reduce_range: bool, vnni: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(metadata: dict[str, Any]) -> dict[str, Any]:
        # the engine of a TorchScript file cannot be changed after the fact
        own = engine if file.suffix == ".onnx" else metadata["config"]["engine"]
        return {**metadata, "config": {**metadata["config"], "engine": own, "reduce_range": reduce_range}}

    path = with_metadata(file, tmp_path, change)
    monkeypatch.setattr(runtime, "cpu_has_vnni", lambda: vnni)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load(path)
    ours = [warning for warning in caught if "VNNI" in str(warning.message)]
    assert bool(ours) is (loaded.metadata["config"]["engine"] != "qnnpack" and not reduce_range and not vnni)
    if ours:
        assert str(ours[0].message) == (
            f"{path}: was quantized with reduce_range=False, for CPUs with VNNI instructions. This CPU has none: its "
            "int8 sums saturate, and results are wrong. Quantize again with QuantConfig(reduce_range=True)."
        )
        assert ours[0].filename == __file__


# ---- metadata, and files of torch.export and OpenVINO


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


# ---- code in files


class Hostile:
    """Pickled, it is a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def with_member(path: Path, target: Path, member: str, content: bytes) -> Path:
    """A copy of an archive in which one member is another, or new."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            if name != member:
                new.writestr(name, old.read(name))
        new.writestr(member, content)
    return target


@pytest.mark.parametrize("member", ["model/data/sample_inputs/model.pt", "model/data/constants/opaque_obj_0"])
def test_nothing_but_tensors_is_unpickled(
    member: str, every_file: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    torch.save(Hostile(ran), buffer := io.BytesIO())
    path = with_member(every_file["pt2"], tmp_path / "model.pt2", member, buffer.getvalue())
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if "opaque" in member:
        load(path)  # nothing refers to it, and it is not read
    else:
        with pytest.raises(ArtifactError, match="is a pickle of more than tensors, which is code that would run"):
            load(path)
    assert not ran.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_the_hostile_file_would_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save(Hostile(ran), buffer := io.BytesIO())
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert ran.exists()
