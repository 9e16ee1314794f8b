"""load(path): what it takes, and what it says about files that it does not take."""

from __future__ import annotations

import copy
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TwoInputs, calibrated
from torch import nn

from lightning_quant import ArtifactError, ExportConfig, QuantConfig, export, load, runtime
from lightning_quant.runtime import FORMAT_VERSION, METADATA_FILE, METADATA_KEY

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
