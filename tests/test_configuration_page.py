"""docs/configuration.md is followed from top to bottom, as a reader would: files are written, commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_quant.cli import COMMANDS
from lightning_quant.recipes import RECIPES

REPO = Path(__file__).parents[1]
PAGE = (REPO / "docs" / "configuration.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, flags=re.M | re.S)


def rows(head: str) -> list[list[str]]:
    """The cells of the table that begins so."""
    lines = PAGE.partition(f"\n{head}")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    """A block whose first line is the name of a file is that file; other Python blocks are one program."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    program = ""
    for language, text in BLOCKS:
        named = re.match(r"# (\w+\.(?:py|yaml))\n", text)
        if named:
            (tmp_path / named[1]).write_text(text, encoding="utf8")
            continue
        assert language in ("python", "sh"), f"no file is named by this block:\n{text}"
        program += text if language == "python" else ""
        command = [sys.executable, "-c", program] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    for folder in ("quantized", "quantized/percentile", "from_old"):
        assert (tmp_path / folder / "model.ts").is_file()


def test_the_table_of_recipes_is_that_of_the_code() -> None:
    shown = {name.strip("`"): methods.lower().split(", ") for name, methods, _ in rows("| recipe |")}
    assert shown == {name: list(recipe.methods) for name, recipe in RECIPES.items()}


def test_every_command_is_there() -> None:
    shown = " ".join(cell for cell, _ in rows("| command |"))
    assert all(re.search(rf"\b{name}\b", shown) for name in COMMANDS)
