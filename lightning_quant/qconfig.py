"""QuantConfig -> torch.ao's QConfigMapping: which observer or fake quantize stands at which tensor."""

from __future__ import annotations

import copy
import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightning_quant._torch_ao import FakeQuantize as TorchFakeQuantize
from lightning_quant._torch_ao import (
    FakeQuantizeBase,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    QConfigMapping,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from lightning_quant.balanced import BalancedObserver
from lightning_quant.config import HISTOGRAMS, Method, ObserverName, QuantConfig, TensorSpec
from lightning_quant.custom import load_class
from lightning_quant.errors import ConfigError
from lightning_quant.fake_quantize import FakeQuantize, Sharing
from lightning_quant.learned_scale import LearnedFakeQuantize
from lightning_quant.observers import HistogramObserver

CONVS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSES: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RNNS: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
CONV_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)
CONV_TRANSPOSE_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

EMBEDDINGS: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)

#: What each method turns into int8: the layers with weights. Everything else runs between them as its inputs allow.
QUANTIZABLE: dict[str, tuple[type[nn.Module], ...]] = {
    "dynamic": (nn.Linear, *RNNS, nn.MultiheadAttention, *EMBEDDINGS),
    "static": (nn.Linear, *CONVS, *CONV_TRANSPOSES, *RNNS, nn.MultiheadAttention, *EMBEDDINGS),
    "qat": (nn.Linear, *CONVS, *CONV_TRANSPOSES, *RNNS, nn.MultiheadAttention, *EMBEDDINGS),
}

#: Every layer of which it is said whether it is in int8. Embeddings have no multiply-accumulates, but many bytes.
WEIGHTED: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Bilinear, *CONVS, *CONV_TRANSPOSES, *RNNS, nn.RNN, nn.MultiheadAttention, *EMBEDDINGS,
)  # fmt: skip

#: Sums of many terms, and exponentials: 8 bits in between cost accuracy, and there are no multiply-accumulates to save.
FLOAT_BY_DESIGN: dict[Any, str] = dict.fromkeys(
    (
        nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.Softmax, nn.GELU,
        F.layer_norm, F.group_norm, F.instance_norm, F.softmax, torch.softmax, "softmax", F.gelu,
    ),
    "normalisation, softmax and GELU stay float by design",
)  # fmt: skip


#: Share of the newest batch in the moving average of an activation's range. Torch's 0.01 looks back a hundred batches,
#: and clips the activations of a network that still grows: in trainings of 40 to 320 steps the int8 output was 10 to
#: 17 dB further from float than with this value (small residual CNN, digits, three seeds).
AVERAGING_CONSTANT = 0.1


def activation_range(spec: TensorSpec) -> tuple[int, int]:
    """The integers ``(quant_min, quant_max)`` of activations, both included: all that so many bits have."""
    size: int = 2**spec.bits
    return (-size // 2, size // 2 - 1) if spec.dtype == "qint8" else (0, size - 1)


def weight_range(config: QuantConfig) -> tuple[int, int]:
    """The integers ``(quant_min, quant_max)`` of weights, both included: symmetric, so that the largest is exact.

    With ``reduce_range`` they have at most 7 bits. CPUs without VNNI multiply pairs of uint8 by int8 and add them in
    16 bits that saturate: ``2 * 255 * 63 = 32130`` fits, whatever the activation. Torch's own ``reduce_range`` takes
    the bit from the activations instead; then a value beyond the calibrated range still saturates, because kernels
    clamp at 255 and not at 127, and the activations, which have one scale per tensor, lose more than the weights,
    which have one per channel.
    """
    bits = min(config.weight.bits, 7) if config.reduce_range else config.weight.bits
    largest: int = 2 ** (bits - 1) - 1
    return -largest, largest


def largest_weight(config: QuantConfig) -> int:
    """The largest integer of any weight, whichever layer has it."""
    own = (replace(config, weight=layer.weight) for layer in config.layers if layer.weight is not None)
    return max(weight_range(one)[1] for one in (config, *own))


def _dtype(spec: TensorSpec, default: str) -> torch.dtype:
    return {"quint8": torch.quint8, "qint8": torch.qint8}[default if spec.dtype == "auto" else spec.dtype]


def _qscheme(spec: TensorSpec, default: str) -> torch.qscheme:
    scheme: torch.qscheme = getattr(torch, default if spec.qscheme == "auto" else spec.qscheme)
    return scheme


@dataclass(frozen=True)
class Constructor:
    """Makes observers or fake quantizes that are as new, by copying one.

    torch.ao makes one each time that it wants to know a dtype: fifteen thousand for two preparations of DenseNet-121,
    a third of the time that they took.
    """

    kind: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]

    def __call__(self) -> nn.Module:
        """A new module of its own."""
        return _as_new(_first(self))


@functools.cache
def _first(constructor: Constructor) -> nn.Module:
    return constructor.kind(**dict(constructor.settings))


def _as_new(module: nn.Module) -> nn.Module:
    """A copy of a module that has Parameters, buffers, settings and submodules of that kind, and nothing else."""
    twin: nn.Module = type(module).__new__(type(module))
    twin.__dict__.update({k: _own(v) for k, v in module.__dict__.items()})
    for name, parameter in module._parameters.items():
        twin._parameters[name] = None if parameter is None else nn.Parameter(parameter.detach().clone())
    for name, buffer in module._buffers.items():
        twin._buffers[name] = None if buffer is None else buffer.clone()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _as_new(child)
    return twin


def _own(value: Any) -> Any:
    """``value``, or a copy if it is one that changes."""
    if isinstance(value, (dict, set)):
        return value.copy()  # several times as fast as copy.copy of an OrderedDict
    return copy.copy(value) if isinstance(value, Sharing) else value


def _constructor(kind: type[nn.Module], **settings: Any) -> Constructor:
    return Constructor(kind, tuple(settings.items()))


def _activation(config: QuantConfig, method: Method) -> Any:
    spec = config.activation
    low, high = activation_range(spec)
    shared = {
        "dtype": _dtype(spec, "quint8"),
        "qscheme": _qscheme(spec, "per_tensor_affine"),
        "quant_min": low,
        "quant_max": high,
    }
    observers: dict[str, Any] = {
        **dict.fromkeys(HISTOGRAMS, HistogramObserver),
        "min_max": MinMaxObserver,
        "moving_average": MovingAverageMinMaxObserver,
    }
    own = own_observer(spec)
    if method == "static":
        if own is not None:
            return _made_with(spec, own, shared)
        name = "histogram" if spec.observer == "auto" else spec.observer
        search = {"search": name, "percentile": spec.percentile} if name in HISTOGRAMS else {}
        return _constructor(observers[name], **shared, **search)
    own_rounding = own_fake_quantize(spec)
    if own is not None or own_rounding is not None:
        averaging = {} if own is not None else {"averaging_constant": AVERAGING_CONSTANT}
        observer = own or MovingAverageMinMaxObserver
        settings = {"observer": observer, **averaging, **shared}
        return _made_with(spec, own_rounding or TorchFakeQuantize, settings, observer)
    # it computes the moving average itself, so that this is the only estimator of training
    shared |= {"observer": MovingAverageMinMaxObserver, "averaging_constant": AVERAGING_CONSTANT}
    if spec.fake_quantize == "auto":
        return _constructor(FakeQuantize, **shared)
    return _constructor(LearnedFakeQuantize, with_offset=spec.fake_quantize == "learned_offset", **shared)


def _weight(config: QuantConfig, method: Method, *, per_tensor: bool) -> Any:
    spec = config.weight
    default = "per_tensor_symmetric" if config.engine == "qnnpack" else "per_channel_symmetric"
    qscheme = _qscheme(spec, default)
    if per_tensor:
        affine = qscheme in (torch.per_channel_affine, torch.per_tensor_affine)
        qscheme = torch.per_tensor_affine if affine else torch.per_tensor_symmetric
    per_channel = qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)
    low, high = weight_range(config)
    shared = {"dtype": _dtype(spec, "qint8"), "qscheme": qscheme, "quant_min": low, "quant_max": high}
    moving = MovingAveragePerChannelMinMaxObserver if per_channel else MovingAverageMinMaxObserver
    exact = PerChannelMinMaxObserver if per_channel else MinMaxObserver
    own, own_rounding = own_observer(spec), own_fake_quantize(spec)
    if method == "qat" and (own is not None or own_rounding is not None):
        averaging = {} if own is not None else {"averaging_constant": 1.0}
        observer = own or moving
        settings = {"observer": observer, **averaging, **shared}
        return _made_with(spec, own_rounding or TorchFakeQuantize, settings, observer)
    if own is not None:
        return _made_with(spec, own, shared)
    if method == "qat":
        # averaging_constant=1: the range is that of the weights as they are now, without memory
        if spec.fake_quantize != "auto":
            own = {"sees_weights": True, "with_offset": spec.fake_quantize == "learned_offset"}
            return LearnedFakeQuantize.with_args(observer=moving, averaging_constant=1.0, **own, **shared)
        return FakeQuantize.with_args(observer=moving, averaging_constant=1.0, **shared)
    name = weight_observer(config, method, qscheme)
    return {"moving_average": moving, "min_max": exact, "balanced": BalancedObserver}[name].with_args(**shared)


def weight_observer(config: QuantConfig, method: Method, qscheme: torch.qscheme) -> ObserverName:
    """The observer of weights after training, with ``auto`` decided. ``config`` is resolved.

    Balanced are weights with one symmetric scale for each channel, beside activations whose ranges are known: what
    their errors add up to shifts what all layers behind them give. TorchScript makes code of observers, and takes none
    but torch's.
    """
    wanted = config.weight.observer
    if wanted == "moving_average":
        return "moving_average"
    asked = wanted == "balanced" or (wanted == "auto" and method == "static")
    # a layer without a scale for each channel, such as a transposed convolution, has min and max in any case
    fits = qscheme == torch.per_channel_symmetric and config.backend != "torchscript"
    return "balanced" if asked and fits else "min_max"


def own_observer(spec: TensorSpec) -> Any:
    """The user's own observer class, or None.

    Raises:
        ConfigError: It is no observer of torch.ao.
    """
    return own_class(spec.observer, "observer", ObserverBase)


def own_fake_quantize(spec: TensorSpec) -> Any:
    """The user's own fake quantize class, or None.

    Raises:
        ConfigError: It is no fake quantize of torch.ao.
    """
    return own_class(spec.fake_quantize, "fake_quantize", FakeQuantizeBase)


def own_classes(spec: TensorSpec) -> tuple[Any, Any]:
    """The user's observer and fake quantize, None where there is none.

    Raises:
        ConfigError: They are none of torch.ao.
    """
    return own_observer(spec), own_fake_quantize(spec)


def own_class(path: str, setting: str, base: type, library: str = "torch.ao.quantization") -> Any:
    """The class that a :class:`TensorSpec` names, or None if it names none of the user's.

    Args:
        path: The value of the setting: a word, or an import path.
        setting: Its name.
        base: What the class has to derive from.
        library: Where ``base`` is from, for the message.

    Raises:
        ConfigError: It does not.
    """
    if "." not in path:
        return None
    found = load_class(path, f"TensorSpec({setting}={path!r})")
    if not issubclass(found, base):
        raise ConfigError(
            f"TensorSpec({setting}={path!r}): it does not derive from {library}.{base.__name__}, which this "
            "backend asks for."
        )
    return found


def made_with(kind: Any, settings: dict[str, Any], inside: Any = None) -> Any:
    """A constructor of an observer or fake quantize, with those of the settings that it takes.

    Args:
        kind: The class.
        settings: ``dtype``, ``qscheme``, ``quant_min``, ``quant_max``, and what else we would say.
        inside: The observer that a fake quantize makes, and passes its other arguments to.
    """
    return kind.with_args(**{k: v for k, v in settings.items() if _takes(kind, k, inside)})


def _made_with(spec: TensorSpec, kind: Any, settings: dict[str, Any], inside: Any = None) -> Any:
    if spec.bits < 8 and not (_takes(kind, "quant_min", inside) and _takes(kind, "quant_max", inside)):
        raise ConfigError(
            f"TensorSpec(bits={spec.bits}) with {kind.__name__}: it takes no quant_min and quant_max, by which it "
            "would be told the range of fewer bits. Let its __init__ take them and pass them on, or leave bits at 8."
        )
    return made_with(kind, settings, inside)


def _takes(kind: Any, name: str, inside: Any) -> bool:
    for base in kind.__mro__:
        if base in (FakeQuantizeBase, ObserverBase):
            break
        parameters = inspect.signature(base.__init__).parameters
        if name in parameters:
            return True
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return False
    return inside is not None and _takes(inside, name, None)


def config_of_layer(config: QuantConfig, name: str) -> QuantConfig:
    """``config`` as it is for the layer ``name``. ``config.layers`` are names, one entry each."""
    for layer in config.layers:
        if layer.name == name and not layer.activation and not layer.weight:
            return config
        if layer.name == name:
            return replace(
                config,
                layers=(),
                activation=layer.activation or config.activation,
                weight=layer.weight or config.weight,
            )
    return config


def layer_qconfig(config: QuantConfig, method: Method, kind: type[nn.Module]) -> QConfig:
    """What a layer of this type gets. ``config`` is resolved."""
    if kind in RNNS:  # the only int8 kernels there are take the ranges of activations at run time
        return _recurrent(config)
    if method == "dynamic":
        return QConfig(activation=_AT_RUN_TIME, weight=_weight(config, method, per_tensor=False))
    # no int8 kernel takes per-channel weights of a transposed convolution (pytorch/pytorch#47535)
    weight = _weight(config, method, per_tensor=kind in CONV_TRANSPOSES)
    return QConfig(activation=_activation(config, method), weight=weight)


def in_words(config: QuantConfig, method: Method, kind: type[nn.Module]) -> tuple[TensorSpec | None, TensorSpec]:
    """How what a layer of this type gives, and its weight, are quantized, with every ``auto`` decided.

    Args:
        config: Resolved, as it is for the layer (:func:`config_of_layer`).
        method: dynamic, static or qat.
        kind: The type of the layer.

    Returns:
        Of activations, None where ranges are taken at run time; and of the weight.
    """
    weight, activation = config.weight, config.activation
    default = "per_tensor_symmetric" if config.engine == "qnnpack" else "per_channel_symmetric"
    qscheme = str(_qscheme(weight, default)).removeprefix("torch.")
    if issubclass(kind, (*CONV_TRANSPOSES, *RNNS)):
        qscheme = qscheme.replace("per_channel", "per_tensor")
    weight = replace(
        weight,
        dtype="qint8",
        qscheme=qscheme,  # type: ignore[arg-type]
        observer=weight_observer(config, method, getattr(torch, qscheme)),
    )
    if method == "dynamic" or issubclass(kind, RNNS):
        return None, weight
    observer = {"static": "histogram", "qat": "moving_average"}[method]
    return (
        replace(
            activation,
            dtype="quint8" if activation.dtype == "auto" else activation.dtype,
            qscheme="per_tensor_affine" if activation.qscheme == "auto" else activation.qscheme,
            observer=observer if activation.observer == "auto" else activation.observer,
        ),
        weight,
    )


_AT_RUN_TIME = PlaceholderObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=255, is_dynamic=True)


def _recurrent(config: QuantConfig) -> QConfig:
    """Torch packs the weights of recurrent layers per tensor only, and quantizes their activations at run time."""
    return QConfig(activation=_AT_RUN_TIME, weight=_weight(config, "dynamic", per_tensor=True))


def qconfig_mapping(config: QuantConfig, method: Method) -> QConfigMapping:
    """The mapping that :func:`torch.ao.quantization.fx.prepare` takes.

    ``config`` has been through :func:`lightning_quant.config.resolve`. Fixed-range operators (sigmoid, hardsigmoid,
    tanh) keep the entries of torch's own default mapping.
    """
    if method == "dynamic":
        mapping = QConfigMapping().set_global(None)
        linear = layer_qconfig(config, method, nn.Linear)
        kind: Any
        # a ReLU after a linear layer is part of its kernel, and torch.ao asks for one qconfig for both
        for kind in (nn.Linear, F.linear, nn.ReLU, F.relu, torch.relu):
            mapping.set_object_type(kind, linear)
        for kind in RNNS:
            mapping.set_object_type(kind, _recurrent(config))
        return mapping
    stock = get_default_qat_qconfig_mapping if method == "qat" else get_default_qconfig_mapping
    mapping = stock(config.engine)
    mapping.set_global(layer_qconfig(config, method, nn.Linear))
    # as every other layout operator: torch's own entry lets it take the range of its input, and none of a float one,
    # so that a layer behind it stays float
    mapping.set_object_type("reshape", layer_qconfig(config, method, nn.Linear))
    transposed = layer_qconfig(config, method, nn.ConvTranspose2d)
    for kind in (*CONV_TRANSPOSES, *CONV_TRANSPOSE_FUNCTIONS):
        mapping.set_object_type(kind, transposed)
    for kind in (*EMBEDDINGS, F.embedding, F.embedding_bag):  # those in int8 are ours: backends/embeddings.py
        mapping.set_object_type(kind, None)
    for kind in FLOAT_BY_DESIGN:
        mapping.set_object_type(kind, None)
    for kind in RNNS:  # the only int8 kernels there are take the ranges of activations at run time
        mapping.set_object_type(kind, _recurrent(config))
    return mapping
