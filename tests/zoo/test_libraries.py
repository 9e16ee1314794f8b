"""LightningModules of published libraries: one callback is added, and nothing else is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_quant import ExportConfig, PostTrainingQuantization, QuantizationAwareTraining

pytestmark = [pytest.mark.zoo, pytest.mark.torchvision, pytest.mark.filterwarnings("ignore")]
KINDS = pytest.mark.parametrize("kind", [PostTrainingQuantization, QuantizationAwareTraining])
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def callback_of(kind: Any, *formats: Any) -> Any:
    return kind(export=ExportConfig(formats=formats or None))


def assert_int8(callback: Any, least: float = 0.95) -> None:
    report = callback.report
    assert report is not None
    assert report.coverage >= least
    assert report.metrics_float.keys() == report.metrics_int8.keys()
    assert report.metrics_float
    for entry in report.formats.values():
        assert entry.metrics.keys() == report.metrics_int8.keys()


def run(root: Any, kind: Any, module: Any, train: Any, val: Any, callback: Any) -> None:
    trainer = root.Trainer(**QUIET, enable_checkpointing=False, max_epochs=1, callbacks=[callback])
    if kind is QuantizationAwareTraining:
        trainer.fit(module, train, val)
    else:
        trainer.validate(module, val, verbose=False)


class Tiles(Dataset):
    """Images of noise, with a mask and a label."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(index))
        target = (image.mean(0) > 0.5).long() if self.key == "mask" else torch.tensor(index % 2)
        return {"image": image, self.key: target}


@KINDS
@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_torchgeo(kind: Any, task: str) -> None:
    trainers = pytest.importorskip("torchgeo.trainers")
    import lightning.pytorch as root

    if task == "segmentation":
        module = trainers.SemanticSegmentationTask(
            model="unet", backbone="resnet18", weights=None, num_classes=2, loss="ce", task="multiclass"
        )
    else:
        module = trainers.ClassificationTask(model="resnet18", weights=None, num_classes=2, task="multiclass")
    loader = DataLoader(Tiles("mask" if task == "segmentation" else "label"), batch_size=8)
    callback = callback_of(kind)
    run(root, kind, module, loader, loader, callback)
    assert_int8(callback)


def series() -> Any:
    import pandas

    steps, groups = 100, "abcd"
    frame = pandas.DataFrame({"t": np.tile(np.arange(steps), 4), "g": np.repeat(list(groups), steps)})
    noise = np.random.default_rng(0).normal(0, 0.05, len(frame))
    frame["y"] = np.sin(frame.t / 5) + frame.g.map({g: i for i, g in enumerate(groups)}) + noise
    frame["c"] = np.cos(frame.t / 5)
    return frame


@KINDS
@pytest.mark.parametrize("name", ["TemporalFusionTransformer", "NBeats"])
def test_pytorch_forecasting(kind: Any, name: str) -> None:
    forecasting = pytest.importorskip("pytorch_forecasting")
    import lightning.pytorch as root

    root.seed_everything(0)
    settings: dict[str, Any] = {"time_varying_unknown_reals": ["y"]}
    if name == "TemporalFusionTransformer":
        settings |= {"static_categoricals": ["g"], "time_varying_known_reals": ["t", "c"]}
    data = forecasting.TimeSeriesDataSet(
        series(), time_idx="t", target="y", group_ids=["g"], max_encoder_length=16, max_prediction_length=4, **settings
    )
    options: dict[str, Any] = {"hidden_size": 16} if name == "TemporalFusionTransformer" else {"widths": [32, 64]}
    module = getattr(forecasting, name).from_dataset(data, **options)
    loaders = [data.to_dataloader(train=train, batch_size=64) for train in (True, False)]
    callback = callback_of(kind)
    run(root, kind, module, *loaders, callback)
    # LSTM that is a class of its own, and embeddings
    assert_int8(callback, 0.5 if name == "TemporalFusionTransformer" else 0.95)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TCNModel", {}),
        ("TiDEModel", {}),
        ("TransformerModel", {"d_model": 32, "nhead": 4, "dim_feedforward": 64}),
    ],
)
def test_darts(name: str, options: dict[str, Any]) -> None:
    pytest.importorskip("darts")
    import darts.models

    values = np.sin(np.arange(400) / 8) + np.random.default_rng(0).normal(0, 0.05, 400)
    timeline = darts.TimeSeries.from_values(values.astype(np.float32))
    callback = callback_of(QuantizationAwareTraining)
    model = getattr(darts.models, name)(
        input_chunk_length=24, output_chunk_length=4, n_epochs=1, random_state=0,
        pl_trainer_kwargs={**QUIET, "callbacks": [callback]}, **options,
    )  # fmt: skip
    model.fit(timeline[:300], val_series=timeline[270:], verbose=False)
    assert_int8(callback)


@KINDS
@pytest.mark.parametrize("name", ["CategoryEmbeddingModelConfig", "FTTransformerConfig"])
def test_pytorch_tabular(kind: Any, name: str) -> None:
    tabular = pytest.importorskip("pytorch_tabular")
    import pandas
    from pytorch_tabular import config, models

    rng = np.random.default_rng(0)
    frame = pandas.DataFrame({"a": rng.normal(size=600), "b": rng.normal(size=600), "c": rng.choice(list("xyz"), 600)})
    frame["y"] = (frame.a + frame.b > 0).astype(int)
    options: dict[str, Any] = {"num_heads": 2, "num_attn_blocks": 2} if name.startswith("FT") else {"layers": "32-16"}
    model = tabular.TabularModel(
        data_config=config.DataConfig(target=["y"], continuous_cols=["a", "b"], categorical_cols=["c"]),
        model_config=getattr(models, name)(task="classification", **options),
        optimizer_config=config.OptimizerConfig(),
        trainer_config=config.TrainerConfig(
            max_epochs=1, accelerator="cpu", batch_size=64, checkpoints=None, load_best=False, progress_bar="none",
            early_stopping=None,
        ),
        verbose=False,
    )  # fmt: skip
    callback = callback_of(kind)
    model.fit(train=frame[:500], validation=frame[500:], callbacks=[callback])
    assert_int8(callback)
