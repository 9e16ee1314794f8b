"""Linear layers whose result the model returns: a kernel of torch multiplies in int8 and gives float.

Nothing is saved by rounding what is returned in float anyhow, and much is lost by it: two classes of ten whose logits
are in one step of the grid are the same to whoever compares them. Of the other layers torch has no such kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from lightning_quant._torch_ao import FusedModule, QConfig, is_observer, quantized_modules, reference_modules
from lightning_quant.backends import islands
from lightning_quant.config import QuantConfig
from lightning_quant.structures import plain

#: Those whose packed weights are FBGEMM's, which has the kernel.
_ENGINES = ("x86", "fbgemm")


class LinearToFloat(quantized_modules.Linear):
    """Torch's int8 linear layer, whose result is float32 and was never rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` of quint8 -> ``(..., out_features)`` of float32."""
        # the kernel rounds its float input to a grid: with that which x is on, to the very same integers
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x.dequantize(), x.q_scale(), x.q_zero_point(), self._packed_params._packed_params
        )

    def _get_name(self) -> str:
        return "LinearToFloat"

    def extra_repr(self) -> str:
        """Without the grid of a result."""
        weight = self.weight()
        return f"in_features={weight.shape[1]}, out_features={weight.shape[0]}, qscheme={weight.qscheme()}"


def has_kernel(config: QuantConfig) -> bool:
    """Whether the engine of a resolved config can give float."""
    return config.engine in _ENGINES


def returned(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The linear layers, called once, whose result is returned and read by nothing else, moved maybe.

    Observers are looked through.
    """
    calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    return [
        node
        for node in graph_module.graph.nodes
        if node.op == "call_module" and calls.count(str(node.target)) == 1
        if _is_linear(graph_module.get_submodule(str(node.target))) and _is_returned(graph_module, node)
    ]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, FusedModule)


def _is_returned(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    def goes_on(user: fx.Node) -> bool:
        return user.target is plain or _observes(graph_module, user) or islands.moves(graph_module, user)

    return bool(node.users) and all(
        user.op == "output" or (goes_on(user) and _is_returned(graph_module, user)) for user in node.users
    )


def _observes(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and is_observer(graph_module.get_submodule(str(node.target)))


# ---- fx


def leave_results(prepared: fx.GraphModule) -> None:
    """Take away the observers and fake quantizes of what is returned.

    Args:
        prepared: Of ``torch.ao.quantization.fx``, its observers in their places. Changed in place.
    """
    calls = [str(node.target) for node in prepared.graph.nodes if node.op == "call_module"]
    for node in returned(prepared):
        observed = next((user for user in node.users if _observes(prepared, user)), None)
        if observed is None or len(node.users) > 1 or calls.count(str(observed.target)) > 1:
            continue
        observed.replace_all_uses_with(node)
        prepared.graph.erase_node(observed)
        prepared.delete_submodule(str(observed.target))
    prepared.recompile()


def lower_results(converted: fx.GraphModule) -> None:
    """Let the linear layers that torch.ao left in float, because nothing rounds what they give, run in int8.

    Args:
        converted: By ``torch.ao.quantization.fx``. Changed in place.
    """
    for node in list(converted.graph.nodes):
        module: Any = converted.get_submodule(str(node.target)) if node.op == "call_module" else None
        given = node.args[0] if node.args else None
        if type(module) is not reference_modules.Linear or not isinstance(given, fx.Node):
            continue
        if (given.op, given.target) != ("call_method", "dequantize"):
            continue
        int8 = quantized_modules.Linear.from_reference(module, 1.0, 0)
        int8.__class__ = LinearToFloat
        parent, _, child = str(node.target).rpartition(".")
        converted.get_submodule(parent)._modules[child] = int8
        node.replace_input_with(given, given.args[0])
        if not given.users:
            converted.graph.erase_node(given)
    converted.recompile()


# ---- eager


def in_float(qconfig: QConfig) -> QConfig:
    """``qconfig`` for a layer whose result is not observed."""
    return QConfig(activation=nn.Identity, weight=qconfig.weight)


def gives_float(qconfig: QConfig | None) -> bool:
    """Whether it comes from :func:`in_float`."""
    return qconfig is not None and qconfig.activation is nn.Identity


class Unrounded(nn.Module):
    """What torch.ao asks for the grid of a result, which is not rounded."""

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """1 and 0, which nothing reads."""
        return torch.tensor([1.0]), torch.tensor([0])
