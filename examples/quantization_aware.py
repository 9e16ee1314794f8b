"""Quantization-aware training: one epoch in float, two with fake quantize, the last with frozen ranges.

python examples/quantization_aware.py
"""

from pytorch_lightning import Trainer, seed_everything

from lightning_quant import ExportConfig, QuantizationAwareTraining
from lightning_quant.demo import Digits, DigitsClassifier


def main() -> None:
    """Train, and test what will be deployed."""
    seed_everything(0)
    model, datamodule = DigitsClassifier(), Digits()
    callback = QuantizationAwareTraining(
        start_epoch=1,
        # first batch norms, then ranges: activations move when batch norms change to their running statistics, and
        # ranges that are frozen by then clip them
        freeze_batch_norm_epoch=2,
        freeze_observers_epoch=4,
        export=ExportConfig(directory="quantized/quantization_aware"),
    )
    trainer = Trainer(max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(model, datamodule)
    report = callback.report
    assert report is not None
    assert report.metrics_before is not None
    print(f"before {report.metrics_before['val_acc']:.4f}")
    print(f"float  {report.metrics_float['val_acc']:.4f}")
    print(f"int8   {report.metrics_int8['val_acc']:.4f}")
    for name, path in report.artifacts.items():
        print(name, path)


if __name__ == "__main__":
    main()
