"""The two verbs on whole models: as one graph, or in the parts that can be captured."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import Branching, Mlp, TwoInputs, decibels
from torch import nn

from lightning_quant import CalibrationError, CaptureError, ConfigError, QuantConfig, TensorSpec, convert, prepare
from lightning_quant.arguments import Call, Captured
from lightning_quant.backends import as_call, reference
from lightning_quant.backends.graph import is_graph
from lightning_quant.config import Method

METHODS: tuple[Method, ...] = ("dynamic", "static", "qat")
X = torch.linspace(0.1, 2, 64).reshape(16, 4)


def in_parts(method: Method = "static", config: QuantConfig | None = None) -> tuple[nn.Module, nn.Module]:
    model = Branching()
    return model, prepare(model, config, method=method, example_inputs=X)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, 3), (X, 3), {}),
        ([X], (X,), {}),
        ({"a": X, "double": True}, (), {"a": X, "double": True}),
    ],
)
def test_example_inputs(given: Any, args: Any, kwargs: Any) -> None:
    call = as_call(given)
    assert len(call.args) == len(args)
    assert call.keywords.keys() == kwargs.keys()
    for ours, theirs in zip((*call.args, *call.keywords.values()), (*args, *kwargs.values()), strict=True):
        if isinstance(theirs, torch.Tensor):
            assert ours is not theirs  # a copy: the caller may go on with its own
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs
    assert as_call(Call((1,))) == Call((1,))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_in_parts_keeps_its_own_forward(method: Method) -> None:
    model, prepared = in_parts(method)
    assert type(prepared) is Branching
    assert isinstance(prepared.up, Captured)
    assert is_graph(prepared.up.graph)
    assert prepared.training is (method == "qat")
    assert type(prepared.down) is Mlp  # the example never went there
    assert type(model.up) is Mlp
    shared = [any(p is q for q in prepared.parameters()) for p in model.parameters()]
    assert all(shared) if method == "qat" else not any(shared)
    prepared(X)
    int8 = convert(prepared)
    assert decibels(model(X), int8(X)) > 25
    assert torch.equal(int8(-X), model(-X))
    assert not any(m.training for m in int8.modules())
    assert is_graph(prepared.up.graph)
    if method != "dynamic":
        assert decibels(model(X), reference(prepared)(X)) > 25


def test_convert_of_a_model_in_parts_asks_for_calibration() -> None:
    with pytest.raises(CalibrationError, match=r"^2 observers saw no data"):
        convert(in_parts()[1])


def test_convert_takes_the_config_of_prepare() -> None:
    config = QuantConfig(skip=("up.first",), activation=TensorSpec(observer="min_max"))
    _, prepared = in_parts(config=config)
    prepared(X)
    assert torch.equal(convert(prepared, config)(X), convert(prepared)(X))
    other = QuantConfig(activation=TensorSpec(observer="histogram"))
    text = "convert was given QuantConfig("
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}.*but the model was prepared with QuantConfig"):
        convert(prepared, other)


def test_targets_and_skip_reach_the_parts() -> None:
    model = nn.Sequential(Mlp(), nn.Linear(3, 3), nn.Linear(3, 2))
    config = QuantConfig(targets=("0", "2"), skip=("0.second",))
    prepared = prepare(model, config, method="static", example_inputs=X)
    prepared(X)
    int8 = convert(prepared)
    assert type(int8[1]) is nn.Linear
    assert type(int8[0].graph.second) is nn.Linear
    assert "quantized" in type(int8[0].graph.first).__module__
    assert decibels(model(X), int8(X)) > 20


def test_keywords_by_name_are_kept_in_parts() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = TwoInputs()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 99:
                return x
            return self.body(x, b=2 * x, double=True)["sum"]

    model = Two()
    prepared = prepare(model, method="static", example_inputs=X)
    prepared(X)
    assert decibels(model(X), convert(prepared)(X)) > 25


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"method": "ptq"}, ConfigError, "quantize(method='ptq'): not one of 'dynamic', 'static', 'qat'. "),
        (
            {"method": "qat", "config": QuantConfig(activation=TensorSpec(observer="min_max"))},
            ConfigError,
            "QuantConfig(activation.observer='min_max') with quantization-aware training",
        ),
        (
            {"method": "static", "config": QuantConfig(skip=("uup",))},
            ConfigError,
            "QuantConfig(skip=...): 'uup' matches no submodule. Did you mean 'up'",
        ),
        ({"method": "static", "model": nn.ReLU()}, CaptureError, "ReLU has nothing that can be quantized"),
    ],
)
def test_what_prepare_refuses(arguments: dict[str, Any], error: Any, text: str) -> None:
    model = arguments.pop("model", None) or Branching()
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        prepare(model, example_inputs=X, **arguments)
