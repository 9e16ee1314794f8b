"""Every Python block of the README and the docs runs, in order, each file as one program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lightning_quant import PostTrainingQuantization, QuantConfig

ROOT = Path(__file__).parents[1]
#: Its blocks run files without this package: test_deploy.py.
APART = ROOT / "docs" / "deploy.md"
#: Its blocks are files and commands: test_configuration_page.py.
FOLLOWED = ROOT / "docs" / "configuration.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf8"), flags=re.M | re.S)


def test_readme_has_code() -> None:
    assert len(blocks(ROOT / "README.md")) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page not in (APART, FOLLOWED)], ids=lambda page: page.name
)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks(page)), encoding="utf8")
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "yaml") and page != FOLLOWED], ids=lambda page: page.name
)
def test_yaml_blocks_are_settings_of_a_callback(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of names that older versions need
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PostTrainingQuantization, as_group=False)
    for block in blocks(page, "yaml"):
        made = parser.instantiate_classes(parser.parse_string(block))
        assert isinstance(made.config, QuantConfig)
        assert made.config != QuantConfig()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf8"))
    assert all((page.parent / link).exists() for link in links), links


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    named = {t for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") for t in _targets(page.read_text("utf8"))}
    assert {"test", "demo", "lint"} <= named
    missing = [target for target in named if not re.search(rf"^{re.escape(target)}:", makefile, flags=re.M)]
    assert not missing


def _targets(text: str) -> list[str]:
    return re.findall(r"\bmake ([a-z][a-z-]*)\b(?=[`\s:,.;)]*(?:`|\n|#| {2}))", text)
