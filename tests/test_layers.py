"""Layers in float, and back in int8, by name, pattern and type: the nearest entry counts, with every backend."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import Residual, calibrated, decibels, settle
from torch import nn

from lightning_quant import ConfigError, LayerConfig, QuantConfig, TensorSpec, convert, coverage, prepare
from lightning_quant.layers import left_float

IMAGES = torch.randn(16, 3, 8, 8)
CONV = "torch.nn.Conv2d"
SKIP, LAYERS = "left float by 'skip'", "left float by 'layers'"


def in_float(config: QuantConfig, model: nn.Module) -> dict[str, str]:
    """The convolutions and linear layers that stay in float."""
    kinds = (nn.Conv2d, nn.Linear)
    return {n: why for n, why in left_float(config, model).items() if isinstance(model.get_submodule(n), kinds)}


ALL = ("stem", *(f"blocks.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)), "fc")


@pytest.mark.parametrize(
    ("skip", "layers", "expected"),
    [
        ((), [{"name": "fc", "dtype": "float"}], {"fc": LAYERS}),
        ((), [{"name": "blocks.*.conv2", "dtype": "float"}], dict.fromkeys((ALL[2], ALL[4]), LAYERS)),
        ((), [{"type": CONV, "dtype": "float"}], dict.fromkeys(ALL[:5], LAYERS)),
        ((), [{"name": "blocks", "dtype": "float"}], dict.fromkeys(ALL[1:5], LAYERS)),
        # a nearer one takes a layer back
        (
            (),
            [{"name": "blocks", "dtype": "float"}, {"name": "blocks.1.conv1", "dtype": "int8"}],
            dict.fromkeys((*ALL[1:3], ALL[4]), LAYERS),
        ),
        # so does one that says how it is quantized
        (
            (),
            [{"type": CONV, "dtype": "float"}, {"name": "stem", "weight": TensorSpec(observer="min_max")}],
            dict.fromkeys(ALL[1:5], LAYERS),
        ),
        # a name before a pattern, a pattern before a type
        ((), [{"name": "stem", "dtype": "float"}, {"name": "st*", "dtype": "int8"}], {"stem": LAYERS}),
        ((), [{"name": "st*", "dtype": "int8"}, {"type": CONV, "dtype": "float"}], dict.fromkeys(ALL[1:5], LAYERS)),
        (("fc",), [], {"fc": SKIP}),
        (("blocks",), [{"name": "blocks.0.conv1", "dtype": "int8"}], dict.fromkeys(ALL[2:5], SKIP)),
        (("blocks.0.conv1",), [{"name": "blocks", "dtype": "int8"}], {"blocks.0.conv1": SKIP}),
        # skip stays above settings that do not say int8
        (("blocks",), [{"type": CONV, "weight": TensorSpec()}], dict.fromkeys(ALL[1:5], SKIP)),
        (("blocks",), [{"type": CONV, "dtype": "int8"}], {}),
    ],
)
def test_the_nearest_entry_counts(skip: tuple[str, ...], layers: list[Any], expected: dict[str, str]) -> None:
    config = QuantConfig(skip=skip, layers=tuple(LayerConfig(**entry) for entry in layers))
    assert in_float(config, Residual()) == expected


def test_a_module_around_an_int8_layer_is_not_left_as_a_whole() -> None:
    layers = (LayerConfig(name="blocks", dtype="float"), LayerConfig(name="blocks.1.conv1", dtype="int8"))
    left = left_float(QuantConfig(layers=layers), Residual())
    assert {"blocks.0", "blocks.0.conv1", "blocks.1.bn1"} <= left.keys()
    assert left.keys().isdisjoint({"blocks", "blocks.1", "blocks.1.conv1"})


@pytest.mark.parametrize("backend", ["fx", "eager", "torchscript", "pt2e"])
def test_what_runs(backend: Any) -> None:
    """As with ``skip``, to the last bit."""
    torch.manual_seed(0)
    model = settle(Residual())
    outputs = []
    for settings in (
        {"skip": ("stem", "blocks.0.conv2")},
        {"layers": (LayerConfig(name="stem", dtype="float"), LayerConfig(name="blocks.0.conv2", dtype="float"))},
    ):
        config = QuantConfig(backend=backend, activation=TensorSpec(observer="min_max"), **settings)
        int8 = convert(calibrated(model, IMAGES, config=config))
        if backend != "torchscript":  # whose operators run under the name of their program
            rows = {row.name: row.int8 for row in coverage(int8, IMAGES).rows}
            assert {name for name, found in rows.items() if not found} == {"stem", "blocks.0.conv2"}
        with torch.no_grad():
            outputs.append(int8(IMAGES))
    assert torch.equal(*outputs)
    with torch.no_grad():
        assert decibels(model(IMAGES), outputs[0]) > 25


def test_int8_that_cannot_be_is_an_error() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(24, 2))
    layers = (LayerConfig(name="0", dtype="int8"),)
    text = (
        "LayerConfig(name='0', dtype='int8'): it stays in float: method 'dynamic' has no int8 kernel for a Conv1d. "
        "Leave out this entry, or give dtype='float'."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        prepare(model, QuantConfig(layers=layers), method="dynamic", example_inputs=torch.randn(2, 4, 8))
    # of a pattern it says nothing
    prepare(
        model,
        QuantConfig(layers=(LayerConfig(name="[02]", dtype="int8"),)),
        method="dynamic",
        example_inputs=torch.randn(2, 4, 8),
    )


def test_int8_inside_of_what_is_kept_is_an_error() -> None:
    layers = (LayerConfig(name="blocks", keep=True), LayerConfig(name="blocks.0.conv1", dtype="int8"))
    text = "^LayerConfig\\(name='blocks.0.conv1', dtype='int8'\\): it stays in float: kept whole by QuantConfig"
    with pytest.raises(ConfigError, match=text):
        prepare(Residual().eval(), QuantConfig(layers=layers), method="static", example_inputs=IMAGES)
