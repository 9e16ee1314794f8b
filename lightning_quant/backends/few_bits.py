"""Activations of fewer than 8 bits in the 8 bits of torch's kernels, which saturate at the ends of these.

A value beyond the range that was observed is clamped in training, and has to be so in the int8 model: a kernel would
give it an integer that the smaller range does not have. The integers are clamped once they are there, so that a layer
is the same kernel as with 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from lightning_quant._torch_ao import is_observer
from lightning_quant.backends.constants import is_constant

#: Type of integers -> all that it has.
WHOLE: dict[torch.dtype, tuple[int, int]] = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}


def limits(observer: Any) -> tuple[int, int] | None:
    """``(quant_min, quant_max)`` of an observer or fake quantize whose range is smaller than its type; else None."""
    inner = getattr(observer, "activation_post_process", observer)
    dtype: Any = getattr(inner, "dtype", None)
    whole = WHOLE.get(dtype)
    if whole is None or getattr(inner, "quant_min", None) is None:
        return None
    found = (int(inner.quant_min), int(inner.quant_max))
    return None if found == whole else found


def saturate(prepared: fx.GraphModule) -> None:
    """Let activations of fewer bits be clamped behind their observers, which torch.ao lowers to a clamp of integers.

    Args:
        prepared: Of ``torch.ao.quantization.fx``, its observers in their places, about to be converted. Changed in
            place.
    """
    modules = dict(prepared.named_modules(remove_duplicate=False))
    qconfigs = prepared.meta["_observed_graph_module_attrs"].node_name_to_qconfig

    def observer_of(node: Any) -> nn.Module | None:
        called = modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None
        return called if is_observer(called) else None

    for node in list(prepared.graph.nodes):
        observer: Any = observer_of(node)
        ends = None if observer is None else limits(observer)
        source = node.args[0] if node.args else None
        if ends is None or not isinstance(source, fx.Node) or is_constant(prepared, source):
            continue
        if source.all_input_nodes and all(observer_of(read) is observer for read in source.all_input_nodes):
            continue  # moved from where it was clamped
        scale, zero_point = (value.item() for value in observer.calculate_qparams())
        with prepared.graph.inserting_after(node):
            clamped = prepared.graph.call_function(torch.clamp, (node, *_values(ends, scale, zero_point)))
        with prepared.graph.inserting_after(clamped):
            again = prepared.graph.call_module(str(node.target), (clamped,))
        node.replace_all_uses_with(again, delete_user_cb=lambda user, own=clamped: user is not own)
        for made in (clamped, again):
            qconfigs[made.name] = qconfigs.get(source.name)
            made.meta.update(node.meta)
    prepared.recompile()


def _values(ends: tuple[int, int], scale: float, zero_point: int) -> tuple[float, ...]:
    return tuple((end - zero_point) * scale for end in ends)


def limits_by_name(prepared: nn.Module) -> dict[str, tuple[int, int]]:
    """Name of each module of an eager-mode model whose result has fewer than 8 bits -> the ends of its integers."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in prepared.named_modules(remove_duplicate=False):
        ends = limits(getattr(module, "activation_post_process", None)) if not is_observer(module) else None
        if ends is not None:
            found[name.removesuffix(".functional")] = ends
    return found


def saturate_modules(converted: fx.GraphModule, ends: dict[str, tuple[int, int]]) -> None:
    """Clamp what int8 modules give.

    Args:
        converted: Of eager mode, with int8 modules. Changed in place.
        ends: From :func:`limits_by_name`, before its modules were swapped.
    """
    for node in list(converted.graph.nodes):
        if node.op != "call_module" or str(node.target) not in ends:
            continue
        module: Any = converted.get_submodule(str(node.target))
        module = getattr(module, "functional", module)
        if not hasattr(module, "scale") or not hasattr(module, "zero_point"):
            continue
        values = _values(ends[str(node.target)], float(module.scale), int(module.zero_point))
        with converted.graph.inserting_after(node):
            clamped = converted.graph.call_function(torch.clamp, (node, *values))
        node.replace_all_uses_with(clamped, delete_user_cb=lambda user, own=clamped: user is not own)
        clamped.meta.update(node.meta)
    converted.recompile()
