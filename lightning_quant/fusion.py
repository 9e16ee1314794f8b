"""Chains of conv or linear, batch norm and activation that run as one int8 kernel, found by data flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_quant._torch_ao import BackendConfig, fuse_graph
from lightning_quant.config import Method
from lightning_quant.qconfig import CONV_TRANSPOSES


@dataclass(frozen=True)
class FusedGroup:
    """Names of the modules (or functions) that became one, in the order of the data."""

    members: tuple[str, ...]

    def __str__(self) -> str:
        return " + ".join(self.members)


def _label(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def fuse(
    graph_module: fx.GraphModule, backend_config: BackendConfig, method: Method
) -> tuple[fx.GraphModule, tuple[FusedGroup, ...]]:
    """Fuse what the engine can run as one kernel.

    Fusion follows the users of each value, so that modules which are not connected are never joined, and a value that
    something else reads as well is not fused away.

    Args:
        graph_module: Its modules may be shared with the caller's: they are not changed.
        backend_config: torch's table of the patterns that can be fused.
        method: With ``qat``, batch norm stays a module of its own inside the fused one; with ``static`` it is folded
            into the weights; with ``dynamic`` only linear and ReLU are fused, as nothing else has a kernel.

    Returns:
        A new graph, and the groups in the order of the data.
    """
    transposed: dict[str, str] = {}
    if method == "static":
        transposed = _fold_transposed(graph_module)
    before = {node.name: node for node in graph_module.graph.nodes}
    if method == "qat":
        backend_config = _without_transposed_batch_norm(backend_config)
    elif method == "dynamic":
        backend_config = _linear_relu_only(backend_config)
    fused = fuse_graph(graph_module, method == "qat", None, backend_config)
    after = {node.name for node in fused.graph.nodes}
    groups = []
    for node in fused.graph.nodes:
        if node.op != "call_module" or node.name not in before:
            continue
        chain = [before[node.name]]
        while len(chain[-1].users) == 1:
            following = next(iter(chain[-1].users))
            if following.name in after:
                break
            chain.append(following)
        members = tuple(_label(link) for link in chain)
        if members[0] in transposed:
            members = (members[0], transposed[members[0]], *members[1:])
        if len(members) > 1:
            groups.append(FusedGroup(members))
    return fused, tuple(groups)


def _without_transposed_batch_norm(config: BackendConfig) -> BackendConfig:
    """Torch lists transposed convolution + batch norm as a pattern, and raises on it in training."""
    kept = [c for c in config.configs if not (isinstance(c.pattern, tuple) and c.pattern[0] in CONV_TRANSPOSES)]
    return BackendConfig(config.name).set_backend_pattern_configs(kept)


def _linear_relu_only(config: BackendConfig) -> BackendConfig:
    kept = [c for c in config.configs if c.pattern in ((nn.Linear, nn.ReLU), (nn.Linear, F.relu))]
    return BackendConfig(config.name).set_backend_pattern_configs(kept)


def _fold_transposed(graph_module: fx.GraphModule) -> dict[str, str]:
    """Fold batch norms into transposed convolutions: torch.ao would rather fuse the batch norm with a ReLU after it.

    Returns:
        Name of each transposed convolution -> name of the batch norm folded into it.
    """
    folded: dict[str, str] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module" or len(node.users) != 1:
            continue
        conv: Any = graph_module.get_submodule(str(node.target))
        following = next(iter(node.users))
        if type(conv) not in CONV_TRANSPOSES or following.op != "call_module":
            continue
        norm: Any = graph_module.get_submodule(str(following.target))
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.training:
            continue
        fused: nn.Module = fuse_conv_bn_eval(conv, norm, transpose=True)
        graph_module.add_submodule(str(node.target), fused)
        folded[str(node.target)] = str(following.target)
        following.replace_all_uses_with(node)
        graph_module.graph.erase_node(following)
    graph_module.recompile()
    return folded
