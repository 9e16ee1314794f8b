"""Runs on two processes, as a user's script would start them: ``python distributed_runs.py SCENARIOS FOLDER``.

Lightning starts this file again for the second rank. What each found is written to ``FOLDER/<scenario>.<rank>.pt``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from modules import Classifier, convnet, rows, trainer, weights
from roots import part, pl
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightning_quant
from lightning_quant import (
    Distillation,
    ExportConfig,
    ExportError,
    LayerConfig,
    OscillationFreezing,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    figures,
    pipeline,
)
from lightning_quant.attachment import attached_to
from lightning_quant.backends.graph import observers
from lightning_quant.learned_scale import is_learned
from lightning_quant.phases import observer_state

RANKS = 2
BATCH = 8
TRAIN, VAL = 64, 48  # 4 and 3 batches of each rank
LEARNED = TensorSpec(fake_quantize="learned")


class Uneven(Dataset):
    """Odd rows, which the second rank gets, are three times as large."""

    def __init__(self, start: int, stop: int) -> None:
        self.rows = rows(start, stop)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        image, label = self.rows[index]
        return image * (3.0 if index % 2 else 1.0), label


def train_loader() -> DataLoader:
    return DataLoader(Uneven(0, TRAIN), batch_size=BATCH)


def val_loader() -> DataLoader:
    return DataLoader(Uneven(TRAIN, TRAIN + VAL), batch_size=BATCH)


def batches_of(rank: int, start: int = 0, stop: int = TRAIN) -> list[torch.Tensor]:
    """The images of a rank's batches, as ``DistributedSampler(shuffle=False)`` deals them."""
    dataset = Uneven(start, stop)
    images = torch.stack([dataset[i][0] for i in range(rank, len(dataset), RANKS)])
    return list(images.split(BATCH))


class Network(Classifier):
    """Logs without ``sync_dist`` as well, and counts the rows of all ranks by ``all_gather``."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(convnet())
        self.counted = 0
        self.norms: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.norms.append(self.net[1].running_mean.clone())  # as DDP's forward found or made it
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader:
        # a sampler of its own, so that the order is known
        sampler = None
        if self.trainer.world_size > 1:
            sampler = torch.utils.data.DistributedSampler(Uneven(0, TRAIN), shuffle=False)
        return DataLoader(Uneven(0, TRAIN), batch_size=BATCH, sampler=sampler)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        images, labels = batch
        self.counted += len(labels)
        self.log("val_largest", images.max(), reduce_fx="max")
        self.log("val_synced", F.cross_entropy(self(images), labels), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        counted = self.all_gather(torch.tensor(float(self.counted)))
        self.log("val_rows", counted.sum())
        self.counted = 0


class Probe(pl.Callback):
    """What is there at each step of a training, and where the input of the network goes."""

    input = ""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.states.append(state(module))
        for name, graph in graphs(module).items():
            (source,) = [node for node in graph.graph.nodes if node.op == "placeholder"]
            self.input = f"{name}.{next(iter(source.users)).target}"

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.gradients.append(
            {
                f"{name}.{key}": fake.scale.grad.clone()
                for name, graph in graphs(module).items()
                for key, fake in observers(graph).items()
                if is_learned(fake) and fake.scale.grad is not None
            }
        )


def graphs(module: Any) -> dict[str, nn.Module]:
    attached = attached_to(module)
    return {} if attached is None else attached.named()


def state(module: Any) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value for name, graph in graphs(module).items() for key, value in observer_state(graph).items()
    }


class Calls:
    """Counts the calls of a function that a module of the package has, meanwhile."""

    def __init__(self, name: str, error: Exception | None = None, room: Any = pipeline) -> None:
        self.name, self.error, self.room, self.number = name, error, room, 0

    def __enter__(self) -> Calls:
        self.before = getattr(self.room, self.name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.number += 1
            if self.error is not None:
                raise self.error
            return self.before(*args, **kwargs)

        setattr(self.room, self.name, counted)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.room, self.name, self.before)


def parallel(*callbacks: Any, strategy: Any = "ddp", **kwargs: Any) -> Any:
    return trainer(*callbacks, devices=RANKS, strategy=strategy, **kwargs)


def outcome(callback: Any, module: Any) -> dict[str, Any]:
    """What a run left on this rank."""
    x = torch.cat(batches_of(1, TRAIN, TRAIN + VAL))
    return {
        "report": None if callback.report is None else callback.report.to_dict(),
        "output": callback.quantized_model(x),
        "weights": weights(module),
        "clean": not hasattr(module, "_ddp_params_and_buffers_to_ignore") and attached_to(module) is None,
    }


def qat(folder: Path) -> dict[str, Any]:
    model, probe = Network(), Probe()
    callback = QuantizationAwareTraining(export=ExportConfig(directory=str(folder / "qat")))
    saved = part("callbacks").ModelCheckpoint(folder / "saved", every_n_train_steps=2, save_top_k=-1)
    runner = parallel(callback, probe, saved, enable_checkpointing=True)
    with Calls("write") as written, Calls("latency_ms", room=figures) as timed:
        runner.fit(model, val_dataloaders=val_loader())
    found = outcome(callback, model) | {
        "states": probe.states, "input": probe.input, "norms": model.norms, "writes": written.number,
        "timings": timed.number,
    }  # fmt: skip
    found["tested"] = runner.test(model, val_loader(), verbose=False)
    return found


def learned(folder: Path) -> dict[str, Any]:
    model, before, after = Network(), Probe(), Probe()
    config = QuantConfig(activation=LEARNED, weight=LEARNED)
    callback = QuantizationAwareTraining(config, start_epoch=1, export=export(folder / "learned"))
    runner = parallel(before, callback, after, max_epochs=2)
    runner.fit(model, val_dataloaders=val_loader())
    return outcome(callback, model) | {
        "states": after.states, "local": before.gradients, "mean": after.gradients,
    }  # fmt: skip


def distilled(folder: Path) -> dict[str, Any]:
    model = Network()
    callback = QuantizationAwareTraining(distill=Distillation(features=("net.2",)), export=export(folder / "distilled"))
    local: list[float] = []

    class Term(pl.Callback):
        """The term of this rank, in each step."""

        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            distiller: Any = callback._distiller
            if "_loss" not in vars(distiller):
                own = distiller._loss

                def noted(*args: Any) -> torch.Tensor:
                    loss = own(*args)
                    local.append(loss.item())
                    return loss

                distiller._loss = noted
            self.teacher = distiller.state()

    term = Term()
    runner = parallel(callback, term)
    runner.fit(model, val_dataloaders=val_loader())
    return outcome(callback, model) | {
        "teacher": term.teacher, "local": local, "metric": runner.callback_metrics["distillation_loss"].item(),
    }  # fmt: skip


def reestimated(folder: Path) -> dict[str, Any]:
    """Learned offsets, and statistics of all ranks at the end."""
    model = Network()
    spec = TensorSpec(fake_quantize="learned_offset")
    callback = QuantizationAwareTraining(
        QuantConfig(activation=spec), reestimate_batches=3, export=export(folder / "reestimated")
    )
    own: list[torch.Tensor] = []

    class Seen(pl.Callback):
        """What comes into the batch norm of this rank while its statistics are estimated."""

        def on_train_end(self, *_: Any) -> None:
            norm = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
            norm.register_forward_pre_hook(lambda _, args: own.append(args[0].detach()))

    parallel(callback, Seen()).fit(model, val_dataloaders=val_loader())
    return outcome(callback, model) | {"own": own[:3], "modes": [part.training for part in model.modules()]}


def oscillating(folder: Path) -> dict[str, Any]:
    model = Network()
    callback = QuantizationAwareTraining(
        QuantConfig(weight=TensorSpec(bits=3)),
        freeze_oscillations=OscillationFreezing(threshold=0.2, final_threshold=None, momentum=0.15),
        export=export(folder / "oscillating"),
    )

    class Known(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            self.found = callback._oscillations.state()

    known = Known()
    parallel(callback, known, max_epochs=3).fit(model, val_dataloaders=val_loader())
    return outcome(callback, model) | {"oscillations": known.found}


def export(folder: Path) -> ExportConfig:
    return ExportConfig(formats=("torchscript",), directory=str(folder))


def accumulated(folder: Path) -> dict[str, Any]:
    """The gradients of two batches, and manual steps, with learned scales."""
    config = QuantConfig(activation=LEARNED, weight=LEARNED)
    found = {}
    for name, model, options in (("automatic", Network(), {"accumulate_grad_batches": 2}), ("manual", Manual(), {})):
        probe = Probe()
        callback = QuantizationAwareTraining(config, export=export(folder / name))
        parallel(callback, probe, fast_dev_run=4, **options).fit(model, val_dataloaders=val_loader())
        found[name] = {"states": probe.states, "weights": weights(model)}
    return found


class Manual(Network):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def averaged(folder: Path) -> dict[str, Any]:
    """Averages of weights and buffers, which are put into the module at the end, after ours."""
    model, callback = Network(), QuantizationAwareTraining(export=export(folder / "averaged"))
    average = part("callbacks").EMAWeightAveraging(decay=0.5, use_buffers=True, update_starting_at_step=1)
    parallel(callback, average).fit(model, val_dataloaders=val_loader())
    return outcome(callback, model)


def resumed(folder: Path) -> dict[str, Any]:
    """Two epochs in one run, and in two."""
    found = {}
    checkpoint = part("callbacks").ModelCheckpoint
    for name, epochs in (("whole", [2]), ("parts", [1, 2])):
        for i, max_epochs in enumerate(epochs):
            model, probe = Network(), Probe()
            callback = QuantizationAwareTraining(export=export(folder / name))
            saved = checkpoint(folder / f"{name} {i}", save_last=True)
            runner = parallel(callback, probe, saved, max_epochs=max_epochs, enable_checkpointing=True)
            path = folder / f"{name} {i - 1}" / "last.ckpt" if i else None
            runner.fit(model, val_dataloaders=val_loader(), ckpt_path=path)
        found[name] = outcome(callback, model) | {"state": probe.states[-1]}
    return found


def fit_then_ptq(folder: Path) -> dict[str, Any]:
    model = Network()
    callback = PostTrainingQuantization(export=export(folder / "fit_then_ptq"))
    parallel(callback).fit(model, val_dataloaders=val_loader())
    return outcome(callback, model)


def ptq_in_validate(folder: Path) -> dict[str, Any]:
    model = Network()
    callback = PostTrainingQuantization(export=export(folder / "ptq_in_validate"))
    runner = parallel(callback)
    validated = runner.validate(model, val_loader(), verbose=False)
    return outcome(callback, model) | {"validated": validated}


def corrected(folder: Path) -> dict[str, Any]:
    model = Network()
    names = ("cross_layer_equalization", "choose_ranges", "gptq")
    callback = PostTrainingQuantization(QuantConfig(corrections=names), export=export(folder / "corrected"))
    parallel(callback).validate(model, val_loader(), verbose=False)
    return outcome(callback, model)


def with_outlier() -> Network:
    """Trained a little; a channel between its last two layers is 10,000 times as large as the others."""
    model = Network()
    torch.manual_seed(1)
    net = nn.Sequential(*convnet()[:-1], nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    images, labels = (torch.stack([torch.as_tensor(row[i]) for row in Uneven(0, TRAIN)]) for i in (0, 1))
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    first, last = net[-3], net[-1]
    with torch.no_grad():
        first.bias[0] += 1
        first.weight[0], first.bias[0] = 1e4 * first.weight[0], 1e4 * first.bias[0]
        last.weight[:, 0] /= 1e4
    model.net = net
    return model


def searched(folder: Path) -> PostTrainingQuantization:
    return PostTrainingQuantization(export=export(folder), max_drop=0.05, monitor="val_acc")


def within_bound(folder: Path) -> dict[str, Any]:
    model = with_outlier()
    callback = searched(folder / "within_bound")
    parallel(callback).validate(model, val_loader(), verbose=False)
    return outcome(callback, model) | {"skip": callback.tuned_config.skip, "targets": callback.report.targets}


def error_of(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def failures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    model, callback = Network(), QuantizationAwareTraining(export=export(folder / "failures"))
    with Calls("write", ExportError("the disk is full")):
        found["export"] = error_of(lambda: parallel(callback).fit(model, val_dataloaders=val_loader()))
    found["trained"] = weights(model)
    rank = torch.distributed.get_rank()
    with Calls("prepare_target", RuntimeError("out of memory") if rank else None):
        callback = QuantizationAwareTraining(export=export(folder / "failures"))
        found["prepare"] = error_of(lambda: parallel(callback).fit(Network(), val_dataloaders=val_loader()))
    counting = TensorSpec(fake_quantize="own_classes.CountingFakeQuantize")
    own = QuantConfig(layers=(LayerConfig(name="net.0", activation=counting),))
    callback = QuantizationAwareTraining(export=export(folder / "failures"))
    runner = parallel(callback, sync_batchnorm=True)
    found["norms"] = error_of(lambda: runner.fit(Network(), val_dataloaders=val_loader()))
    callback = QuantizationAwareTraining(own, export=export(folder / "failures"))
    found["own"] = error_of(lambda: parallel(callback).fit(Network(), val_dataloaders=val_loader()))
    return found


def _in_other_processes(folder: Path, strategy: str) -> dict[str, Any]:
    """In the process that starts the ranks, what it has after they ended."""
    model, callback = Network(), QuantizationAwareTraining(export=export(folder / strategy))
    start = weights(model)
    parallel(callback, strategy=strategy).fit(model, val_dataloaders=val_loader())
    found = outcome(callback, model) | {"start": start, "model": type(callback.quantized_model).__name__}
    # another Trainer: Lightning cannot fit twice with one
    found["tested"] = parallel(callback, strategy=strategy).test(model, val_loader(), verbose=False)
    ptq = PostTrainingQuantization(export=export(folder / f"{strategy}_ptq"))
    found["none before"] = ptq.report is None and ptq.quantized_model is None
    parallel(ptq, strategy=strategy).validate(model, val_loader(), verbose=False)
    found["ptq"] = outcome(ptq, model)
    return found


def ddp_spawn(folder: Path) -> dict[str, Any]:
    return _in_other_processes(folder, "ddp_spawn")


def ddp_fork(folder: Path) -> dict[str, Any]:
    return _in_other_processes(folder, "ddp_fork")


SCENARIOS = (
    qat,
    learned,
    distilled,
    oscillating,
    reestimated,
    accumulated,
    averaged,
    resumed,
    fit_then_ptq,
    ptq_in_validate,
    corrected,
    within_bound,
    failures,
    ddp_spawn,
    ddp_fork,
)


def main(names: list[str], folder: Path) -> None:
    for name in names:
        found = {run.__name__: run for run in SCENARIOS}[name](folder)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        torch.save({"file": lightning_quant.__file__, **found}, folder / f"{name}.{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1].split(","), Path(sys.argv[2]))
