"""QuantReport: what was quantized, what it cost and what it gained; as JSON, as Markdown and on the console."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from lightning_quant.analysis.coverage import LayerRow
from lightning_quant.analysis.histograms import Spread
from lightning_quant.analysis.layers import LayerReport
from lightning_quant.errors import ArtifactError
from lightning_quant.formatting import shown_bytes, shown_db, shown_number, shown_threads

_FASTEST = " (fastest)"


@dataclass(frozen=True, kw_only=True)
class FormatReport:
    """One file format (of several files, if there are several targets: their sums, and the lowest SQNR).

    Attributes:
        size_bytes: Of the files.
        latency_ms: Median time of one sample, through the file's own runtime, as reloaded.
        latency_ms_float: The same, of the float model in the same runtime; None: its runtime has no float file here.
        sqnr_db: Of the reloaded files against the programs that they were written from, on real validation input.
        metrics: The module's validation metrics with the reloaded files in place.
        int8_kernels: Convolutions and matrix products that multiply integers, in the graph that the runtime made of the
            file; None: it does not show it.
        float_kernels: Those that multiply floats.
        left_float: Layers that are in float in these files alone, because their runtime is faster so on this machine.
    """

    size_bytes: int
    latency_ms: float
    sqnr_db: float
    metrics: dict[str, float]
    latency_ms_float: float | None = None
    int8_kernels: int | None = None
    float_kernels: int | None = None
    left_float: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class QuantReport:
    """The result of a run.

    Attributes:
        method: static, dynamic or qat.
        config: The resolved QuantConfig, as plain values.
        targets: What was quantized as one graph each; ``forward`` is the module's own.
        metrics_before: Validation metrics of the module as it came in (quantization-aware training only).
        metrics_float: Validation metrics in float; after training, of the trained weights without fake quantize.
        metrics_int8: Validation metrics of the int8 model.
        size_bytes_float: Of the float weights and buffers that the files hold in int8.
        size_bytes_int8: Of the file in the backend's native format.
        latency_ms_float: One sample, the float model as frozen TorchScript.
        latency_ms_int8: One sample, the native file, reloaded.
        num_threads: Torch's threads while timing.
        sqnr_db: Of the int8 model's output against the float model's, on real validation input.
        coverage: Share of the multiply-accumulates of layers with weights that run in int8, 0 to 1.
        artifacts: Format -> file, or format -> target -> file where there is one file per target.
        formats: Format -> its size, latency, SQNR and metrics.
        formats_left_out: Format -> why it was not written.
        float_layers: Layer -> why it stays in float.
        fused: Groups of modules that run as one kernel.
        notes: Remarks for a person.
        kept: Submodule that runs its own code between the graphs around and inside of it -> why.
        num_processes: How many processes trained, calibrated and evaluated it.
        layers: What int8 costs each layer, on one real batch, in the order in which they run.
        layers_unseen: Target -> why nothing, or not everything, can be seen of its layers.
        coverage_layers: Layers and functions with weights, as they ran: multiply-accumulates, and why they are float.
        num_samples: How many samples the metrics are of; None: it cannot be known.
        checksums: Name of a file -> its SHA-256, in hexadecimal digits.
        made_by: The callback, as ``class_path`` and the ``init_args`` that differ from their defaults; empty: none did.
        versions: Package -> its version.
        search: Of layers to leave in float: the bound, whether it is met, and the layers; None: there was none.
        run: The callback that made it, so that it is known again where its processes are gone; empty: none did.
    """

    method: str
    config: dict[str, Any]
    targets: list[str]
    metrics_before: dict[str, float] | None
    metrics_float: dict[str, float]
    metrics_int8: dict[str, float]
    size_bytes_float: int
    size_bytes_int8: int
    latency_ms_float: float
    latency_ms_int8: float
    num_threads: int
    sqnr_db: float
    coverage: float
    artifacts: dict[str, Path | dict[str, Path]]
    formats: dict[str, FormatReport]
    formats_left_out: dict[str, str]
    float_layers: dict[str, str]
    fused: list[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    num_processes: int = 1
    layers: tuple[LayerReport, ...] = ()
    layers_unseen: dict[str, str] = field(default_factory=dict)
    coverage_layers: tuple[LayerRow, ...] = ()
    num_samples: int | None = None
    checksums: dict[str, str] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    run: str = field(default="", compare=False)

    @property
    def metrics_artifacts(self) -> dict[str, dict[str, float]]:
        """Format -> the module's validation metrics with the reloaded files in place."""
        return {name: entry.metrics for name, entry in self.formats.items()}

    @property
    def fastest(self) -> str:
        """The format whose files took the least time for one sample on this machine."""
        return min(self.formats, key=lambda name: self.formats[name].latency_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: paths as text, infinite decibels as ``"inf"``."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> QuantReport:
        """The reverse of :meth:`to_dict`. What only a later version writes is left out.

        Args:
            plain: What :meth:`to_dict` gave.

        Raises:
            ArtifactError: It is not a report, or one of an earlier version that lacks something.
        """
        try:
            values = {**plain, "formats": {name: _of(FormatReport, entry) for name, entry in plain["formats"].items()}}
            values["artifacts"] = {name: _paths(files) for name, files in plain["artifacts"].items()}
            values["fused"] = [tuple(group) for group in plain["fused"]]
            values["layers"] = [_layer(entry) for entry in plain.get("layers", ())]
            values["coverage_layers"] = [_of(LayerRow, entry) for entry in plain.get("coverage_layers", ())]
            return _of(cls, values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"this is no report of lightning_quant ({type(error).__name__}: {error}). Give what "
                "QuantReport.to_dict gave, or a report.json."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> QuantReport:
        """The report in a ``report.json``.

        Args:
            path: The file, or the folder that has it.

        Raises:
            ArtifactError: There is none, or it cannot be read.
        """
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        try:
            plain = json.loads(path.read_text(encoding="utf8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ArtifactError(
                f"{path}: no report can be read there: {error}. Give the folder that ExportConfig(directory=...) named."
            ) from error
        return cls.from_dict(plain)

    def to_markdown(self) -> str:
        """The report as a page."""
        lines = ["# Quantization report", "", f"Method `{self.method}`, backend `{self.config['backend']}`, engine "
                 f"`{self.config['engine']}`. Quantized: {', '.join(f'`{t}`' for t in self.targets)}.", ""]  # fmt: skip
        lines += _markdown_table(*self.summary())
        lines += ["", "## Files", ""]
        lines += _markdown_table(*self.files())
        lines += [f"- `{name}` was not written: {reason}." for name, reason in self.formats_left_out.items()]
        lines += [f"- {text}" for text in self.left_float()]
        lines += ["", "## Layers in float", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in self.float_layers.items()] or ["None."]
        if self.kept:
            lines += ["", "## Parts that run their own code", ""]
            lines += [f"- `{name}`: {reason}" for name, reason in self.kept.items()]
        lines += ["", "## Fused groups", ""]
        lines += [f"- {' + '.join(f'`{m}`' for m in group)}" for group in self.fused] or ["None."]
        if self.notes:
            lines += ["", "## Notes", ""] + [f"- {note}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def summary(self) -> tuple[list[str], list[list[str]]]:
        """The table of float beside int8, as text: the heads of its columns, and its rows."""
        head = ["", "float", "int8", "change"]
        rows = []
        for name in sorted(self.metrics_float.keys() | self.metrics_int8.keys()):
            a, b = self.metrics_float.get(name), self.metrics_int8.get(name)
            change = "" if a is None or b is None else f"{b - a:+.4f}"
            rows.append([name, shown_number(a), shown_number(b), change])
        ratio = self.size_bytes_int8 / max(1, self.size_bytes_float)
        speed = self.latency_ms_float / max(1e-9, self.latency_ms_int8)
        rows.append(["size", shown_bytes(self.size_bytes_float), shown_bytes(self.size_bytes_int8), f"x {ratio:.2f}"])
        threads = shown_threads(self.num_threads)
        rows.append([f"latency, one sample, {threads}", f"{self.latency_ms_float:.2f} ms",
                     f"{self.latency_ms_int8:.2f} ms", f"{speed:.2f} times as fast"])  # fmt: skip
        rows.append(["SQNR of the output", "", shown_db(self.sqnr_db), ""])
        rows.append(["coverage (share of multiply-accumulates)", "0.0 %", f"{100 * self.coverage:.1f} %", ""])
        if self.metrics_before:
            head.insert(1, "before training")
            for row in rows:
                row.insert(1, shown_number(self.metrics_before.get(row[0])))
        return head, rows

    def files(self) -> tuple[list[str], list[list[str]]]:
        """The table of files, as text: the heads of its columns, and its rows."""
        head = ["format", "file", "size", "latency", "float", "int8 kernels", "SQNR against its program",
                "metrics, reloaded"]  # fmt: skip
        rows = []
        for name, entry in self.formats.items():
            files = self.artifacts[name]
            shown = ", ".join(str(f) for f in files.values()) if isinstance(files, dict) else str(files)
            metrics = ", ".join(f"{k} {shown_number(v)}" for k, v in sorted(entry.metrics.items()))
            in_float = "" if entry.latency_ms_float is None else f"{entry.latency_ms_float:.2f} ms"
            kernels = ""
            if entry.int8_kernels is not None and entry.float_kernels is not None:
                kernels = f"{entry.int8_kernels} of {entry.int8_kernels + entry.float_kernels}"
            latency = f"{entry.latency_ms:.2f} ms{_FASTEST * (name == self.fastest)}"
            rows.append(
                [
                    name,
                    shown,
                    shown_bytes(entry.size_bytes),
                    latency,
                    in_float,
                    kernels,
                    shown_db(entry.sqnr_db),
                    metrics,
                ]
            )
        return head, rows

    def _metrics_of_files(self) -> tuple[list[str], list[list[str]]]:
        names = sorted({name for entry in self.formats.values() for name in entry.metrics})
        rows = [[name, *(shown_number(e.metrics.get(name)) for e in self.formats.values())] for name in names]
        return ["", *self.formats], rows

    def left_float(self) -> list[str]:
        """A sentence for each format in whose files layers are in float that are not in the others."""
        shown = []
        for name, entry in self.formats.items():
            if entry.left_float == ("",) or (entry.left_float and entry.int8_kernels == 0):
                shown.append(f"{name}: everything is in float in this file: nothing is faster in int8 on this machine.")
            elif entry.left_float:
                layers = ", ".join(entry.left_float)
                shown.append(f"{name}: in float in this file, because it is faster so on this machine: {layers}.")
        return shown

    def print(self, console: Console | None = None) -> None:
        """Show the tables.

        Args:
            console: Where. None: on the terminal.
        """
        console = console or Console()
        head, rows = self.files()
        # as narrow as terminals are: names without their folder, and metrics below
        names = [_shown_files(list(_leaves({name: self.artifacts[name]}))) for name in self.formats]
        files = (
            head[:-1],
            [
                [row[0], name, row[2], row[3].removesuffix(_FASTEST), *row[4:-1]]
                for row, name in zip(rows, names, strict=True)
            ],
        )
        folders = sorted({str(Path(file).parent) for file in _leaves(self.artifacts)})
        tables = {
            f"int8 by {self.method} of {self.config['backend']}": self.summary(),
            f"files in {', '.join(folders)}": files,
            "metrics of the reloaded files": self._metrics_of_files(),
        }
        for title, (head, rows) in tables.items():
            table = Table(title=title, title_justify="left")
            for number, text in enumerate(head):
                table.add_column(
                    text,
                    justify="left" if text in ("", "format", "file") else "right",
                    overflow="fold",
                    no_wrap=" " not in text and all(len(row[number]) <= 12 for row in rows),
                )
            for row in rows:
                table.add_row(*row)
            if rows:
                console.print(table)
        if self.fastest is not None:
            console.print(f"fastest for one sample on this machine: {self.fastest}", markup=False)
        for name, reason in self.float_layers.items():
            console.print(f"float: {name} ({reason})", markup=False)
        for name, reason in self.kept.items():
            console.print(f"runs its own code: {name} ({reason})", markup=False)
        left_out = [f"{name} was not written: {reason}" for name, reason in self.formats_left_out.items()]
        for note in [*left_out, *self.left_float(), *self.notes]:
            console.print(note, markup=False)

    def write(self, directory: Path) -> None:
        """Write ``report.json`` and ``report.md``; files that only an earlier report lists are removed.

        The ``report.html`` of an earlier report goes as well: :func:`lightning_quant.report_page.write_html` writes it.

        Args:
            directory: The folder, which has to exist.
        """
        path = directory / "report.json"
        for old in _files_of(path) - {Path(f).name for f in _leaves(self.artifacts)}:
            (directory / old).unlink(missing_ok=True)
            if old.endswith(".xml"):
                (directory / old).with_suffix(".bin").unlink(missing_ok=True)
        (directory / "report.html").unlink(missing_ok=True)
        for name, text in (
            ("report.json", json.dumps(self.to_dict(), indent=2) + "\n"),
            ("report.md", self.to_markdown()),
        ):
            partial = directory / f".{name}.partial"
            partial.write_text(text, encoding="utf8")
            partial.replace(directory / name)


def modified(folder: Path) -> int | None:
    """When the report in ``folder`` was written, in nanoseconds; None: there is none."""
    try:
        return (folder / "report.json").stat().st_mtime_ns
    except OSError:
        return None


def report_of(folder: Path, run: str) -> QuantReport | None:
    """The report that this run wrote into ``folder``; None: there is none, or that of another."""
    path = folder / "report.json"
    if not path.is_file():
        return None
    report = QuantReport.load(path)
    return report if report.run == run else None


_R = TypeVar("_R")


def _of(kind: type[_R], plain: dict[str, Any]) -> _R:
    """A dataclass from plain values: numbers that JSON has no word for are text there, tuples are lists."""
    values = {}
    for part in fields(kind):  # type: ignore[arg-type]
        if part.name in plain:
            values[part.name] = _unplain(plain[part.name], str(part.type))
    return kind(**values)


def _unplain(value: Any, kind: str) -> Any:
    if kind.startswith("float") and isinstance(value, str):
        return float(value)
    if kind.startswith("dict[str, float]") and isinstance(value, dict):
        return {name: float(number) for name, number in value.items()}
    return tuple(value) if kind.startswith("tuple") else value


def _layer(plain: dict[str, Any]) -> LayerReport:
    spreads = {name: _of(Spread, plain[name]) for name in ("reads", "weight") if plain.get(name)}
    return _of(LayerReport, {**plain, **spreads})


def _paths(files: Any) -> Any:
    return {name: Path(file) for name, file in files.items()} if isinstance(files, dict) else Path(files)


def _leaves(value: Any) -> list[Any]:
    return [leaf for v in value.values() for leaf in _leaves(v)] if isinstance(value, dict) else [value]


def _shown_files(files: list[Any]) -> str:
    """The name of one, or of several what their names have in common."""
    names = [Path(file).name for file in files]
    stem, suffix = names[0].partition(".")[0], names[0].rpartition(".")[2]
    return names[0] if len(names) == 1 else f"{stem}.*.{suffix} ({len(names)})"


def _files_of(report: Path) -> set[str]:
    """The names of the files that an earlier report lists, as far as this package gives such names."""
    try:
        names = {Path(str(f)).name for f in _leaves(json.loads(report.read_text(encoding="utf8"))["artifacts"])}
        return {name for name in names if re.fullmatch(r"model(\..+)?\.(ts|onnx|xml|pt2)", name)}
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return set()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def _markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in cells]
