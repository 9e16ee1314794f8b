"""Torch's own eager-mode ``prepare``, ``prepare_qat`` and ``convert``, each told which modules it is to swap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from lightning_quant import qat_modules
from lightning_quant._torch_ao import (
    FusedModule,
    QConfig,
    convert_modules,
    fused_quantized_modules,
    get_default_dynamic_quant_module_mappings,
    get_default_static_quant_module_mappings,
    prepare_modules,
    prepare_modules_qat,
    qat_conv_bn_modules,
    qat_layer_modules,
    quantized_modules,
)
from lightning_quant.backends import float_results
from lightning_quant.backends.beginning import native_patterns
from lightning_quant.backends.eager_operators import SCALAR
from lightning_quant.backends.eager_stubs import Functional
from lightning_quant.backends.graph import put
from lightning_quant.config import Method
from lightning_quant.qconfig import RNNS

#: Key of ``graph_module.meta``: name of a module -> its qconfig. Not on the modules, because those of a graph that is
#: linked to a model in training are the model's own.
QCONFIGS = "lightning_quant qconfigs"
#: Name of a module -> its qconfig.
QConfigs = dict[str, QConfig | None]


def trainable_modules() -> dict[Any, Any]:
    """Float module -> the one with fake quantized weights. Torch's own table for eager mode has no ``nn.Conv1d``."""
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    return {
        c.pattern: c.qat_module
        for c in native_patterns("qat").configs
        if c.qat_module is not None and isinstance(c.pattern, type) and c.pattern not in embeddings
    }


def int8_modules(method: Method) -> dict[Any, Any]:
    """Float or trainable module -> int8 one."""
    dynamic: dict[Any, Any] = get_default_dynamic_quant_module_mappings()
    if method == "dynamic":
        return dynamic
    return {
        **get_default_static_quant_module_mappings(),
        **{kind: dynamic[kind] for kind in RNNS},
        qat_layer_modules.Conv1d: quantized_modules.Conv1d,
        qat_conv_bn_modules.ConvReLU1d: fused_quantized_modules.ConvReLU1d,
    }


def observe(graph_module: fx.GraphModule, qconfigs: QConfigs, kept: tuple[str, ...], *, training: bool) -> None:
    """Give the modules named in ``qconfigs`` observers, in ``training`` fake quantizes and fake quantized weights.

    Args:
        graph_module: Changed in place.
        qconfigs: Afterwards no module has its own, so that nothing depends on copies and links keeping it.
        kept: Modules that are not looked into.
        training: ``graph_module`` is in training mode.
    """
    if not qconfigs:
        return
    with _apart(graph_module, kept):
        _set_qconfigs(graph_module, qconfigs)
        if training:
            prepare_modules_qat(graph_module, mapping=trainable_modules(), inplace=True)
        else:
            prepare_modules(graph_module, inplace=True)
        _take_qconfigs(graph_module)


def swap(graph_module: fx.GraphModule, qconfigs: QConfigs, kept: tuple[str, ...], method: Method) -> None:
    """Put int8 modules in the places of those named in ``qconfigs``.

    Args:
        graph_module: Observed, with the ranges of weights as they are; in eval mode. Changed in place.
        qconfigs: Those that it was observed with, and those of layers that need no observers.
        kept: Modules that are not looked into.
        method: dynamic, static or qat.
    """
    _store_attributes(graph_module)
    stock = {own: theirs for theirs, own in qat_modules.REPLACEMENTS.items()}
    with _apart(graph_module, kept):
        for module in graph_module.modules():
            # torch.ao folds the batch norm of its own classes alone
            if type(module) in stock:
                module.__class__ = stock[type(module)]
            elif isinstance(module, Functional) and module.operation in SCALAR:
                module.functional = quantized_modules.QFunctional()  # no observer, from which torch.ao would make one
        in_float = [name for name, qconfig in qconfigs.items() if float_results.gives_float(qconfig)]
        for name in in_float:
            put(graph_module, f"{name}.activation_post_process", float_results.Unrounded())
        _set_qconfigs(graph_module, qconfigs)
        convert_modules(graph_module, int8_modules(method), inplace=True, convert_custom_config_dict={})
        for name in in_float:
            graph_module.get_submodule(name).__class__ = float_results.LinearToFloat


@contextmanager
def _apart(graph_module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Take the modules that a graph keeps out of it: torch.ao goes through all modules that there are."""
    modules = {name: graph_module.get_submodule(name) for name in names}
    for name in names:
        put(graph_module, name, nn.Identity())
    try:
        yield
    finally:
        for name, module in modules.items():
            put(graph_module, name, module)


def _set_qconfigs(graph_module: nn.Module, qconfigs: QConfigs) -> None:
    """Give modules these qconfigs, and all others None: torch.ao hands that of a module down to its children."""
    _take_qconfigs(graph_module)
    for name, qconfig in qconfigs.items():
        module = graph_module.get_submodule(name)
        parts = module.children() if isinstance(module, FusedModule) else ()
        for part in (module, *parts):
            part.__dict__["qconfig"] = qconfig
    for module in graph_module.modules():
        module.__dict__.setdefault("qconfig", None)


def _take_qconfigs(graph_module: nn.Module) -> None:
    for module in graph_module.modules():
        module.__dict__.pop("qconfig", None)


def _store_attributes(graph_module: fx.GraphModule) -> None:
    """Keep what the graph reads of layers: once these are in int8, they have packed weights and no Parameters."""
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        owner, _, attribute = str(node.target).rpartition(".")
        value = getattr(graph_module.get_submodule(owner), attribute)
        if owner and isinstance(value, torch.Tensor):
            name = f"stored_{node.name}"
            graph_module.register_buffer(name, value.detach())
            node.target = name
    graph_module.recompile()
