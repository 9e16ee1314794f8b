"""docs/deploy.md: each block runs a file, in a process without lightning_quant and what is installed with it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Residual, calibrated, decibels, settle
from roots import pl
from test_docs import blocks

from lightning_quant import ExportConfig, QuantConfig, export, load, prepare
from lightning_quant.cli import main
from lightning_quant.config import FormatName
from lightning_quant.demo import Digits, DigitsClassifier
from lightning_quant.runtime import read_metadata

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"

#: The same file in the same runtime; only its precision and threads may be other ones. Exports ask for 25 dB, and wrong
#: layouts gave 2 to 10 dB.
SAME_DB = 30.0

BLOCKED = ("lightning_quant", "lightning", "pytorch_lightning", "torchao", "torchmetrics", "jsonargparse")
#: Python runs a module of this name before the program.
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""

#: Gives what a block has found to the test.
EPILOGUE = f"""
import json, sys
import numpy
assert not {{name.partition(".")[0] for name in sys.modules}} & set({BLOCKED})
if "metadata" in globals():
    open("metadata.json", "w").write(json.dumps(metadata))
else:
    numpy.save("logits.npy", numpy.asarray(logits))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``images.npy``, ``images.bin`` and the files that need no compiler."""
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lightning-quant[openvino]'")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("deploy")
    images = torch.randn(4, 3, 8, 8)
    np.save(folder / "images.npy", images.numpy())
    np.savez(folder / "images.npz", x=images.numpy())
    images.numpy().tofile(folder / "images.bin")
    write_files(folder, ("torchscript", "onnx", "openvino", "pt2"))
    (folder / "blocker").mkdir()
    (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    return folder


@pytest.fixture(scope="module")
def compiled_folder(folder: Path) -> Path:
    """The same, with the file that is compiled."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++: install it")
    write_files(folder, ("aoti",))
    return folder


def write_files(folder: Path, formats: tuple[FormatName, ...]) -> None:
    torch.manual_seed(1)
    images = torch.randn(64, 3, 8, 8)
    # the engine that the page names; for a CPU without VNNI, so that loading warns on none
    config = QuantConfig(engine="x86", reduce_range=True)
    prepared = calibrated(settle(Residual()), images, config=config)
    settings = ExportConfig(directory=folder / "quantized", formats=formats)
    export(prepared, None, settings, example_inputs={"x": images})


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder / "blocker")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def file_of(block: str) -> str:
    return re.findall(r'"quantized/([\w.]+)"', block)[0]


def expected(folder: Path, name: str) -> torch.Tensor:
    with torch.inference_mode():
        return load(folder / "quantized" / name)(torch.from_numpy(np.load(folder / "images.npy")))


def check_logits(folder: Path, name: str, logits: torch.Tensor) -> None:
    reference = expected(folder, name)
    assert logits.shape == reference.shape == (4, 5)
    assert decibels(reference, logits) > SAME_DB


PYTHON = [block for block in blocks(PAGE) if 'metadata["state"]' not in block]
WITH_STATE = [block for block in blocks(PAGE) if 'metadata["state"]' in block]
RUNNING = [block for block in PYTHON if "logits" in block]
READING = [block for block in PYTHON if "logits" not in block]


def test_the_page_has_a_block_for_each_file() -> None:
    assert {file_of(block) for block in RUNNING} == {
        "model.ts", "model.onnx", "model.xml", "model.pt2", "model.aoti.pt2"
    }  # fmt: skip
    assert len(blocks(PAGE, "cpp")) == 1


def check_runs(block: str, folder: Path) -> None:
    (folder / "logits.npy").unlink(missing_ok=True)
    done = run(block + EPILOGUE, folder)
    assert done.returncode == 0, done.stderr
    check_logits(folder, file_of(block), torch.from_numpy(np.load(folder / "logits.npy")))


@pytest.mark.parametrize("block", [block for block in RUNNING if "aoti" not in block], ids=file_of)
def test_a_file_runs_without_this_package(block: str, folder: Path) -> None:
    check_runs(block, folder)


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in RUNNING if "aoti" in block], ids=file_of)
def test_a_compiled_file_runs_without_this_package(block: str, compiled_folder: Path) -> None:
    check_runs(block, compiled_folder)


class Remembering(torch.nn.Module):
    """A convolution over a stream, and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(2, 3, 3)
        self.register_buffer("last", torch.full((1, 2, 2), 0.5))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([self.last, x], 2)
        self.last = padded[:, :, -2:]
        self.calls += 1
        return self.conv(padded) * self.calls


@pytest.mark.parametrize("block", WITH_STATE, ids=file_of)
def test_a_file_with_state_runs_without_this_package(block: str, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    shutil.copytree(folder / "blocker", tmp_path / "blocker")
    model, stream = Remembering().eval(), torch.randn(4, 1, 2, 16)
    np.save(tmp_path / "stream.npy", stream.numpy())
    config = QuantConfig(reduce_range=True)
    settings = ExportConfig(directory=tmp_path / "quantized", formats=("onnx", "openvino"))
    prepared = prepare(model, config, method="static", example_inputs=stream[0])
    with torch.no_grad():
        for x in stream:
            prepared(x)
    export(prepared, None, settings, example_inputs=stream[0])
    done = run(f"{block}\nlogits = outputs\ndel metadata\n{EPILOGUE}", tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    loaded = load(tmp_path / "quantized" / file_of(block))
    with torch.inference_mode():
        assert decibels(torch.stack([loaded(x) for x in stream]), found) > SAME_DB
        assert decibels(torch.stack([model(x) for x in stream]), found) > 25


def test_state_is_described_as_the_page_says(tmp_path: Path) -> None:
    table = PAGE.read_text(encoding="utf8").split("| key of an entry | what it is |")[1]
    rows = table.split("\n\n")[0].splitlines()
    named = [key for row in rows for key in re.findall(r"`(\w+)`", row.partition("|")[2].partition("|")[0])]
    example = torch.randn(1, 2, 16)
    prepared = calibrated(Remembering().eval(), example)
    settings = ExportConfig(directory=tmp_path, formats=("torchscript",))
    export(prepared, None, settings, example_inputs=example)
    entries = read_metadata(tmp_path / "model.ts")["state"]
    assert [entry["input"] for entry in entries] == ["state_calls", "state_last"]
    assert all(sorted(entry) == sorted(named) for entry in entries)


@pytest.mark.parametrize("block", READING, ids=file_of)
def test_metadata_is_read_without_this_package(block: str, folder: Path) -> None:
    done = run(block + EPILOGUE, folder)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "metadata.json").read_text())
    assert found == read_metadata(folder / "quantized" / file_of(block))


@pytest.mark.slow
def test_metadata_of_a_compiled_file(compiled_folder: Path) -> None:
    path = compiled_folder / "quantized" / "model.aoti.pt2"
    metadata = read_metadata(path)
    assert metadata["format"] == "aoti"
    assert metadata == json.loads(torch._inductor.aoti_load_package(str(path)).get_metadata()["lightning_quant"])


@pytest.mark.parametrize("name", BLOCKED)
def test_an_import_of_this_package_would_fail(name: str, folder: Path) -> None:
    done = run(f"import {name}", folder)
    assert done.returncode == 1
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


@pytest.mark.slow
def test_the_program_in_cpp(compiled_folder: Path) -> None:
    """Built by the page's own commands; what it writes is what the file gives in Python."""
    folder = compiled_folder
    (folder / "main.cpp").write_text(blocks(PAGE, "cpp")[0])
    (commands,) = (block for block in blocks(PAGE, "sh") if "g++" in block)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    logits = torch.from_numpy(np.fromfile(folder / "logits.bin", dtype=np.float32)).reshape(4, 5)
    check_logits(folder, "model.aoti.pt2", logits)


#: What a command says that is about a LightningModule, and not about files.
OF_A_MODULE = {"my_package.MyModule"}
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for page in (PAGE, PAGE.parents[1] / "README.md")
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.startswith("lightning-quant ")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a LightningModule and its data, and a checkpoint of a float run."""
    folder = tmp_path_factory.mktemp("trained")
    names = "DigitsClassifier as MyModule, Digits as MyData"
    (folder / "my_package.py").write_text(f"from lightning_quant.demo import {names}\n")
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(DigitsClassifier(), Digits())
    trainer.save_checkpoint(folder / "old.ckpt")
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if not OF_A_MODULE & {*c}], ids=" ".join)
def test_a_command_of_the_pages(command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "old").mkdir(exist_ok=True)
    shutil.copy(folder / "quantized" / "model.onnx", folder / "old" / "model.onnx")
    assert main(command) == 0


def test_the_commands_that_take_a_module(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order: the plan that one writes is what the next one reads."""
    monkeypatch.syspath_prepend(trained)
    monkeypatch.chdir(trained)
    commands = [command for command in COMMANDS if OF_A_MODULE & {*command}]
    assert commands
    for command in commands:
        assert main(command) == 0


def test_the_table_of_metadata_is_whole(folder: Path) -> None:
    table = PAGE.read_text(encoding="utf8").split("| key | what it is |")[1].split("\n\n")[0]
    named = [
        key for row in table.splitlines() for key in re.findall(r"`(\w+)`", row.partition("|")[2].partition("|")[0])
    ]
    assert sorted(named) == sorted(read_metadata(folder / "quantized" / "model.ts"))
