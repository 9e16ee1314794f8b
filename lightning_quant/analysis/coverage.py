"""The share of the multiply-accumulates of layers with weights that run in int8."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_quant._torch_ao import RECURRENT_MODULES, FusedModule
from lightning_quant.backends.graph import place_of
from lightning_quant.modes import without_fast_path

#: Why a layer stays in float of which nothing else is known.
NO_KERNEL = "no int8 kernel was placed for it"

_ATEN = torch.ops.aten
nn_recurrent = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class LayerRow:
    """One layer with weights, as it ran.

    Attributes:
        name: The module (or, for a function, the module it was called in).
        op: The operator that ran, e.g. ``quantized::conv2d_relu`` or ``aten::convolution``.
        macs: Multiply-accumulates for the example inputs.
        int8: Whether it ran in int8.
        reason: Why not, where that is known.
        weighted: Whether it has weights. A product of two activations (attention) has none, and counts for no share.
    """

    name: str
    op: str
    macs: int
    int8: bool
    reason: str = ""
    weighted: bool = True


@dataclass(frozen=True)
class Coverage:
    """What ran in int8, and what in float.

    Attributes:
        rows: In the order in which the layers ran, recurrent ones first.
    """

    rows: tuple[LayerRow, ...]

    @property
    def share(self) -> float:
        """Multiply-accumulates in int8 over all of them, 0 to 1; 0 for a model without layers with weights."""
        total = sum(row.macs for row in self.rows if row.weighted)
        return sum(row.macs for row in self.rows if row.int8 and row.weighted) / total if total else 0.0


def coverage(
    converted: nn.Module,
    example_inputs: tuple[Any, ...] | torch.Tensor,
    *,
    reasons: dict[str, str] | None = None,
    run: Callable[[], object] | None = None,
) -> Coverage:
    """Run ``converted`` once and count the multiply-accumulates of each convolution, linear and recurrent layer.

    Embeddings have rows as well, with none.

    What is counted is the operators that run, not the modules that are there: a layer that is never called counts
    nothing, a functional one counts as much as a module.

    Args:
        converted: Any module; a float one has share 0.
        example_inputs: Positional arguments.
        reasons: Layer name -> why it is float, for the rows.
        run: What to run instead of ``converted(*example_inputs)``.
    """
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    names = _Names(converted)
    counter = _Counter(names, converted)
    with names, without_fast_path(), torch.no_grad(), counter:
        if run is None:
            converted(*example_inputs)
        else:
            run()
    reasons = reasons or {}
    rows = []
    for name, op, macs, int8, weighted in [(*row, True) for row in names.recurrent] + counter.found:
        reason = "" if int8 else next((r for n, r in reasons.items() if name == n or name.startswith(n + ".")), "")
        if not reason and not int8:
            reason = NO_KERNEL if weighted else "a product of two activations: float by design"
        rows.append(LayerRow(name, op, macs, int8, reason, weighted))
    return Coverage(tuple(rows))


class _Names:
    """Follows which module is running: its name, and whether it is a recurrent one, which is counted as a whole."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stack: list[str] = []
        self.inside_recurrent = 0
        self.recurrent: list[tuple[str, str, int, bool]] = []
        self.handles: list[Any] = []
        self.exported: list[fx.GraphModule] = []

    def __enter__(self) -> _Names:
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            # the layer of a fused module has no name of its own
            parent = self.model.get_submodule(name.rpartition(".")[0])
            shown = name.rpartition(".")[0] if isinstance(parent, FusedModule) else name
            recurrent = isinstance(module, (*RECURRENT_MODULES, *nn_recurrent))
            self.handles.append(module.register_forward_pre_hook(partial(self._enter, shown, recurrent)))
            self.handles.append(module.register_forward_hook(partial(self._leave, recurrent), always_call=True))
            if isinstance(module, fx.GraphModule) and _is_exported(module):
                # an attribute of its own is called before the method of its class
                module.forward = _Named(module, shown, self.stack).run
                self.exported.append(module)
        return self

    def _enter(self, name: str, recurrent: bool, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.stack.append(name)
        if recurrent and not self.inside_recurrent:
            int8 = isinstance(module, RECURRENT_MODULES)
            self.recurrent.append((name, type(module).__name__, _recurrent_macs(module, args[0]), int8))
        self.inside_recurrent += recurrent

    def _leave(self, recurrent: bool, *_: object) -> None:
        self.stack.pop()
        self.inside_recurrent -= recurrent

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for module in self.exported:
            del module.forward

    @property
    def current(self) -> str:
        return self.stack[-1] if self.stack else ""


class _Named(fx.Interpreter):
    """Runs an exported graph, each operator under the name of the module that it came from."""

    def __init__(self, module: fx.GraphModule, name: str, stack: list[str]) -> None:
        super().__init__(module)
        self.name = name
        self.stack = stack

    def run_node(self, n: fx.Node) -> Any:
        place = place_of(n)
        self.stack.append(f"{self.name}.{place}" if self.name and place else self.name or place)
        try:
            return super().run_node(n)
        finally:
            self.stack.pop()


def _is_exported(module: fx.GraphModule) -> bool:
    return any(isinstance(node.target, torch._ops.OpOverload) and place_of(node) for node in module.graph.nodes)


def _recurrent_macs(module: Any, x: Any) -> int:
    """Each step multiplies the input and the hidden state by the weights of every gate."""
    data = getattr(x, "data", x)  # a PackedSequence has its steps there
    steps = data.numel() // data.shape[-1]
    kind = type(module).__name__.upper()
    gates = 4 if "LSTM" in kind else 3 if "GRU" in kind else 1
    size, hidden = module.input_size, module.hidden_size
    state = getattr(module, "proj_size", 0) or hidden
    directions = 2 if getattr(module, "bidirectional", False) else 1
    total = 0
    for layer in range(getattr(module, "num_layers", 1)):
        width = size if layer == 0 else state * directions
        total += directions * gates * hidden * (width + state)
        if state != hidden:
            total += directions * hidden * state
    return steps * total


def module_macs(module: Any, given: Any) -> int:
    """Of one call of a linear or recurrent layer, or one that is fused with what follows it; 0 of any other."""
    layer: Any = next(iter(module.children())) if isinstance(module, FusedModule) else module
    if isinstance(layer, nn_recurrent):
        return _recurrent_macs(layer, given)
    if isinstance(layer, nn.Linear):
        return int(given.numel() // given.shape[-1] * layer.weight.numel())
    return 0


class _Counter(TorchDispatchMode):
    def __init__(self, names: _Names, model: nn.Module) -> None:
        super().__init__()
        self.names = names
        tensors = (*model.parameters(), *model.buffers())
        self.weights = {x.untyped_storage().data_ptr() for x in tensors if not x.is_quantized}
        self.found: list[tuple[str, str, int, bool, bool]] = []
        #: What dequantize operators gave -> whether it was a stored weight. Runtimes fuse them with what reads them.
        self.dequantized: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._follow(func, args, output)
        counted = _macs(func, args, output, self.weights)
        if counted is not None:
            counted = self._in_qdq(func, args, counted)
        if counted is not None and not self.names.inside_recurrent:
            self.found.append((self.names.current, func._schema.name, *counted))
        return output

    def _follow(self, func: Any, args: tuple[Any, ...], output: Any) -> None:
        """Remember what was dequantized, and where it was moved to."""
        name = func._schema.name
        source = args[0] if args else None
        if isinstance(source, (list, tuple)):
            source = source[0] if source else None
        if not isinstance(source, torch.Tensor) or not isinstance(output, torch.Tensor):
            return
        if name.startswith("quantized_decomposed::dequantize"):
            self.dequantized[output] = source.untyped_storage().data_ptr() in self.weights
        elif name in _MOVES and source in self.dequantized:
            self.dequantized[output] = self.dequantized[source]

    def _in_qdq(self, func: Any, args: tuple[Any, ...], counted: tuple[int, bool, bool]) -> tuple[int, bool, bool]:
        """As counted, but int8 if data and weight come from dequantize operators, of which the latter is stored."""
        macs, int8, _ = counted
        data, weight = (args[1], args[2]) if func is _ATEN.addmm.default else args[:2]
        if not isinstance(weight, torch.Tensor) or not self.dequantized.get(weight, False):
            return counted
        return macs, int8 or data in self.dequantized, True


#: They give the values that they take: what they move was dequantized before.
_MOVES = frozenset(
    f"aten::{name}"
    for name in (
        "t", "transpose", "permute", "view", "_unsafe_view", "reshape", "clone", "expand", "unsqueeze", "squeeze",
        "slice", "select", "alias", "detach", "constant_pad_nd", "cat", "_to_copy", "contiguous", "_reshape_alias",
    )
)  # fmt: skip

_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)


def _macs(func: Any, args: tuple[Any, ...], output: Any, weights: set[int]) -> tuple[int, bool, bool] | None:
    """``(multiply-accumulates, int8, with weights)`` of one product, or None for any other operator."""
    name = func._schema.name
    if name.startswith(("quantized::conv", "quantized::linear")) and not name.endswith(("prepack", "unpack")):
        packed: Any = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        weight = packed.unpack()[0]
        moved = args[0] if "transpose" in name else output
        return moved.numel() * math.prod(weight.shape[1:]), True, True
    if name.startswith("quantized::embedding") and not name.endswith(("prepack", "unpack")):
        return 0, True, True
    if name == "aten::embedding" or name.startswith("aten::_embedding_bag"):  # of a table that is an activation, none
        stored = args[0].untyped_storage().data_ptr() in weights
        return (0, False, True) if stored else None
    if name.startswith("onednn::q"):
        return output.numel() * math.prod(args[3].shape[1:]), True, True
    if func in (_ATEN.convolution.default, _ATEN.mkldnn_convolution.default):
        weight = args[1]
        transposed = bool(args[6]) if func is _ATEN.convolution.default else False
        # a transposed weight is (in, out / groups, ...): each input meets out / groups * prod(kernel) of it
        return (args[0] if transposed else output).numel() * math.prod(weight.shape[1:]), False, True
    if func in (_ATEN.addmm.default, _ATEN.mm.default, _ATEN.linear.default):
        weight = args[2] if func is _ATEN.addmm.default else args[1]
        stored = weight.untyped_storage().data_ptr() in weights
        return output.numel() * weight.shape[1 if func is _ATEN.linear.default else 0], False, stored
    if name in ("aten::bmm", "aten::baddbmm"):
        return output.numel() * args[-1].shape[1], False, args[-1].untyped_storage().data_ptr() in weights
    if name == "aten::mkldnn_rnn_layer":  # of exported graphs: every step meets the weights of all gates
        return args[0].numel() // args[0].shape[-1] * (args[1].numel() + args[2].numel()), False, True
    if name == "aten::_trilinear":  # nn.Bilinear: (rows, 1, in1, 1) by (1, out, in1, in2) by (rows, 1, 1, in2)
        return output.numel() * args[1].shape[-2] * args[1].shape[-1], False, True
    if name in _ATTENTION:
        query, key, value = args[:3]
        # scores and their product with the values
        return query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]), False, False
    return None
