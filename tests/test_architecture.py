"""Imports point one way: read with ``ast`` and held by rules, each shown to fail on a package that breaks it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
NAME = "lightning_quant"

#: Bottom to top. A module imports from its own layer and from those below; a subpackage counts as one module here.
LAYERS = (
    ("errors", "formatting"),
    (
        "custom",
        "structures",
        "_torch_ao",
        "_roots",
        "arguments",
        "scripted",
        "modes",
        "native",
        "range_search",
        "levels",
        "devices",
    ),
    ("config",),
    (
        "recipes",
        "balanced",
        "qat_modules",
        "qconfig",
        "fusion",
        "capture",
        "observers",
        "fake_quantize",
        "learned_scale",
        "learned_offset",
        "placement",
        "layers",
    ),
    ("backends",),
    (
        "phases",
        "ranks",
        "rank_steps",
        "team",
        "progress",
        "provenance",
        "scale_training",
        "oscillation",
        "batch_norms",
        "attachment",
        "exporters",
        "runtime",
        "analysis",
    ),
    (
        "evaluate",
        "samples",
        "inputs",
        "tuning",
        "report",
        "strategies",
        "precision",
        "averaging",
        "pruning",
        "distillation",
        "corrections",
    ),
    ("parts", "reestimation"),
    ("figures", "layer_reports"),
    ("report_plots",),
    ("report_page", "logging_to"),
    ("pipeline", "correcting"),
    ("from_checkpoint", "fallback"),
    ("within_size",),
    ("planning", "post_training"),
    ("diagnosis",),
    ("callbacks",),
    ("demo",),
    ("lightning_cli", "tables"),
    ("cli",),
    ("__init__",),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

KNOW_LIGHTNING = (
    "progress", "evaluate", "inputs", "averaging", "pruning", "tuning", "parts", "logging_to", "pipeline",
    "from_checkpoint", "fallback", "planning", "post_training", "callbacks", "demo", "lightning_cli", "cli",
)  # fmt: skip
LIGHTNING = ("pytorch_lightning", "lightning", "lightning_fabric")
# torch.quantization is the old name of torch.ao.quantization
TORCH_AO = ("torch.ao", "torch.quantization", "torchao")
HEAVY = ("onnx", "onnxruntime", "onnxscript", "openvino", "torchao", "matplotlib", "jinja2", "sklearn")


# ---- reading imports


@dataclass(frozen=True)
class Import:
    """One imported name: ``importer`` is a module of the package, ``imported`` any dotted name."""

    importer: str
    imported: str
    line: int
    at_module_level: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@dataclass(frozen=True)
class Package:
    """The modules of a package by dotted name, and every import in them."""

    modules: frozenset[str]
    imports: tuple[Import, ...]

    def internal(self) -> Iterator[tuple[Import, str]]:
        """The imports of the package's own modules, each with the module that it reads."""
        for found in self.imports:
            name = found.imported
            while name not in self.modules and "." in name:  # lightning_quant.config.near -> lightning_quant.config
                name = name.rpartition(".")[0]
            if name in self.modules:
                yield found, name


def room(module: str) -> str:
    """The name that a module has in ``LAYERS``: ``lightning_quant.backends.fx`` is in ``backends``."""
    return [*module.split("."), "__init__"][1]


def is_within(name: str, roots: tuple[str, ...]) -> bool:
    """Whether the dotted ``name`` is one of ``roots`` or inside one."""
    return any(name == root or name.startswith(root + ".") for root in roots)


def read_package(folder: Path) -> Package:
    """Parse every module in ``folder``, a package."""
    modules: set[str] = set()
    imports: list[Import] = []
    for path in sorted(folder.rglob("*.py")):
        parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
        is_init = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_init else parts)
        modules.add(module)
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for names, line, at_module_level in _walk(tree, ".".join(parts[:-1]), at_module_level=True):
            imports += [Import(module, name, line, at_module_level) for name in names]
    return Package(frozenset(modules), tuple(imports))


def _walk(node: ast.AST, parent: str, at_module_level: bool) -> Iterator[tuple[list[str], int, bool]]:
    """Yield (names, line, whether it runs when the module is imported); ``parent`` is what ``from .`` means here."""
    match node:
        case ast.Import():
            yield [alias.name for alias in node.names], node.lineno, at_module_level
        case ast.ImportFrom():
            above = parent.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            yield [f"{base}.{alias.name}" for alias in node.names], node.lineno, at_module_level
        case ast.Call(
            func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            yield [name], node.lineno, at_module_level
        # reaches torch.ao with no import of it, because `import torch` loads it
        case ast.Attribute(value=ast.Name(id="torch"), attr="ao" | "quantization"):
            yield [f"torch.{node.attr}"], node.lineno, at_module_level
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            for statement in node.orelse:
                yield from _walk(statement, parent, at_module_level)
            return
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
            at_module_level = False
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, parent, at_module_level)


# ---- the rules: each takes a package and returns what breaks it


def unknown_modules(package: Package) -> list[str]:
    return [
        f"{module}: not in LAYERS; say where it belongs"
        for module in sorted(package.modules)
        if room(module) not in RANK
    ]


def layers_point_down(package: Package) -> list[str]:
    return [
        f"{found}: {room(target)} is above {room(found.importer)}"
        for found, target in package.internal()
        # a module without a rank is reported by unknown_modules
        if room(target) in RANK and RANK[room(target)] > RANK.get(room(found.importer), len(LAYERS))
    ]


def nothing_is_circular(package: Package) -> list[str]:
    """No circle of modules, and none of subpackages: importing a module runs its subpackage's ``__init__`` too."""
    modules: dict[str, set[str]] = {}
    rooms: dict[str, set[str]] = {}
    for found, target in package.internal():
        modules.setdefault(found.importer, set()).add(target)
        if room(target) != room(found.importer):
            rooms.setdefault(room(found.importer), set()).add(room(target))
    for graph in (modules, rooms):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            return ["a circle: " + " <- ".join(error.args[1])]
    return []


def only_torch_ao_imports_torch_ao(package: Package) -> list[str]:
    return [
        f"{found}: only _torch_ao may"
        for found in package.imports
        if is_within(found.imported, TORCH_AO) and room(found.importer) != "_torch_ao"
    ]


def only_some_know_lightning(package: Package) -> list[str]:
    allowed = (*KNOW_LIGHTNING, "_roots")
    return [
        f"{found}: only {', '.join(allowed)} may"
        for found in package.imports
        if is_within(found.imported, LIGHTNING) and room(found.importer) not in allowed
    ] + [
        f"{found}: only {', '.join(KNOW_LIGHTNING)} may"
        for found, target in package.internal()
        if room(target) == "_roots" and room(found.importer) not in allowed
    ]


def heavy_imports_are_late(package: Package) -> list[str]:
    return [
        f"{found} at module level: move it into the function that needs it"
        for found in package.imports
        if found.at_module_level and is_within(found.imported, HEAVY)
    ]


Rule = Callable[[Package], list[str]]
RULES: tuple[Rule, ...] = (
    unknown_modules,
    layers_point_down,
    nothing_is_circular,
    only_torch_ao_imports_torch_ao,
    only_some_know_lightning,
    heavy_imports_are_late,
)


# ---- the package keeps the rules


@pytest.mark.parametrize("rule", RULES)
def test_package_keeps(rule: Rule) -> None:
    broken = rule(read_package(REPO / NAME))
    assert not broken, "\n".join(broken)


def test_the_reader_sees_the_package() -> None:
    """A reader that finds nothing would let every rule pass."""
    package = read_package(REPO / NAME)
    edges = {(found.importer, target) for found, target in package.internal()}
    assert (f"{NAME}.config", f"{NAME}.errors") in edges
    assert any(is_within(found.imported, TORCH_AO) for found in package.imports)


# ---- and each rule can fail


def write_package(folder: Path, sources: dict[str, str]) -> Package:
    """Write a package with these modules (``backends/fx`` -> source) and read it."""
    for module, source in {"__init__": "", **sources}.items():
        path = folder / NAME / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return read_package(folder / NAME)


@pytest.mark.parametrize(
    ("rule", "sources", "expected"),
    [
        (unknown_modules, {"attic": ""}, "lightning_quant.attic: not in LAYERS"),
        (unknown_modules, {"attic/chest": ""}, "lightning_quant.attic.chest: not in LAYERS"),
        (
            layers_point_down,
            {"capture": "\nfrom lightning_quant.cli import main", "cli": ""},
            "lightning_quant.capture:2 imports lightning_quant.cli.main: cli is above capture",
        ),
        (layers_point_down, {"config": "from . import report", "report": ""}, "report is above config"),
        (
            layers_point_down,
            {"backends/__init__": "", "backends/fx": "from ..callbacks import C", "callbacks": ""},
            "callbacks is above backends",
        ),
        (layers_point_down, {"errors": "def f():\n    import lightning_quant.config", "config": ""}, "errors:2"),
        (layers_point_down, {"cli": "from lightning_quant import QuantConfig"}, "__init__ is above cli"),
        (
            nothing_is_circular,
            {"fusion": "from lightning_quant import qconfig", "qconfig": "from lightning_quant import fusion"},
            "a circle: lightning_quant.",
        ),
        (
            nothing_is_circular,
            {"backends/__init__": "from .fx import f", "backends/fx": "from lightning_quant.backends import g"},
            "a circle: lightning_quant.backends",
        ),
        (  # no module imports itself here, but `import runtime` would, through exporters/__init__
            nothing_is_circular,
            {
                "exporters/__init__": "from lightning_quant.runtime import load",
                "exporters/onnx": "",
                "runtime": "from lightning_quant.exporters.onnx import load",
            },
            "a circle: exporters <- runtime <- exporters",
        ),
        (only_torch_ao_imports_torch_ao, {"qconfig": "import torch.ao.quantization"}, "only _torch_ao may"),
        (only_torch_ao_imports_torch_ao, {"qconfig": "from torch import ao"}, "imports torch.ao"),
        (only_torch_ao_imports_torch_ao, {"qconfig": "import torch\nx = torch.ao.nn"}, "qconfig:2 imports torch.ao"),
        (only_torch_ao_imports_torch_ao, {"backends/pt2e": "def f():\n    from torchao import x"}, "imports torchao.x"),
        (only_some_know_lightning, {"capture": "import pytorch_lightning as pl"}, "imports pytorch_lightning: only"),
        (only_some_know_lightning, {"report": "from lightning.pytorch import Trainer"}, "imports lightning.pytorch"),
        (
            only_some_know_lightning,
            {"backends/fx": "from .._roots import x", "_roots": ""},
            "imports lightning_quant._",
        ),
        (heavy_imports_are_late, {"runtime": "import onnxruntime as ort"}, "runtime:1 imports onnxruntime at module"),
        (heavy_imports_are_late, {"report": "try:\n    import jinja2\nexcept ImportError: ..."}, "report:2 imports"),
        (heavy_imports_are_late, {"demo": "class A:\n    from sklearn import datasets"}, "sklearn.datasets at module"),
        (heavy_imports_are_late, {"report": "x = importlib.import_module('matplotlib.pyplot')"}, "matplotlib.pyplot"),
    ],
)
def test_rule_can_fail(rule: Rule, sources: dict[str, str], expected: str, tmp_path: Path) -> None:
    broken = rule(write_package(tmp_path, sources))
    assert len(broken) == 1, broken
    assert expected in broken[0]


@pytest.mark.parametrize("rule", RULES)
def test_rule_allows(rule: Rule, tmp_path: Path) -> None:
    """What looks like a breach and is none."""
    package = write_package(
        tmp_path,
        {
            # for types only; and names that only begin like a forbidden one
            "config": "if TYPE_CHECKING:\n    import onnx\n    from lightning_quant.cli import main\nimport onnx_ir",
            "errors": "import typing\nif typing.TYPE_CHECKING:\n    import torchao, lightning.pytorch",
            "capture": "from lightning_utilities import core\nimport torch.backends.quantized",
            # late
            "runtime": "def f():\n    import onnxruntime\n    from lightning_quant.exporters import onnx",
            # a subpackage's __init__ shows what its modules define
            "exporters/__init__": "from lightning_quant.exporters.onnx import export",
            "exporters/onnx": "from .qdq import q",
            "exporters/qdq": "from lightning_quant.errors import ExportError",
            "cli": "from lightning_quant import _roots, demo",
            "demo": "import lightning_quant.config",
            "_roots": "import pytorch_lightning",
            "_torch_ao": "from torch.ao.quantization import QConfig",
            "__init__": "from lightning_quant.cli import main",
        },
    )
    assert rule(package) == []


# ---- what an import of the package really loads

ALWAYS_THERE = "torch, pytorch_lightning, torchmetrics"


def heavy_modules_after(imports: str) -> set[str]:
    """Which of ``HEAVY`` are loaded in a fresh interpreter after ``import <imports>``."""
    code = f"import {imports}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def loaded_anyway() -> set[str]:
    return heavy_modules_after(ALWAYS_THERE)


def test_import_loads_nothing_heavy(loaded_anyway: set[str]) -> None:
    assert heavy_modules_after(f"{ALWAYS_THERE}, {NAME}") - loaded_anyway == set()


def test_a_heavy_import_would_be_seen(loaded_anyway: set[str]) -> None:
    assert "onnx" in heavy_modules_after("onnx") - loaded_anyway
