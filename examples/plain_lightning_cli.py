"""LightningCLI as it comes: the callback is one of the Trainer's, in YAML or by flags.

python examples/plain_lightning_cli.py fit --config examples/plain_lightning_cli.yaml
python examples/plain_lightning_cli.py fit --trainer.max_epochs=2 --trainer.callbacks+=QuantizationAwareTraining
"""

from pytorch_lightning.cli import LightningCLI

import lightning_quant  # noqa: F401  so that the names of its callbacks are known
from lightning_quant.demo import Digits, DigitsClassifier

if __name__ == "__main__":
    LightningCLI(DigitsClassifier, Digits, seed_everything_default=0)
