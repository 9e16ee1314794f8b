"""What can go wrong, by the moment at which it is found."""

from __future__ import annotations

import os


class QuantizationError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(QuantizationError, ValueError):
    """A setting that cannot work: known when the configuration or the callback is made."""


class CaptureError(QuantizationError, RuntimeError):
    """The layers to quantize, or the inputs to trace them with, could not be found."""


class CoverageError(QuantizationError, RuntimeError):
    """Less of the model runs in int8 than was asked for."""


class CalibrationError(QuantizationError, RuntimeError):
    """Observers saw no data, so that there are no ranges to quantize with."""


class ExportError(QuantizationError, RuntimeError):
    """A file could not be written, or what it computes is not what the model computes."""


class RankError(QuantizationError, RuntimeError):
    """Another process of the same run failed. The text has what it raised."""


class ArtifactError(QuantizationError, RuntimeError):
    """A file that cannot be loaded or run."""


class MissingExtraError(QuantizationError, ImportError):
    """An optional package is needed for what was asked.

    Args:
        package: Its name.
        extra: Of this package; it brings the other one.
        purpose: What needs it: the beginning of a sentence.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'lightning-quant[{extra}]'"
        )


_PACKAGE = os.path.dirname(__file__) + os.sep


def where(error: BaseException) -> str:
    """``"file.py:12: "``: the last line of the user's code in the traceback, or nothing."""
    found = ""
    step = error.__traceback__
    while step is not None:
        filename = step.tb_frame.f_code.co_filename
        ours = filename.startswith(_PACKAGE) or f"{os.sep}torch{os.sep}" in filename
        if not ours and not filename.startswith("<"):
            found = f"{filename}:{step.tb_lineno}: "
        step = step.tb_next
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""


def last_line(error: BaseException) -> str:
    """The last line of an error's text, shortened: where TorchScript says what went wrong."""
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines else ""
