"""Every example runs from start to end, as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_quant import QuantReport

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
#: Those that are command lines, with their settings beside them.
WITH_SETTINGS = [path for path in EXAMPLES if path.with_suffix(".yaml").exists()]
#: What int8 may differ by from float in each metric.
CLOSE = 0.02


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_settings_have_their_example() -> None:
    assert {path.with_suffix(".py") for path in EXAMPLES[0].parent.glob("*.yaml")} == set(WITH_SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    settings = ["fit", "--config", str(path.with_suffix(".yaml"))] if path in WITH_SETTINGS else []
    done = subprocess.run(
        [sys.executable, str(path), *settings],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if path.stem == "without_trainer":
        assert (tmp_path / "quantized" / path.stem / "model.ts").is_file()
        return
    report = QuantReport.load(tmp_path / "quantized" / path.stem / "report.json")
    assert report.coverage == 1 or report.config["skip"]
    assert all(Path(tmp_path, file).is_file() for file in _files(report))
    assert report.metrics_int8
    for name, value in report.metrics_int8.items():
        assert value == pytest.approx(report.metrics_float[name], abs=CLOSE)


def _files(report: QuantReport) -> list[Path]:
    groups = [files.values() if isinstance(files, dict) else [files] for files in report.artifacts.values()]
    return [file for group in groups for file in group]
