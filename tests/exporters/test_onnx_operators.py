"""Decomposing single operators gives what torch's decomposition of the whole gives."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from models import Mlp, Residual, calibrated, decibels, settle
from torch import nn
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
NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "many": (Many, (4, 3, 8, 8)),
    "residual": (Residual, (4, 3, 8, 8)),
    "mlp": (Mlp, (5, 4)),
    "lstm": (lambda: nn.LSTM(3, 5, batch_first=True), (4, 6, 3)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (4, 5, 8)),
}


def program_of(name: str) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make().eval()
    if name == "residual":
        settle(model)
    x = torch.randn(shape)
    return to_program(qdq(calibrated(model, x)), (x,), ((),)), x


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
