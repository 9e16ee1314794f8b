"""A report in the Trainer's loggers: metrics in all of them, tables and pictures in those that take them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lightning_quant._roots import ROOTS
from lightning_quant.report import QuantReport
from lightning_quant.report_plots import PAPER, as_pixels, sqnr_plot

#: In pixels, at twice the density.
_WIDTH = 720


def log_report(trainer: Any, report: QuantReport) -> None:
    """Give a report to every logger of a Trainer, on rank 0.

    Metrics go through ``Logger.log_metrics``; tables and pictures through ``log_table(key, columns, data, step)`` and
    ``log_image(key, images, step)``, as ``WandbLogger`` has them, where a logger has these methods; TensorBoard gets
    them as text and images. Pictures need the extra ``report``.

    Args:
        trainer: At the end of its run.
        report: Of this run.
    """
    if not trainer.is_global_zero:
        return
    step = trainer.global_step
    pictures = {"int8/layers": _picture(report)} if _has_layers(report) else {}
    for logger in trainer.loggers:
        logger.log_metrics(metrics_of(report), step=step)
        if any(isinstance(logger, root.loggers.TensorBoardLogger) for root in ROOTS):
            _to_tensorboard(logger.experiment, report, pictures, step)
        else:
            _to_methods(logger, report, pictures, step)
        logger.save()


def metrics_of(report: QuantReport) -> dict[str, float]:
    """The numbers of a report by name, as loggers take them."""
    values = {f"int8/{name}": value for name, value in report.metrics_int8.items()}
    values |= {f"float/{name}": value for name, value in report.metrics_float.items()}
    values |= {
        "int8/coverage": report.coverage,
        "int8/size_bytes": float(report.size_bytes_int8),
        "int8/latency_ms": report.latency_ms_int8,
        "int8/sqnr_db": report.sqnr_db,
        "float/size_bytes": float(report.size_bytes_float),
        "float/latency_ms": report.latency_ms_float,
    }
    for name, entry in report.formats.items():
        values |= {f"{name}/{metric}": value for metric, value in entry.metrics.items()}
        values |= {f"{name}/latency_ms": entry.latency_ms, f"{name}/size_bytes": float(entry.size_bytes)}
    return values


def tables_of(report: QuantReport) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Name -> the heads of the columns, and rows."""
    tables: dict[str, tuple[list[str], list[list[Any]]]] = {
        "int8/summary": report.summary(),
        "int8/files": report.files(),
    }
    if report.layers:
        head = ["layer", "kind", "alone_db", "sqnr_db", "weight_db"]
        rows = [[x.name, x.kind, x.alone_db, x.sqnr_db, x.weight_db] for x in report.layers]
        tables["int8/layers"] = (head, rows)
    return {name: (head, [list(row) for row in rows]) for name, (head, rows) in tables.items()}


def _has_layers(report: QuantReport) -> bool:
    known = any(layer.alone_db is not None or layer.sqnr_db is not None for layer in report.layers)
    return known and find_spec("matplotlib") is not None


def _picture(report: QuantReport) -> Any:
    return as_pixels(sqnr_plot(report.layers, _WIDTH, PAPER))


def _to_tensorboard(writer: Any, report: QuantReport, pictures: dict[str, Any], step: int) -> None:
    writer.add_text("int8/report", report.to_markdown(), step)
    for name, pixels in pictures.items():
        # not add_figure, which draws through pyplot: its state and its backend are the user's
        writer.add_image(name, pixels[..., :3], step, dataformats="HWC")


def _to_methods(logger: Any, report: QuantReport, pictures: dict[str, Any], step: int) -> None:
    if (log_table := getattr(logger, "log_table", None)) is not None:
        for name, (head, rows) in tables_of(report).items():
            log_table(key=name, columns=head, data=rows, step=step)
    if (log_image := getattr(logger, "log_image", None)) is not None:
        for name, pixels in pictures.items():
            log_image(key=name, images=[pixels], step=step)
