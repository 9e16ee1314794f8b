"""What takes time is shown in the Trainer's own progress bar, whichever it has, and nowhere if it has none."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from rich import get_console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from lightning_quant._roots import root_of

#: One part of a step is done; a text says what comes next.
Advance = Callable[[str], None]


class Progress(Protocol):
    """Shows steps, one after the other."""

    def step(self, text: str, total: int | None) -> AbstractContextManager[Advance]:
        """A line of the bar, which is gone when the context is left, also by an exception.

        Args:
            text: What is done.
            total: How many parts it has; None: that is not known.
        """


class _Silent:
    @contextlib.contextmanager
    def step(self, text: str, total: int | None) -> Iterator[Advance]:
        yield lambda text: None


SILENT: Progress = _Silent()


def progress_of(trainer: Any) -> Progress:
    """Lines of the Trainer's own bar: of a ``TQDMProgressBar`` or ``RichProgressBar``, or a class derived from one.

    Nothing is shown with ``enable_progress_bar=False``, with ``refresh_rate=0``, on the ranks whose bar is off, and
    where a bar is of another kind, which no other code can draw into.
    """
    bar = trainer.progress_bar_callback
    kinds = root_of(trainer).callbacks
    if isinstance(bar, kinds.TQDMProgressBar) and not bar.is_disabled:
        return _Tqdm(bar)
    if isinstance(bar, kinds.RichProgressBar) and not bar.is_disabled:
        return _Rich(bar)
    return SILENT


class _Tqdm:
    """Each line is one of validation, as the bar's own method makes it, which users derive from to change its looks."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    @contextlib.contextmanager
    def step(self, text: str, total: int | None) -> Iterator[Advance]:
        line = self.bar.init_validation_tqdm()
        line.leave = False
        line.set_description(text, refresh=False)
        line.reset(total)

        def advance(text: str) -> None:
            line.update()
            if text:  # what it says may take long
                line.set_description(text)

        try:
            yield advance
        finally:
            line.close()


class _Rich:
    """A task beside those of the bar while it is alive; behind its end, a display in the same colours that vanishes."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar

    @contextlib.contextmanager
    def step(self, text: str, total: int | None) -> Iterator[Advance]:
        with self._display() as (display, unknown):
            task = display.add_task(text, total=unknown if total is None else total)

            def advance(text: str) -> None:
                display.update(task, advance=1, description=text or None, refresh=bool(text))

            try:
                yield advance
            finally:
                display.remove_task(task)
                display.refresh()

    @contextlib.contextmanager
    def _display(self) -> Iterator[tuple[RichProgress, float | None]]:
        """What shows tasks, and how it is told that their size is not known."""
        display = self.bar.progress
        if display is not None and display.live.is_started:  # there can only be one at a time
            yield display, math.inf
            return
        theme = self.bar.theme
        bar = BarColumn(
            complete_style=theme.progress_bar,
            finished_style=theme.progress_bar_finished,
            pulse_style=theme.progress_bar_pulse,
        )
        columns = (TextColumn("{task.description}"), bar, TimeElapsedColumn())
        with RichProgress(*columns, console=get_console(), transient=True) as own:
            yield own, None


class _Console:
    @contextlib.contextmanager
    def step(self, text: str, total: int | None) -> Iterator[Advance]:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with RichProgress(*columns, console=get_console(), transient=True) as display:
            task = display.add_task(text, total=total)
            yield lambda text: display.update(task, advance=1, description=text or None)


#: On a terminal, where there is no Trainer.
CONSOLE: Progress = _Console()
