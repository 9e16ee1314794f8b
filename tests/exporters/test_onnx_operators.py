"""Decomposing single operators gives what torch's decomposition of the whole gives."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import models
import onnx
import pytest
import torch
from models import Network, calibrated, decibels, exportable
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from lightning_quant import ExportConfig, convert, export, load
from lightning_quant.exporters import onnx as writer
from lightning_quant.exporters import onnx_operators, qdq
from lightning_quant.exporters.onnx_operators import Quick
from lightning_quant.exporters.qdq import to_program

Program = torch.export.ExportedProgram


class Many(nn.Module):
    """Operators that have to be written out, of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)
        self.relu, self.drop, self.linear = nn.ReLU(inplace=True), nn.Dropout(inplace=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(F.silu(self.conv(x), inplace=True)))
        x = self.drop(self.pool(x).flatten(1))
        first, second = self.linear(x).chunk(2, dim=1)
        return first * second.reshape(-1, 2)


class Overwriting(nn.Module):
    """What is overwritten is read elsewhere, under another name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        seen = y.view(-1)
        y.relu_()
        return seen.reshape(y.shape) + y


#: Steps that compute sizes, or change nothing else.
SIZES = ("Shape", "Gather", "Concat", "Reshape", "Constant", "Mul")
NETWORKS: dict[str, Network] = {"many": (Many, (4, 3, 8, 8)), **models.NETWORKS}


def program_of(name: str) -> tuple[Program, torch.Tensor]:
    prepared, x = exportable(NETWORKS[name])
    return to_program(qdq(prepared), (x,), ((),)), x


def table_of(program: Program, monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """The table that torch.onnx decomposes with."""
    seen: list[dict[Any, Any]] = []

    decompose = Program.run_decompositions

    def ask(self: Any, table: Any, *args: Any) -> Any:
        seen.append(dict(table))
        return decompose(self, table, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "run_decompositions", ask)
        torch.onnx.export(program, (), dynamo=True, verbose=False)
    return seen[0]


def outputs(program: Program, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(program.module(check_guards=False)(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_left_that_a_decomposition_would_write_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = program_of(name)
    table = table_of(program, monkeypatch)
    expected = outputs(program, x)
    quick = Quick.of(copy.deepcopy(program))
    assert quick.run_decompositions(table) is quick  # not as a whole
    whole = program.run_decompositions(table)

    def operators(of: Program) -> Counter[str]:
        return Counter(str(n.target) for n in of.graph.nodes if isinstance(n.target, torch._ops.OpOverload))

    # sizes may be asked for once or twice
    differ = (operators(quick) - operators(whole)) + (operators(whole) - operators(quick))
    assert set(differ) <= {"aten.sym_size.int", "aten.clone.default", "aten.view.default", "aten.alias.default"}
    for now, before in zip(outputs(quick, x), expected, strict=True):
        assert torch.equal(now, before)


def test_what_is_read_elsewhere_is_decomposed_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3)
    program = to_program(Overwriting(), (x,), ((),))
    expected = Overwriting()(x)
    quick = Quick.of(copy.deepcopy(program))
    whole = quick.run_decompositions(table_of(program, monkeypatch))
    assert whole is not quick
    assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in whole.graph.nodes)
    assert torch.equal(outputs(whole, x)[0], expected)


def test_what_makes_tensors_of_its_own_is_decomposed_as_a_whole(tmp_path: Any) -> None:
    """Pooling to places that do not divide the image computes with indices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    x = torch.randn(8, 3, 32, 32)
    prepared = calibrated(model.eval(), x)
    path = export(prepared, None, ExportConfig(directory=tmp_path, formats=("onnx",)), x)["onnx"]
    with torch.no_grad():
        assert decibels(convert(prepared)(x), load(path)(x)) > 38


def test_the_file_has_the_same_steps(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = program_of("many")
    metadata = {"format": "onnx", "tensors": ["x"], "outputs": ["y"], "state": []}

    def steps() -> Counter[str]:
        model = writer.to_model(copy.deepcopy(program), metadata, tmp_path / "model.onnx")
        return Counter(node.op_type for node in model.graph.node if node.op_type not in SIZES)

    quick = steps()
    monkeypatch.setattr(onnx_operators.Quick, "of", lambda program: program)
    assert quick == steps()
    assert quick["Conv"] == quick["BatchNormalization"] == quick["Relu"] == 1


class Averaged(nn.Module):
    """An average over all of an image in ``channels_last``, as ConvNeXt makes them: torch lays its result out anew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).flatten(1)


class Resized(nn.Module):
    """Sizes that are computed from those of a tensor in front of an interpolation, as MobileViT computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        samples, channels, _, _ = x.shape
        x = F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)
        return x.reshape(samples * channels * 4, 2, 4, 2).transpose(1, 2).reshape(samples, channels, 8, 8)


class Parts(nn.Module):
    """What is returned is written out: ``chunk`` and ``unflatten``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.conv(x)
        return (*x.chunk(2, 1), x.flatten(1).unflatten(1, (2, -1)))


@pytest.mark.parametrize("kind", [Averaged, Resized, Parts])
def test_a_file_takes_any_number_of_samples_and_gives_what_the_model_does(kind: type[nn.Module], tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 7, 7)
    prepared = calibrated(kind().eval(), x)
    loaded = load(export(prepared, None, ExportConfig(directory=tmp_path, formats=("onnx",)), x)["onnx"])
    with torch.no_grad():
        for samples in (1, 3, 5):
            data = torch.randn(samples, 3, 7, 7)
            pairs = zip(
                torch.utils._pytree.tree_leaves(convert(prepared)(data)),
                torch.utils._pytree.tree_leaves(loaded(data)),
                strict=True,
            )
            assert all(expected.shape == got.shape and decibels(expected, got) > 38 for expected, got in pairs)


def test_an_average_over_an_image_is_one_step(tmp_path: Any) -> None:
    """Not a gathering by computed indices, which is what a decomposition of the new strides gives."""
    x = torch.randn(4, 3, 8, 8)
    prepared = calibrated(Averaged().eval(), x)
    path = export(prepared, None, ExportConfig(directory=tmp_path, formats=("onnx",)), x)["onnx"]
    steps = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert steps["GlobalAveragePool"] + steps["ReduceMean"] == 1
    assert not {"Range", "Gather", "Expand"} & set(steps)


def test_layers_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4)
    program = to_program(qdq(calibrated(encoder.eval(), x)), (x,), ((),))
    table = table_of(program, monkeypatch)
    expected = outputs(program, x)
    traced: list[Any] = []
    monkeypatch.setattr(
        onnx_operators, "make_fx", lambda call, **options: traced.append(call) or make_fx(call, **options)
    )
    quick = Quick.of(program)
    written_out = sum(onnx_operators._unknown(table)(node.target) for node in program.graph.nodes)
    assert quick.run_decompositions(table) is quick
    assert 0 < 3 * len(traced) < written_out
    for now, before in zip(outputs(quick, x), expected, strict=True):
        assert torch.equal(now, before)
