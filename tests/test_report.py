"""The report: JSON that any reader takes, a page, a console; and files of earlier reports that go."""

from __future__ import annotations

import io
import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_quant import FormatReport, QuantReport

BASE = QuantReport(
    method="static",
    config={"backend": "fx", "engine": "x86", "skip": ["head"], "reduce_range": True},
    targets=["encoder", "decoder"],
    metrics_before=None,
    metrics_float={"val_acc": 0.9125, "val_loss": 0.31},
    metrics_int8={"val_acc": 0.91, "val_loss": 0.3125},
    size_bytes_float=4_000_000,
    size_bytes_int8=1_040_000,
    latency_ms_float=3.0,
    latency_ms_int8=1.5,
    num_threads=2,
    sqnr_db=31.25,
    coverage=0.975,
    artifacts={
        "torchscript": {"encoder": Path("out/model.encoder.ts"), "decoder": Path("out/model.decoder.ts")},
        "onnx": Path("out/model.onnx"),
    },
    formats={
        "torchscript": FormatReport(
            size_bytes=1_040_000, latency_ms=1.5, sqnr_db=math.inf, metrics={"val_acc": 0.91, "val_loss": 0.3125}
        ),
        "onnx": FormatReport(
            size_bytes=99_000,
            latency_ms=2.25,
            sqnr_db=44.04,
            metrics={"val_acc": 0.9095},
            latency_ms_float=2.5,
            int8_kernels=19,
            float_kernels=2,
            left_float=("encoder.stem", "head"),
        ),
    },
    formats_left_out={"openvino": "openvino is not installed"},
    float_layers={"head": "left float by 'skip'", "[odd]": "never called"},
    fused=[("encoder.conv", "encoder.bn", "encoder.act")],
    notes=["One file per target."],
)


def console_text(report: QuantReport, width: int = 160) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    report.print(console)
    return console.export_text()


@pytest.mark.parametrize("width", [80, 160])
def test_the_console_breaks_no_name_of_a_format_and_shows_the_metrics_of_each_file(width: int) -> None:
    text = console_text(BASE, width)
    lines = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    for name in BASE.formats:
        assert name in lines
    assert "files in out" in text
    assert max(map(len, text.splitlines())) <= width
    assert not any(line.startswith("│") and not line.rstrip().endswith("│") for line in text.splitlines())
    below = text.partition("metrics of the reloaded files")[2]
    for name, entry in BASE.formats.items():
        assert name in below
        for metric in entry.metrics:
            assert metric in below


def test_the_files_fit_into_80_columns() -> None:
    names = {"torchscript": "model.ts", "onnx": "model.onnx", "openvino": "model.xml"}
    entry = next(iter(BASE.formats.values()))
    report = replace(
        BASE,
        artifacts={name: Path("out", file) for name, file in names.items()},
        formats=dict.fromkeys(
            names, replace(entry, latency_ms_float=12.34, int8_kernels=106, float_kernels=0, sqnr_db=41.8)
        ),
    )
    rows = [line for line in console_text(report, 80).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    for name, file in names.items():
        (row,) = (row for row in cells if row[:2] == [name, file])
        assert "12.34 ms" in row
        assert "41.8 dB" in row
        assert len(row) == 7


def test_several_files_of_a_format_are_one_name_with_their_number() -> None:
    files = {part: Path("out", f"model.net.{part}.ts") for part in ("encoder", "transformer", "decoder")}
    entry = next(iter(BASE.formats.values()))
    report = replace(BASE, artifacts={"torchscript": files}, formats={"torchscript": entry})
    assert "│ model.*.ts (3) │" in console_text(report, 120)


# ---- JSON


def strict_json(value: Any) -> Any:
    """What a reader without Python's extensions (``Infinity``, ``NaN``) reads."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(json.dumps(value, allow_nan=False), parse_constant=refuse)


def test_to_dict_is_json() -> None:
    plain = BASE.to_dict()
    assert strict_json(plain) == plain
    assert plain["artifacts"]["onnx"] == str(Path("out/model.onnx"))
    assert plain["artifacts"]["torchscript"]["encoder"] == str(Path("out/model.encoder.ts"))
    assert plain["formats"]["torchscript"]["sqnr_db"] == "inf"
    assert plain["formats"]["onnx"]["sqnr_db"] == 44.04
    assert plain["formats"]["onnx"]["left_float"] == ["encoder.stem", "head"]
    assert plain["formats"]["torchscript"]["int8_kernels"] is None
    assert plain["fused"] == [["encoder.conv", "encoder.bn", "encoder.act"]]
    assert plain["metrics_before"] is None


@pytest.mark.parametrize(("value", "text"), [(math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan")])
def test_what_json_has_no_number_for_is_text(value: float, text: str) -> None:
    report = replace(BASE, sqnr_db=value, metrics_int8={"val_acc": value})
    plain = strict_json(report.to_dict())
    assert plain["sqnr_db"] == text
    assert plain["metrics_int8"]["val_acc"] == text


def test_a_report_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        BASE.coverage = 1.0


# ---- Markdown


def test_the_page_has_everything() -> None:
    page = BASE.to_markdown()
    for text in (
        "Method `static`, backend `fx`, engine `x86`. Quantized: `encoder`, `decoder`.",
        "| val_acc | 0.9125 | 0.9100 | -0.0025 |",
        "| val_loss | 0.3100 | 0.3125 | +0.0025 |",
        "| size | 4.00 MB | 1.04 MB | x 0.26 |",
        "| latency, one sample, 2 threads | 3.00 ms | 1.50 ms | 2.00 times as fast |",
        "| SQNR of the output |  | 31.2 dB |  |",
        "| coverage (share of multiply-accumulates) | 0.0 % | 97.5 % |  |",
        "exact | val_acc 0.9100, val_loss 0.3125 |",
        "| format | file | size | latency | float | int8 kernels | SQNR against its program | metrics, reloaded |",
        "| 1.04 MB | 1.50 ms (fastest) |  |  | exact | val_acc 0.9100, val_loss 0.3125 |",
        "| 99.0 kB | 2.25 ms | 2.50 ms | 19 of 21 | 44.0 dB | val_acc 0.9095 |",
        "- onnx: in float in this file, because it is faster so on this machine: encoder.stem, head.",
        "- `openvino` was not written: openvino is not installed.",
        "- `head`: left float by 'skip'",
        "- `encoder.conv` + `encoder.bn` + `encoder.act`",
        "- One file per target.",
    ):
        assert text in page
    for path in ("model.encoder.ts", "model.decoder.ts", "model.onnx"):
        assert path in page


@pytest.mark.parametrize(("left_float", "int8_kernels"), [(("",), None), (("encoder.stem", "head"), 0)])
def test_a_file_with_everything_in_float(left_float: tuple[str, ...], int8_kernels: int | None) -> None:
    entry = replace(BASE.formats["onnx"], left_float=left_float, int8_kernels=int8_kernels)
    report = replace(BASE, formats={**BASE.formats, "onnx": entry})
    text = "onnx: everything is in float in this file: nothing is faster in int8 on this machine."
    assert f"- {text}" in report.to_markdown().splitlines()
    assert text in console_text(report)
    assert "because it is faster so on this machine" not in report.to_markdown()


def test_nothing_is_said_of_files_with_everything_in_int8() -> None:
    report = replace(BASE, formats={"torchscript": BASE.formats["torchscript"]})
    for text in (report.to_markdown(), console_text(report)):
        assert "in float in this file" not in text


def test_the_fastest_is_that_of_the_least_time() -> None:
    assert BASE.fastest == "torchscript"
    quick = replace(BASE.formats["onnx"], latency_ms=1.0)
    report = replace(BASE, formats={**BASE.formats, "onnx": quick})
    assert report.fastest == "onnx"
    assert report.to_markdown().count("(fastest)") == 1


def test_every_table_of_the_page_is_rectangular() -> None:
    for report in (BASE, replace(BASE, metrics_before={"val_acc": 0.1})):
        tables: list[list[int]] = [[]]
        for line in report.to_markdown().splitlines():
            if line.startswith("|"):
                tables[-1].append(line.count("|"))
            elif tables[-1]:
                tables.append([])
        found = [table for table in tables if table]
        assert len(found) == 2
        assert all(len(set(table)) == 1 for table in found)


def test_metrics_before_training_have_a_column() -> None:
    page = replace(BASE, metrics_before={"val_acc": 0.1, "val_loss": 2.5}).to_markdown()
    assert "|  | before training | float | int8 | change |" in page
    assert "| val_acc | 0.1000 | 0.9125 | 0.9100 | -0.0025 |" in page


def test_a_metric_that_only_one_model_has() -> None:
    page = replace(BASE, metrics_float={"a": 1.0}, metrics_int8={"b": 2.0}).to_markdown()
    assert "| a | 1.0000 |  |  |" in page
    assert "| b |  | 2.0000 |  |" in page


def test_a_report_of_nothing_in_particular() -> None:
    empty = replace(
        BASE,
        metrics_float={},
        metrics_int8={},
        float_layers={},
        fused=[],
        notes=[],
        formats_left_out={},
        num_threads=1,
        size_bytes_float=0,
        latency_ms_int8=0.0,
    )
    page = empty.to_markdown()
    assert page.count("None.") == 2
    assert "## Notes" not in page
    assert "latency, one sample, 1 thread |" in page
    assert console_text(empty)


# ---- console


@pytest.mark.parametrize("width", [60, 160])
def test_the_console_shows_every_metric_and_file(width: int) -> None:
    shown = "".join(console_text(BASE, width).split())
    for text in ("int8 by static", "val_acc", "0.9125", "0.9100", "97.5 %", "31.2 dB", "One file per target."):
        assert "".join(text.split()) in shown
    # brackets are no markup
    assert "float: [odd] (never called)" in console_text(BASE)
    assert "openvino was not written: openvino is not installed" in console_text(BASE)


def test_print_without_a_console_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    BASE.print()
    assert "val_acc" in capsys.readouterr().out


# ---- files


def with_files(folder: Path, *names: str) -> QuantReport:
    for name in names:
        (folder / name).write_text(name)
    return replace(BASE, artifacts={name: folder / name for name in names}, formats={})


def test_write(tmp_path: Path) -> None:
    report = with_files(tmp_path, "model.ts")
    report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.ts", "report.json", "report.md"]
    assert strict_json(json.loads((tmp_path / "report.json").read_text("utf8"))) == report.to_dict()
    assert (tmp_path / "report.md").read_text("utf8") == report.to_markdown()


def test_files_that_only_the_earlier_report_lists_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.onnx").write_text("not listed in any report")
    with_files(tmp_path, "model.a.ts", "model.b.ts", "model.onnx", "model.pt2", "model.aoti.pt2").write(tmp_path)
    with_files(tmp_path, "model.ts", "model.onnx").write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["mine.onnx", "model.onnx", "model.ts", "report.json", "report.md"]


def test_the_weights_of_an_earlier_openvino_file_go_with_it(tmp_path: Path) -> None:
    (tmp_path / "model.a.bin").write_text("weights")
    (tmp_path / "other.bin").write_text("somebody else's")
    with_files(tmp_path, "model.a.xml").write(tmp_path)
    assert (tmp_path / "model.a.bin").exists()
    with_files(tmp_path, "model.ts").write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model.ts", "other.bin", "report.json", "report.md"]


def test_a_file_of_the_earlier_report_that_is_gone_already(tmp_path: Path) -> None:
    with_files(tmp_path, "model.a.ts").write(tmp_path)
    (tmp_path / "model.a.ts").unlink()
    with_files(tmp_path, "model.ts").write(tmp_path)
    assert (tmp_path / "model.ts").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"artifacts": 3}', '{"artifacts": {"a": null}}', "null"])
def test_an_earlier_report_that_cannot_be_read_is_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    report = with_files(tmp_path, "model.ts")
    report.write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf8")) == report.to_dict()
    assert (tmp_path / "model.ts").exists()


def test_a_report_removes_no_files_but_ours(tmp_path: Path) -> None:
    inside, outside = tmp_path / "run", tmp_path / "model.ts"
    inside.mkdir()
    for path in (outside, inside / "train.csv"):
        path.write_text("somebody else's")
    foreign = {"data": "train.csv", "up": "../model.ts", "folder": "."}
    (inside / "report.json").write_text(json.dumps({"artifacts": foreign}))
    with_files(inside, "model.onnx").write(inside)
    assert outside.exists()
    assert (inside / "train.csv").exists()
