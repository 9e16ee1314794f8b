"""A converted eager-mode graph as float arithmetic between quantize and dequantize operators.

It is read off the int8 modules, so that weights, scales and zero points are theirs to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant._torch_ao import RECURRENT_MODULES, fused_quantized_modules, quantized_modules, reference_modules
from lightning_quant.backends.eager_operators import FIXED, SCALAR, TENSOR, TENSORS, VALUE
from lightning_quant.backends.eager_stubs import Functional
from lightning_quant.backends.few_bits import WHOLE
from lightning_quant.backends.float_results import LinearToFloat

_OPS = torch.ops.quantized_decomposed
_STORED = {torch.quint8: torch.uint8, torch.qint8: torch.int8}

_PLAIN = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_WITH_RELU: dict[Any, Any] = {
    fused_quantized_modules.LinearReLU: nn.Linear,
    fused_quantized_modules.ConvReLU1d: nn.Conv1d,
    fused_quantized_modules.ConvReLU2d: nn.Conv2d,
    fused_quantized_modules.ConvReLU3d: nn.Conv3d,
}
#: Int8 layer -> the float layer that it is without a ReLU.
_LAYERS: dict[Any, Any] = {
    **{getattr(quantized_modules, kind.__name__): kind for kind in _PLAIN},
    **_WITH_RELU,
    LinearToFloat: nn.Linear,
}

_NORMS: dict[Any, tuple[Any, bool]] = {
    quantized_modules.BatchNorm2d: (nn.BatchNorm2d, False),
    quantized_modules.BatchNorm3d: (nn.BatchNorm3d, False),
    fused_quantized_modules.BNReLU2d: (nn.BatchNorm2d, True),
    fused_quantized_modules.BNReLU3d: (nn.BatchNorm3d, True),
}


@dataclass(frozen=True)
class QParams:
    """``x ~ (q - zero_point) * scale``, with ``q`` of ``dtype``: ``torch.quint8`` or ``torch.qint8``.

    ``ends`` are the least and the largest ``q``, where these are not all that the type has.
    """

    scale: float
    zero_point: int
    dtype: torch.dtype
    ends: tuple[int, int] | None = None

    def after(self, operation: Callable[[torch.Tensor], torch.Tensor]) -> QParams:
        """Those of what ``operation`` gives for an int8 tensor that has these."""
        tensor = torch._empty_affine_quantized([1], scale=self.scale, zero_point=self.zero_point, dtype=self.dtype)
        found = operation(tensor)
        return QParams(found.q_scale(), found.q_zero_point(), found.dtype)


def neutral(
    converted: fx.GraphModule, recurrent: dict[str, nn.Module], ends: dict[str, tuple[int, int]]
) -> fx.GraphModule:
    """The graph ``converted`` with explicit operators in the place of int8 tensors.

    Args:
        converted: Its modules are taken over, and changed.
        recurrent: The float layers of those that take the ranges of activations at run time, which have no neutral
            form.
        ends: Name of a module whose result has fewer than 8 bits -> the least and the largest of its integers.
    """
    for name, module in list(converted.named_modules()):
        if isinstance(module, RECURRENT_MODULES) and name in recurrent:
            _put(converted, name, recurrent[name])
    return _Writer(converted, ends).write()


class _Writer:
    """Goes through the nodes of a converted graph once, and writes each as what it computes in float.

    Attributes:
        known: Node of the converted graph that gives int8 -> its qparams.
        written: Node of the converted graph -> that of the new one, which gives its value dequantized.
    """

    def __init__(self, converted: fx.GraphModule, ends: dict[str, tuple[int, int]]) -> None:
        self.module = converted
        self.ends = ends
        self.graph = fx.Graph()
        self.known: dict[fx.Node, QParams] = {}
        self.written: dict[fx.Node, fx.Node] = {}

    def write(self) -> fx.GraphModule:
        for node in self.module.graph.nodes:
            self.written[node] = self._quantize(node) if node.op == "call_module" else self._copy(node)
        return fx.GraphModule(self.module, self.graph, type(self.module).__name__)

    def _copy(self, node: fx.Node) -> fx.Node:
        """The same call in float; rounded, if it gives int8."""
        copied = self.graph.node_copy(node, lambda n: self.written[n])
        source = next((n for n in node.all_input_nodes if n in self.known), None)
        if source is None:
            return copied
        if node.meta.get(VALUE) == TENSORS:  # parts, which are read one by one
            self.known[node] = self.known[source]
        if node.meta.get(VALUE) != TENSOR:
            return copied
        return self._round(node, copied, self.known[source])

    def _round(self, node: fx.Node, value: fx.Node, qparams: QParams) -> fx.Node:
        self.known[node] = qparams
        low, high = qparams.ends or WHOLE[qparams.dtype]
        limits = (qparams.scale, qparams.zero_point, low, high, _STORED[qparams.dtype])
        quantized = self.graph.call_function(_OPS.quantize_per_tensor.default, (value, *limits))
        return self.graph.call_function(_OPS.dequantize_per_tensor.default, (quantized, *limits))

    def _quantize(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        module: Any = self.module.get_submodule(name)
        kind = type(module)
        if kind is quantized_modules.Quantize:
            (source,) = node.all_input_nodes
            qparams = QParams(float(module.scale), int(module.zero_point), module.dtype, self.ends.get(name))
            return self._round(node, self.written[source], qparams)
        if kind is quantized_modules.DeQuantize:
            return self.written[node.all_input_nodes[0]]
        if kind is Functional:
            return self._functional(node, module)
        dtype = next((self.known[n].dtype for n in node.all_input_nodes if n in self.known), None)
        if dtype is None:
            return self._copy(node)
        if kind in FIXED:
            copied = self.graph.node_copy(node, lambda n: self.written[n])
            return self._round(node, copied, self.known[node.all_input_nodes[0]].after(module))
        relu = False
        if kind in _LAYERS:
            _put(self.module, name, _layer(_LAYERS[kind], module))
            relu = kind in _WITH_RELU
        elif kind in _NORMS:
            float_kind, relu = _NORMS[kind]
            _put(self.module, name, _norm(float_kind, module))
        elif kind in (quantized_modules.Hardswish, quantized_modules.ELU, quantized_modules.LeakyReLU):
            _put(self.module, name, _activation(module))
        else:
            return self._copy(node)
        value = self.graph.node_copy(node, lambda n: self.written[n])
        if kind is LinearToFloat:
            return value
        if relu:
            value = self.graph.call_function(F.relu, (value,))
        qparams = QParams(float(module.scale), int(module.zero_point), dtype, self.ends.get(name))
        return self._round(node, value, qparams)

    def _functional(self, node: fx.Node, module: Functional) -> fx.Node:
        args: Any = fx.node.map_arg(node.args, lambda n: self.written[n])
        qparams = self.known[node.all_input_nodes[0]]
        own: Any = module.functional
        if module.operation in SCALAR:
            number: Any = node.args[1]
            if module.operation == "add_scalar":  # the kernel adds to the integers
                args = (args[0], round(number / qparams.scale) * qparams.scale)
            qparams = qparams.after(lambda x: module(x, number))
        else:
            qparams = QParams(own.scale, own.zero_point, qparams.dtype, self.ends.get(str(node.target)))
        functions: dict[str, Any] = {
            "add": torch.add, "add_relu": torch.add, "add_scalar": torch.add, "mul": torch.mul,
            "mul_scalar": torch.mul, "matmul": torch.matmul, "cat": torch.cat,
        }  # fmt: skip
        value = self.graph.call_function(functions[module.operation], tuple(args))
        if module.operation == "add_relu":
            value = self.graph.call_function(F.relu, (value,))
        return self._round(node, value, qparams)


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.get_submodule(parent)._modules[child] = part


def _layer(kind: Any, int8: Any) -> nn.Module:
    """The reference layer with the weights of an int8 one."""
    weight, bias = int8._weight_bias()
    with torch.device("meta"):
        if kind is nn.Linear:
            layer: Any = nn.Linear(int8.in_features, int8.out_features, bias is not None)
        else:
            more = {"output_padding": int8.output_padding} if int8.transposed else {}
            layer = kind(
                int8.in_channels, int8.out_channels, int8.kernel_size, stride=int8.stride, padding=int8.padding,
                dilation=int8.dilation, groups=int8.groups, bias=bias is not None, **more,
            )  # fmt: skip
    layer.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    qparams: dict[str, Any] = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127, "is_decomposed": True}
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        qparams |= {
            "qscheme": torch.per_channel_affine,
            "scale": weight.q_per_channel_scales().float(),
            "zero_point": weight.q_per_channel_zero_points(),
            "axis": weight.q_per_channel_axis(),
        }
    else:
        qparams |= {
            "qscheme": torch.per_tensor_affine,
            "scale": torch.tensor([weight.q_scale()]),
            "zero_point": torch.tensor([weight.q_zero_point()]),
        }
    made: nn.Module = getattr(reference_modules, kind.__name__).from_float(layer, qparams)
    return made


def _norm(kind: Any, int8: Any) -> nn.Module:
    norm: Any = kind(int8.num_features, eps=int8.eps)
    norm.weight, norm.bias = (nn.Parameter(x.detach(), requires_grad=False) for x in (int8.weight, int8.bias))
    norm.running_mean, norm.running_var = int8.running_mean, int8.running_var
    made: nn.Module = norm.eval()
    return made


def _activation(int8: Any) -> nn.Module:
    if isinstance(int8, nn.ELU):
        return nn.ELU(int8.alpha)
    return nn.LeakyReLU(int8.negative_slope) if isinstance(int8, nn.LeakyReLU) else nn.Hardswish()
