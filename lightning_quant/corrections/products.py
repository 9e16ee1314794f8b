"""A layer of a simulated graph as a product of matrices, at some positions of its output.

Of a feature map that a convolution gives, neighbours know much of each other: a few thousand positions say as much of
its weight as all of them, and cost a small part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant.analysis.branching import Runner
from lightning_quant.analysis.switches import Rounding, SwitchedLayer, SwitchedWeight
from lightning_quant.corrections.learned_rounding import Activation

_CONVS: dict[Any, int] = {
    F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3,
    torch.ops.aten.conv1d.default: 1, torch.ops.aten.conv2d.default: 2, torch.ops.aten.conv3d.default: 3,
    torch.ops.aten.conv1d.padding: 1, torch.ops.aten.conv2d.padding: 2, torch.ops.aten.conv3d.padding: 3,
}  # fmt: skip
_LINEARS = (F.linear, torch._C._nn.linear, torch.ops.aten.linear.default)
#: Positions of the output that a layer is looked at.
POSITIONS = 8192
#: Values of the inputs at these positions, at the most: 256 MiB.
_VALUES = 2**26
#: Of one value each.
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Sigmoid,
    nn.Tanh, nn.Mish, nn.CELU, nn.SELU,
)  # fmt: skip
#: Names of functions, methods and ``aten`` operators of the same.
_NAMES = frozenset(
    ("relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "gelu", "elu", "leaky_relu", "sigmoid", "tanh",
     "mish", "celu", "selu", "clamp", "clamp_min", "clamp_max")
)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """How a layer is computed.

    Attributes:
        kernel: ``(k, ...)`` of a convolution; of a linear layer ``()``.
        groups: Of a convolution; 1.
        stride: As many numbers as ``kernel`` has.
        dilation: The same.
        pad: As :func:`torch.nn.functional.pad` takes it.
        mode: The same.
        bias: ``(outputs,)``, or None.
        activation: What follows it; None: nothing.
    """

    kernel: tuple[int, ...]
    groups: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pad: tuple[int, ...]
    mode: str
    bias: torch.Tensor | None
    activation: Activation | None

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in the layout of the layer as ``(groups, outputs, inputs)``."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def positions(self, x: torch.Tensor) -> int:
        """How many positions the output for ``x`` has."""
        if not self.kernel:
            return x.numel() // x.shape[-1]
        sizes = self._windows(x).shape
        count = sizes[0]
        for size in sizes[2 : 2 + len(self.kernel)]:
            count *= size
        return count

    def read(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What the layer reads of ``x`` for some positions of its output: ``(groups, positions, inputs)``."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])[positions][None]
        windows = self._windows(x)
        count = len(self.kernel)
        places = torch.unravel_index(positions, (windows.shape[0], *windows.shape[2 : 2 + count]))
        # indices with a slice between them: the positions come first
        index: Any = (places[0], slice(None), *places[1:])
        found: torch.Tensor = windows[index]
        return found.reshape(len(positions), self.groups, -1).transpose(0, 1)

    def gives(self, read: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the layer and its activation function give: ``(groups, positions, outputs)``."""
        found = torch.baddbmm(self.bias_row(weight), read, self.rows(weight).transpose(1, 2))
        return found if self.activation is None else self.activation(found)

    def bias_row(self, weight: torch.Tensor) -> torch.Tensor:
        """The bias as ``(groups, 1, outputs)``; zeros, where there is none."""
        bias = weight.new_zeros(weight.shape[0]) if self.bias is None else self.bias.detach()
        return bias.reshape(self.groups, 1, -1)

    def _windows(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, *output, *kernel)``, a view of ``x`` with its padding."""
        if x.dim() == len(self.kernel) + 1:
            x = x[None]
        if any(self.pad):
            x = F.pad(x, self.pad, mode=self.mode)
        for dim, (kernel, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(dim, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
        return x


def drawn(
    product: Product,
    weight: torch.Tensor,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    positions: int,
    generator: torch.Generator,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the layer reads at positions that are drawn from all batches, as :meth:`Product.read` gives it.

    Args:
        product: How the layer is computed.
        weight: In its layout.
        batches: What it is given of each batch, in the float model and in the quantized one.
        positions: How many of all batches together; fewer where they would take too much memory.
        generator: Draws them.
    """
    most = min(positions, max(1, _VALUES // (weight.numel() // weight.shape[0] * product.groups)))
    for number, (floating, quantized) in enumerate(batches):
        # as many as there are to be, shared by the batches
        share = most * (number + 1) // len(batches) - most * number // len(batches)
        chosen = torch.randperm(product.positions(floating), generator=generator)[:share]
        yield product.read(floating, chosen), product.read(quantized, chosen)


def product_of(runner: Runner, node: fx.Node) -> Product | None:
    """How the layer of a node is computed; None: it is no linear layer and no convolution with a stored weight."""
    stored = runner.weight_of(node)
    if stored is None or type(stored.weight(False)) is not torch.Tensor:
        return None
    after = _behind(runner, node)
    if isinstance(stored, SwitchedLayer):
        layer: Any = stored.layer
        own = layer.after
        activation = after if own is None else own
        pad = (tuple(layer.pad), str(layer.padding_mode)) if layer.pad else None
        return _made(layer.function, stored.weight(False), layer.bias, layer.arguments, activation, pad)
    called = _arguments(runner, node)
    if called is None:
        return None
    bias, arguments = called
    return _made(node.target, stored.weight(False), bias, arguments, after, None)


def _arguments(runner: Runner, node: fx.Node) -> tuple[torch.Tensor | None, dict[str, Any]] | None:
    """The bias of a function, and its other arguments; None: its weight is not read as it is stored."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if not isinstance(runner.parts.get(given.pop("weight")), SwitchedWeight):
        return None
    given.pop("input", None)
    bias: Any = given.pop("bias", None)
    if isinstance(bias, fx.Node):
        if bias.op != "get_attr":
            return None
        bias = runner.called(bias, (), {})
    if any(isinstance(value, fx.Node) for value in given.values()):
        return None
    return bias, given


def _made(
    function: Any,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arguments: dict[str, Any],
    activation: Activation | None,
    pad: tuple[tuple[int, ...], str] | None,
) -> Product | None:
    if function in _LINEARS and weight.dim() == 2:
        return Product((), 1, (), (), (), "constant", bias, activation)
    dims = _CONVS.get(function)
    if dims is None or weight.dim() != dims + 2:
        return None
    kernel = tuple(weight.shape[2:])
    dilation = _each(arguments.get("dilation", 1), dims)
    mode = "constant" if pad is None or pad[1] == "zeros" else pad[1]
    ends = _padding(arguments.get("padding", 0), kernel, dilation) if pad is None else pad[0]
    groups = int(arguments.get("groups", 1))
    return Product(kernel, groups, _each(arguments.get("stride", 1), dims), dilation, ends, mode, bias, activation)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """For :func:`torch.nn.functional.pad`: the last dimension first, each with both ends."""
    both = [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        both = [(total // 2, total - total // 2) for total in totals]
    elif padding != "valid":
        both = [(p, p) for p in _each(padding, len(kernel))]
    return tuple(end for ends in reversed(both) for end in ends)


def _behind(runner: Runner, node: fx.Node) -> Activation | None:
    """The activation function that alone reads what a layer gives, rounded or not."""
    for _ in range(2):
        users = list(node.users)
        if len(users) != 1:
            return None
        node = users[0]
        if _is_activation(runner, node):
            found = node
            return lambda x: runner.called(found, *fx.node.map_arg((found.args, found.kwargs), lambda _: x))
        if not isinstance(runner.parts.get(node), Rounding):
            return None
    return None


def _is_activation(runner: Runner, node: fx.Node) -> bool:
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        return isinstance(runner.parts[node], _ACTIVATIONS)
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return node.op in ("call_function", "call_method") and name.partition(".")[0].rstrip("_") in _NAMES
