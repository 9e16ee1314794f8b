"""What arrives in the Trainer's loggers: read from the files of TensorBoard and CSV, and seen in loggers of ours."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from modules import Classifier, Digits, convnet, ptq, trainer
from roots import pl

from lightning_quant import QuantReport
from lightning_quant.logging_to import log_report, metrics_of, tables_of

#: Other figures are those of files and of layers.
KEYS = {"int8/val_acc", "float/val_acc", "int8/coverage", "int8/size_bytes", "int8/latency_ms", "int8/sqnr_db",
        "float/size_bytes", "float/latency_ms", "torchscript/val_loss", "torchscript/latency_ms"}  # fmt: skip


def run_with(*loggers: Any) -> QuantReport:
    callback = ptq()
    trainer(callback, logger=list(loggers)).validate(Classifier(convnet()), Digits(), verbose=False)
    assert callback.report is not None
    return callback.report


class Plain(pl.loggers.logger.Logger):
    """Takes metrics and nothing else, as Lightning asks of every logger."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}
        self.saved = 0

    name = "plain"
    version = "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def save(self) -> None:
        self.saved += 1


class Rich(Plain):
    """With the methods that ``WandbLogger`` has."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
        self.images: dict[str, list[Any]] = {}

    def log_table(
        self, key: str, columns: Any = None, data: Any = None, dataframe: Any = None, step: int | None = None
    ) -> None:
        self.tables[key] = (columns, data)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.images[key] = images


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'lightning-quant[test]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = pl.loggers.TensorBoardLogger(str(tmp_path))
    report = run_with(logger)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    known = events.Tags()
    assert set(known["scalars"]) >= KEYS
    assert events.Scalars("int8/val_acc")[0].value == pytest.approx(report.metrics_int8["val_acc"])
    assert known["images"] == ["int8/layers"]
    picture = events.Images("int8/layers")[0]
    assert picture.width > 1000
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    text = events.Tensors("int8/report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == report.to_markdown()


def test_csv(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(str(tmp_path))
    report = run_with(logger)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    (row,) = [row for row in rows if row["int8/val_acc"]]
    assert {name for name, value in row.items() if value} >= KEYS
    assert float(row["int8/val_loss"]) == pytest.approx(report.metrics_int8["val_loss"])
    assert float(row["torchscript/size_bytes"]) == report.formats["torchscript"].size_bytes


def test_a_logger_with_tables_and_images_gets_them_and_one_without_gets_metrics() -> None:
    plain, rich = Plain(), Rich()
    report = run_with(plain, rich)
    assert plain.metrics.items() >= metrics_of(report).items()
    assert rich.metrics.items() >= metrics_of(report).items()
    assert plain.saved
    assert rich.tables == tables_of(report)
    head, rows = rich.tables["int8/layers"]
    assert head[:3] == ["layer", "kind", "alone_db"]
    assert [row[0] for row in rows] == ["net.0", "net.6"]
    assert all(len(row) == len(head) for head, rows in rich.tables.values() for row in rows)
    ((pixels,),) = rich.images.values()
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.std() > 5  # something is drawn
    assert (pixels[:3, :3] == 255).all()  # on white paper


def test_without_layers_there_is_no_picture_and_no_table_of_them() -> None:
    rich = Rich()
    report = replace(run_with(), layers=())
    log_report(SimpleNamespace(is_global_zero=True, global_step=3, loggers=[rich]), report)
    assert rich.images == {}
    assert set(rich.tables) == {"int8/summary", "int8/files"}


def test_only_rank_zero_logs() -> None:
    rich = Rich()
    log_report(SimpleNamespace(is_global_zero=False, global_step=3, loggers=[rich]), run_with())
    assert rich.metrics == {}
    assert rich.tables == {}


def test_pyplot_is_left_alone() -> None:
    import matplotlib.pyplot as plt

    backend, figures = plt.get_backend(), plt.get_fignums()
    run_with(Rich())
    assert plt.get_backend() == backend
    assert plt.get_fignums() == figures
    assert math.isclose(plt.rcParams["font.size"], plt.rcParamsDefault["font.size"])
