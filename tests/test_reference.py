"""The API reference: every public name is in it, with a docstring that describes each argument."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from roots import pl

import lightning_quant
from lightning_quant import cli, recipes

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"

#: What the reference has besides: what public names give or take.
BESIDES = {
    "lightning_quant.recipes",
    "lightning_quant.recipes.RECIPES",
    "lightning_quant.runtime.Artifact",
    "lightning_quant.runtime.state.State",
    "lightning_quant.analysis.layers.LayerReport",
    "lightning_quant.analysis.histograms.Spread",
    "lightning_quant.phases.Phase",
    "lightning_quant.progress.CONSOLE",
    "lightning_quant.progress.Progress",
    "lightning_quant.report_page.write_html",
    "lightning_quant.tuning.goal.Goal",
    *(f"lightning_quant.recipes.{name}" for name in recipes.RECIPES),
}


def public() -> dict[str, Any]:
    """Dotted name -> what has to be in the reference."""
    found = {f"lightning_quant.{name}": getattr(lightning_quant, name) for name in lightning_quant.__all__}
    del found["lightning_quant.recipes"]
    found |= {f"lightning_quant.recipes.{name}": getattr(recipes, name) for name in ("load", "Recipe")}
    commands = {**cli.COMMANDS, "main": cli.main, "quant_cli": cli.quant_cli}
    return found | {f"lightning_quant.cli.{name}": function for name, function in commands.items()}


def in_reference(folder: Path = REFERENCE) -> set[str]:
    """The names that Sphinx is asked for."""
    text = "\n".join(page.read_text(encoding="utf8") for page in sorted(folder.glob("*.md")))
    return set(re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, flags=re.M))


def described(docstring: str) -> set[str]:
    """What the sections ``Args`` and ``Attributes`` describe."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?:(?: {4}.*)?\n?)*)", inspect.cleandoc(docstring), flags=re.M)
    return {name for section in sections for name in re.findall(r"^ {4}(\w+):", section, flags=re.M)}


def arguments(function: Callable[..., Any]) -> set[str]:
    # errors of the package take a text, as all exceptions do
    if inspect.isclass(function) and issubclass(function, Exception) and not inspect.isfunction(function.__init__):
        return set()
    return set(inspect.signature(function).parameters) - {"self", "cls"}


def methods(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public methods and properties of a class and of ours that it derives from, without hooks of Lightning."""
    for base in kind.__mro__:
        if not base.__module__.startswith("lightning_quant"):
            continue
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not name.startswith("_") and inspect.isfunction(function) and not hasattr(pl.Callback, name):
                yield name, function


@dataclass(frozen=True)
class Documented:
    """A name of the reference."""

    name: str
    value: Any

    def problems(self) -> list[str]:
        docstring = vars(self.value).get("__doc__") if inspect.isclass(self.value) else self.value.__doc__
        # what a dataclass makes where there is none
        if not docstring or docstring.startswith(f"{self.value.__name__}("):
            return [f"{self.name} has no docstring"]
        takes, says = arguments(self.value), described(docstring)
        found = [f"{self.name} does not describe {name}" for name in sorted(takes - says)]
        found += [f"{self.name} describes {name}, which it does not take" for name in sorted(says - takes)]
        if inspect.isclass(self.value):
            for name, method in methods(self.value):
                found += Documented(f"{self.name}.{name}", method).problems()
        return found


def test_nothing_is_described_twice() -> None:
    found = re.findall(r"^\.\. auto\w+:: (\S+)", "\n".join(p.read_text() for p in sorted(REFERENCE.glob("*.md"))), re.M)
    assert found
    assert sorted(found) == sorted(set(found))


@pytest.mark.parametrize("name", sorted(public()))
def test_each_public_name_is_described(name: str) -> None:
    assert Documented(name, public()[name]).problems() == []


def test_each_public_name_is_in_the_reference() -> None:
    assert in_reference() == public().keys() | BESIDES


def test_a_name_that_is_not_there_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(".. autofunction:: lightning_quant.prepare\n\nand lightning_quant.convert\n")
    assert in_reference(tmp_path) == {"lightning_quant.prepare"}


def _silent(a: int) -> None: ...


def _half(a: int, *, b: int = 1) -> None:
    """Do.

    Args:
        a: First, which
            b: is not.
    """


def _stale(a: int) -> None:
    """Do.

    Args:
        a: First.
        b: Gone.

    Raises:
        ValueError: Never.
    """


@dataclass
class _Fields:
    a: int


@dataclass
class _Half:
    """Two.

    Attributes:
        a: First.
    """

    a: int
    b: int

    def tell(self, where: str) -> None:
        """Tell."""

    @property
    def silent(self) -> int:
        return 1


class _Error(lightning_quant.ConfigError):
    """A text."""


class _Argued(lightning_quant.ConfigError):
    """Two."""

    def __init__(self, package: str) -> None: ...


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (_silent, ["x has no docstring"]),
        (_half, ["x does not describe b"]),
        (_stale, ["x describes b, which it does not take"]),
        (_Fields, ["x has no docstring"]),
        (_Half, ["x does not describe b", "x.tell does not describe where", "x.silent has no docstring"]),
        (_Error, []),
        (_Argued, ["x does not describe package"]),
    ],
)
def test_what_is_missing_is_seen(value: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if inspect.isclass(value):  # methods of other packages are not ours to describe
        monkeypatch.setattr(value, "__module__", "lightning_quant.of_a_test")
    assert Documented("x", value).problems() == expected
