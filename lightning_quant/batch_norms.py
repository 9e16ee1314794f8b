"""Statistics of batch norms, taken once more when a quantization-aware training is over.

Running statistics are moving averages over steps in which weights still moved, and with few bits they do so in jumps:
at the end they are not those of the network that is converted (Nagel et al. 2022,
https://arxiv.org/abs/2203.11086). Here mean and variance are those of all values of some batches at once, with the
weights as they are and with fake quantize on (Wu and Johnson 2021, section 3, https://arxiv.org/abs/2105.07576).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_quant.backends.graph import info, observers, sees_weights
from lightning_quant.errors import ConfigError


def reestimate_batch_norms(prepared: nn.Module, batches: Iterable[Any]) -> int:
    """Give the batch norms of a prepared module the statistics of ``batches``.

    They normalise by each batch meanwhile, as in training; dropout and the like are off. Weights are rounded as they
    are; ranges of activations, modes and the counts of batches stay as they are.

    Args:
        prepared: From :func:`lightning_quant.prepare` with ``method="qat"``, in training mode. Batch norms that are in
            eval mode, frozen on purpose, keep their statistics.
        batches: Inputs: a tensor, or a tuple of positional arguments.

    Returns:
        How many batches there were.

    Raises:
        ConfigError: No batch norm is in training mode, or there is no batch.
    """
    info(prepared)
    norms = training_norms(prepared)
    if not norms:
        raise ConfigError(
            "reestimate_batch_norms: no batch norm with running statistics is in training mode. Call "
            "prepared.train() first, or leave it out where the model has none."
        )

    def run() -> int:
        count = 0
        for batch in batches:
            prepared(*batch) if isinstance(batch, tuple) else prepared(batch)
            count += 1
        return count

    with torch.no_grad():
        return reestimated(prepared, [prepared], norms, run)


def training_norms(model: nn.Module) -> list[Any]:
    """The batch norms with running statistics that are in training mode."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None and module.training
    ]


def reestimated(
    model: nn.Module,
    graphs: Iterable[nn.Module],
    norms: list[Any],
    run: Callable[[], int],
    add: Callable[[torch.Tensor], object] | None = None,
) -> int:
    """Give ``norms``, parts of ``model``, the statistics of what they see while ``run`` runs.

    Args:
        model: Whose other parts are in eval mode meanwhile.
        graphs: The prepared graphs in it. Ranges of their activations stay, those of weights are of these as they are.
        norms: Of these, those with the same buffers count as one.
        run: Runs the model, and says for how many batches.
        add: Adds a tensor in place to those of other processes. Float64, on the CPU.

    Returns:
        How many batches ``run`` counted.

    Raises:
        ConfigError: There was no batch.
    """
    sums: dict[int, torch.Tensor] = {}

    def see(module: Any, args: tuple[Any, ...]) -> None:
        x = args[0].detach().to(torch.float64)
        x = x.movedim(1, 0).reshape(x.shape[1], -1)
        own = torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)]).cpu()
        key = id(module.running_mean)
        sums[key] = sums[key] + own if key in sums else own

    with _only(model, list(graphs), norms), contextlib.ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(see).remove)
        count = run()
    if count == 0:
        raise ConfigError("batch norms cannot be estimated again: there is no batch. Give at least one.")
    done: set[int] = set()
    for norm in norms:
        key = id(norm.running_mean)
        if key in done:
            continue
        done.add(key)
        total = sums.get(key, torch.zeros(3, norm.running_mean.numel(), dtype=torch.float64))
        if add is not None:
            add(total)
        if bool(total[0].max() > 1):  # else it was not called
            _write(norm, *total)
    return count


def _write(norm: Any, count: torch.Tensor, total: torch.Tensor, squares: torch.Tensor) -> None:
    """Mean, and unbiased variance as ``torch.nn.BatchNorm2d`` keeps it."""
    mean = total / count
    variance = ((squares / count - mean**2) * count / (count - 1)).clamp(min=0)
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


@contextlib.contextmanager
def _only(model: nn.Module, graphs: list[nn.Module], norms: list[Any]) -> Iterator[None]:
    """All but ``norms`` in eval mode, and activations not observed; running statistics do not move."""
    modes = [(module, module.training) for module in model.modules()]
    switched: list[tuple[Any, bool]] = [
        (module, sees_weights(graph, name))
        for graph in graphs
        for name, module in observers(graph).items()
        if isinstance(getattr(module, "observer_enabled", None), torch.Tensor)
    ]
    flags = [(module, module.observer_enabled.clone(), follows) for module, follows in switched]
    momenta = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for module, _ in modes:
            module.training = False
        for rounding, _, follows in flags:
            rounding.observer_enabled.fill_(follows)
        for norm in norms:
            norm.training = True
            # as they are, also where they say what a weight is multiplied by
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for rounding, flag, _ in flags:
            rounding.observer_enabled.copy_(flag)
        for norm, momentum, counted in momenta:
            norm.momentum, norm.num_batches_tracked = momentum, counted
