"""Steps in the Trainer's own bar: what is shown, that nothing is without one, and that nothing is left over."""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from modules import Classifier, Digits, convnet, ptq, qat, trainer
from rich.console import Console
from roots import pl
from tqdm import tqdm

from lightning_quant import CalibrationError, ExportConfig, PostTrainingQuantization
from lightning_quant import progress as progress_module
from lightning_quant.progress import CONSOLE, SILENT, progress_of

BARS = {"tqdm": pl.callbacks.TQDMProgressBar, "rich": pl.callbacks.RichProgressBar}
STEPS = ("Calibrating", "Converting", "Validating int8", "Writing", "Measuring latency", "Comparing layers")


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal that rich draws on, which can be read."""
    made = Console(file=io.StringIO(), force_terminal=True, width=100)
    for module in ("pytorch_lightning", "lightning.pytorch"):
        found = sys.modules.get(f"{module}.callbacks.progress.rich_progress")
        if found is not None:
            monkeypatch.setattr(found, "get_console", lambda: made)
            monkeypatch.setattr(found, "reconfigure", lambda **_: None)
    monkeypatch.setattr(progress_module, "get_console", lambda: made)
    return made


@pytest.mark.parametrize("entry", ["fit", "validate"])
@pytest.mark.parametrize("order", ["bar first", "bar last"])
@pytest.mark.parametrize("kind", BARS)
def test_the_steps_are_in_the_trainers_bar(
    kind: str, order: str, entry: str, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [BARS[kind](), ptq()]
    run = trainer(*(callbacks if order == "bar first" else callbacks[::-1]), enable_progress_bar=True)
    getattr(run, entry)(Classifier(convnet()), datamodule=Digits())
    out = console.file.getvalue() if kind == "rich" else capsys.readouterr().out  # type: ignore[attr-defined]
    assert [step for step in STEPS if step not in out] == []


def test_a_training_says_what_it_does_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    trainer(BARS["tqdm"](), qat(), enable_progress_bar=True).fit(Classifier(convnet()), Digits())
    out = capsys.readouterr().out
    for text in ("Validating float, before training", "Validating float", "Validating int8", "Validating torchscript"):
        assert text in out


def test_each_file_is_named_while_it_is_written_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def step(self: Any, text: str, total: int | None) -> Iterator[Any]:
        yield said.append

    monkeypatch.setattr(progress_module._Tqdm, "step", step)
    callback = PostTrainingQuantization(export=ExportConfig(formats=("torchscript", "pt2")))
    trainer(BARS["tqdm"](), callback, enable_progress_bar=True).validate(Classifier(convnet()), Digits())
    assert [text for text in said if text] == [
        "Writing torchscript", "Checking torchscript", "Writing pt2", "Checking pt2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{"enable_progress_bar": False}, {"enable_progress_bar": True, "callbacks": [BARS["tqdm"](refresh_rate=0)]}],
    ids=["no bar", "refresh_rate=0"],
)
def test_nothing_is_shown_without_a_bar(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    own = settings.pop("callbacks", [])
    run = trainer(*own, ptq(), **settings)
    assert progress_of(run) is SILENT
    run.fit(Classifier(convnet()), Digits())
    out = "".join(capsys.readouterr())
    assert [step for step in STEPS if step in out] == []


def test_a_bar_of_another_kind_is_left_alone() -> None:
    class Own(pl.callbacks.ProgressBar):
        pass

    assert progress_of(trainer(Own(), enable_progress_bar=True)) is SILENT


def test_a_bar_that_is_off_stays_off() -> None:
    """Lightning turns off those of the other ranks."""
    for kind in BARS.values():
        bar = kind()
        run = trainer(bar, enable_progress_bar=True)
        assert progress_of(run) is not SILENT
        bar.disable()
        assert progress_of(run) is SILENT


# ---- after errors


def test_a_terminal_without_a_trainer(console: Console) -> None:
    with CONSOLE.step("Calibrating", 2) as advance:
        advance("")
        advance("Checking onnx")
    assert not getattr(console, "_live_stack", [])
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Calibrating" in shown
    assert "Checking onnx" in shown


def bar_of(kind: str) -> Any:
    bar = BARS[kind]()
    run = trainer(bar, enable_progress_bar=True)
    bar.setup(run, Classifier(convnet()), "validate")
    return run, bar


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("kind", BARS)
def test_an_error_leaves_no_line(kind: str, alive: bool, console: Console, capsys: pytest.CaptureFixture[str]) -> None:
    run, bar = bar_of(kind)
    if alive:
        bar.on_validation_start(run, None)
    before = len(bar.progress.tasks) if kind == "rich" and alive else len(tqdm._instances)

    def fail() -> None:
        with progress_of(run).step("Calibrating", None) as advance:
            advance("")
            raise CalibrationError("no data")

    with pytest.raises(CalibrationError):
        fail()
    if kind == "rich":
        assert alive == (bar.progress is not None)
        if alive:
            assert len(bar.progress.tasks) == before
            assert bar.progress.live.is_started
            bar.teardown(run, None, "validate")
        assert not getattr(console, "_live_stack", [])
    else:
        assert len(tqdm._instances) == before
        line = capsys.readouterr().out.rpartition("\n")[2]
        assert "Calibrating" not in line.rpartition("\r")[2]
        if alive:
            bar.on_validation_end(run, None)


def test_a_run_that_fails_leaves_no_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lightning_quant.pipeline.write", fail)
    with pytest.raises(OSError, match="no space left"):
        trainer(BARS["tqdm"](), ptq(), enable_progress_bar=True).validate(Classifier(convnet()), Digits())
    assert not [line for line in tqdm._instances if not line.disable and "Writing" in str(line.desc)]
    assert "Writing files" in capsys.readouterr().out


# ---- what else is not shown

NOISE = """
import sys, warnings
sys.path.insert(0, {tests!r})
from modules import Classifier, Digits, convnet, trainer
from lightning_quant import ExportConfig, PostTrainingQuantization, QuantConfig, QuantizationAwareTraining

class Loud(Classifier):
    def validation_step(self, batch, batch_idx):
        warnings.warn("a word of the user")
        return super().validation_step(batch, batch_idx)

warnings.resetwarnings()
warnings.simplefilter("always")
warnings.filterwarnings("ignore", message="of the user's own")
before = list(warnings.filters)
for callback in (
    QuantizationAwareTraining(QuantConfig(backend={backend!r}), export=ExportConfig(directory="qat")),
    PostTrainingQuantization(QuantConfig(backend={backend!r}), export=ExportConfig(directory="ptq")),
):
    model = Loud(convnet())
    run = trainer(callback)
    run.fit(model, datamodule=Digits())
    run.test(model, datamodule=Digits(), verbose=False)
assert warnings.filters == before, [x for x in warnings.filters if x not in before]
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fx", "eager", "pt2e"])
def test_torchs_announcements_are_kept_from_the_user_and_the_users_warnings_are_not(
    backend: str, tmp_path: Path
) -> None:
    program = NOISE.format(tests=str(Path(__file__).parent), backend=backend)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "Warning:" in line or "deprecated" in line]
    assert any("a word of the user" in line for line in said)
    # Lightning's own, of the user's Trainer
    others = [line for line in said if "a word of the user" not in line and "LeafSpec" not in line]
    assert others == []


def test_the_package_logs_and_does_not_print() -> None:
    """The tables of a report, the command and the demo are what a user asked to see."""
    shown = {"report.py", "cli.py", "demo.py"}
    root = Path(progress_module.__file__).parent
    calls = [
        path.name
        for path in root.rglob("*.py")
        if path.name not in shown and any(line.lstrip().startswith("print(") for line in path.read_text().splitlines())
    ]
    assert calls == []
    assert logging.getLogger("lightning_quant").handlers == []
