"""Every Python block of the README and the docs runs, in order, each file as one program."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lightning_quant import PostTrainingQuantization, QuantConfig
from lightning_quant.cli import main
from lightning_quant.config import REFUSED, SUPPORT

ROOT = Path(__file__).parents[1]
#: Its blocks run files without this package: test_deploy.py.
APART = ROOT / "docs" / "deploy.md"
#: Its blocks are files and commands: test_configuration_page.py.
FOLLOWED = ROOT / "docs" / "configuration.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("[!_]*.md")), *sorted((ROOT / "docs").glob("reference/*.md"))]
#: What a page's commands may need is what its own program wrote. Those of the README: test_deploy.py.
WITH_COMMANDS = [ROOT / "docs" / "slow.md"]


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf8"), flags=re.M | re.S)


def test_readme_has_code() -> None:
    assert len(blocks(ROOT / "README.md")) >= 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page not in (APART, FOLLOWED)], ids=lambda page: page.name
)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks(page)), encoding="utf8")
    done = subprocess.run([sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if page in WITH_COMMANDS:
        commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
        assert commands
        monkeypatch.chdir(tmp_path)
        for command in commands:
            assert main(shlex.split(command, comments=True)[1:]) == 0, command


def test_the_tutorial_quantizes_with_five_lines() -> None:
    float_training, quantization, *_ = blocks(ROOT / "docs" / "tutorial.md")
    assert "lightning_quant" not in float_training
    assert "PostTrainingQuantization" in quantization
    assert len([line for line in quantization.splitlines() if line.strip()]) <= 5


def formats_in(table: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """The cells of a table of front ends by methods: the formats behind ``->``, or all that a cell names."""
    head, _, *rows = table.strip().splitlines()
    methods = [{"quantization-aware training": "qat"}.get(cell, cell) for cell in _cells(head)[1:]]
    found = {}
    for row in rows:
        backend, *cells = _cells(row)
        for method, cell in zip(methods, cells, strict=True):
            found[_quoted(backend)[0], method] = _quoted(cell.rpartition("->")[2])
    return found


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def _quoted(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`(\w+)`", text))


def test_the_table_of_the_readme_is_that_of_the_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf8")
    (table,) = re.findall(r"^\| \| dynamic \| static \|.*\n(?:\|.*\n)+", text, flags=re.M)
    assert formats_in(table) == {**SUPPORT, **dict.fromkeys(REFUSED, ())}


def test_a_wrong_table_would_be_seen() -> None:
    table = """
        | | dynamic | quantization-aware training |
        |---|---|---|
        | `fx` (FX) | `a`, LSTM -> `pt2`, `onnx` | refused |
    """
    assert formats_in(table) == {("fx", "dynamic"): ("pt2", "onnx"), ("fx", "qat"): ()}


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


def headings(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf8"), flags=re.M | re.S)
    found = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def broken_links(page: Path) -> list[str]:
    """Links to files that are not there, and to headings that no page has."""
    text = page.read_text(encoding="utf8")
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(
        r"^\[[^\]]+\]: (?!https?:)(\S+)$", text, flags=re.M
    )
    broken = []
    for link in links:
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_link_to_nowhere_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page: of `links`\n[a](page.md), [b](gone.md), [c](#a-page-of-links), [d](page.md#gone), [e]\n"
        "\n[e]: gone.py\n```sh\n# gone\n```\n[f](https://x.y)"
    )
    assert broken_links(page) == ["gone.md", "page.md#gone", "gone.py"]


def test_pictures_are_small_and_shown() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 200_000
        assert any(picture.name in page.read_text(encoding="utf8") for page in PAGES)


def test_every_page_is_in_the_site() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf8")
    trees = "\n".join(re.findall(r"^```\{toctree\}\n(.*?)^```", index, flags=re.M | re.S))
    listed = set(re.findall(r"^[a-z][\w/-]*$", trees, flags=re.M))
    pages = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in PAGES[1:]}
    assert listed == pages - {"index"}


def test_make_targets_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf8")
    named = {t for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") for t in _targets(page.read_text("utf8"))}
    assert {"test", "demo", "lint"} <= named
    missing = [target for target in named if not re.search(rf"^{re.escape(target)}:", makefile, flags=re.M)]
    assert not missing


def _targets(text: str) -> list[str]:
    return re.findall(r"\bmake ([a-z][a-z-]*)\b(?=[`\s:,.;)]*(?:`|\n|#| {2}))", text)
