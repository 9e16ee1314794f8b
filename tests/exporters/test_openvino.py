"""OpenVINO files: int8 kernels in OpenVINO's own graph, any batch, inputs and outputs by name."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from models import Residual, TwoInputs, calibrated, decibels, settle
from torch import nn

from lightning_quant import ArtifactError, ExportConfig, MissingExtraError, QuantConfig, convert, export, load
from lightning_quant.analysis.kernels import kernels
from lightning_quant.runtime import METADATA_KEY
from lightning_quant.runtime.of_openvino import ANY, SHAPES

openvino = pytest.importorskip("openvino")

CONFIG = QuantConfig(reduce_range=False)


class Encoder(nn.Module):
    """A block of a transformer over ``(N, 6, 16)``."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x).mean(1))


class Lookup(nn.Module):
    """Takes integers and floats, gives a tuple of both."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, index: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.fc(self.table(index) + x)
        return y, y.argmax(1)


class File:
    """A model, its prepared graph and its file."""

    def __init__(self, model: nn.Module, folder: Path, *data: torch.Tensor, **named: torch.Tensor) -> None:
        self.model = model
        self.prepared = calibrated(model, *data, config=CONFIG, **named)
        names = [*named] if named else []
        example = dict(zip(("a", *names), (*data, *named.values()), strict=True)) if named else data
        self.path = export(
            self.prepared, None, ExportConfig(directory=folder, formats=("openvino",)), example_inputs=example
        )["openvino"]
        self.loaded = load(self.path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], File]:
    def make(name: str) -> File:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("files")
        if name == "convnet":
            return File(settle(Residual()), folder, torch.randn(16, 3, 8, 8))
        if name == "encoder":
            return File(Encoder().eval(), folder, torch.randn(16, 6, 16))
        if name == "lookup":
            return File(Lookup().eval(), folder, torch.arange(16) % 10, torch.randn(16, 4))
        return File(TwoInputs().eval(), folder, torch.randn(16, 4), b=torch.randn(16, 4))

    return functools.cache(make)


@pytest.fixture
def convnet(files: Callable[[str], File]) -> File:
    return files("convnet")


def copied(file: File, folder: Path) -> Path:
    for suffix in (".xml", ".bin"):
        shutil.copy(file.path.with_suffix(suffix), folder)
    return folder / file.path.name


# ---- kernels


@pytest.mark.parametrize(("name", "products"), [("convnet", 6), ("encoder", 5), ("two", 2)])
def test_every_layer_is_an_int8_kernel(files: Callable[[str], File], name: str, products: int) -> None:
    found = kernels(files(name).path)
    assert found is not None
    # "two" calls a layer twice on the same values, of which OpenVINO makes one
    assert (found.int8, found.floating) == (products, 0), found.kinds


def test_the_residual_add_is_inside_of_a_kernel(convnet: File) -> None:
    found = kernels(convnet.path)
    assert not any(kind.startswith(("Eltwise", "Subgraph")) for kind in found.kinds), found.kinds
    assert found.conversions == 1  # of the input alone


class Excited(nn.Module):
    """Squeeze-and-excitation as MobileNetV3 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.squeeze, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.last(x * nn.functional.hardsigmoid(self.squeeze(x.mean((2, 3), keepdim=True))))


def test_hard_sigmoids_are_what_openvino_fuses(tmp_path: Path) -> None:
    x = torch.randn(16, 3, 9, 9)
    file = File(Excited().eval(), tmp_path, x)
    kinds = {layer.get("type") for layer in ElementTree.parse(file.path).iter("layer")}
    assert "HSigmoid" in kinds
    assert "HardSigmoid" not in kinds
    found = kernels(file.path)
    assert found is not None
    assert not any("Math" in kind for kind in found.kinds), found.kinds


def test_a_hard_sigmoid_with_a_slope_of_its_own_stays() -> None:
    from openvino import Model, opset13

    from lightning_quant.exporters.openvino_rewrites import rewrite

    x = opset13.parameter([1, 4], np.float32)
    slope, offset = (opset13.constant(value, np.float32) for value in (0.2, 0.5))
    model = Model([opset13.hard_sigmoid(x, slope, offset)], [x])
    rewrite(model)
    assert [node.get_type_name() for node in model.get_ops()].count("HardSigmoid") == 1


class Tokens(nn.Module):
    """The mean over tokens of a residual block, with an offset for each channel in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.offset = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        return self.head((self.offset + (x + self.second(x))).mean(1))


def _biases_alike(value: float | None) -> nn.Sequential:
    """Linear layers without biases, or with the same one for each channel."""
    net = nn.Sequential(*(nn.Linear(32, width, bias=value is not None) for width in (32, 32)), nn.Linear(32, 8))
    for layer in net:
        if layer.bias is not None:
            nn.init.constant_(layer.bias, value or 0.0)
    return nn.Sequential(net[0], nn.ReLU(), net[1], nn.ReLU(), net[2]).eval()


def _padded_average() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(3, 2, padding=1), nn.Conv2d(8, 4, 1)).eval()


SILENTLY_WRONG: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a mean over tokens": (lambda: Tokens().eval(), (7, 16)),
    "an average that counts its padding": (_padded_average, (3, 9, 9)),
    "linear layers without biases": (lambda: _biases_alike(None), (32,)),
    "linear layers with biases of 0": (lambda: _biases_alike(0.0), (32,)),
    "linear layers with biases that are one": (lambda: _biases_alike(0.5), (32,)),
}


@pytest.mark.parametrize("name", SILENTLY_WRONG)
def test_what_openvino_itself_computes_wrongly(name: str, tmp_path: Path) -> None:
    """With two threads: the number decides which kernels it takes."""
    make, shape = SILENTLY_WRONG[name]
    torch.manual_seed(0)
    model = make()
    prepared = calibrated(model, torch.randn(64, *shape), config=CONFIG)
    path = export(prepared, None, ExportConfig(directory=tmp_path, formats=("openvino",)), torch.randn(3, *shape))
    converted = convert(prepared)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loaded = load(path["openvino"])
        for size in (1, 2, 4, 8, 16):
            x = torch.randn(size, *shape)
            with torch.no_grad():
                assert decibels(converted(x), loaded(x)) > 25, size
    finally:
        torch.set_num_threads(before)


def test_what_it_computes_rightly_stays() -> None:
    from openvino import Model, opset13

    from lightning_quant.exporters.openvino_rewrites import rewrite

    x = opset13.parameter([2, 4, 8, 8], np.float32)
    low, high = opset13.constant(np.float32(0)), opset13.constant(np.float32(1))
    positive = opset13.fake_quantize(x, low, high, low, high, 256)
    pooled = opset13.avg_pool(positive, [1, 1], [1, 1], [1, 1], [3, 3], False)
    pixels = opset13.reduce_mean(pooled, opset13.constant([2, 3]), keep_dims=False)
    weight = opset13.convert(opset13.constant(np.ones((4, 4), np.int8)), np.float32)
    product = opset13.matmul(pixels, weight, False, True)
    with_bias = opset13.add(product, opset13.constant(np.arange(4, dtype=np.float32)))
    to_one = opset13.convert(opset13.constant(np.ones((1, 4), np.int8)), np.float32)
    model = Model([opset13.matmul(with_bias, to_one, False, True)], [x])
    before = [node.get_type_name() for node in model.get_ordered_ops()]
    rewrite(model)
    assert [node.get_type_name() for node in model.get_ordered_ops()] == before


@pytest.mark.parametrize("name", ["convnet", "encoder"])
def test_weights_are_int8_without_zero_points(files: Callable[[str], File], name: str) -> None:
    file = files(name)
    model = openvino.Core().read_model(str(file.path))
    assert not [op for op in model.get_ops() if op.get_type_name() == "Subtract" and _is_weight(op.input_value(0))]
    sizes = {op.get_element_type().get_type_name(): 0 for op in model.get_ops() if op.get_type_name() == "Constant"}
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            sizes[op.get_element_type().get_type_name()] += op.get_data().size
    weights = sum(p.numel() for p in file.prepared.parameters() if p.dim() > 1)
    # symmetric weights are signed; nothing of them is left in float
    assert sizes["i8"] == weights
    assert sizes["f32"] < weights / 2
    assert "f16" not in sizes


def _is_weight(value: Any) -> bool:
    node = value.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and node.get_data().ndim > 1


def test_zero_points_that_are_not_zero_stay(tmp_path: Path) -> None:
    from lightning_quant import TensorSpec

    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(32, 8)
    with torch.no_grad():
        model[0].weight.abs_()
    config = QuantConfig(weight=TensorSpec(qscheme="per_channel_affine"), reduce_range=False)
    prepared = calibrated(model.eval(), x, config=config)
    path = export(prepared, None, ExportConfig(directory=tmp_path, formats=("openvino",)), x)["openvino"]
    assert decibels(model(x), load(path)(x)) > 30


# ---- inputs and outputs


@pytest.mark.parametrize("name", ["convnet", "encoder", "two", "lookup"])
def test_the_file_itself_has_the_names_dtypes_and_free_batch(files: Callable[[str], File], name: str) -> None:
    file = files(name)
    model = openvino.Core().read_model(str(file.path))
    expected = {
        "convnet": (["x"], ["f32"], ["output"], ["f32"]),
        "encoder": (["x"], ["f32"], ["output"], ["f32"]),
        "two": (["a", "b"], ["f32", "f32"], ["sum", "left"], ["f32", "f32"]),
        "lookup": (["index", "x"], ["i64", "f32"], ["output_0", "output_1"], ["f32", "i64"]),
    }[name]
    found = [
        [getter(value) for value in values]
        for values in (model.inputs, model.outputs)
        for getter in (lambda value: value.get_any_name(), lambda value: value.get_element_type().get_type_name())
    ]
    assert found == list(expected)
    assert all(value.get_partial_shape()[0].is_dynamic for value in model.inputs)
    metadata = file.loaded.metadata
    assert (metadata["tensors"], metadata["outputs"]) == (expected[0], expected[2])
    assert all(shape[0] is None for shape in metadata["shapes"])


def test_a_dict_by_position_and_by_name(files: Callable[[str], File]) -> None:
    file, (a, b) = files("two"), torch.randn(2, 5, 4)
    with torch.no_grad():
        expected = file.model(a, b=b)
    for output in (file.loaded(a, b), file.loaded(a, b=b), file.loaded(b=b, a=a)):
        assert output.keys() == expected.keys()
        for key, value in expected.items():
            assert output[key].dtype == value.dtype
            assert decibels(value, output[key]) > 25


def test_integers_go_in_and_come_out(files: Callable[[str], File]) -> None:
    file, index, x = files("lookup"), torch.tensor([3, 9, 0]), torch.randn(3, 4)
    y, best = file.loaded(index, x)
    expected, _ = file.model(index, x)
    assert decibels(expected, y) > 25
    assert best.dtype == torch.int64
    assert torch.equal(best, y.argmax(1))


def test_outputs_are_the_callers(convnet: File) -> None:
    """The next call writes into the runtime's buffers again."""
    one, other = torch.randn(2, 2, 3, 8, 8)
    first = convnet.loaded(one)
    kept = first.clone()
    assert not torch.equal(convnet.loaded(other), kept)
    assert torch.equal(first, kept)


def test_an_input_that_is_not_contiguous(convnet: File) -> None:
    x = torch.randn(8, 8, 3, 4).permute(3, 2, 0, 1)
    assert not x.is_contiguous()
    assert torch.equal(convnet.loaded(x), convnet.loaded(x.contiguous()))


def test_inputs_are_not_changed(convnet: File) -> None:
    x = torch.randn(4, 3, 8, 8)
    before = x.clone()
    convnet.loaded(x)
    assert torch.equal(x, before)


# ---- shapes


def test_compiled_shapes_are_bounded_and_give_the_same(convnet: File) -> None:
    loaded = load(convnet.path)
    x = torch.randn(8, 3, 8, 8)
    whole = loaded(x)
    for size in range(1, 9):
        assert torch.equal(loaded(x[:size]), whole[:size])
    keys = list(loaded._requests)
    assert len(keys) == SHAPES + 1
    assert [shapes for _, shapes in keys[:SHAPES]] == [((size, 3, 8, 8),) for size in (8, 1, 2, 3)]
    assert keys[-1][1] == ANY
    for size in (8, 5, 1):
        assert torch.equal(loaded(x[:size]), whole[:size])
    assert list(loaded._requests) == keys


def test_another_number_of_threads_is_another_program(convnet: File) -> None:
    loaded, x = load(convnet.path), torch.randn(2, 3, 8, 8)
    threads = torch.get_num_threads()
    expected = loaded(x)
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(loaded(x), expected)
    finally:
        torch.set_num_threads(threads)
    assert {known for known, _ in loaded._requests} == {threads, threads + 1}


def test_a_copy_shares_what_is_compiled(convnet: File) -> None:
    loaded, x = load(convnet.path), torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(loaded)
    assert twin is not loaded
    assert twin.model is loaded.model
    assert torch.equal(twin(x), loaded(x))
    assert len(loaded._requests) == 1
    assert not twin.training
    assert copy.deepcopy(loaded.train()).training


def test_files_may_be_replaced_while_the_model_is_in_use(convnet: File, tmp_path: Path) -> None:
    path, x = copied(convnet, tmp_path), torch.randn(2, 3, 8, 8)
    loaded = load(path)
    path.with_suffix(".bin").write_bytes(b"")
    path.unlink()
    assert torch.equal(loaded(x), convnet.loaded(x))


# ---- files that cannot be read


def test_the_weights_are_missing(convnet: File, tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    shutil.copy(convnet.path, path)
    text = f"{path}: its weights, model.bin, are not beside it. Copy both files."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("suffix", [".xml", ".bin"])
def test_a_truncated_file(convnet: File, suffix: str, share: float, tmp_path: Path) -> None:
    path = copied(convnet, tmp_path)
    part = path.with_suffix(suffix)
    content = part.read_bytes()
    part.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        ArtifactError, match=rf"^{re.escape(str(path))}: cannot be read as OpenVINO IR, it is damaged or foreign: "
    ):
        load(path)


def test_ir_that_somebody_else_wrote(convnet: File, tmp_path: Path) -> None:
    path = copied(convnet, tmp_path)
    tree = ElementTree.parse(path)
    info = tree.getroot().find("rt_info")
    info.remove(info.find(METADATA_KEY))
    tree.write(path)
    text = f"{path}: not written by lightning_quant (it has no metadata). Load it with its own runtime."
    with pytest.raises(ArtifactError, match=f"^{re.escape(text)}$"):
        load(path)


def test_without_openvino(convnet: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    text = (
        "loading model.xml needs the package 'openvino', which is not installed. "
        "Install it with: pip install 'lightning-quant[openvino]'"
    )
    with pytest.raises(MissingExtraError, match=f"^{re.escape(text)}$"):
        load(convnet.path)
