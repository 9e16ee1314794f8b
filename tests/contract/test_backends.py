"""Backend x method x format: every cell of the table works on every network, or says why not."""

from __future__ import annotations

import copy
import re
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from models import decibels
from nets import NETS, Net
from torch import nn

from lightning_quant import (
    ConfigError,
    ExportConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    convert,
    coverage,
    export,
    load,
    prepare,
)
from lightning_quant.backends import each_graph
from lightning_quant.config import REFUSED, SUPPORT, BackendName, Method
from lightning_quant.exporters import qdq
from lightning_quant.exporters.layouts import LAYOUTS, laid_out
from lightning_quant.exporters.qdq import to_program

CELLS = [*product(get_args(BackendName), get_args(Method))]
WORKING = [cell for cell in CELLS if cell in SUPPORT]

#: (backend, method) -> the layers with weights that it leaves in float.
FLOAT_KINDS: dict[tuple[str, str], tuple[type[nn.Module], ...]] = {
    **{(backend, "dynamic"): (nn.Conv2d, nn.ConvTranspose2d) for backend in ("fx", "eager")},
    ("torchscript", "dynamic"): (nn.Conv2d, nn.ConvTranspose2d, nn.LSTM),
    ("torchscript", "static"): (nn.LSTM,),
    ("pt2e", "dynamic"): (nn.Conv2d, nn.ConvTranspose2d, nn.LSTM),
    ("pt2e", "static"): (nn.LSTM,),
    ("pt2e", "qat"): (nn.LSTM,),
}


def train(prepared: nn.Module, net: Net, steps: int = 3) -> None:
    parameters = [p for p in prepared.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    prepared.train()
    for _ in range(steps):
        optimizer.zero_grad()
        prepared(net.data(16)).square().mean().backward()
        optimizer.step()
    prepared.eval()


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in SUPPORT], ids="-".join)
def test_a_cell_that_cannot_be_is_refused_when_the_callback_is_made(cell: tuple[Any, Any]) -> None:
    backend, method = cell
    kind: Any = QuantizationAwareTraining if method == "qat" else PostTrainingQuantization
    with pytest.raises(ConfigError, match=f"^{re.escape(REFUSED[cell])}$"):
        kind(QuantConfig(backend=backend))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("cell", WORKING, ids="-".join)
def test_a_cell(cell: tuple[Any, Any], name: str, tmp_path: Path) -> None:
    backend, method = cell
    net = NETS[name]
    model = net.build()
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model, QuantConfig(backend=backend), method=method, example_inputs=net.data(2))
    if method == "qat":
        train(prepared, net)
        assert all(p.grad is not None for p in model.parameters())
        weights = [key for key, value in before.items() if key.endswith("weight")]
        assert not any(torch.equal(model.state_dict()[key], before[key]) for key in weights)
    else:
        with torch.no_grad():
            for _ in range(4):
                prepared(net.data(32))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    int8 = convert(prepared)
    x = net.data(16)
    with torch.no_grad():
        expected = prepared(x) if method == "qat" else model(x)
        found = int8(x)
    figure = decibels(expected, found)
    assert figure >= (25 if net.convolutional and method == "static" else 15)
    rows = coverage(int8, x).rows
    kinds = FLOAT_KINDS.get(cell, ())
    left = [m for m in model.modules() if isinstance(m, kinds)]
    assert any(row.int8 for row in rows)
    assert bool(left) == any(not row.int8 and row.weighted for row in rows)

    formats: Any = tuple(name for name in SUPPORT[cell] if name not in COMPILED)
    check_files(prepared, int8, formats, net, x, tmp_path)


#: Formats that take a compiler half a minute for each file.
COMPILED = ("aoti",)
SIZES = (1, 3, 64)


def check_files(prepared: nn.Module, int8: nn.Module, formats: Any, net: Net, x: torch.Tensor, directory: Path) -> None:
    """Each file computes, at any batch, what the program does that it was written from."""
    files = export(prepared, export_config=ExportConfig(directory=str(directory), formats=formats), example_inputs=x)
    assert tuple(files) == formats
    neutral = None
    for name, path in files.items():
        loaded = load(path)
        assert loaded.metadata["format"] == name
        program = int8
        if name in LAYOUTS:
            if neutral is None:
                neutral = to_program(each_graph(prepared, None, qdq), (x[:2],), ())
            program = laid_out(neutral, LAYOUTS[name]).module(check_guards=False)
        for count in SIZES:
            data = net.data(count)
            with torch.no_grad():
                # not against int8 itself: it cuts off what is beyond the range of its output, a float output does not
                assert decibels(program(data), loaded(data)) >= 30, (name, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "encoder"])
@pytest.mark.parametrize("cell", [cell for cell in WORKING if set(COMPILED) & set(SUPPORT[cell])], ids="-".join)
def test_a_cell_of_a_compiled_format(cell: tuple[Any, Any], name: str, tmp_path: Path) -> None:
    backend, method = cell
    net = NETS[name]
    prepared = prepare(net.build(), QuantConfig(backend=backend), method=method, example_inputs=net.data(2))
    if method == "qat":
        train(prepared, net)
    else:
        with torch.no_grad():
            for _ in range(4):
                prepared(net.data(32))
    check_files(prepared, convert(prepared), COMPILED, net, net.data(16), tmp_path)
