"""What can go wrong, by the moment at which it is found."""


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


class ArtifactError(QuantizationError, RuntimeError):
    """A file that cannot be loaded or run."""


class MissingExtraError(QuantizationError, ImportError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'lightning-quant[{extra}]'"
        )
