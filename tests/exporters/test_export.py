"""Files: each is loaded again and compared; all of an export appear, or none."""

from __future__ import annotations

import collections
import copy
import functools
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Branching, Mlp, Residual, TwoInputs, calibrated, decibels, settle
from torch import nn
from torch.export.graph_signature import TensorArgument

from lightning_quant import (
    CalibrationError,
    ConfigError,
    ExportConfig,
    ExportError,
    QuantConfig,
    convert,
    export,
    exporters,
    load,
    prepare,
)
from lightning_quant.backends import each_graph
from lightning_quant.config import SUPPORT
from lightning_quant.exporters import MIN_SQNR_DB, check_writable, onnx, qdq
from lightning_quant.exporters.writing import EXPORTERS

FORMATS = ("torchscript", "onnx")


class TupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        y = self.fc(x)
        return y, [torch.relu(y), y.argmax(1)]


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, batch: dict[str, torch.Tensor], pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.fc(batch["x"] + pair[0]) + pair[1]


def residual(size: int) -> tuple[Any, ...]:
    return (torch.randn(size, 3, 8, 8),)


def rows(size: int) -> tuple[Any, ...]:
    return (torch.randn(size, 4),)


#: name -> (model, positional data of a batch size, names of the inputs)
CASES: dict[str, tuple[Any, Any, list[str]]] = {
    "residual": (lambda: settle(Residual()), residual, ["x"]),
    "mlp": (Mlp, rows, ["x"]),
    "two inputs": (TwoInputs, lambda size: (*rows(size), *rows(size)), ["a", "b"]),
    "tuple": (TupleOutput, rows, ["x"]),
    "containers": (
        Containers,
        lambda size: ({"x": torch.randn(size, 4)}, (torch.randn(size, 4), torch.randn(size, 3))),
        ["batch", "pair"],
    ),
}
#: A container of several tensors is several inputs of a file.
FLAT_NAMES = {"containers": ["batch", "pair_0", "pair_1"]}


class Exported:
    """A case with its prepared graph and its files."""

    def __init__(self, name: str, directory: Path) -> None:
        torch.manual_seed(0)
        make, self.data, self.inputs = CASES[name]
        self.name = name
        self.model = make().eval()
        data = self.data(32)
        self.example = dict(zip(self.inputs, data, strict=True))
        self.prepared = prepare(self.model, method="static", example_inputs=self.example)
        with torch.no_grad():
            self.prepared(*data)
        self.directory = directory
        self.paths = export(
            self.prepared, None, ExportConfig(directory=directory, formats=FORMATS), example_inputs=self.example
        )


@pytest.fixture(scope="module")
def export_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    return functools.cache(lambda name: Exported(name, tmp_path_factory.mktemp("files")))


@pytest.fixture(params=list(CASES))
def exported(request: pytest.FixtureRequest, export_case: Callable[[str], Exported]) -> Exported:
    return export_case(request.param)


@pytest.fixture
def convnet(export_case: Callable[[str], Exported]) -> Exported:
    return export_case("residual")


def leaves(output: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_flatten(output)[0]


def structure(output: Any) -> Any:
    return torch.utils._pytree.tree_flatten(output)[1]


# ---- what was written


def test_the_files_of_an_export(exported: Exported) -> None:
    assert exported.paths == {
        "torchscript": exported.directory / "model.ts",
        "onnx": exported.directory / "model.onnx",
    }
    assert sorted(path.name for path in exported.directory.iterdir()) == ["model.onnx", "model.ts"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_loaded_file_computes_what_was_exported(exported: Exported, name: str, size: int) -> None:
    loaded = load(exported.paths[name])
    program = convert(exported.prepared) if name == "torchscript" else each_graph(exported.prepared, None, qdq)
    data = exported.data(size)
    with torch.no_grad():
        expected, actual = program(*data), loaded(*data)
    assert structure(actual) == structure(expected)
    for ours, theirs in zip(leaves(expected), leaves(actual), strict=True):
        assert theirs.shape == ours.shape
        assert theirs.dtype == ours.dtype
        if not ours.is_floating_point():
            assert (ours == theirs).float().mean() > 0.9
        elif name == "torchscript":  # the same kernels
            assert torch.equal(ours, theirs)
        else:  # ONNX Runtime sums integers where torch sums floats: a tie may round to the next step
            assert decibels(ours, theirs) > 35


@pytest.mark.parametrize("name", FORMATS)
def test_a_loaded_file_is_near_the_float_model(exported: Exported, name: str) -> None:
    expected, actual = exported.model(**exported.example), load(exported.paths[name])(**exported.example)
    for ours, theirs in zip(leaves(expected), leaves(actual), strict=True):
        if ours.is_floating_point():
            assert decibels(ours, theirs) > MIN_SQNR_DB


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_have_the_names_of_the_parameters(exported: Exported, name: str) -> None:
    loaded, data = load(exported.paths[name]), exported.data(3)
    by_name = dict(zip(exported.inputs, data, strict=True))
    expected, actual = loaded(*data), loaded(**dict(reversed(by_name.items())))
    assert all(torch.equal(a, b) for a, b in zip(leaves(expected), leaves(actual), strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_the_metadata_of_a_file(exported: Exported, name: str) -> None:
    metadata = load(exported.paths[name]).metadata
    data = leaves(exported.data(32))
    assert metadata["format"] == name
    assert metadata["format_version"] == 1
    assert metadata["method"] == "static"
    assert metadata["inputs"] == FLAT_NAMES.get(exported.name, exported.inputs)
    assert list(metadata["parameters"]) == exported.inputs
    assert metadata["input_shapes"] == [list(x.shape) for x in data]
    assert metadata["input_dtypes"] == ["torch.float32"] * len(data)
    assert metadata["torch"] == torch.__version__
    assert metadata["config"]["backend"] == "fx"
    # what was "auto" is what this machine chose
    assert metadata["config"]["engine"] in torch.backends.quantized.supported_engines
    assert metadata["config"]["reduce_range"] in (True, False)


def test_metadata_can_be_read_without_this_package(convnet: Exported) -> None:
    onnx_package = pytest.importorskip("onnx")
    with zipfile.ZipFile(convnet.paths["torchscript"]) as archive:
        name = next(name for name in archive.namelist() if name.endswith("extra/lightning_quant.json"))
        native = json.loads(archive.read(name))
    props = {prop.key: prop.value for prop in onnx_package.load(convnet.paths["onnx"]).metadata_props}
    # TorchScript has no shapes: what it takes depends on what it computes with them
    own = {"format": "torchscript", "shapes": [[None] * 4]}
    assert native == {**json.loads(props["lightning_quant"]), **own}


def test_the_onnx_file_is_valid_and_names_its_inputs(exported: Exported) -> None:
    onnx_package = pytest.importorskip("onnx")
    model = onnx_package.load(exported.paths["onnx"])
    onnx_package.checker.check_model(model, full_check=True)
    assert all(value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input)
    names = [value.name for value in model.graph.input]
    assert names == FLAT_NAMES.get(exported.name, exported.inputs)


def test_the_onnx_file_tells_nothing_of_the_machine(convnet: Exported) -> None:
    content = convnet.paths["onnx"].read_bytes()
    for text in (str(Path(exporters.__file__).parent), str(Path(__file__).parent), str(convnet.directory)):
        assert text.encode() not in content


def kernels_of_onnx_runtime(path: Path, folder: Path) -> collections.Counter[str]:
    """Operator that ONNX Runtime runs -> how often."""
    onnx_package = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx_package.load(folder / "optimized.onnx").graph.node)


def test_onnx_runtime_fuses_every_layer_into_an_int8_kernel(convnet: Exported, tmp_path: Path) -> None:
    counts = kernels_of_onnx_runtime(convnet.paths["onnx"], tmp_path)
    assert counts["QLinearConv"] == 5
    assert counts["QGemm"] + counts["QLinearMatMul"] == 1
    assert counts["QLinearAdd"] == 2
    assert not counts.keys() & {"Conv", "Gemm", "MatMul", "Add", "BatchNormalization"}, counts


def test_a_layer_that_writes_floats_is_an_int8_kernel_of_onnx_runtime(tmp_path: Path) -> None:
    """Also behind a flattening, through which its input comes."""
    head = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(4, 3, 8, 8)
    prepared = calibrated(head, x, config=QuantConfig(backend="pt2e"))
    paths = export(prepared, None, ExportConfig(directory=tmp_path, formats=("onnx",)), x)
    counts = kernels_of_onnx_runtime(paths["onnx"], tmp_path)
    assert counts["QGemm"] == 1
    assert not counts.keys() & {"Gemm", "MatMul"}, counts


def test_weights_are_stored_in_int8(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    prepared = calibrated(model, torch.randn(32, 256))
    paths = export(prepared, None, ExportConfig(directory=tmp_path, formats=FORMATS), torch.randn(32, 256))
    float_bytes = sum(p.numel() * 4 for p in model.parameters())
    for path in paths.values():
        assert path.stat().st_size <= 0.30 * float_bytes


@pytest.mark.parametrize(("method", "formats"), [(m, formats) for (b, m), formats in SUPPORT.items() if b == "fx"])
def test_every_cell_of_the_support_table_writes_its_files(method: Any, formats: Any, tmp_path: Path) -> None:
    # what has to be compiled has a test of its own
    formats = tuple(name for name in formats if name != "aoti")
    model, x = Mlp().eval(), torch.randn(16, 4)
    paths = export(calibrated(model, x, method=method), None, ExportConfig(directory=tmp_path, formats=formats), x)
    assert tuple(paths) == formats
    for path in paths.values():
        loaded = load(path)
        assert loaded.metadata["method"] == method
        assert decibels(model(x), loaded(x)) > 25


def test_a_model_with_several_kinds_of_layers(tmp_path: Path) -> None:
    """Files of what the exporters translate by hand: groups, transposed, functional, reflected, normalised."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reflect = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
            self.grouped = nn.Conv2d(4, 8, 3, groups=4, stride=2)
            self.norm = nn.GroupNorm(2, 8)
            self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
            self.weight = nn.Parameter(torch.randn(6, 4, 1, 1))
            self.fc = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(nn.functional.hardswish(self.grouped(torch.relu(self.reflect(x)))))
            y = nn.functional.conv2d(torch.cat([self.up(y)], 1), self.weight)
            return self.fc(y.mean((2, 3)) * 3).softmax(-1)

    model, x = Many().eval(), torch.randn(16, 3, 8, 8)
    paths = export(calibrated(model, x), None, ExportConfig(directory=tmp_path, formats=FORMATS), x)
    for path in paths.values():
        for size in (1, 5):
            assert load(path)(torch.randn(size, 3, 8, 8)).shape == (size, 2)
        assert decibels(model(x), load(path)(x)) > 25


@pytest.mark.torchvision
def test_the_files_of_resnet18_have_a_quarter_of_its_size(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision").models
    model = settle(models.resnet18(weights=None), (8, 3, 64, 64), steps=2)
    x = torch.randn(8, 3, 64, 64)
    paths = export(calibrated(model, x), None, ExportConfig(directory=tmp_path, formats=FORMATS), x)
    float_bytes = sum(p.numel() * 4 for p in model.parameters())
    for path in paths.values():
        assert path.stat().st_size <= 0.30 * float_bytes
        # twenty layers with random weights: torch's own default config gives 18
        assert decibels(model(x), load(path)(x)) > 15


# ---- all or nothing


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def earlier(tmp_path: Path) -> Iterator[Path]:
    """A folder with files of an earlier run, which must come out as they went in."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("model.ts", "model.onnx", "report.json", "notes.txt"):
        (folder / name).write_text(f"earlier {name}")
    before = contents(folder)
    yield folder
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)


def both(folder: Path) -> ExportConfig:
    return ExportConfig(directory=str(folder), formats=FORMATS)


def test_an_exporter_that_raises_leaves_the_folder(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(program: torch.export.ExportedProgram, path: Path, metadata: Any) -> None:
        path.write_text("half of a file")
        raise RuntimeError("disk full")

    monkeypatch.setitem(EXPORTERS, "onnx", broken)
    x = torch.randn(8, 4)
    with pytest.raises(
        ExportError, match=r"^onnx export of forward failed: RuntimeError: disk full\. Leave the format"
    ):
        export(calibrated(Mlp(), x), None, both(earlier), x)


def multiplied(program: torch.export.ExportedProgram, factor: float) -> torch.export.ExportedProgram:
    """A copy of a program of one output, which it gives times ``factor``."""
    copied = copy.deepcopy(program)
    graph = copied.graph
    output = next(node for node in graph.nodes if node.op == "output")
    (value,) = output.args[0]
    with graph.inserting_before(output):
        product = graph.call_function(torch.ops.aten.mul.Tensor, (value, factor))
    product.meta = dict(value.meta)
    output.args = ((product,),)
    copied.graph_signature.output_specs[0].arg = TensorArgument(name=product.name)
    copied.graph_module.recompile()
    return copied


def test_a_file_that_computes_something_else_is_not_kept(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(program: torch.export.ExportedProgram, path: Path, metadata: Any) -> None:
        onnx.export(multiplied(program, 1.1), path, metadata)

    monkeypatch.setitem(EXPORTERS, "onnx", wrong)
    x = torch.randn(8, 4)
    # an error of a tenth is 20 dB; where the numbers are rounded once more it is a little less
    text = (
        r"^onnx export of forward: the file computes something else than the model that it was written from: "
        r"(19\.\d|20\.0) dB, where at least 25 dB are needed\. The first layer that differs is first\. "
        r"It was not kept\. Leave the format out with "
        r"ExportConfig\(formats=\.\.\.\), or find the layer with QuantConfig\(skip=\.\.\.\)\.$"
    )
    with pytest.raises(ExportError, match=text):
        export(calibrated(Mlp(), x), None, both(earlier), x)
    assert MIN_SQNR_DB == 25


def test_a_file_that_cannot_be_loaded_is_not_kept(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def truncated(program: torch.export.ExportedProgram, path: Path, metadata: Any) -> None:
        onnx.export(program, path, metadata)
        path.write_bytes(path.read_bytes()[:100])

    monkeypatch.setitem(EXPORTERS, "onnx", truncated)
    x = torch.randn(8, 4)
    text = "onnx export of forward: the file that was just written cannot be loaded: "
    with pytest.raises(ExportError, match=f"^{text}"):
        export(calibrated(Mlp(), x), None, both(earlier), x)


Output = collections.namedtuple("Output", "y z")


def test_a_file_gives_tuples_and_dicts_in_the_place_of_other_containers(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> Output:
            return Output(self.fc(x), x)

    model, x = Named(), torch.randn(8, 4)
    prepared = calibrated(model, x)
    assert isinstance(prepared(x), Output)
    assert isinstance(convert(prepared)(x), Output)
    for path in export(prepared, None, both(tmp_path), x).values():
        y, z = load(path)(x)
        assert decibels(model(x).y, y) > 25
        assert torch.equal(z, x)


def test_an_output_of_integers_alone(tmp_path: Path) -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x).argmax(1)

    model, x = Classes(), torch.randn(64, 4)
    with pytest.raises(ExportError, match=r"integers only.*Return the scores, and take argmax outside of forward"):
        export(calibrated(model, x), None, both(tmp_path), x)
    assert not list(tmp_path.glob("model.*"))


# ---- what is refused before anything is written


def test_export_wants_real_input() -> None:
    text = "export(example_inputs=None): give real input; every file is compared with the model on it."
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        export(calibrated(Mlp(), torch.randn(2, 4)))
    assert list(Path().iterdir()) == []


def test_a_model_that_decides_by_its_data_has_no_file() -> None:
    x = torch.randn(8, 4).abs()
    prepared = prepare(Branching(), method="static", example_inputs=x)
    prepared(x)
    text = "forward: a file cannot hold it, because its code decides by the values of its data, or does what "
    with pytest.raises(ExportError, match=f"^{re.escape(text)}"):
        export(prepared, None, None, x)


def test_a_model_that_decides_by_its_sizes_has_one(tmp_path: Path) -> None:
    class BySize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = Mlp(), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            if x.shape[-1] == 3:
                x = torch.relu(x)
            return self.head(x)

    model, x = BySize(), torch.randn(8, 4)
    prepared = calibrated(model, x)
    assert not isinstance(prepared, torch.fx.GraphModule)  # torch.fx cannot follow the branch
    for path in export(prepared, None, both(tmp_path), x).values():
        assert decibels(model(x), load(path)(x)) > 25


def test_export_wants_a_calibrated_model() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(CalibrationError, match=r"^2 observers saw no data"):
        export(prepare(Mlp(), method="static", example_inputs=x), None, None, x)
    assert list(Path().iterdir()) == []


def test_export_with_another_config() -> None:
    x = torch.randn(8, 4)
    prepared = calibrated(Mlp(), x, config=QuantConfig(reduce_range=True))
    with pytest.raises(ConfigError, match=r"^convert was given QuantConfig\(.*but the model was prepared with"):
        export(prepared, QuantConfig(reduce_range=False), None, x)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(
            ConfigError, match=rf"^ExportConfig\(directory='{path}'\): cannot write there: .*Choose another folder\.$"
        ):
            check_writable(path)


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
