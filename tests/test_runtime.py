"""load(path): what it takes, and what it says about files that it does not take."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from models import TwoInputs, calibrated
from torch import nn

from lightning_quant import ArtifactError, ExportConfig, MissingExtraError, QuantConfig, export, load, runtime
from lightning_quant._torch_ao import quiet
from lightning_quant.runtime import FORMAT_VERSION, METADATA_FILE, METADATA_KEY, read_metadata
from lightning_quant.runtime.archives import is_arithmetic

ROOT = Path(__file__).parents[1]

FORMATS = {"torchscript": "model.ts", "onnx": "model.onnx", "openvino": "model.xml", "pt2": "model.pt2"}
#: What an error calls the kind of a file.
KINDS = {".ts": "TorchScript", ".onnx": "ONNX", ".xml": "OpenVINO IR", ".pt2": "a torch.export archive"}
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


def repacked(
    path: Path, folder: Path, changes: dict[str, Callable[[bytes], bytes]], added: dict[str, bytes] | None = None
) -> Path:
    """A copy of an archive with other contents.

    Args:
        path: Of a .ts or .pt2 file.
        folder: Where the copy goes.
        changes: End of an entry's name -> its new content from the old one. Each has to be there.
        added: Name of a new entry, inside of the archive's folder -> content.
    """
    target, found = folder / path.name, set()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            for end, change in changes.items():
                if name.endswith(end):
                    found.add(end)
                    content = change(content)
            new.writestr(name, content)
        for name, content in (added or {}).items():
            new.writestr(f"{old.namelist()[0].split('/')[0]}/{name}", content)
    assert found == changes.keys()
    return target


def with_metadata(path: Path, folder: Path, change: Any) -> Path:
    """A copy of a file with other metadata."""
    target = folder / path.name
    if path.suffix in (".ts", ".pt2"):
        return repacked(
            path, folder, {f"extra/{METADATA_FILE}": lambda content: json.dumps(change(json.loads(content))).encode()}
        )
    if path.suffix == ".xml":
        shutil.copy(path.with_suffix(".bin"), folder)
        tree = ElementTree.parse(path)
        entry = tree.getroot().find("rt_info").find(METADATA_KEY)
        entry.set("value", json.dumps(change(json.loads(entry.get("value")))))
        tree.write(target)
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


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (A.double(), B, "a is torch.float64; this artifact takes torch.float32: a.to(torch.float32)"),
        (A, B.long(), "b is torch.int64; this artifact takes torch.float32: b.to(torch.float32)"),
        (A.half(), B.half(), "a is torch.float16; this artifact takes torch.float32: a.to(torch.float32)"),
        (A[0], B, "a has the shape (4,); this artifact takes (*, {}), where * is any size."),
        (A, B[..., None], "b has the shape (2, 4, 1); this artifact takes (*, {}), where * is any size."),
    ],
)
def test_a_wrong_dtype_or_number_of_dimensions(file: Path, a: Any, b: Any, text: str) -> None:
    # TorchScript has no shapes
    text = text.format("*" if file.suffix == ".ts" else "4")
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(file)(a, b)


def test_a_wrong_size(file: Path) -> None:
    loaded, wide = load(file), torch.zeros(2, 5)
    if file.suffix == ".ts":
        text = (
            "TorchScript cannot run inputs of the shapes [[2, 5], [2, 4]]; the file was made with [[2, 4], [2, 4]], of "
            "which the first dimension is free: RuntimeError: "
        )
        with pytest.raises(ArtifactError, match=f"^{re.escape(text)}.+"):
            loaded(wide, B)
        return
    text = "a has the shape (2, 5); this artifact takes (*, 4), where * is any size."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        loaded(wide, B)


def test_what_is_no_tensor(file: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^this artifact takes 2 tensors \(a, b\), not 1\.$"):
        load(file)(A, 3.0)


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_any_batch(file: Path, size: int) -> None:
    loaded, whole = load(file), torch.randn(2, 64, 4)
    expected = loaded(*whole)
    for key, value in loaded(*whole[:, :size]).items():
        # float sums of one row may be made in another order than those of many
        assert torch.allclose(value, expected[key][:size], atol=1e-6)


# ---- packages that are missing


@pytest.mark.parametrize(("name", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_runtime_that_is_not_installed(
    name: str, package: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    text = (
        f"loading {FORMATS[name]} needs the package {package!r}, which is not installed. "
        f"Install it with: pip install 'lightning-quant[{name}]'"
    )
    with pytest.raises(MissingExtraError, match=f"^{re.escape(text)}$"):
        load(files[name])


# ---- files that are not ours


@pytest.mark.parametrize("name", [*FORMATS.values(), "folder"])
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
    if path.suffix == ".xml":
        shutil.copy(file.with_suffix(".bin"), tmp_path)
    kind = KINDS[path.suffix]
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
    path.with_suffix(".bin").write_bytes(b"")
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


def test_an_archive_that_somebody_else_exported(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(nn.Linear(4, 2), (torch.ones(1, 4),)), path)
    text = f"{path}: not written by lightning_quant (it has no metadata). Load it with its own runtime."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(path)


def test_an_opset_that_onnx_runtime_does_not_know(files: dict[str, Path], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = onnx.load(files["onnx"])
    next(opset for opset in model.opset_import if opset.domain == "").version = 999
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    text = f"{path}: ONNX Runtime {onnxruntime.__version__} does not know the opset of this file: "
    with pytest.raises(ArtifactError, match=rf"^{re.escape(text)}[\s\S]*\nUpdate it: pip install -U onnxruntime$"):
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
        own = engine if file.suffix != ".ts" else metadata["config"]["engine"]
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


@pytest.mark.parametrize("name", ["torchscript", "onnx", "openvino", "pt2"])
def test_metadata_without_a_runtime(name: str, files: dict[str, Path]) -> None:
    """In a process that cannot import any: what it reads is what a runtime reads."""
    path = files[name]
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
def test_an_onnx_file_that_was_cut_off_anywhere(cut: int, files: dict[str, Path], tmp_path: Path) -> None:
    content = files["onnx"].read_bytes()
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


def test_openvino_without_its_weights(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    path.write_bytes(files["openvino"].read_bytes())
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
    member: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    torch.save(Hostile(ran), buffer := io.BytesIO())
    path = with_member(files["pt2"], tmp_path / "model.pt2", member, buffer.getvalue())
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


# ---- nothing that is in a file runs when it is loaded


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    path = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()  # the payload works
    path.rmdir()
    return path


def saved(value: Any) -> bytes:
    """As torch writes it: an archive with a pickle."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def refused(path: Path, marker: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ArtifactError):
            load(path)
    assert not marker.exists()


@pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl"])
def test_pickles_of_torchscript_are_not_run(entry: str, files: dict[str, Path], marker: Path, tmp_path: Path) -> None:
    refused(repacked(files["torchscript"], tmp_path, {f"/{entry}": lambda _: pickle.dumps(Payload(marker), 2)}), marker)


def test_what_torch_save_wrote_is_not_run(marker: Path, tmp_path: Path) -> None:
    ours = {"format_version": 1, "config": {"engine": "fbgemm", "reduce_range": True}}
    for name in ("model.ts", "model.pt2", "model.onnx"):
        path = tmp_path / name
        torch.save(Payload(marker), path)
        refused(path, marker)
        with zipfile.ZipFile(path, "a") as archive:  # with metadata as ours
            archive.writestr(f"model/extra/{METADATA_FILE}", json.dumps(ours))
        refused(path, marker)


def pickled_payload(content: bytes) -> bytes:
    """The list of weights, of which the first one is said to be a pickle."""
    config = json.loads(content)
    next(iter(config["config"].values()))["use_pickle"] = True
    return json.dumps(config).encode()


def one_constant(kind: str) -> Callable[[bytes], bytes]:
    def change(_: bytes) -> bytes:
        entry = {"path_name": f"{kind}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        return json.dumps({"config": {"constant": entry}}).encode()

    return change


def sizes(text: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        return re.sub(rb'"expr_str": "(?:[^"\\\\]|\\\\.)*"', b'"expr_str": ' + json.dumps(text).encode(), content)

    return change


ARCHIVES: dict[str, Callable[[Path], Any]] = {
    "sample inputs": lambda m: ({"sample_inputs/model.pt": lambda _: saved(((Payload(m),), {}))}, {}),
    "old weights": lambda m: ({}, {"data/weights/model.pt": saved({"weight": Payload(m)})}),
    "old constants": lambda m: ({}, {"data/constants/model.pt": saved({"constant": Payload(m)})}),
    "a weight": lambda m: (
        {"model_weights_config.json": pickled_payload, "weights/weight_0": lambda _: saved(Payload(m))},
        {},
    ),
    "a constant": lambda m: (
        {"model_constants_config.json": one_constant("tensor")},
        {"data/constants/tensor_0": saved(Payload(m))},
    ),
    "an opaque constant": lambda m: (
        {"model_constants_config.json": one_constant("opaque_obj")},
        {"data/constants/opaque_obj_0": pickle.dumps(Payload(m))},
    ),
    "a size": lambda m: ({"models/model.json": sizes(f"__import__('os').mkdir({str(m)!r})")}, {}),
}


@pytest.mark.parametrize("place", ARCHIVES)
def test_code_in_an_archive_is_not_run(place: str, files: dict[str, Path], marker: Path, tmp_path: Path) -> None:
    changes, added = ARCHIVES[place](marker)
    path = repacked(files["pt2"], tmp_path, changes, added)
    text = (
        rf"^{re.escape(str(path))}: .*, which is code that would run when it is loaded\. This package writes no such "
        r"files; it was not loaded\. Load it with torch\.export\.load if you trust it\.$"
    )
    with pytest.raises(ArtifactError, match=text):
        load(path)
    assert not marker.exists()


@pytest.mark.parametrize("place", ["sample inputs", "a weight", "an opaque constant", "a size"])
def test_torch_itself_runs_that_code(place: str, files: dict[str, Path], marker: Path, tmp_path: Path) -> None:
    """The archives of the test above are what they seem to be."""
    changes, added = ARCHIVES[place](marker)
    path = repacked(files["pt2"], tmp_path, changes, added)
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        torch.export.load(path)
    assert marker.exists()


def test_an_archive_of_the_kind_before_is_not_run(files: dict[str, Path], marker: Path, tmp_path: Path) -> None:
    """torch.export.load falls back to it where it cannot read the archive."""
    path = repacked(files["pt2"], tmp_path, {"archive_version": lambda _: b"999"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("version", "8.20")
        archive.writestr("serialized_exported_program.json", "{}")
        for part in ("state_dict", "constants", "example_inputs"):
            archive.writestr(f"serialized_{part}.pt", saved({"x": Payload(marker)}))
    refused(path, marker)


@pytest.mark.parametrize(
    "text",
    [
        "s77", "3*s77 + 1", "(s27 - 1)//2", "Max(1, s3)", "Symbol('s63', positive=True, integer=True)",
        "Add(Integer(1), Mul(Integer(2), Symbol('s1', integer=True)))", "FloorDiv(s1, 2)", "Eq(s1, 2)",
    ],
)  # fmt: skip
def test_sizes_are_arithmetic(text: str) -> None:
    assert is_arithmetic(text)


@pytest.mark.parametrize(
    "text",
    [
        "exit()", "__import__('os')", "eval(chr(111))", "().__class__", "Symbol('exec(1)')", "[x for x in s]",
        "(lambda: 1)()", "s()()", "Symbol.mro()", "f'{s}'", "sympify('x')", "Add('a')(1)", "s[0]", "s = 1", "",
        "Symbol('__import__')",
    ],
)  # fmt: skip
def test_other_expressions_are_not(text: str) -> None:
    assert not is_arithmetic(text)
