"""The batch norms of a LightningModule that was trained, with the statistics of its training batches."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch

from lightning_quant.attachment import attached_to, is_ours, relink, run_quantized, unbind
from lightning_quant.batch_norms import reestimated, training_norms
from lightning_quant.evaluate import forget
from lightning_quant.inputs import isolated_rng, run_training_step, training_batches
from lightning_quant.team import Team


def reestimate(trainer: Any, module: Any, count: int, team: Team) -> int:
    """Give the batch norms of a trained module the statistics of its first training batches, of all ranks.

    A copy runs: metrics, logs, loaders and random states stay as they are. What loaders and augmentation draw from the
    global generators is the same in each call, so that a training that was killed ends as one that was not.

    Args:
        trainer: At the end of ``fit``.
        module: With graphs attached, on the CPU. The statistics of its batch norms in training mode are changed.
        count: How many batches, on each rank.
        team: All ranks.

    Returns:
        How many batches there were; 0: there is no batch norm in training mode.

    Raises:
        ConfigError: There was no batch.
    """
    training = {id(norm) for norm in training_norms(module)}
    names = [name for name, part in module.named_modules() if id(part) in training and not is_ours(name)]
    if not names:
        return 0
    twin = copy.deepcopy(module)
    forget(twin)
    unbind(twin)
    twin.trainer = trainer
    relink(twin)
    run_quantized(twin, True)
    wanted = {id(twin.get_submodule(name).running_mean) for name in names}
    norms = [part for part in twin.modules() if id(getattr(part, "running_mean", None)) in wanted]

    def run() -> int:
        found = 0
        for batch in training_batches(trainer, count):
            run_training_step(trainer, twin, batch)
            found += 1
        return found

    with isolated_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        attached = attached_to(twin)
        graphs = attached.graphs if attached is not None else ()
        found = reestimated(twin, graphs, norms, run, team.add)
    with torch.no_grad():
        for name in names:
            for key in ("running_mean", "running_var"):
                getattr(module.get_submodule(name), key).copy_(getattr(twin.get_submodule(name), key))
    return found
