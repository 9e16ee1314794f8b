"""Every import from ``torch.ao`` and torchao that upstream may delete. Nobody else in the package imports them.

``torch.ao.quantization`` announces its removal on import of some names and on every call of others. What is
suppressed here is that announcement alone, and the one about quantized tensor dtypes: see :func:`quiet`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from lightning_quant.errors import ConfigError, MissingExtraError

try:
    import torch.ao.nn.intrinsic.qat as qat_conv_bn_modules
    import torch.ao.nn.intrinsic.quantized as fused_quantized_modules
    import torch.ao.nn.qat as qat_layer_modules
    import torch.ao.nn.quantized as quantized_modules
    import torch.ao.nn.quantized.dynamic as dynamic_modules
    import torch.ao.nn.quantized.reference as reference_modules
    import torch.ao.quantization.fx._decomposed
    from torch.ao.nn.intrinsic import _FusedModule as FusedModule
    from torch.ao.quantization import (
        DeQuantStub,
        FakeQuantize,
        FakeQuantizeBase,
        FusedMovingAvgObsFakeQuantize,
        HistogramObserver,
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        ObserverBase,
        PerChannelMinMaxObserver,
        PlaceholderObserver,
        QConfig,
        QConfigMapping,
        QuantStub,
    )
    from torch.ao.quantization.backend_config import (
        BackendConfig,
        BackendPatternConfig,
        get_fbgemm_backend_config,
        get_native_backend_config,
        get_onednn_backend_config,
        get_qnnpack_backend_config,
    )
    from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
    from torch.ao.quantization.fx.fuse import fuse as fuse_graph
    from torch.ao.quantization.fx.prepare import prepare as prepare_graph
    from torch.ao.quantization.fx.tracer import QuantizationTracer
    from torch.ao.quantization.fx.utils import assert_and_get_unique_device as _remembered_devices
    from torch.ao.quantization.observer import UniformQuantizationObserverBase
    from torch.ao.quantization.qconfig_mapping import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
    from torch.ao.quantization.quantization_mappings import (
        get_default_dynamic_quant_module_mappings,
        get_default_static_quant_module_mappings,
    )
    from torch.ao.quantization.quantize import (
        convert as convert_modules,
    )
    from torch.ao.quantization.quantize import (
        prepare as prepare_modules,
    )
    from torch.ao.quantization.quantize import (
        prepare_qat as prepare_modules_qat,
    )
    from torch.ao.quantization.quantize_fx import (
        _attach_meta_to_node_if_not_exist as attach_node_meta,
    )
    from torch.ao.quantization.quantize_fx import (
        _convert_fx as convert_graph,
    )
    from torch.ao.quantization.quantize_fx import (
        _swap_ff_with_fxff as swap_float_functional,
    )
    from torch.ao.quantization.quantize_jit import convert_dynamic_jit, convert_jit, prepare_dynamic_jit, prepare_jit
except ImportError as error:  # pragma: no cover - no such torch exists yet
    raise ImportError(
        f"torch {torch.__version__} no longer has torch.ao.quantization ({error.name}). "
        "The fx backend needs torch 2.13 to 2.14: pip install 'torch<2.15'."
    ) from error

#: The recurrent layers whose weights are int8.
RECURRENT_MODULES = (
    dynamic_modules.LSTM,
    dynamic_modules.GRU,
    dynamic_modules.LSTMCell,
    dynamic_modules.GRUCell,
    dynamic_modules.RNNCell,
)

__all__ = [
    "RECURRENT_MODULES",
    "BackendConfig",
    "BackendPatternConfig",
    "DeQuantStub",
    "FakeQuantize",
    "FakeQuantizeBase",
    "FusedModule",
    "FusedMovingAvgObsFakeQuantize",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObserverBase",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "PrepareCustomConfig",
    "QConfig",
    "QConfigMapping",
    "QuantStub",
    "QuantizationTracer",
    "UniformQuantizationObserverBase",
    "attach_node_meta",
    "classes",
    "convert_dynamic_jit",
    "convert_graph",
    "convert_jit",
    "convert_modules",
    "forget_models",
    "fuse_graph",
    "fused_quantized_modules",
    "get_default_dynamic_quant_module_mappings",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig_mapping",
    "get_default_static_quant_module_mappings",
    "get_fbgemm_backend_config",
    "get_native_backend_config",
    "get_onednn_backend_config",
    "get_qnnpack_backend_config",
    "is_fake_quantize",
    "is_observer",
    "prepare_dynamic_jit",
    "prepare_graph",
    "prepare_jit",
    "prepare_modules",
    "prepare_modules_qat",
    "pt2e",
    "qat_conv_bn_modules",
    "qat_layer_modules",
    "quantized_modules",
    "quiet",
    "reference_modules",
    "swap_float_functional",
]


def forget_models() -> None:
    """Let the models be freed that torch.ao has prepared and converted.

    It remembers the device of each of them for good, with the model as key of an unbounded cache
    (``torch/ao/quantization/fx/utils.py``, ``assert_and_get_unique_device``, in all versions up to 2.14), and so does
    torchao (``torchao/utils.py``, up to 0.18).
    """
    utils = sys.modules.get("torchao.utils")
    for function in (_remembered_devices, getattr(utils, "_assert_and_get_unique_device", None)):
        cache_clear = getattr(function, "cache_clear", None)
        if cache_clear is not None:
            cache_clear()


def is_fake_quantize(module: object) -> bool:
    """Whether ``module`` is a fake quantize, of torch.ao or of torchao."""
    return isinstance(module, (FakeQuantizeBase, *_torchao_classes("FakeQuantizeBase")))


def is_observer(module: object) -> bool:
    """Whether ``module`` is an observer or a fake quantize, of torch.ao or of torchao."""
    bases = (FakeQuantizeBase, ObserverBase, *_torchao_classes("FakeQuantizeBase", "ObserverBase"))
    return isinstance(module, bases)


def classes(*names: str) -> tuple[type, ...]:
    """The classes of these names of torch.ao, and those of torchao if it was imported."""
    return (*(globals()[name] for name in names), *_torchao_classes(*names))


def _torchao_classes(*names: str) -> tuple[type, ...]:
    pt2e = sys.modules.get("torchao.quantization.pt2e")  # who made an object of one has imported it
    return tuple(getattr(pt2e, name) for name in names) if pt2e is not None else ()


#: What the pt2e backend takes from torchao, by the module that has it.
_PT2E: dict[str, tuple[str, ...]] = {
    "torchao.quantization.pt2e": (
        "FakeQuantize",
        "FakeQuantizeBase",
        "MinMaxObserver",
        "MovingAverageMinMaxObserver",
        "MovingAveragePerChannelMinMaxObserver",
        "ObserverBase",
        "PerChannelMinMaxObserver",
        "PlaceholderObserver",
    ),
    "torchao.quantization.pt2e.observer": ("UniformQuantizationObserverBase",),
    "torchao.quantization.pt2e.quantize_pt2e": ("convert_pt2e", "prepare_pt2e", "prepare_qat_pt2e"),
    "torchao.quantization.pt2e.quantizer": ("QuantizationAnnotation", "QuantizationSpec", "Quantizer"),
    "torchao.quantization.pt2e.quantizer.quantizer": ("Q_ANNOTATION_KEY",),
}
#: The versions that the pt2e backend was tried with.
_PT2E_VERSIONS = "0.18"


@functools.cache
def pt2e() -> Any:
    """The names of torchao that the pt2e backend works with, as attributes.

    Imported when first asked for: the other backends work without torchao, and its import takes two seconds.

    Raises:
        MissingExtraError: torchao is not installed.
        ConfigError: The torchao that is installed does not have one of the names.
    """
    found: dict[str, Any] = {}
    logger = logging.getLogger("torch.utils._pytree")  # what torchao registers there is announced as deprecated
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # torchao's import adds a filter of its own to those of the user
            for module, names in _PT2E.items():
                loaded = importlib.import_module(module)
                found.update({name: getattr(loaded, name) for name in names})
    except (ImportError, AttributeError) as error:
        try:
            version = importlib.import_module("torchao").__version__
        except ImportError:
            raise MissingExtraError("torchao", "pt2e", "backend 'pt2e'") from error
        raise ConfigError(
            f"backend='pt2e' with torchao {version}: {error}. The backend was tried with torchao {_PT2E_VERSIONS}: "
            f"pip install 'torchao=={_PT2E_VERSIONS}', or use backend='fx'."
        ) from error
    finally:
        logger.setLevel(level)
    return SimpleNamespace(**found)


def register_int8_kernels() -> None:
    """Teach the inductor of this process the int8 convolutions and matrix products of oneDNN.

    torchao registers them when its quantizer is imported, for good: only in a process that does nothing else. Its
    patterns take for granted that what stands before and behind a matrix product folds the sizes in front and puts the
    same ones back; with free sizes, other reshapes match as well, and it computes something else. Those are left out.
    So are sums that would be added up in place in a tensor that is the caller's, a constant, or needed later on.

    Raises:
        ImportError: torchao is not installed, or not of a version that this knows.
        AttributeError: As before.
    """
    passes: Any = importlib.import_module("torchao.quantization.pt2e.inductor_passes.x86")
    checks = passes._is_valid_dequant_linear_pattern
    get_linear = passes._get_linear_node

    def checked(dtype: torch.dtype, folds: bool, contiguous: bool) -> Callable[[Any], bool]:
        theirs = checks(dtype, folds, contiguous)

        def check(match: Any) -> bool:
            if not folds:
                return bool(theirs(match))
            if not contiguous:  # it compares the sizes as numbers
                sizes = (*match.kwargs["act_expand_size"], *match.kwargs["wgt_expand_size"])
                return not any(isinstance(size, torch.fx.Node) for size in sizes) and bool(theirs(match))
            _, behind = get_linear(match, folds, contiguous)
            before = match.kwargs["x"].meta["val"].shape
            return tuple(behind.meta["val"].shape[:-1]) == tuple(before[:-1]) and bool(theirs(match))

        return check

    adds = passes._is_valid_quantized_op_binary_optimization_pattern

    def unshared(qop: Any, extra_input_from_dequant: bool = True) -> Callable[[Any], bool]:
        theirs = adds(qop, extra_input_from_dequant)

        def check(match: Any) -> bool:
            computed = passes.filter_nodes(match.nodes, qop)[0]
            names = [name for name in ("other", "accum", "accum_after_dequant") if name in match.kwargs]
            return all(_may_be_overwritten(match.kwargs[name], computed) for name in names) and bool(theirs(match))

        return check

    passes._is_valid_dequant_linear_pattern = checked
    passes._is_valid_quantized_op_binary_optimization_pattern = unshared
    importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")


def _may_be_overwritten(node: torch.fx.Node, computed: torch.fx.Node) -> bool:
    """Whether no one else looks at the memory behind ``node``, also through another view, once ``computed`` ran."""
    users = importlib.import_module("torch._inductor.fx_passes.mkldnn_fusion")._get_remaining_users
    while True:
        if node.op != "call_function" or len(users(node, computed)) > 1:
            return False
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        if schema is None or not schema.arguments or schema.arguments[0].alias_info is None:
            return True
        viewed = node.args[0]
        if not isinstance(viewed, torch.fx.Node):
            return False
        node = viewed


#: The announcements that a user of this package can do nothing about, by the start of their text.
DEPRECATIONS = (
    "torch.ao.quantization is deprecated",
    r"`?torch\.jit\.",
    "torch.quantize_per_tensor",
    r".*quint8.*deprecated",
    r".*qint8.*deprecated",
    r".*[Qq]uantized.*deprecated",
    "must run observer before calling calculate_qparams",
    "Please use quant_min and quant_max to specify the range for observers",
    "TypedStorage is deprecated",
    "To copy construct from a tensor",  # torch's own reference LSTM and GRU
    r"The tensor attributes? .*_flat_weights",  # the list in which torch's own recurrent layers keep their Parameters
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's announcements about torch.ao and torch.jit from the user while our own calls cause them."""
    with warnings.catch_warnings():
        for text in DEPRECATIONS:
            warnings.filterwarnings("ignore", message=text)
        yield
