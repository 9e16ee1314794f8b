"""Packages of AOTInductor: compiled, for any batch; and what is said where there is no compiler."""

from __future__ import annotations

import copy
import functools
import re
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Mlp, Residual, TwoInputs, calibrated, decibels, settle
from torch import nn

from lightning_quant import ArtifactError, ExportConfig, ExportError, QuantConfig, TensorSpec, export, load
from lightning_quant.analysis.kernels import kernels
from lightning_quant.exporters import aoti, qdq
from lightning_quant.exporters.layouts import LAYOUTS, laid_out
from lightning_quant.exporters.qdq import to_program

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/no/such/compiler")
    x = torch.randn(8, 4)
    prepared = calibrated(Mlp().eval(), x)
    text = (
        "AOTInductor needs a C++ compiler: CC='/no/such/compiler' is not there. Install g++ or clang, or leave 'aoti' "
        "out of ExportConfig(formats=...)."
    )
    with pytest.raises(ExportError, match=f"^{re.escape(text)}$"):
        export(prepared, None, ExportConfig(directory=tmp_path, formats=("aoti",)), x)
    assert list(tmp_path.iterdir()) == []


class Files:
    def __init__(self, model: nn.Module, folder: Path, example: Any, *data: torch.Tensor, **named: Any) -> None:
        self.model = model.eval()
        prepared = calibrated(self.model, *data, **named)
        self.path = export(prepared, None, ExportConfig(directory=folder, formats=("aoti",)), example)["aoti"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    def make(name: str) -> Files:
        torch.manual_seed(0)
        folder, (a, b) = tmp_path_factory.mktemp("files"), torch.randn(2, 16, 4)
        if name == "mlp":
            return Files(Mlp(), folder, a, a)
        return Files(TwoInputs(), folder, {"a": a, "b": b}, a, b=b)

    return functools.cache(make)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 64])
def test_any_batch(files: Callable[[str], Files], size: int) -> None:
    file, x = files("mlp"), torch.randn(size, 4)
    loaded = load(file.path)
    assert file.path.name == "model.aoti.pt2"
    with torch.no_grad():
        assert decibels(file.model(x), loaded(x)) > 25
    assert torch.equal(copy.deepcopy(loaded)(x=x), loaded(x))
    assert not loaded.training
    assert not loaded(x).requires_grad


@pytest.mark.slow
def test_a_dict_of_two_inputs(files: Callable[[str], Files]) -> None:
    file, (a, b) = files("two"), torch.randn(2, 5, 4)
    loaded = load(file.path)
    assert loaded.metadata["format"] == "aoti"
    assert loaded.metadata["tensors"] == ["a", "b"]
    expected, found = file.model(a, b=b), loaded(b=b, a=a)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert decibels(value, found[key]) > 25
    # inputs that are no blocks of memory are made some
    assert torch.equal(loaded(a.T.contiguous().T, b)["sum"], found["sum"])
    with pytest.raises(ArtifactError, match=r"^a is torch\.float64; this artifact takes torch\.float32"):
        loaded(a.double(), b)
    with pytest.raises(ArtifactError, match=r"^b has the shape \(5, 1\); this artifact takes \(\*, 4\)"):
        loaded(a, b[:, :1])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_truncated_package(files: Callable[[str], Files], share: float, tmp_path: Path) -> None:
    content = files("mlp").path.read_bytes()
    path = tmp_path / "model.aoti.pt2"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(path))}: cannot be read as a torch\.export archive"):
        load(path)


@pytest.mark.slow
def test_a_package_that_somebody_else_compiled_does_not_run(files: Callable[[str], Files], tmp_path: Path) -> None:
    """Compiled code runs when it is loaded: the metadata is read before."""
    path = tmp_path / "model.aoti.pt2"
    with zipfile.ZipFile(files("mlp").path) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("_metadata.json"):
                content = content.replace(b'"lightning_quant":', b'"somebody_else":')
            if name.endswith(".so"):
                content = b"no library at all"
            new.writestr(name, content)
    text = f"{path}: not written by lightning_quant (it has no metadata). Load it with its own runtime."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(path)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("lightning_quant")]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fx", pytest.param("pt2e", marks=needs_torchao)])
def test_integers_are_multiplied(backend: Any, tmp_path: Path) -> None:
    """What stands before and behind a layer is what the patterns of inductor look for, a pool and a reshape too."""
    x = torch.randn(8, 3, 8, 8)
    prepared = calibrated(settle(Residual()).eval(), x, config=QuantConfig(backend=backend))
    before = torch._inductor.config.pre_grad_custom_pass
    path = export(prepared, None, ExportConfig(directory=tmp_path, formats=("aoti",)), x)["aoti"]
    found = kernels(path)
    assert found is not None
    assert (found.int8, found.floating) == (6, 0)  # five convolutions and a linear layer
    assert torch._inductor.config.pre_grad_custom_pass is before  # the user's torch.compile is as it was


class Adding(nn.Module):
    """Sums behind a linear layer of what must not be overwritten: the input, a view of it, a constant, and what is
    needed later on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("offset", torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x + self.first(x)
        y = self.second(y) + self.offset
        z = x.flatten(1).unflatten(1, (6, 8)) + self.third(y)
        kept = z.relu()
        return kept + self.fourth(kept * 2), kept


@needs_torchao
@pytest.mark.slow
def test_sums_are_not_added_up_in_memory_that_others_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The int8 matrix product of oneDNN adds in place: not into the caller's tensors, nor into constants."""
    x = torch.randn(8, 6, 8)
    path = export(calibrated(Adding().eval(), x), None, ExportConfig(directory=tmp_path, formats=("aoti",)), x)["aoti"]
    loaded, given = load(path), x.clone()
    first = loaded(given)
    assert torch.equal(given, x)
    for a, b in zip(first, loaded(given), strict=True):
        assert torch.equal(a, b)
    found = kernels(path)
    assert found is not None
    assert found.int8 == 4
    assert warned(caplog) == []


@pytest.mark.slow
def test_without_torchao_floats_are_multiplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(aoti, "find_spec", lambda name: None)
    x = torch.randn(8, 4)
    path = export(calibrated(Mlp().eval(), x), None, ExportConfig(directory=tmp_path, formats=("aoti",)), x)["aoti"]
    found = kernels(path)
    assert found is not None
    assert found.int8 == 0
    assert found.floating > 0
    assert warned(caplog) == [
        "model.aoti.pt2: torchao is not installed (pip install 'lightning-quant[pt2e]'). It is compiled without int8 "
        "kernels: it runs slower."
    ]


@needs_torchao
@pytest.mark.slow
def test_a_package_with_wrong_int8_kernels_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    x, compile_right = torch.randn(8, 4), aoti._compile

    def compile_wrong(source: Path, path: Path, described: Path, *, int8_kernels: bool) -> None:
        if int8_kernels:
            other = torch.export.export(Mlp().eval(), (x[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            torch.export.save(other, source.with_name("other.pt2"))
            source = source.with_name("other.pt2")
        compile_right(source, path, described, int8_kernels=int8_kernels)

    monkeypatch.setattr(aoti, "_compile", compile_wrong)
    model = Mlp().eval()
    path = export(calibrated(model, x), None, ExportConfig(directory=tmp_path, formats=("aoti",)), x)["aoti"]
    with torch.no_grad():
        assert decibels(model(x), load(path)(x)) > 25
    (message,) = warned(caplog)
    pattern = (
        r"model\.aoti\.pt2: torchao's int8 kernels compute something else for this model \(-?\d+\.\d dB\)\. It is "
        r"compiled without int8 kernels: it runs slower\."
    )
    assert re.fullmatch(pattern, message)


@pytest.mark.slow
def test_what_the_compiler_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a compiler that does not work: its last lines."""
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho broken compiler >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    x = torch.randn(8, 4)
    prepared = calibrated(Mlp().eval(), x)
    with pytest.raises(ExportError, match=r"^AOTInductor (cannot compile this model: |needs a C\+\+ compiler: )"):
        export(prepared, None, ExportConfig(directory=tmp_path / "files", formats=("aoti",)), x)


@pytest.mark.slow
def test_activations_of_fewer_bits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Torchao's kernels saturate at 255: 11 dB with values four times as large as the range."""
    torch.manual_seed(0)
    config = QuantConfig(activation=TensorSpec(bits=4), weight=TensorSpec(bits=4), reduce_range=False)
    x = torch.randn(16, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    prepared = calibrated(net.eval(), x, config=config)
    path = export(prepared, None, ExportConfig(directory=str(tmp_path), formats=("aoti",)), x)["aoti"]
    assert [r.getMessage() for r in caplog.records if r.name == aoti.__name__] == [
        "model.aoti.pt2: activations have fewer than 8 bits, to which torchao's int8 kernels do not clamp. It is "
        "compiled without int8 kernels: it runs slower."
    ]
    program = laid_out(to_program(qdq(prepared), (x[:2],), ()), LAYOUTS["aoti"])
    with torch.no_grad():
        assert decibels(program.module(check_guards=False)(4 * x), load(path)(4 * x)) > 25
