"""What the linear passes leave of a graph is what ``onnxscript.optimizer`` leaves of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import models
import numpy as np
import onnx_ir
import onnxruntime
import onnxscript.optimizer
import onnxscript.rewriter
import pytest
import torch
from models import Network, exportable
from torch import nn
from torch.nn import functional as F

from lightning_quant.exporters import qdq
from lightning_quant.exporters.onnx_operators import Quick
from lightning_quant.exporters.onnx_simplify import simplify
from lightning_quant.exporters.qdq import to_program


class Roundabout(nn.Module):
    """Steps that do nothing, twice what is needed once, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.relu(self.conv(F.pad(x, (1, 1, 1, 1))))) * 1.0
        x = x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).reshape(x.shape[0], -1).reshape(-1, 8, 64)
        return (x[:, :, 2:30] + 0.0) / 1.0 + torch.arange(28).float().sqrt()


NETWORKS: dict[str, Network] = {**models.NETWORKS, "roundabout": (Roundabout, (4, 3, 8, 8))}


def written(name: str) -> tuple[Any, tuple[int, ...]]:
    """The graph as torch.onnx gives it."""
    prepared, x = exportable(NETWORKS[name])
    program = to_program(qdq(prepared), (x,), ((),))
    exported = torch.onnx.export(Quick.of(program), (), dynamo=True, verbose=False, optimize=False)
    assert exported is not None
    return exported.model, tuple(x.shape)


def steps(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def constants(model: Any) -> Counter[Any]:
    return Counter((value.dtype, str(value.shape)) for value in model.graph.initializers.values())


def run(model: Any, data: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: data})


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_is_that_of_the_optimizer(name: str) -> None:
    model, shape = written(name)
    other = model.clone()
    data = np.random.default_rng(0).standard_normal((3, *shape[1:])).astype(np.float32)
    before, raw = steps(model), run(model, data)
    simplify(model)
    onnxscript.optimizer.optimize_ir(other, num_iterations=1)
    assert steps(model) == steps(other)
    assert sum(steps(model).values()) < sum(before.values())
    assert constants(model) == constants(other)
    for got, expected, by_torch in zip(run(model, data), run(other, data), raw, strict=True):
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_allclose(got, by_torch, atol=2e-2 * np.abs(by_torch).max())


def test_rules_are_those_whose_operators_the_graph_has(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[list[Any]] = []
    rewrite = onnxscript.rewriter.rewrite
    monkeypatch.setattr(
        onnxscript.rewriter, "rewrite", lambda model, rules: used.append(rules) or rewrite(model, rules)
    )
    model, _ = written("mlp")
    simplify(model)
    assert 0 < len(used[0]) < 15
