"""Weights of 2 to 8 bits and activations of 4 to 8: ranges, int8 models that keep to them, and smaller files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import own_classes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import PROPERTY, Residual, calibrated, decibels, settle
from modules import Classifier, Digits, convnet, trainer
from torch import fx, nn

from lightning_quant import (
    ConfigError,
    ExportConfig,
    LayerConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    convert,
    export,
    load,
    prepare,
)
from lightning_quant.analysis.kernels import kernels
from lightning_quant.backends import reference
from lightning_quant.backends.graph import observers, sees_weights
from lightning_quant.exporters import qdq
from lightning_quant.exporters.layouts import LAYOUTS, laid_out
from lightning_quant.exporters.onnx_bits import fits, packed
from lightning_quant.exporters.qdq import to_program
from lightning_quant.qconfig import activation_range, weight_range
from lightning_quant.runtime import files_of
from lightning_quant.runtime.metadata import read_metadata

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
BACKENDS = ("fx", "eager", "pt2e")


class Wide(nn.Module):
    """Takes ``(N, 3, 8, 8)``, gives ``(N, 10)``; its weights are most of its file, odd numbers of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 33, 3)
        self.second = nn.Conv2d(33, 129, 3)
        self.third = nn.Conv2d(129, 129, 3)
        self.fc = nn.Linear(129 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.fc(torch.relu(self.third(x)).flatten(1))


def config(weight: int = 8, activation: int = 8, **settings: Any) -> QuantConfig:
    return QuantConfig(
        weight=TensorSpec(bits=weight), activation=TensorSpec(bits=activation), reduce_range=False, **settings
    )


def images(count: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


# ---- ranges


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["static", "qat"])
@pytest.mark.parametrize(("weight", "activation"), [(2, 4), (3, 5), (4, 8), (7, 7), (8, 8)])
def test_observers_have_the_range_of_their_bits(backend: Any, method: Any, weight: int, activation: int) -> None:
    prepared = prepare(nn.Conv2d(3, 4, 3), config(weight, activation, backend=backend), method=method,
                       example_inputs=images(2))  # fmt: skip
    found: set[tuple[int, int]] = set()
    for module in prepared.modules():
        inner = getattr(module, "activation_post_process", module)
        if isinstance(getattr(inner, "quant_min", None), int):
            found.add((inner.quant_min, inner.quant_max))
        if getattr(module, "qconfig", None) is not None:  # observers of static weights are made when they are converted
            weights = module.qconfig.weight()
            found.add((weights.quant_min, weights.quant_max))
    largest = 2 ** (weight - 1) - 1
    ends = {(-largest, largest), (0, 2**activation - 1)}
    assert found == ends if (backend, method) != ("eager", "static") else found == ends - {(-largest, largest)}


def test_reduce_range_takes_no_bit_of_fewer() -> None:
    for bits, largest in ((8, 63), (7, 63), (6, 31), (4, 7)):
        assert weight_range(QuantConfig(weight=TensorSpec(bits=bits), reduce_range=True)) == (-largest, largest)


def test_signed_activations() -> None:
    assert activation_range(TensorSpec(bits=4, dtype="qint8")) == (-8, 7)
    assert activation_range(TensorSpec(bits=4, dtype="quint8")) == (0, 15)


# ---- the int8 model


def integers_of(graph_module: fx.GraphModule, x: torch.Tensor) -> list[torch.Tensor]:
    """All integers that are left for the next step while a converted graph or its neutral form runs."""
    found: list[torch.Tensor] = []

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            clamped = any(user.target is torch.clamp for user in n.users)
            if n.op != "get_attr" and isinstance(value, torch.Tensor) and not clamped:
                if value.is_quantized:
                    found.append(value.int_repr())
                elif value.dtype is torch.uint8:
                    found.append(value)
            return value

    with torch.no_grad():
        Watching(graph_module).run(x)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 6])
def test_values_beyond_the_range_are_clamped(backend: Any, bits: int) -> None:
    """Kernels saturate at 255: with 4 bits a value beyond the range would be an integer that is none of the 16."""
    torch.manual_seed(0)
    own = config(4, bits, backend=backend)
    prepared = calibrated(settle(Residual()), images(), config=own)
    far = 3 * images(seed=1)
    int8, neutral = convert(prepared), reference(prepared)
    seen = [integers_of(module, far) for module in (int8, neutral)]
    for integers in seen:
        assert len(integers) >= 5
        assert {int(x.max()) for x in integers} <= set(range(2**bits))
        assert max(int(x.max()) for x in integers) == 2**bits - 1
    with torch.no_grad():
        expected, found = neutral(far), int8(far)
    # where a sum is on a tie, kernels round otherwise: seldom, but one step of 4 bits is large
    assert decibels(expected, found) > 25
    clipping = int(min(min(integers_of(neutral, far), key=lambda x: int(x.min())).flatten()))
    assert clipping == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_the_int8_model_lie_in_their_range(backend: Any) -> None:
    torch.manual_seed(0)
    prepared = calibrated(settle(Residual()), images(), config=config(3, 8, backend=backend))
    stored = [b for b in qdq(prepared).buffers() if b.dtype is torch.int8]
    assert len(stored) == 6
    assert all(int(b.abs().max()) == 3 for b in stored)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_by_pattern_and_by_type(backend: Any) -> None:
    torch.manual_seed(0)
    layers = (
        LayerConfig(type="torch.nn.Linear", weight=TensorSpec(bits=5)),
        LayerConfig(name="blocks.0.*", weight=TensorSpec(bits=2), activation=TensorSpec(bits=6)),
    )
    prepared = calibrated(settle(Residual()), images(), config=config(4, 8, backend=backend, layers=layers))
    program = to_program(qdq(prepared), (images(2),), ())
    largest = {
        name.removeprefix("module.").removesuffix(".weight"): int(value.abs().max())
        for name, value in program.state_dict.items()
        if value.dtype is torch.int8
    }
    assert largest == {"stem": 7, "blocks.0.conv1": 1, "blocks.0.conv2": 1, "blocks.1.conv1": 7, "blocks.1.conv2": 7,
                       "fc": 15}  # fmt: skip
    ends = {node.args[4] for node in program.graph.nodes if node.target is QUANTIZE}
    assert ends == {63, 255}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["auto", "learned"])
def test_training_rounds_to_fewer_bits(backend: Any, rounding: Any) -> None:
    torch.manual_seed(0)
    spec = TensorSpec(bits=4, fake_quantize=rounding)
    model = settle(Residual())
    settings = QuantConfig(backend=backend, weight=spec, activation=spec, reduce_range=False)
    prepared = prepare(model, settings, method="qat", example_inputs=images(2))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for seed in range(4):
        optimizer.zero_grad()
        prepared(images(seed=seed)).square().mean().backward()
        optimizer.step()
    prepared.eval()
    for name, module in observers(prepared).items():
        if not sees_weights(prepared, name):
            module.disable_observer()  # type: ignore[operator]
    int8, neutral = convert(prepared), reference(prepared)
    far = 3 * images(seed=9)
    for module in (int8, neutral):
        assert max(int(x.max()) for x in integers_of(module, far)) == 15
    with torch.no_grad():
        assert decibels(neutral(far), int8(far)) > 25
        # eager mode rounds what a pool gives in the int8 model alone
        assert decibels(prepared(images()), neutral(images())) > (10 if backend == "eager" else 25)


# ---- files


@pytest.mark.parametrize("backend", ["fx", "pt2e"])
def test_files_with_weights_of_4_bits(tmp_path: Path, backend: Any) -> None:
    """Half as large in ONNX and OpenVINO, the same integers, the same int8 kernels."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, sizes, shown, x = Wide().eval(), {}, {}, images(16)
    for bits in (8, 4):
        prepared = calibrated(model, x, config=config(bits, backend=backend))
        formats = ("onnx", "openvino", "pt2" if backend == "pt2e" else "torchscript")
        written = export(prepared, None, ExportConfig(directory=str(tmp_path / str(bits)), formats=formats), x)
        for name, path in written.items():
            sizes[bits, name] = sum(file.stat().st_size for file in files_of(path))
            shown[bits, name] = kernels(path)
            with torch.no_grad():
                assert decibels(reference(prepared)(x[:8]), load(path)(x[:8])) > 30
            metadata = read_metadata(path)["bits"]
            small = bits == 4 and name in ("onnx", "openvino")
            assert metadata == {"weights": [bits], "activations": [8], "weights_stored": "int4" if small else "int8"}
    for name in ("onnx", "openvino"):
        # the graph and the scales are the same, and a tenth of the file
        assert 0.5 <= sizes[4, name] / sizes[8, name] < 0.6
        assert (shown[4, name].int8, shown[4, name].floating) == (shown[8, name].int8, shown[8, name].floating)
    assert shown[4, "onnx"].int8 >= 3
    file = onnx.load(str(tmp_path / "4" / "model.onnx"))
    onnx.checker.check_model(file)
    assert {i.version for i in file.opset_import if i.domain == ""} == {21}
    small = [tensor for tensor in file.graph.initializer if tensor.data_type == onnx.TensorProto.INT4]
    assert len(small) == 4
    assert {onnx.numpy_helper.to_array(t).astype(np.int8).max() for t in small} == {7}
    assert 'element_type="i4"' in (tmp_path / "4" / "model.xml").read_text()


@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("name", ["onnx", "openvino", "pt2"])
def test_files_clamp_activations(tmp_path: Path, bits: int, name: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = images()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 5))
    prepared = calibrated(net.eval(), x, config=config(8, bits))
    path = export(prepared, None, ExportConfig(directory=str(tmp_path), formats=(name,)), x)[name]
    far = 2 * images(seed=1)
    program = laid_out(to_program(qdq(prepared), (x[:2],), ()), LAYOUTS[name])
    with torch.no_grad():
        expected = program.module(check_guards=False)(far)
        for node in program.graph.nodes:
            if node.target in (QUANTIZE, DEQUANTIZE):
                node.args = (*node.args[:4], 255, *node.args[5:])
        program.graph_module.recompile()
        unclamped = program.module(check_guards=False)(far)
    found = load(path)(far)
    assert decibels(expected, found) > 20
    assert decibels(expected, found) > decibels(expected, unclamped) + 6


def test_a_file_of_few_weights_in_4_bits(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    layers = (LayerConfig(name="fc", weight=TensorSpec(bits=4)),)
    torch.manual_seed(0)
    prepared = calibrated(Wide().eval(), images(16), config=config(layers=layers))
    path = export(prepared, None, ExportConfig(directory=str(tmp_path), formats=("onnx",)), images(16))["onnx"]
    kinds = [tensor.data_type for tensor in onnx.load(str(path)).graph.initializer if len(tensor.dims) > 1]
    assert sorted(kinds) == sorted([onnx.TensorProto.INT8] * 3 + [onnx.TensorProto.INT4])
    with torch.no_grad():
        assert decibels(reference(prepared)(images(4)), load(path)(images(4))) > 30


@PROPERTY
@given(st.lists(st.integers(-8, 7), min_size=1, max_size=9))
def test_packing_is_that_of_onnx(values: list[int]) -> None:
    onnx = pytest.importorskip("onnx")
    array = np.array(values, np.int8)
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, array.shape, packed(array).tobytes(), raw=True)
    assert onnx.numpy_helper.to_array(tensor).astype(np.int8).tolist() == values
    assert fits(array)
    assert not fits(np.array([*values, 8]))


def test_the_report_says_so(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    settings = ExportConfig(directory=str(tmp_path), formats=("torchscript", "onnx"))
    callback = PostTrainingQuantization(config=config(4, 6), export=settings)
    trainer(callback).validate(Classifier(convnet()), datamodule=Digits(), verbose=False)
    assert callback.report is not None
    assert callback.report.notes == [
        "Weights have 4 bits. onnx: those of 4 or fewer are stored in 4 bits. torchscript: stored in 8 bits, with the "
        "values of fewer, and no smaller.",
        "Activations have 6 bits: kernels compute with 8, and are held to the values of fewer.",
    ]


# ---- what cannot be


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "4"])
def test_no_such_number(bits: Any) -> None:
    with pytest.raises(ConfigError, match=exactly(f"TensorSpec(bits={bits!r}): give a whole number from 2 to 8.")):
        TensorSpec(bits=bits)


@pytest.mark.parametrize("make", [QuantConfig, lambda **own: LayerConfig(name="a", **own)])
def test_too_few_for_activations(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"\(activation.bits=3\): activations have 4 to 8 bits, because one scale "):
        make(activation=TensorSpec(bits=3))


@pytest.mark.parametrize("where", ["all", "one"])
def test_dynamic_has_8(where: str) -> None:
    spec = TensorSpec(bits=4)
    own = QuantConfig(weight=spec) if where == "all" else QuantConfig(layers=(LayerConfig(name="a", weight=spec),))
    text = (
        "TensorSpec(bits=4) with method='dynamic': it takes the ranges of activations when they are computed, of 8 "
        "bits, and its files store weights in 8 bits. Leave bits out, or use method='static' or "
        "QuantizationAwareTraining."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        PostTrainingQuantization(own, method="dynamic")


def test_torchscript_has_8() -> None:
    text = (
        "TensorSpec(bits=5) with backend='torchscript': TorchScript graph mode quantizes to the 8 bits of its kernels, "
        "and clamps to no smaller range. Leave bits out, or use backend='fx', 'eager' or 'pt2e'."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        PostTrainingQuantization(QuantConfig(backend="torchscript", activation=TensorSpec(bits=5)))
    QuantizationAwareTraining(QuantConfig(activation=TensorSpec(bits=5)))


class Blind(own_classes.HalfRange):
    """Takes no range of integers."""

    def __init__(self, dtype: torch.dtype = torch.quint8) -> None:
        super().__init__(dtype=dtype)


def test_an_observer_that_is_not_told() -> None:
    spec = TensorSpec(bits=4, observer=f"{__name__}.Blind")
    text = (
        "TensorSpec(bits=4) with Blind: it takes no quant_min and quant_max, by which it would be told the range of "
        "fewer bits. Let its __init__ take them and pass them on, or leave bits at 8."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        prepare(nn.Linear(4, 3), QuantConfig(activation=spec), method="static", example_inputs=torch.randn(2, 4))


@pytest.mark.parametrize("entry", [{"name": "0"}, {"type": "torch.nn.Embedding"}])
def test_embeddings_have_8(entry: dict[str, str]) -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3))
    layer = LayerConfig(**entry, weight=TensorSpec(bits=4))
    with pytest.raises(ConfigError, match=r"weight.bits=4\): the rows of embeddings have 8 bits, for which alone"):
        prepare(net, QuantConfig(layers=(layer,)), method="static", example_inputs=torch.arange(4))
