"""Post-training quantization of a LightningModule that has been trained already.

python examples/post_training.py
"""

from pytorch_lightning import Trainer, seed_everything

from lightning_quant import ExportConfig, PostTrainingQuantization, QuantConfig, load
from lightning_quant.demo import Digits, DigitsClassifier


def main() -> None:
    """Train in float, then quantize in ``validate``."""
    seed_everything(0)
    model, datamodule = DigitsClassifier(), Digits()
    Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model, datamodule)

    callback = PostTrainingQuantization(
        # the last layer stays in float
        QuantConfig(skip=("model.8",)),
        calibration_batches=3,
        export=ExportConfig(directory="quantized/post_training"),
    )
    Trainer(accelerator="cpu", logger=False, callbacks=[callback]).validate(model, datamodule)
    report = callback.report
    assert report is not None
    print(f"float {report.metrics_float['val_acc']:.4f}, int8 {report.metrics_int8['val_acc']:.4f}")
    print("still float:", report.float_layers)

    # the file runs without the LightningModule
    int8 = load(report.artifacts["torchscript"])
    images, _ = datamodule.val_set[:5]
    print(int8(images / 8 - 1).argmax(1))


if __name__ == "__main__":
    main()
