"""Archives of ``torch.export``, read without running what is in them.

``torch.export.load`` unpickles whatever an archive asks it to (``weights_only=False``, or first True and then False),
and lets sympy evaluate its sizes, which are Python expressions. What this package writes needs neither.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_quant.errors import ArtifactError

#: Names and numbers, as in ``Symbol('s77', integer=True)``.
_WORD = re.compile(r"[\w.+-]*")
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
    ast.Tuple, ast.Load, ast.keyword,
)  # fmt: skip


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The program in an archive that :func:`torch.export.save` wrote.

    Raises:
        ArtifactError: It holds pickled objects, or what is no arithmetic in the place of a size.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2

    with PT2ArchiveReader(str(path)) as reader:
        for what in _code_in(reader):
            raise ArtifactError(
                f"{path}: {what}, which is code that would run when it is loaded. This package writes no such files; "
                "it was not loaded. Load it with torch.export.load if you trust it."
            )
    # not torch.export.load: that goes on to read another kind of archive where this one is damaged
    program: torch.export.ExportedProgram = load_pt2(str(path)).exported_programs["model"]
    return program


def _code_in(reader: Any) -> Iterator[str]:
    """What in an archive would be run, by the same reader that torch takes."""
    from torch.export.pt2_archive import constants

    for name in reader.get_file_names():
        if name.startswith(constants.AOTINDUCTOR_DIR):
            yield f"{name} is compiled"
        elif name.startswith((constants.WEIGHTS_DIR, constants.CONSTANTS_DIR)):
            if name.endswith(".pt"):
                yield f"{name} is a pickle"
            elif name.endswith(".json"):
                yield from _pickled_payloads(json.loads(reader.read_string(name))["config"])
        elif name.startswith(constants.SAMPLE_INPUTS_DIR):
            if not _holds_tensors(reader.read_bytes(name)):
                yield f"{name} is a pickle of more than tensors"
        elif name.startswith(constants.MODELS_DIR):
            for text in _expressions(json.loads(reader.read_string(name))):
                if not is_arithmetic(text):
                    yield f"{name} has the size {text[:100]!r}"


def _pickled_payloads(config: dict[str, Any]) -> Iterator[str]:
    from torch.export.pt2_archive import constants

    plain = (constants.WEIGHT_FILENAME_PREFIX, constants.TENSOR_CONSTANT_FILENAME_PREFIX)
    for name, payload in config.items():
        if payload["use_pickle"] or not payload["path_name"].startswith(plain):
            yield f"{name} is a pickle"


def _holds_tensors(content: bytes) -> bool:
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        return not content
    return True


def _expressions(value: Any) -> Iterator[str]:
    """Every expression of a serialized program."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key == "expr_str":
                yield str(part)
            else:
                yield from _expressions(part)
    elif isinstance(value, list):
        for part in value:
            yield from _expressions(part)


def is_arithmetic(text: str) -> bool:
    """Whether an expression, when Python evaluates it, calls nothing but sympy's own classes on numbers and names.

    >>> is_arithmetic("2*Symbol('s77', positive=True)"), is_arithmetic("exit()")
    (True, False)
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    called = {id(node.func): node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return all(_is_plain(node, id(node) in called) for node in ast.walk(tree))


def _is_plain(node: ast.AST, called: bool) -> bool:
    import sympy
    from torch.utils._sympy import functions

    if isinstance(node, ast.Name):
        kind = getattr(functions, node.id, getattr(sympy, node.id, None))
        return "__" not in node.id and (not called or (isinstance(kind, type) and issubclass(kind, sympy.Basic)))
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) or bool(
            isinstance(node.value, str) and _WORD.fullmatch(node.value) and "__" not in node.value
        )
    return not called and isinstance(node, (*_ARITHMETIC, ast.Call))
