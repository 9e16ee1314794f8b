"""The page of a report: what is on it, that it needs nothing from outside, and how a real browser lays it out."""

from __future__ import annotations

import functools
import hashlib
import html
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from modules import Classifier, Digits, StepsOnly, convnet, mlp, ptq, qat, trainer
from test_report import BASE
from torch import nn

from lightning_quant import (
    ExportConfig,
    MissingExtraError,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    QuantReport,
    TensorSpec,
)
from lightning_quant.analysis.coverage import LayerRow
from lightning_quant.analysis.histograms import Spread
from lightning_quant.analysis.layers import LayerReport
from lightning_quant.layer_reports import HISTOGRAMS
from lightning_quant.provenance import as_yaml
from lightning_quant.report_page import NO_HTML, html_of, write_html
from lightning_quant.report_plots import NAMED, shown_name, worst_layers

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect"}


class Page(HTMLParser):
    """Reads a page, and insists that every element is closed where it has to be.

    Attributes:
        tables: Their rows, as the texts of their cells.
        svgs: The label of each drawing -> how many shapes it has.
        words: All text outside of style sheets.
        links: What an element refers to, outside of the page.
        pre: What is set as code blocks.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.svgs: dict[str, int] = {}
        self.links: list[str] = []
        self.pre: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "action") and not v.startswith("#")]
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "svg":
            self.svgs[values["aria-label"]] = 0
        elif tag in ("path", "use", "rect") and self.svgs:
            self.svgs[next(reversed(self.svgs))] += 1
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "pre":
            self.pre.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data
        if "pre" in self.open:
            self.pre[-1] += data
        if self.open and self.open[-1] != "tr" and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1][-1] += data


def layer(name: str, alone: float | None = 40.0, **settings: Any) -> LayerReport:
    reads = Spread(low=-1.0, high=2.0, clip_low=-0.9, clip_high=1.9, clipped=0.001, counts=(1, 5, 100, 3))
    weight = Spread(low=-0.1, high=0.1, clip_low=-0.1, clip_high=0.1, clipped=0.0, counts=(2, 50, 40))
    made = {"kind": "Conv2d", "int8": True, "sqnr_db": 30.0, "weight_db": 45.0, "reads": reads, "weight": weight}
    return LayerReport(name=name, alone_db=alone, **{**made, **settings})


FULL = replace(
    BASE,
    layers=(layer("encoder.stem", 35.0), layer("encoder.deep", 25.0, weight_db=25.5), layer("decoder.last", 45.0)),
    coverage_layers=(
        LayerRow("encoder.stem", "quantized::conv2d", 3_000_000, True),
        LayerRow("encoder.deep", "quantized::conv2d", 1_000_000, True),
        LayerRow("head", "aten::addmm", 100_000, False, "left float by 'skip'"),
    ),
    num_samples=400,
    checksums={"model.onnx": "ab" * 32, "model.encoder.ts": "cd" * 32, "model.decoder.ts": "ef" * 32},
    made_by={"class_path": "lightning_quant.PostTrainingQuantization", "init_args": {"config": {"skip": ["head"]}}},
    versions={"torch": "2.14.1"},
    config={**BASE.config, "weight": {"qscheme": "auto"}},
)  # fmt: skip


@functools.cache
def page_of_full() -> Page:
    return Page(html_of(FULL))


# ---- the page of a real run


@pytest.mark.parametrize("method", ["static", "qat"])
def test_a_run_ends_with_a_page(method: str) -> None:
    callback = ptq() if method == "static" else qat()
    trainer(callback).fit(Classifier(convnet()), Digits())
    report, folder = callback.report, Path("quantized")
    text = (folder / "report.html").read_text("utf8")
    page = Page(text)
    assert {"net.0", "net.6"} == {layer.name for layer in report.layers}
    assert report.layers_unseen == {}
    assert report.num_samples == 40
    for name, value in report.metrics_int8.items():
        row = next(row for row in page.tables[0] if row[0] == name)
        assert any(f"{value:.4f}" in cell for cell in row)
    assert "± " in next(row for row in page.tables[0] if row[0] == "val_acc")[1]
    for file in folder.glob("model.*"):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert report.checksums[file.name] == digest
        assert digest in page.words
    # two of the plot of all layers, and one for each layer's histograms
    assert len(page.svgs) == 2 + 2
    assert all(shapes > 10 for shapes in page.svgs.values())
    assert html_of(QuantReport.load(folder)) == text
    assert list(folder.glob(".*")) == []


@pytest.mark.parametrize(
    ("backend", "method", "told"),
    [
        ("eager", "static", {}),
        ("pt2e", "static", {}),
        ("pt2e", "qat", {}),
        ("fx", "dynamic", {"net": "method='dynamic' takes the ranges"}),
        ("torchscript", "static", {"net": "graphs of backend 'torchscript' are programs"}),
    ],
)
def test_every_backend_has_a_page_that_says_what_cannot_be_seen(
    backend: str, method: str, told: dict[str, str]
) -> None:
    config = QuantConfig(backend=backend)
    export = ExportConfig(formats=("pt2" if backend == "pt2e" else "torchscript",))
    callback: Any = (
        QuantizationAwareTraining(config, export=export)
        if method == "qat"
        else PostTrainingQuantization(config, method=method, export=export)
    )
    trainer(callback).fit(Classifier(mlp()), Digits())
    report = callback.report
    assert report.layers_unseen.keys() == told.keys()
    assert all(report.layers_unseen[name].startswith(reason) for name, reason in told.items())
    page = Page(Path("quantized/report.html").read_text("utf8"))
    assert all(reason in page.words for reason in told.values())
    assert report.layers
    assert all(layer.weight is not None and layer.reads is not None for layer in report.layers)
    seen = backend != "torchscript"
    assert all((layer.alone_db is not None) == seen for layer in report.layers)
    assert len([label for label in page.svgs if label.startswith("SQNR")]) == 2 * seen
    assert len([label for label in page.svgs if label.startswith("Histograms")]) == len(report.layers)


def test_several_targets_have_their_names() -> None:
    callback = ptq()
    trainer(callback).validate(StepsOnly(), Digits())
    names = [layer.name for layer in callback.report.layers]
    assert names
    module = callback.quantized_model
    assert all(any(name == n or n.startswith(name) for n, _ in StepsOnly().named_modules()) for name in names), module


class Deciding(nn.Module):
    """Cannot be traced: it decides by its data. There is a graph inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > -1e9 else x


@pytest.mark.parametrize("make", [ptq, qat])
def test_layers_around_and_inside_of_what_runs_its_own_code(make: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), Deciding(), nn.ReLU(), nn.Linear(32, 10))
    callback, model = make(), Classifier(net)
    trainer(callback).fit(model, Digits())
    assert list(callback.report.kept) == ["net.3"]
    found = {layer.name: layer for layer in callback.report.layers}
    assert set(found) == {"net.1", "net.3.inner", "net.5"}
    assert all(30 < layer.alone_db < 70 and layer.sqnr_db is not None for layer in found.values())
    assert all(module.training for module in model.modules())  # Lightning ends a fit in training mode


def test_a_part_that_fails_is_a_note_and_costs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a part of the user's\nmore lines")

    monkeypatch.setattr("lightning_quant.layer_reports.layers_of", fail)
    callback = ptq()
    trainer(callback).validate(Classifier(convnet()), Digits())
    assert callback.report.layers == ()
    assert callback.report.layers_unseen == {"net": "RuntimeError: a part of the user's"}
    assert "RuntimeError: a part of the user's" in Page(Path("quantized/report.html").read_text("utf8")).words
    assert Path("quantized/model.ts").is_file()


# ---- what is on it


def test_every_section_is_there() -> None:
    page = page_of_full()
    assert [name for name in page.ids if name.isalpha()] == [
        "metrics", "latency", "files", "layers", "coverage", "spreads", "reproduce",
    ]  # fmt: skip
    metrics, latency, files, layers = page.tables
    assert metrics[0] == ["metric", "float", "int8", "torchscript", "onnx", "int8 − float"]  # noqa: RUF001
    assert metrics[1][0] == "val_acc"
    assert metrics[1][1] == "0.9125± 0.0141"  # sqrt(0.9125 * 0.0875 / 400)
    assert metrics[2][1] == "0.3100"  # of a loss it cannot be known
    assert [row[0] for row in latency[1:]] == ["torchscriptfastest", "onnx"]
    assert latency[2][1] == "int82.25 msfloat2.50 ms"
    assert "ab" * 32 in files[2][1]
    assert [row[1] for row in layers[1:]] == [
        "encoder.stem", "encoder.deep", "decoder.last", "headleft float by 'skip'",
    ]  # fmt: skip
    assert layers[4][3] == "float"
    assert layers[1][4:7] == ["35.0", "30.0", "45.0"]


def test_tables_are_rectangular() -> None:
    for table in page_of_full().tables:
        assert len({len(row) for row in table}) == 1


def test_the_worst_layer_is_named_with_what_to_do() -> None:
    page = page_of_full()
    assert page.pre[0] == 'QuantConfig(skip=("encoder.deep",))'
    assert "The rounding of its weight costs most" in page.words
    assert page.pre[1] == as_yaml(FULL.made_by)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"alone_db": 20.0, "weight_db": 21.0}, "On this CPU weights have 7 bits (reduce_range)."),
        (
            {"reads": Spread(low=-9, high=9, clip_low=-1, clip_high=1, clipped=0.2)},
            "20.0 % of the values that it reads",
        ),
        ({"alone_db": 20.0}, "What it reads is rounded in steps of 0.011"),
        ({"alone_db": 20.0, "reads": None}, "Leave it in float, and look at the metrics again."),
    ],
)
def test_advice_is_that_of_the_cause(changes: dict[str, Any], advice: str) -> None:
    report = replace(FULL, layers=(replace(layer("a", 30.0), **changes),))
    assert advice in Page(html_of(report)).words


def test_advice_on_weights_is_that_of_the_settings() -> None:
    bad = (layer("a", 20.0, weight_db=20.5),)

    def words(**changes: Any) -> str:
        config = {**FULL.config, "reduce_range": False, **changes.pop("config", {})}
        return Page(html_of(replace(FULL, layers=bad, config=config, **changes))).words

    assert "QuantizationAwareTraining makes up for much of that." in words()
    assert "Train longer with fake quantize" in words(method="qat")
    for config in ({"weight": {"qscheme": "per_tensor_affine"}}, {"engine": "qnnpack"}):
        assert "One scale per channel helps" in words(config=config)


def test_names_are_text_and_no_markup() -> None:
    name = "a<script>alert(1)</script>&\"'"
    report = replace(FULL, layers=(layer(name, 3.0),), targets=[name], notes=[name], float_layers={name: name})
    text = html_of(report)
    assert "<script" not in text
    page = Page(text)
    assert name in page.words
    assert "SQNR of each layer" in " ".join(page.svgs)


def test_it_needs_nothing_from_outside() -> None:
    text = html_of(FULL)
    assert page_of_full().links == []
    assert "script" not in page_of_full().tags
    assert "link" not in page_of_full().tags
    # names of formats of XML are no addresses that anything reads
    assert re.findall(r"""url\((?!#)|@import|https?://(?!www\.w3\.org/)""", text) == []


def test_colours_are_those_of_light_and_dark() -> None:
    text = html_of(FULL)
    assert "@media (prefers-color-scheme: dark)" in text
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    for drawing in drawings:
        colours = set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", drawing))
        assert colours <= {"none", "var(--ink)", "var(--muted)", "var(--line)", "var(--total)", "var(--alone)",
                           "var(--worst)", "var(--weight)"}  # fmt: skip
        assert "var(--worst)" in colours
    for name in ("ink", "muted", "line", "total", "alone", "worst", "weight"):
        assert text.count(f"--{name}: #") == 2


def test_a_report_of_nothing_in_particular_is_a_page() -> None:
    empty = replace(
        BASE, metrics_float={}, metrics_int8={}, formats={}, artifacts={}, float_layers={}, fused=[], notes=[],
        formats_left_out={}, config={"backend": "fx", "engine": "x86"},
    )  # fmt: skip
    page = Page(html_of(empty))
    assert page.svgs == {}
    assert "There was no validation data" in page.words


def test_an_earlier_report_json_is_a_page() -> None:
    """What was added later is not in it."""
    plain = FULL.to_dict()
    for name in ("layers", "layers_unseen", "coverage_layers", "num_samples", "checksums", "made_by", "versions"):
        del plain[name]
    page = Page(html_of(QuantReport.from_dict(plain)))
    assert "No sampling error is shown: how many samples there were is not known." in page.words
    assert "The settings, as they were resolved for this machine" in page.words


def test_figures_that_are_no_numbers_are_drawn() -> None:
    layers = tuple(layer(f"l{i}", value, sqnr_db=value) for i, value in enumerate((float("inf"), float("nan"), -50.0)))
    assert len(Page(html_of(replace(FULL, layers=layers))).svgs) == 2 + 3


def test_of_many_layers_the_page_stays_small() -> None:
    many = tuple(layer(f"net.stage{i // 20}.block{i % 20}.conv", 40 + i % 7 - (i == 77) * 20) for i in range(300))
    without = tuple(replace(x, reads=replace(x.reads, counts=()), weight=None) for x in many[HISTOGRAMS:])
    report = replace(FULL, layers=many[:HISTOGRAMS] + without)
    text = html_of(report)
    assert len(text) < 400_000
    assert len(many) > NAMED
    assert Page(text).pre[0].startswith('QuantConfig(skip=("net.stage3.block17.conv", ')
    assert worst_layers(many)[0].name == "net.stage3.block17.conv"


def test_long_names_keep_their_end() -> None:
    assert shown_name("encoder.layers.11.attention.query", 20) == "….11.attention.query"
    assert shown_name("short", 20) == "short"


def test_the_checks_of_these_tests_can_fail() -> None:
    with pytest.raises(AssertionError):
        Page("<table><tr><td></table>")
    assert Page('<img src="http://example.org/a.png">').links == ["http://example.org/a.png"]


# ---- settings that make it again


@pytest.mark.parametrize(
    "callback",
    [
        PostTrainingQuantization(),
        PostTrainingQuantization(
            QuantConfig(
                backend="eager", skip=("head", "*.stem"), activation=TensorSpec(observer="percentile", percentile=99.5)
            ),
            calibration_batches=3,
            export=ExportConfig(directory="elsewhere", formats=("torchscript", "onnx")),
        ),
        PostTrainingQuantization(method="dynamic"),
        QuantizationAwareTraining(QuantConfig(backend="fx"), start_epoch=1, freeze_batch_norm_epoch=4),
    ],
    ids=["defaults", "many", "dynamic", "qat"],
)
def test_the_yaml_makes_the_callback_again(callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--trainer.callbacks", type=list[PostTrainingQuantization | QuantizationAwareTraining])
    parsed = parser.parse_string(as_yaml(callback._made_by()))
    (again,) = parser.instantiate_classes(parsed).trainer.callbacks
    assert type(again) is type(callback)
    assert again.config == callback.config
    assert again.export == callback.export
    assert again._made_by() == callback._made_by()


# ---- without the extra


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra_there_is_a_note_and_no_page(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("quantized").mkdir()
    Path("quantized/report.html").write_text("of an earlier run")
    find_spec = importlib.util.find_spec
    for module in ("lightning_quant.report_page", "lightning_quant.logging_to"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name == package else find_spec(name))
    callback = ptq()
    trainer(callback).validate(Classifier(convnet()), Digits())
    assert callback.report.notes == [NO_HTML]
    assert "pip install 'lightning-quant[report]'" in Path("quantized/report.md").read_text("utf8")
    assert not Path("quantized/report.html").exists()


@pytest.mark.parametrize(("package", "purpose"), [("matplotlib", "a plot"), ("jinja2", "report.html")])
def test_to_ask_for_a_page_without_the_extra_is_an_error(
    package: str, purpose: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = f"{purpose} needs the package '{package}', which is not installed. Install it with: pip install"
    with pytest.raises(MissingExtraError, match=re.escape(text)):
        write_html(FULL, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="unavoidable: no chromium is on this machine, and pip cannot install one"
)
#: Parts that may be wider than the page, because they scroll by themselves.
MEASURE = """<script>addEventListener("load", () => {
const doc = document.querySelector("iframe").contentDocument, width = doc.documentElement.clientWidth;
const inside = e => e.closest(".scroll, pre, svg") !== null;
const wide = [...doc.body.querySelectorAll("*")].filter(e => !inside(e) && e.getBoundingClientRect().right > width + 1);
const names = wide.map(e => e.tagName + "." + e.className).join(" ");
document.title = [doc.documentElement.scrollWidth, width, names].join("|");
})</script>"""


def browse(*arguments: str, folder: Path) -> str:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [str(CHROMIUM), *flags, profile, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(width: int, tmp_path: Path) -> None:
    long = "encoder.layers.11.attention.self.query_projection_of_the_second_head.quantized.linear"
    layers = (*FULL.layers, layer(long, 12.0))
    metrics = {"validation/mean_average_precision_at_50": 0.5, **BASE.metrics_int8}
    report = replace(FULL, layers=layers, metrics_int8=metrics, notes=[long * 2], kept={long: "because " * 20})
    framed = html.escape(html_of(report))
    wrapper = (
        f'<!DOCTYPE html>{MEASURE}<iframe style="border:0;width:{width}px;height:900px" srcdoc="{framed}"></iframe>'
    )
    (tmp_path / "wrapper.html").write_text(wrapper, encoding="utf8")
    seen = browse("--window-size=1400,1000", "--dump-dom", f"file://{tmp_path}/wrapper.html", folder=tmp_path)
    found = re.search(r"<title>(\d+)\|(\d+)\|(.*?)</title>", seen)
    assert found is not None, seen[:500]
    assert (int(found[1]), int(found[2]), found[3]) == (width, width, "")


@needs_browser
def test_dark_mode_is_dark(tmp_path: Path) -> None:
    from matplotlib.image import imread

    write_html(FULL, tmp_path / "report.html")
    paper = {}
    for name, scheme in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{name}.png"
        browse(
            f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1280,2400", f"--screenshot={picture}",
            f"file://{tmp_path}/report.html", folder=tmp_path,
        )  # fmt: skip
        pixels = imread(picture)[..., :3].mean(2)
        paper[name] = pixels[5, 5]
        # text and plots are seen on it: many values are far from the paper's
        assert (abs(pixels - paper[name]) > 0.4).mean() > 0.005
    assert paper["dark"] < 0.2
    assert paper["light"] > 0.9
