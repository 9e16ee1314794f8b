"""Named QuantConfigs: a recipe is a value.

>>> int8_dynamic.backend
'fx'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from lightning_quant.config import Method, QuantConfig, TensorSpec, near
from lightning_quant.errors import ConfigError

_LEARNED = TensorSpec(fake_quantize="learned")

#: Calibrated on validation data: histograms choose the range of activations with the least squared error.
int8_static = QuantConfig(activation=TensorSpec(observer="histogram"))
#: The same without the outermost 0.1 per cent of the values, for activations with outliers.
int8_static_percentile = QuantConfig(activation=TensorSpec(observer="percentile", percentile=99.9))
#: The same, and corrected after calibration: more accurate, for some passes over a few batches more.
int8_accurate = QuantConfig(
    activation=TensorSpec(observer="histogram"), corrections=("smoothquant", "choose_ranges", "gptq")
)
#: Trained with fake quantize, whose scales follow the ranges.
int8_qat = QuantConfig(activation=TensorSpec(observer="moving_average"))
#: Trained with fake quantize, whose scales are trained too (LSQ, https://arxiv.org/abs/1902.08153).
int8_qat_learned = QuantConfig(activation=_LEARNED, weight=_LEARNED)
#: Ranges of activations at run time: linear and recurrent layers, and embeddings. Needs no data.
int8_dynamic = QuantConfig()
#: For ONNX Runtime, which fuses an int8 convolution only with an output that is quantized at once, as `fx` does it.
onnxruntime = QuantConfig(backend="fx")
#: For OpenVINO, whose convolutions may write floats, as `pt2e` leaves them before a SiLU or the output.
openvino = QuantConfig(backend="pt2e")
#: Programs of ``torch.export`` (`model.pt2`).
pt2e = QuantConfig(backend="pt2e")
#: For ARM, on QNNPACK: one scale for each weight, which its kernels for phones expect, and all 8 bits.
mobile_qnnpack = QuantConfig(engine="qnnpack", weight=TensorSpec(qscheme="per_tensor_symmetric"), reduce_range=False)
#: Right on every x86 CPU, whichever this one is: weights have 7 bits, as CPUs without VNNI need them.
any_x86 = QuantConfig(engine="x86", reduce_range=True)


@dataclass(frozen=True)
class Recipe:
    """A config with its name.

    Attributes:
        name: Of the recipe.
        config: What it stands for.
        methods: For which it is.
        purpose: When to take it.
    """

    name: str
    config: QuantConfig
    methods: tuple[Method, ...]
    purpose: str


#: Name -> recipe.
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            Recipe("int8_static", int8_static, ("static",), "calibrated on validation data"),
            Recipe("int8_static_percentile", int8_static_percentile, ("static",), "activations that have outliers"),
            Recipe("int8_accurate", int8_accurate, ("static",), "corrected after calibration: the most accurate"),
            Recipe("int8_qat", int8_qat, ("qat",), "trained with fake quantize"),
            Recipe("int8_qat_learned", int8_qat_learned, ("qat",), "scales are trained as well (LSQ)"),
            Recipe("int8_dynamic", int8_dynamic, ("dynamic",), "no data; linear and recurrent layers, embeddings"),
            Recipe("onnxruntime", onnxruntime, ("static", "qat"), "files for ONNX Runtime"),
            Recipe("openvino", openvino, ("static", "qat"), "files for OpenVINO"),
            Recipe("pt2e", pt2e, ("static", "qat", "dynamic"), "programs of torch.export"),
            Recipe("mobile_qnnpack", mobile_qnnpack, ("static", "qat"), "ARM, on QNNPACK"),
            Recipe("any_x86", any_x86, ("static", "qat"), "every x86 CPU, also without VNNI"),
        )
    }
)


def made(parser: ArgumentParser, parsed: Any) -> Any:
    """What was parsed, with the objects that it describes."""
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    return instantiate(parsed)


def load(name_or_file: str | Path) -> QuantConfig:
    """A recipe by its name, or the QuantConfig in a YAML file, such as an edited plan.

    Args:
        name_or_file: A key of :data:`RECIPES`, or the path of a file.

    Raises:
        ConfigError: There is no such recipe and no such file, or the file is no QuantConfig.

    >>> load("int8_qat") is int8_qat
    True
    """
    if str(name_or_file) in RECIPES:
        return RECIPES[str(name_or_file)].config
    path = Path(name_or_file)
    if not path.is_file():
        raise ConfigError(
            f"{name_or_file}: there is no recipe of this name, and no such file. {near(str(name_or_file), RECIPES)}"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(QuantConfig, "config")
    try:
        parsed: Any = parser.parse_args([f"--config={path}"])
        config: QuantConfig = made(parser, parsed).config
    except ArgumentError as error:
        raise ConfigError(f"{path}: this is no QuantConfig. {error}") from error
    return config
