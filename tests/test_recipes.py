"""Recipes are values that do what they say, by name and from files."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import Residual, calibrated, decibels, settle
from torch import nn

from lightning_quant import ConfigError, LayerConfig, QuantConfig, TensorSpec, convert, correct, recipes
from lightning_quant.config import check_method, plain
from lightning_quant.recipes import RECIPES, Recipe

IMAGES = torch.randn(16, 3, 8, 8)


def test_each_is_an_attribute_and_an_entry() -> None:
    values = {name: value for name, value in vars(recipes).items() if isinstance(value, QuantConfig)}
    assert values == {name: recipe.config for name, recipe in RECIPES.items()}
    assert {recipe.name for recipe in RECIPES.values()} == RECIPES.keys()
    assert {"int8_static", "int8_qat", "int8_dynamic", "openvino", "onnxruntime", "mobile_qnnpack"} <= RECIPES.keys()


def test_they_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        recipes.int8_static.backend = "eager"  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        RECIPES["own"] = RECIPES["int8_static"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("recipe", "method"), [(recipe, method) for recipe in RECIPES.values() for method in recipe.methods],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_each_gives_an_int8_model(recipe: Recipe, method: Any) -> None:
    check_method(recipe.config, method)
    torch.manual_seed(0)
    model = settle(Residual()) if method != "dynamic" else nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    prepared = calibrated(model, IMAGES, method=method, config=recipe.config, passes=1)
    prepared = correct(prepared, [IMAGES]) if recipe.config.corrections else prepared
    # a learned scale begins at 2 * mean(|w|) / sqrt(127), which clips weights until it is trained
    least = 20 if recipe.name == "int8_qat_learned" else 25
    with torch.no_grad():
        assert decibels(model(IMAGES), convert(prepared)(IMAGES)) > least


@pytest.mark.parametrize(
    ("name", "method"), [("int8_static", "qat"), ("int8_static", "dynamic"), ("int8_qat_learned", "static")]
)
def test_for_another_method(name: str, method: Any) -> None:
    assert method not in RECIPES[name].methods
    with pytest.raises(ConfigError):
        check_method(RECIPES[name].config, method)


@pytest.mark.parametrize("name", RECIPES)
def test_from_yaml(name: str) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(plain(RECIPES[name].config)), encoding="utf8")
    assert recipes.load("recipe.yaml") == RECIPES[name].config == recipes.load(name)


def test_every_setting_from_yaml() -> None:
    config = QuantConfig(
        backend="eager",
        engine="qnnpack",
        activation=TensorSpec(observer="torch.ao.quantization.MinMaxObserver"),
        weight=TensorSpec(qscheme="per_tensor_symmetric", observer="moving_average"),
        targets=("net",),
        skip=("net.0",),
        layers=(
            LayerConfig(name="net.1", dtype="float"),
            LayerConfig(type=nn.Linear, activation=TensorSpec(observer="percentile", percentile=99.5)),
            LayerConfig(name="net.2", keep=True),
        ),
        corrections=("smoothquant", "bias_correction"),
        reduce_range=True,
        min_coverage=0.5,
    )
    Path("config.yaml").write_text(yaml.safe_dump(plain(config)), encoding="utf8")
    assert recipes.load(Path("config.yaml")) == config


def test_neither_a_name_nor_a_file() -> None:
    text = (
        "int8_statik: there is no recipe of this name, and no such file. Did you mean 'int8_static', 'int8_qat', "
        "'int8_dynamic'?"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        recipes.load("int8_statik")
