"""Which of Lightning's strategies quantization works with, and why it does not with the others."""

from __future__ import annotations

from typing import Any

from lightning_quant.errors import ConfigError

#: By the name of the class or of one that it derives from: those of a package that is not installed cannot be imported.
_XLA = "XLA (TPUs) compiles a training whose tensors have no values until it runs, and ranges are such values. "
_REFUSED = {
    "FSDPStrategy": "FSDP cuts Parameters into shards and flattens them, and int8 is made from whole weights. ",
    "ModelParallelStrategy": "it cuts Parameters into distributed tensors, and int8 is made from whole weights. ",
    "DeepSpeedStrategy": "DeepSpeed's engine takes over Parameters, optimizers and precision, and may shard them, and "
    "int8 is made from whole float32 weights. ",
    "XLAStrategy": _XLA,
    "SingleDeviceXLAStrategy": _XLA,
}
_REMEDY = (
    "Use Trainer(strategy='ddp') or one device; or train without this callback, and quantize the checkpoint with "
    "PostTrainingQuantization and validate(ckpt_path=...) on one device."
)
_SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy")


def check_strategy(trainer: Any) -> None:
    """Refuse a Trainer whose strategy would make quantization wrong or impossible.

    Raises:
        ConfigError: It shards the model or compiles it for a TPU; it is none that is known to work; or it synchronises
            batch norms, which torch does on GPUs alone, on the CPU.
    """
    strategy = trainer.strategy
    names = [kind.__name__ for kind in type(strategy).__mro__]
    shown = f"Trainer(strategy={names[0]})"
    for name, reason in _REFUSED.items():
        if name in names:
            raise ConfigError(f"{shown}: quantization does not work with it: {reason}{_REMEDY}")
    if not any(name in names for name in _SUPPORTED):
        raise ConfigError(
            f"{shown}: it derives from none of {' and '.join(_SUPPORTED)}, and how it places and trains Parameters is "
            f"not known. {_REMEDY}"
        )
    if getattr(strategy, "_layer_sync", None) is not None and is_parallel(trainer):
        if strategy.root_device.type == "cpu":
            raise ConfigError(
                "Trainer(sync_batchnorm=True) on the CPU: torch's SyncBatchNorm runs on GPUs alone. Leave it out, or "
                "train on GPUs."
            )


def is_parallel(trainer: Any) -> bool:
    """Whether ``DistributedDataParallel`` wraps the module, with one process or several."""
    return any(kind.__name__ == "DDPStrategy" for kind in type(trainer.strategy).__mro__)
