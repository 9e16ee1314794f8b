"""QuantConfig and its parts, and the table of what each backend can do.

Everything here is a frozen value that can be written in YAML. Nothing here imports torch.ao: how a value becomes an
observer is :mod:`lightning_quant.qconfig`'s business.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jsonargparse.typing import restricted_string_type

from lightning_quant.custom import load_class, path_of
from lightning_quant.errors import ConfigError, MissingExtraError

BackendName = Literal["fx", "eager", "torchscript", "pt2e"]
EngineName = Literal["auto", "x86", "fbgemm", "onednn", "qnnpack"]
Method = Literal["dynamic", "static", "qat"]
PostTrainingMethod = Literal["static", "dynamic"]
FormatName = Literal["torchscript", "onnx", "openvino", "pt2", "aoti"]
JitName = Literal["trace", "script"]
DtypeName = Literal["auto", "quint8", "qint8"]
QschemeName = Literal[
    "auto", "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"
]
ObserverName = Literal["auto", "histogram", "percentile", "entropy", "min_max", "moving_average", "balanced"]
RoundingName = Literal["auto", "learned", "learned_offset"]
LayerDtype = Literal["int8", "float"]
#: In the order in which they are applied.
CorrectionName = Literal[
    "cross_layer_equalization",
    "smoothquant",
    "choose_ranges",
    "adaround",
    "gptq",
    "analytic_bias_correction",
    "bias_correction",
]

#: Those that make up for errors of rounding: one of them at the most.
MAKING_UP: tuple[CorrectionName, ...] = ("adaround", "gptq", "analytic_bias_correction", "bias_correction")

ClassPath = str
if not TYPE_CHECKING:  # so that a command line refuses what is neither a word of ours nor a path
    ClassPath = restricted_string_type("ClassPath", r"^\S+\.\S+$", docstring="Import path of a class.")

#: (backend, method) -> the formats that it can write, the native one first. A cell that is not here is in ``REFUSED``.
SUPPORT: dict[tuple[str, str], tuple[FormatName, ...]] = {
    ("eager", "dynamic"): ("torchscript",),
    ("eager", "static"): ("torchscript", "onnx", "openvino", "pt2", "aoti"),
    ("eager", "qat"): ("torchscript", "onnx", "openvino", "pt2", "aoti"),
    ("torchscript", "dynamic"): ("torchscript",),
    ("torchscript", "static"): ("torchscript",),
    ("fx", "dynamic"): ("torchscript",),
    ("fx", "static"): ("torchscript", "onnx", "openvino", "pt2", "aoti"),
    ("fx", "qat"): ("torchscript", "onnx", "openvino", "pt2", "aoti"),
    ("pt2e", "dynamic"): ("pt2",),
    ("pt2e", "static"): ("pt2", "onnx", "openvino", "aoti"),
    ("pt2e", "qat"): ("pt2", "onnx", "openvino", "aoti"),
}

#: (backend, method) that cannot be, and what to do instead.
REFUSED: dict[tuple[str, str], str] = {
    ("torchscript", "qat"): (
        "backend='torchscript' cannot train: TorchScript graph mode has no fake quantize. Train with backend='fx', "
        "'eager' or 'pt2e'; 'fx' and 'eager' write TorchScript files."
    ),
}

#: backend -> (the packages that it needs, the extra that brings them)
BACKEND_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {"pt2e": (("torchao",), "pt2e")}

#: Observers that count values.
HISTOGRAMS = ("histogram", "percentile", "entropy")

#: The fewest bits of each kind of tensor. Kernels add products of 8 bits; with 3 bits for activations, one scale for a
#: whole tensor leaves 8 values, and no training tried here came near to float.
FEWEST_BITS = {"weight": 2, "activation": 4}

#: Backends whose graphs call modules, so that one can take the place of another.
SWAPPING = ("fx", "eager")

#: Formats that are written without being named, besides the native one of the backend.
_BY_DEFAULT = ("onnx", "openvino")

#: format -> (the packages that it needs, the extra that brings them)
FORMAT_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "torchscript": ((), ""),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx"),
    # it is written by way of ONNX
    "openvino": (("openvino", "onnx", "onnxscript"), "openvino"),
    "pt2": ((), ""),
    "aoti": ((), ""),
}


def near(name: str, known: Iterable[str], limit: int = 3) -> str:
    """``"Did you mean 'a', 'b'?"`` for the names that are close to ``name``, else the first few known ones."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    if close:
        return "Did you mean " + ", ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(k) for k in known[:8]) + (", ..." if len(known) > 8 else "")
    return f"Known: {shown}." if known else "There are none."


def _check_choice(owner: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        options = ", ".join(repr(c) for c in choices)
        raise ConfigError(f"{owner}({name}={value!r}): not one of {options}. {near(str(value), map(str, choices))}")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """How one kind of tensor (activations, or weights) is quantized: ``x ~ (q - zero_point) * scale``.

    Attributes:
        dtype: ``quint8`` (0..255) or ``qint8`` (-128..127). ``auto``: the first for activations, the second for
            weights.
        qscheme: One scale per tensor or per output channel, affine (with a zero point) or symmetric. ``auto``:
            ``per_tensor_affine`` for activations; for weights ``per_channel_symmetric``, on ``qnnpack``
            ``per_tensor_symmetric``.
        observer: How the range is estimated. Of activations: ``histogram`` (least mean squared error), ``percentile``,
            ``entropy`` (least Kullback-Leibler divergence, as TensorRT), ``min_max``, or ``moving_average`` of min and
            max. Of weights: ``min_max``, ``moving_average``, or ``balanced``: a little wider than min and max, where
            errors of rounding add up to least. ``auto``: ``histogram`` for static activations, ``moving_average`` for
            those of quantization-aware training; for static weights with one symmetric scale per output channel
            ``balanced`` (but not by ``torchscript``), and ``min_max`` for other weights. Or a class of your own that
            derives from ``torch.ao.quantization.ObserverBase`` (with ``backend="pt2e"``: from torchao's), or its import
            path.
        percentile: With ``observer="percentile"``: per cent of the values that are not above the range, and not below.
        bits: Of the integers: 2 to 8 for weights, 4 to 8 for activations. Kernels compute with 8 bits: fewer lie in the
            smaller range of these, and cost accuracy that training wins back. Files are smaller where a runtime reads
            integers of 4 bits: ONNX and OpenVINO with weights of 4 bits or fewer.
        fake_quantize: What rounds in training: ``auto``, whose scale follows the range; ``learned``, whose scale is
            trained with the weights from where the first batch puts it (LSQ, https://arxiv.org/abs/1902.08153), and
            whose zero point stays there; ``learned_offset``, where zero points are trained as well, and weights begin
            by their standard deviation (LSQ+, https://arxiv.org/abs/2004.09576); or a class of your own that derives
            from ``torch.ao.quantization.FakeQuantizeBase`` (with ``backend="pt2e"``: from torchao's), or its import
            path.

    Raises:
        ConfigError: A value is not one of the choices, or not a class that can be imported.
    """

    dtype: DtypeName = "auto"
    qscheme: QschemeName = "auto"
    observer: ObserverName | ClassPath = "auto"
    percentile: float = 99.99
    bits: int = 8
    fake_quantize: RoundingName | ClassPath = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not FEWEST_BITS["weight"] <= self.bits <= 8:
            raise ConfigError(f"TensorSpec(bits={self.bits!r}): give a whole number from 2 to 8.")
        if isinstance(self.percentile, bool) or not 50 < self.percentile <= 100:
            raise ConfigError(f"TensorSpec(percentile={self.percentile!r}): give a number above 50, up to 100.")
        for name in ("observer", "fake_quantize"):
            setting = f"TensorSpec({name}={getattr(self, name)!r})"
            object.__setattr__(self, name, path_of(getattr(self, name), setting))
        named: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("dtype", get_args(DtypeName)),
            ("qscheme", get_args(QschemeName)),
            ("observer", get_args(ObserverName)),
            ("fake_quantize", get_args(RoundingName)),
        )
        for name, choices in named:
            value = getattr(self, name)
            if name in ("observer", "fake_quantize") and "." in str(value):
                load_class(value, f"TensorSpec({name}={value!r})")
            else:
                _check_choice("TensorSpec", name, value, choices)
        if self.fake_quantize in ("learned", "learned_offset") and "." in self.observer:
            raise ConfigError(
                f"TensorSpec(fake_quantize={self.fake_quantize!r}, observer={self.observer!r}): a learned scale begins "
                "at the min and max of the first batch. Leave observer at 'auto', or fake_quantize."
            )


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """How some layers are quantized, where that is not as :class:`QuantConfig` says for all.

    Which layers is said by ``name``, ``type`` or both. Of several entries that match a layer the nearest one counts,
    alone: one that matches the layer itself before one that matches a module around it, a name before a pattern, a
    pattern with more letters before one with fewer, a name before a type, the later of two equal ones.

    Attributes:
        name: Name of a submodule, or an ``fnmatch`` pattern of names. A submodule stands for all that is inside it.
        type: Class of a submodule, or its import path, e.g. ``torch.nn.Linear``. Subclasses match as well.
        activation: How what the layers give is quantized. None: as everywhere.
        weight: How their weights are quantized. None: as everywhere.
        dtype: ``float`` leaves them in float. ``int8`` takes layers back that a farther entry or ``skip`` leaves in
            float; said of a layer by its own name, it is an error if the layer stays in float for another reason.
        keep: Call them as they are and in float; their code is not captured.
        observed: With ``quantized``: the class, or its import path, of the module that runs in the place of the layer
            while ranges are observed or trained; made by ``observed.from_float(layer)``. None: the layer itself.
        quantized: The class, or its import path, of the module that takes the layer's place in the int8 model; made
            by ``quantized.from_observed(module)``, or by ``quantized.from_float(module)`` where it has no such method.
            It takes and gives float tensors.

    Raises:
        ConfigError: It matches nothing by its nature, changes nothing, or contradicts itself.

    >>> LayerConfig(name="head", weight=TensorSpec(qscheme="per_tensor_symmetric")).keep
    False
    """

    name: str | None = None
    type: str | None = None
    activation: TensorSpec | None = None
    weight: TensorSpec | None = None
    dtype: LayerDtype | None = None
    keep: bool = False
    observed: str | None = None
    quantized: str | None = None

    def __post_init__(self) -> None:
        for field_name in ("type", "observed", "quantized"):
            value = getattr(self, field_name)
            if value is not None:
                setting = f"LayerConfig({field_name}={value!r})"
                object.__setattr__(self, field_name, path_of(value, setting))
                load_class(getattr(self, field_name), setting)
        shown = f"LayerConfig(name={self.name!r}, type={self.type!r})"
        if not self.name and not self.type:
            raise ConfigError(f"{shown}: give the name of the layers (or a pattern), or their type.")
        for field_name in ("activation", "weight"):
            spec = getattr(self, field_name)
            if spec is not None and not isinstance(spec, TensorSpec):
                raise ConfigError(f"{shown}: {field_name}={spec!r}: give a TensorSpec.")
        _check_specs("LayerConfig", self.activation, self.weight)
        if self.dtype is not None:
            _check_choice("LayerConfig", "dtype", self.dtype, get_args(LayerDtype))
        if self.observed and not self.quantized:
            raise ConfigError(f"{shown}: observed={self.observed!r} needs quantized=..., the module that follows it.")
        int8 = self.activation is not None or self.weight is not None or self.dtype == "int8"
        if (int8, self.dtype == "float", self.keep, self.quantized is not None).count(True) != 1:
            raise ConfigError(
                f"{shown}: give one of: activation and weight (or dtype='int8' alone), or dtype='float', or keep=True, "
                "or quantized=..."
            )


def _check_specs(owner: str, activation: TensorSpec | None, weight: TensorSpec | None) -> None:
    """Refuse what no int8 kernel takes."""
    if activation is not None and activation.qscheme.startswith("per_channel"):
        raise ConfigError(
            f"{owner}(activation.qscheme={activation.qscheme!r}): int8 kernels take activations with one scale. Use "
            "'per_tensor_affine' or 'per_tensor_symmetric'; per channel is for weights."
        )
    symmetric = activation is not None and activation.qscheme == "per_tensor_symmetric"
    if activation is not None and symmetric and activation.fake_quantize == "learned_offset":
        raise ConfigError(
            f"{owner}(activation.fake_quantize='learned_offset', activation.qscheme={activation.qscheme!r}): a "
            "symmetric range has no zero point to train. Use 'learned', or 'per_tensor_affine'."
        )
    if activation is not None and activation.bits < FEWEST_BITS["activation"]:
        raise ConfigError(
            f"{owner}(activation.bits={activation.bits}): activations have {FEWEST_BITS['activation']} to 8 bits, "
            "because one scale stands for a whole tensor. Fewer are for weights."
        )
    if weight is not None and weight.dtype == "quint8":
        raise ConfigError(f"{owner}(weight.dtype='quint8'): int8 kernels take signed weights. Use 'qint8'.")
    if activation is not None and activation.observer == "balanced":
        raise ConfigError(
            f"{owner}(activation.observer='balanced'): it looks at what errors of weights add up to. For activations "
            "use 'histogram', 'percentile', 'entropy', 'min_max' or 'moving_average'."
        )
    scales = ("auto", "per_channel_symmetric")
    if weight is not None and weight.observer == "balanced" and weight.qscheme not in scales:
        raise ConfigError(
            f"{owner}(weight.observer='balanced', weight.qscheme={weight.qscheme!r}): it chooses a scale for each "
            "output channel. Use 'per_channel_symmetric', or observer='min_max'."
        )
    if weight is not None and weight.observer in HISTOGRAMS:
        raise ConfigError(
            f"{owner}(weight.observer={weight.observer!r}): weights are known in full, a histogram is for activations. "
            "Use 'balanced', 'min_max' or 'moving_average'."
        )


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What is quantized, and how. The method (dynamic, static, QAT) is chosen by the callback.

    Attributes:
        backend: The front end that captures the model: ``fx`` (FX graph mode), ``eager`` (eager mode), ``torchscript``
            (TorchScript graph mode) or ``pt2e`` (``torch.export``; needs the extra ``pt2e``).
        engine: The kernel library that int8 runs on, ``torch.backends.quantized.engine``. ``auto``: ``x86`` on x86
            machines, ``qnnpack`` elsewhere.
        activation: How activations are quantized.
        weight: How weights are quantized.
        targets: Names (or ``fnmatch`` patterns) of the submodules to quantize. Empty: found automatically.
        skip: Names (or ``fnmatch`` patterns) of submodules left in float. A pattern that matches nothing is an error.
        layers: What is different for some layers: other observers or schemes, float, a user's own classes, modules to
            keep whole. An entry that matches nothing is an error.
        corrections: What is corrected after calibration, before the model is converted, each as its paper has it:
            ``cross_layer_equalization``, ``smoothquant``, ``choose_ranges``, and one of ``adaround``, ``gptq``,
            ``analytic_bias_correction`` (without data) and ``bias_correction``. They are applied in this order,
            whatever order is given. Of ``method="static"`` alone. Empty: nothing.
        reduce_range: Quantize weights to 7 bits. Needed on x86 CPUs without VNNI, whose int8 multiply-add saturates at
            16 bits. None: decided from this CPU, and written into every file.
        jit: With ``backend="torchscript"``: ``trace`` or ``script`` the model.
        debug: With ``backend="torchscript"``: keep weights as attributes of the converted graph, to look at them. It
            runs slower.
        min_coverage: The share of multiply-accumulates, 0 to 1, that has to run in int8: less is an error. None: below
            0.5 there is a warning.

    Raises:
        ConfigError: A value is not one of the choices, or two settings contradict each other.

    >>> QuantConfig(skip=("*.head",)).backend
    'fx'
    """

    backend: BackendName = "fx"
    engine: EngineName = "auto"
    activation: TensorSpec = field(default_factory=TensorSpec)
    weight: TensorSpec = field(default_factory=TensorSpec)
    targets: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    layers: tuple[LayerConfig, ...] = ()
    corrections: tuple[CorrectionName, ...] = ()
    reduce_range: bool | None = None
    min_coverage: float | None = None
    jit: JitName = "trace"
    debug: bool = False

    def __post_init__(self) -> None:
        share = self.min_coverage
        if share is not None and (
            isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1
        ):
            raise ConfigError(f"QuantConfig(min_coverage={share!r}): give a share from 0 to 1, or None.")
        _check_choice("QuantConfig", "backend", self.backend, get_args(BackendName))
        _check_choice("QuantConfig", "engine", self.engine, get_args(EngineName))
        _check_choice("QuantConfig", "jit", self.jit, get_args(JitName))
        if not isinstance(self.debug, bool):
            raise ConfigError(f"QuantConfig(debug={self.debug!r}): give True or False.")
        if self.backend != "torchscript" and (self.jit, self.debug) != ("trace", False):
            raise ConfigError(
                f"QuantConfig(backend={self.backend!r}, jit={self.jit!r}, debug={self.debug}): jit and debug are "
                "settings of TorchScript graph mode. Leave them out, or use backend='torchscript'."
            )
        for name in ("activation", "weight"):
            if not isinstance(getattr(self, name), TensorSpec):
                raise ConfigError(f"QuantConfig({name}={getattr(self, name)!r}): give a TensorSpec.")
        for name in ("targets", "skip"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"QuantConfig({name}={value!r}): give a list of names, e.g. {name}=({value!r},).")
            object.__setattr__(self, name, tuple(value))  # YAML gives lists
            if not all(isinstance(pattern, str) and pattern for pattern in getattr(self, name)):
                raise ConfigError(f"QuantConfig({name}={value!r}): every pattern is a non-empty string.")
        if isinstance(self.layers, (LayerConfig, dict, str)):
            raise ConfigError(f"QuantConfig(layers={self.layers!r}): give a list of LayerConfig.")
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            if not isinstance(layer, LayerConfig):
                raise ConfigError(f"QuantConfig(layers={layer!r}): give LayerConfig entries.")
        _check_specs("QuantConfig", self.activation, self.weight)
        object.__setattr__(self, "corrections", _ordered(self.corrections))
        if self.corrections and self.backend == "torchscript":
            raise ConfigError(
                f"QuantConfig(corrections={self.corrections!r}, backend='torchscript'): corrections change layers of a "
                "graph, and TorchScript graph mode has none. Leave them out, or use backend='fx', 'eager' or 'pt2e'."
            )
        for spec in (self.activation, *(layer.activation for layer in self.layers if layer.activation)):
            if spec.dtype == "qint8" and self.engine in ("x86", "fbgemm", "onednn"):
                raise ConfigError(
                    f"QuantConfig(activation.dtype='qint8', engine={self.engine!r}): the x86 kernels take unsigned "
                    "activations. Use 'quint8', or engine='qnnpack'."
                )


def _ordered(corrections: Any) -> tuple[CorrectionName, ...]:
    """The names in the order in which they are applied."""
    known: tuple[CorrectionName, ...] = get_args(CorrectionName)
    if isinstance(corrections, str):
        raise ConfigError(f"QuantConfig(corrections={corrections!r}): give a list of names, e.g. ({corrections!r},).")
    for name in corrections:
        _check_choice("QuantConfig", "corrections", name, known)
    if len({*corrections}) != len(tuple(corrections)):
        raise ConfigError(f"QuantConfig(corrections={tuple(corrections)!r}): name each correction once.")
    making_up = [name for name in known if name in corrections and name in MAKING_UP]
    if len(making_up) > 1:
        raise ConfigError(
            f"QuantConfig(corrections={tuple(corrections)!r}): {' and '.join(making_up)} would make up for the same "
            "errors of rounding, each taking what the other did for an error. Name one: gptq or adaround, "
            "bias_correction to leave weights as they are, analytic_bias_correction where there is no data."
        )
    return tuple(name for name in known if name in corrections)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which files are written, and where.

    Attributes:
        directory: The folder of ``model.*`` and ``report.*`` (JSON, Markdown, HTML). Made if it does not exist; files
            of an earlier run are replaced.
        formats: ``torchscript``, ``onnx``, ``openvino``, ``pt2`` (``torch.export``), ``aoti`` (compiled by AOTInductor
            for this kind of CPU). None: the native format of the backend, and ``onnx`` and ``openvino`` where they can
            be written and their extras are installed. Formats that are named are checked at once.
        skip_slow: In each file, leave in float what its runtime runs slower in int8 on this machine, by measurement: no
            file is slower than float then. ``pt2`` has no runtime of its own and stays as it is. It takes a dozen trial
            files for each format.
        batch_sizes: How many samples a call has, where ``skip_slow`` measures. A file serves all of these numbers: it
            is slower than float with none of them, and the fastest in their geometric mean.

    Raises:
        ConfigError: A format is not known or is named twice; a batch size that is not a positive integer.
    """

    directory: str = "quantized"
    formats: tuple[FormatName, ...] | None = None
    skip_slow: bool = False
    batch_sizes: tuple[int, ...] = (1, 16)

    def __post_init__(self) -> None:
        if not isinstance(self.skip_slow, bool):
            raise ConfigError(f"ExportConfig(skip_slow={self.skip_slow!r}): give True or False.")
        sizes = self.batch_sizes
        if not isinstance(sizes, (tuple, list)) or not sizes or any(type(n) is not int or n < 1 for n in sizes):
            raise ConfigError(f"ExportConfig(batch_sizes={sizes!r}): give numbers of samples, e.g. (1, 16).")
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(sizes))))
        object.__setattr__(self, "directory", str(self.directory))
        if not self.directory:
            raise ConfigError("ExportConfig(directory=''): give the name of a folder.")
        if self.formats is None:
            return
        if isinstance(self.formats, str):
            raise ConfigError(f"ExportConfig(formats={self.formats!r}): give a list, e.g. ({self.formats!r},).")
        object.__setattr__(self, "formats", tuple(self.formats))
        for name in self.formats:
            _check_choice("ExportConfig", "formats", name, get_args(FormatName))
        if not self.formats or len(set(self.formats)) != len(self.formats):
            raise ConfigError(f"ExportConfig(formats={self.formats!r}): name each format once, at least one.")

    @property
    def path(self) -> Path:
        """The folder as a path."""
        return Path(self.directory)


def plain(config: QuantConfig | ExportConfig) -> dict[str, Any]:
    """All settings as YAML has them: dicts, lists, texts and numbers.

    >>> plain(ExportConfig(formats=("onnx",)))["formats"]
    ['onnx']
    """
    values: dict[str, Any] = _plain(asdict(config))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def formats_of(config: QuantConfig, method: Method) -> tuple[FormatName, ...]:
    """The formats that this backend can write for this method, the native one first.

    Raises:
        ConfigError: The backend does not have the method.
    """
    _check_choice("quantize", "method", method, get_args(Method))
    if (config.backend, method) in REFUSED:
        raise ConfigError(REFUSED[config.backend, method])
    return SUPPORT[config.backend, method]


def check_method(config: QuantConfig, method: Method) -> None:
    """Refuse what this backend and method cannot do.

    Raises:
        ConfigError: The backend does not have the method, or a setting has no meaning for it.
        MissingExtraError: The backend needs a package that is not installed.
    """
    formats_of(config, method)
    packages, extra = BACKEND_PACKAGES.get(config.backend, ((), ""))
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtraError(package, extra, f"backend {config.backend!r}")
    activations = [config.activation, *(layer.activation for layer in config.layers if layer.activation)]
    weights = [config.weight, *(layer.weight for layer in config.layers if layer.weight)]
    for spec in activations:
        if method == "qat" and spec.observer in (*HISTOGRAMS, "min_max"):
            raise ConfigError(
                f"QuantConfig(activation.observer={spec.observer!r}) with quantization-aware training: ranges "
                "follow the training with a moving average. Use 'auto' or 'moving_average'."
            )
        if method == "dynamic" and spec != TensorSpec():
            raise ConfigError(
                f"QuantConfig(activation={spec!r}) with method='dynamic': the range of each activation is "
                "taken when it is computed. Leave activation at its default, or use method='static'."
            )
    balanced = any(spec.observer == "balanced" for spec in weights)
    if balanced and (method == "qat" or config.backend == "torchscript"):
        reason = "training moves weights" if method == "qat" else "TorchScript graph mode compiles observers"
        raise ConfigError(
            f"QuantConfig(weight.observer='balanced') with backend={config.backend!r}, method={method!r}: {reason}, so "
            "that scales follow min and max. Leave observer at 'auto'."
        )
    _check_corrections(config, method, activations)
    if few := next((spec for spec in (*activations, *weights) if spec.bits < 8), None):
        _check_bits(config, method, few)
    for spec in (*activations, *weights):
        if method != "qat" and spec.fake_quantize != "auto":
            raise ConfigError(
                f"TensorSpec(fake_quantize={spec.fake_quantize!r}) with method={method!r}: fake quantize is for "
                "training. Leave it out, or use QuantizationAwareTraining."
            )
        if config.backend == "torchscript" and spec.observer in ("percentile", "entropy"):
            raise ConfigError(
                f"QuantConfig(activation.observer={spec.observer!r}) with backend='torchscript': TorchScript graph "
                "mode compiles observers, and this one cannot be. Use 'histogram', or backend='fx', 'eager' or 'pt2e'."
            )
    if config.backend == "torchscript" and any(layer.activation for layer in config.layers):
        raise ConfigError(
            "LayerConfig(activation=...) with backend='torchscript': TorchScript graph mode observes all activations "
            "of a program in one way. Give it to QuantConfig(activation=...), or use backend='fx', 'eager' or 'pt2e'."
        )
    swapped = [layer for layer in config.layers if layer.quantized]
    if swapped and config.backend not in SWAPPING:
        raise ConfigError(
            f"LayerConfig(quantized={swapped[0].quantized!r}) with backend={config.backend!r}: it captures operators, "
            f"not modules that could be exchanged. Use backend={' or '.join(map(repr, SWAPPING))}."
        )


def _check_corrections(config: QuantConfig, method: Method, activations: list[TensorSpec]) -> None:
    """Refuse corrections where there is nothing to correct."""
    if config.corrections and method != "static":
        reason = "training corrects weights itself" if method == "qat" else "nothing is calibrated"
        raise ConfigError(
            f"QuantConfig(corrections={config.corrections!r}) with method={method!r}: {reason}. Leave them out, or use "
            "PostTrainingQuantization(method='static')."
        )
    plain = next((spec for spec in activations if spec.observer not in ("auto", *HISTOGRAMS)), None)
    if "choose_ranges" in config.corrections and plain is not None:
        raise ConfigError(
            f"QuantConfig(corrections=('choose_ranges',)) with activation.observer={plain.observer!r}: it chooses "
            "among ranges of a histogram. Leave observer at 'auto', or choose_ranges out."
        )


def _check_bits(config: QuantConfig, method: Method, spec: TensorSpec) -> None:
    """Refuse fewer than 8 bits where nothing is made of them."""
    if method == "dynamic":
        raise ConfigError(
            f"TensorSpec(bits={spec.bits}) with method='dynamic': it takes the ranges of activations when they are "
            "computed, of 8 bits, and its files store weights in 8 bits. Leave bits out, or use method='static' or "
            "QuantizationAwareTraining."
        )
    if config.backend == "torchscript":
        raise ConfigError(
            f"TensorSpec(bits={spec.bits}) with backend='torchscript': TorchScript graph mode quantizes to the 8 bits "
            "of its kernels, and clamps to no smaller range. Leave bits out, or use backend='fx', 'eager' or 'pt2e'."
        )


def _missing_packages(name: str) -> tuple[str, ...]:
    return tuple(package for package in FORMAT_PACKAGES[name][0] if find_spec(package) is None)


def resolve_formats(
    config: QuantConfig, method: Method, export: ExportConfig
) -> tuple[tuple[FormatName, ...], dict[str, str]]:
    """The formats to write, and those that were left out with their reasons.

    Raises:
        ConfigError: A format was named that this backend and method cannot write.
        MissingExtraError: A format was named whose packages are not installed.
    """
    able = formats_of(config, method)
    if export.formats is not None:
        for name in export.formats:
            if name not in able:
                raise ConfigError(
                    f"ExportConfig(formats={export.formats!r}): backend={config.backend!r} with method={method!r} "
                    f"cannot write {name!r}. It writes: {', '.join(able)}."
                )
            for package in _missing_packages(name):
                raise MissingExtraError(package, FORMAT_PACKAGES[name][1], f"format {name!r}")
        return export.formats, {}
    chosen: list[FormatName] = [able[0]]
    left_out: dict[str, str] = {}
    all_formats: tuple[FormatName, ...] = get_args(FormatName)
    for name in all_formats:
        if name == able[0] or name not in _BY_DEFAULT:
            continue
        if name not in able:
            left_out[name] = f"backend {config.backend!r} does not write it for method {method!r}"
        elif missing := _missing_packages(name):
            left_out[name] = f"{missing[0]} is not installed: pip install 'lightning-quant[{FORMAT_PACKAGES[name][1]}]'"
        else:
            chosen.append(name)
    return tuple(chosen), left_out


def cpu_has_vnni() -> bool:
    """Whether this CPU multiplies int8 without saturating at 16 bits (AVX512-VNNI, AVX-VNNI), or is not an x86."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return True
    return bool(torch.cpu._is_vnni_supported())


def resolve(config: QuantConfig) -> QuantConfig:
    """``config`` with ``engine="auto"`` and ``reduce_range=None`` replaced by what this machine needs.

    Raises:
        ConfigError: The engine is not part of this build of torch.
    """
    available = torch.backends.quantized.supported_engines
    engine = config.engine
    if engine == "auto":
        engine = "x86" if "x86" in available else "qnnpack"
    if engine not in available:
        raise ConfigError(
            f"QuantConfig(engine={engine!r}): this build of torch has {', '.join(e for e in available if e != 'none')}."
        )
    reduce_range = config.reduce_range
    if reduce_range is None:
        # qnnpack accumulates in 32 bits, so that it never saturates
        reduce_range = engine != "qnnpack" and not cpu_has_vnni()
    return replace(config, engine=engine, reduce_range=reduce_range)
