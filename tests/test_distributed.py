"""Two real processes train, calibrate and report as one: started by a script, spawned and forked."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed_runs import (
    LEARNED,
    RANKS,
    TRAIN,
    VAL,
    Network,
    batches_of,
    export,
    searched,
    val_loader,
    with_outlier,
)
from modules import Classifier, Digits, ForwardUnused, as_test, convnet, different, merged, ptq, qat, trainer, weights
from processes import run
from roots import part
from torch import nn

import lightning_quant
from lightning_quant import (
    ArtifactError,
    ConfigError,
    PostTrainingQuantization,
    QuantConfig,
    QuantReport,
    load,
    prepare,
)
from lightning_quant._torch_ao import MinMaxObserver, MovingAverageMinMaxObserver
from lightning_quant.attachment import attach, detach, keep_from_broadcast
from lightning_quant.backends.graph import observers
from lightning_quant.learned_scale import LearnedFakeQuantize, is_learned
from lightning_quant.qconfig import AVERAGING_CONSTANT
from lightning_quant.rank_steps import RankSteps
from lightning_quant.ranks import merge_ranks
from lightning_quant.strategies import check_strategy
from lightning_quant.team import ALONE, all_ranks

TESTS = Path(__file__).parent
ENDS = ("activation_post_process.min_val", "activation_post_process.max_val")


def started(folder: Path, scenarios: str, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Scenario -> what each rank found, of a script that is run as a user would run it."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    inherited = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "NODE_RANK")}
    ended = subprocess.run(
        [sys.executable, str(TESTS / "distributed_runs.py"), scenarios, str(folder)],
        env={**inherited, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    found = {
        name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(ranks)]
        for name in scenarios.split(",")
    }
    assert {of_rank["file"] for each in found.values() for of_rank in each} == {lightning_quant.__file__}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def ranks_found(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return started(
        folder,
        "qat,learned,distilled,oscillating,reestimated,accumulated,averaged,resumed,fit_then_ptq,ptq_in_validate,corrected,"
        "within_bound,failures",
        RANKS,
    )


def trained(found: dict[str, Any]) -> Network:
    model = Network()
    model.load_state_dict(found["weights"])
    return model


def of_one_process(model: Network) -> dict[str, float]:
    """The metrics of all data, which one process sees."""
    return merged(trainer().validate(model, val_loader(), verbose=False))


def check_metrics(ours: dict[str, float], expected: dict[str, float]) -> None:
    assert ours.keys() == expected.keys()
    assert ours["val_rows"] == expected["val_rows"] == VAL
    for name in ("val_acc", "val_largest"):
        assert ours[name] == expected[name]
    for name in ("val_loss", "val_synced"):  # float32 sums of a few batches, in another order
        assert ours[name] == pytest.approx(expected[name], rel=1e-6)


# ---- quantization-aware training


def test_ranges_of_all_ranks_are_those_of_all_data_after_each_step(ranks_found: Any) -> None:
    found = ranks_found["qat"]
    steps = TRAIN // RANKS // 8
    assert all(len(of_rank["states"]) == steps for of_rank in found)
    for ours, theirs in zip(found[0]["states"], found[1]["states"], strict=True):
        assert len(ours) > 10
        assert not different(ours, theirs)
    data = [batches_of(rank) for rank in range(RANKS)]
    for end, extreme in zip(ENDS, (torch.amin, torch.amax), strict=True):
        seen = np.array([[extreme(batch).item() for batch in of_rank] for of_rank in data])
        average = seen[:, 0].mean()
        for step in range(steps):
            if step:
                average = (average + AVERAGING_CONSTANT * (seen[:, step] - average)).mean()
            got = found[0]["states"][step][f"{found[0]['input']}.{end}"].item()
            # float32 rounds once for each step
            assert got == pytest.approx(average, rel=steps * 2.0**-24, abs=1e-12)
    assert seen[1].min() > 2 * seen[0].max()  # a rank alone would have another range


def test_a_teacher_of_two_processes(ranks_found: Any) -> None:
    first, second = ranks_found["distilled"]
    assert different(first["weights"], second["weights"]) == []
    assert different(first["weights"], ranks_found["qat"][0]["weights"]) != []
    for found in (first, second):
        assert different(found["teacher"], weights(Network())) == []
        assert len(found["local"]) == TRAIN // RANKS // 8
        assert found["clean"]
    # each rank has its own data
    assert first["local"] != second["local"]
    expected = np.mean([first["local"], second["local"]])
    assert first["metric"] == pytest.approx(expected, rel=1e-5)
    assert second["metric"] == first["metric"]


def test_oscillations_of_two_processes_are_the_same(ranks_found: Any) -> None:
    first, second = ranks_found["oscillating"]
    assert different(first["weights"], second["weights"]) == []
    (of_first,), (of_second,) = (list(found["oscillations"].values()) for found in (first, second))
    assert of_first.keys() == of_second.keys()
    for name in of_first:
        assert different(of_first[name], of_second[name]) == []
    assert 0 < sum(int(kept["frozen"].sum()) for kept in of_first.values())
    assert first["clean"]


def test_statistics_of_batch_norms_are_those_of_all_ranks(ranks_found: Any) -> None:
    first, second = ranks_found["reestimated"]
    assert different(first["weights"], second["weights"]) == []
    values = torch.cat([*first["own"], *second["own"]])
    assert len(first["own"]) == 3
    name = next(name.removesuffix("running_mean") for name in first["weights"] if name.endswith("running_mean"))
    for statistic, expected in (
        ("running_mean", values.mean((0, 2, 3), dtype=torch.float64)),
        ("running_var", values.to(torch.float64).var((0, 2, 3))),
    ):
        torch.testing.assert_close(first["weights"][name + statistic].double(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(first["own"][0], second["own"][0])


def test_training_is_that_of_ddp(ranks_found: Any) -> None:
    found = ranks_found["qat"]
    start = weights(Network())
    for name, parameter in Network().named_parameters():
        ours = found[0]["weights"][name]
        assert torch.equal(ours, found[1]["weights"][name])
        assert parameter.shape == ours.shape
        assert not torch.equal(start[name], ours)
    # batch norms begin each pass with the statistics of rank 0, as without us
    assert len(found[0]["norms"]) == TRAIN // RANKS // 8
    for ours, theirs in zip(found[0]["norms"], found[1]["norms"], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(found[0]["norms"][0], found[0]["norms"][1])
    assert all(of_rank["clean"] for of_rank in found)


@pytest.mark.parametrize("scenario", ["qat", "learned", "averaged", "fit_then_ptq", "ptq_in_validate", "corrected"])
def test_one_report_whose_metrics_are_those_of_all_data(scenario: str, ranks_found: Any, folder: Path) -> None:
    first, second = ranks_found[scenario]
    report = first["report"]
    assert report == second["report"]
    assert report["num_processes"] == RANKS
    assert torch.equal(first["output"], second["output"])
    assert not different(first["weights"], second["weights"])
    read = QuantReport.load(folder / scenario)
    assert read.to_dict() == report
    model = trained(first)
    check_metrics(report["metrics_float"], of_one_process(model))
    for name, file in read.artifacts.items():
        put_back = copy.deepcopy(model)
        put_back.net = load(file)
        check_metrics(report["formats"][name]["metrics"], of_one_process(put_back))
    check_metrics(report["metrics_int8"], report["formats"]["torchscript"]["metrics"])


def test_all_ranks_make_the_corrections_of_rank_0(ranks_found: Any) -> None:
    plain, corrected = ranks_found["ptq_in_validate"], ranks_found["corrected"]
    notes = [note for note in corrected[0]["report"]["notes"] if " changed " in note]
    assert [note.split()[1] for note in notes] == ["cross_layer_equalization", "choose_ranges", "gptq"]
    assert torch.equal(corrected[0]["output"], corrected[1]["output"])
    assert not torch.equal(corrected[0]["output"], plain[0]["output"])


def test_rank_0_alone_writes_and_times(ranks_found: Any, folder: Path) -> None:
    found = ranks_found["qat"]
    assert [of_rank["writes"] for of_rank in found] == [1, 0]
    assert [of_rank["timings"] for of_rank in found] == [1, 0]
    files = {"report.html", "report.json", "report.md"} | {
        Path(f).name for f in found[0]["report"]["artifacts"].values()
    }
    assert {f.name for f in (folder / "qat").iterdir() if f.suffix != ".bin"} == files
    check_metrics(found[0]["report"]["metrics_before"], of_one_process(Network()))


def test_test_runs_int8_on_all_ranks(ranks_found: Any) -> None:
    for of_rank in ranks_found["qat"]:
        accuracy = as_test(of_rank["report"]["metrics_int8"])["test_acc"]
        assert merged(of_rank["tested"])["test_acc"] == accuracy


def test_a_checkpoint_in_the_middle_has_what_all_ranks_saw(ranks_found: Any, folder: Path) -> None:
    (path,) = (folder / "saved").glob("*step=2.ckpt")
    kept = torch.load(path, weights_only=True)["lightning_quant"]["observers"]
    flat = {f"{name}.{key}": value for name, found in kept.items() for key, value in found.items()}
    for of_rank in ranks_found["qat"]:
        assert not different(flat, of_rank["states"][1])


def test_learned_scales_are_trained_with_the_gradients_of_all(ranks_found: Any) -> None:
    first, second = ranks_found["learned"]
    quantized = [i for i, gradients in enumerate(first["mean"]) if gradients]
    # a float epoch, and the first quantized pass, in which scales begin
    assert quantized == [5, 6, 7]
    for step in quantized:
        local = [of_rank["local"][step] for of_rank in (first, second)]
        mean = first["mean"][step]
        assert mean.keys() == local[0].keys()
        assert len(mean) >= 4
        assert not different(mean, second["mean"][step])
        assert different(*local)
        for name, gradient in mean.items():
            torch.testing.assert_close(gradient, (local[0][name] + local[1][name]) / 2)
    for ours, theirs in zip(first["states"], second["states"], strict=True):
        assert not different(ours, theirs)
    scales = [name for name in first["states"][-1] if name.endswith(".scale")]
    assert any(not torch.equal(first["states"][-1][name], first["states"][5][name]) for name in scales)


@pytest.mark.parametrize("how", ["automatic", "manual"])
def test_accumulated_gradients_and_manual_steps(how: str, ranks_found: Any) -> None:
    first, second = (of_rank[how] for of_rank in ranks_found["accumulated"])
    assert len(first["states"]) == 4
    # accumulated: nothing is agreed on between the steps of the optimizer
    for ours, theirs in list(zip(first["states"], second["states"], strict=True))[1 :: 2 if how == "automatic" else 1]:
        assert not different(ours, theirs)
    assert not different(first["weights"], second["weights"])
    assert different(first["weights"], weights(Network()))


def test_a_run_that_is_resumed_ends_as_one_that_was_not(ranks_found: Any) -> None:
    for of_rank in ranks_found["resumed"]:
        whole, parts = of_rank["whole"], of_rank["parts"]
        assert not different(whole["weights"], parts["weights"])
        assert not different(whole["state"], parts["state"])
        assert torch.equal(whole["output"], parts["output"])
        assert whole["report"]["metrics_int8"] == parts["report"]["metrics_int8"]


# ---- post-training quantization


@pytest.mark.parametrize("scenario", ["fit_then_ptq", "ptq_in_validate"])
def test_calibration_of_all_shards_is_that_of_one_process(scenario: str, ranks_found: Any, tmp_path: Path) -> None:
    found = ranks_found[scenario][0]
    callback = PostTrainingQuantization(export=export(tmp_path / "one"))
    trainer(callback).validate(trained(found), val_loader(), verbose=False)
    x = torch.cat(batches_of(1, TRAIN, TRAIN + VAL))
    # histograms are added exactly, so that the int8 models are the same
    assert torch.equal(callback.quantized_model(x), found["output"])
    half = PostTrainingQuantization(export=export(tmp_path / "half"))
    one_shard = [batch for batch in val_loader()]
    shard = [[images[::2], labels[::2]] for images, labels in one_shard]
    trainer(half).validate(trained(found), torch.utils.data.DataLoader(shard, batch_size=None), verbose=False)
    assert not torch.equal(half.quantized_model(x), found["output"])


def test_ranks_leave_the_same_layers_in_float(ranks_found: Any, tmp_path: Path) -> None:
    first, second = ranks_found["within_bound"]
    assert first["report"]["search"]["is_met"] is True
    assert first["skip"] == second["skip"] == ("net.6", "net.8")
    assert first["report"] == second["report"]
    assert torch.equal(first["output"], second["output"])
    callback = searched(tmp_path / "one")
    trainer(callback).validate(with_outlier(), val_loader(), verbose=False)
    assert callback.tuned_config is not None
    assert callback.tuned_config.skip == first["skip"]
    x = torch.cat(batches_of(1, TRAIN, TRAIN + VAL))
    assert torch.equal(callback.quantized_model(x), first["output"])


# ---- errors


def test_an_error_of_one_rank_is_raised_on_all(ranks_found: Any) -> None:
    first, second = ranks_found["failures"]
    stops = "RankError: rank {} failed, and this one stops with it: "
    assert first["export"].startswith("ExportError: the disk is full The training is not lost: ")
    assert first["export"].endswith("lightning-quant export trained.ckpt --model distributed_runs.Network")
    assert second["export"] == stops.format(0) + first["export"]
    assert not different(first["trained"], second["trained"])
    assert different(first["trained"], weights(Network()))
    assert second["prepare"] == "RuntimeError: out of memory"
    assert first["prepare"] == stops.format(1) + second["prepare"]


def test_a_class_that_ranks_cannot_merge_is_found_before_training(ranks_found: Any) -> None:
    for of_rank in ranks_found["failures"]:
        assert of_rank["own"].startswith("ConfigError: own_classes.CountingFakeQuantize (")
        assert " is of a class that ranks cannot merge, and how the buffers " in of_rank["own"]
        assert of_rank["own"].endswith("has to leave the same buffers on all of them.")


# ---- processes that Lightning starts


@pytest.mark.parametrize("strategy", [pytest.param("ddp_spawn", marks=pytest.mark.slow), "ddp_fork"])
def test_the_process_that_started_others_has_all_they_left(strategy: str, tmp_path: Path) -> None:
    (found,) = started(tmp_path, strategy, 1)[strategy]
    report = found["report"]
    assert report == QuantReport.load(tmp_path / strategy).to_dict()
    assert report["num_processes"] == RANKS
    assert different(found["weights"], found["start"])
    model = trained(found)
    check_metrics(report["metrics_float"], of_one_process(model))
    model.net = load(report["artifacts"]["torchscript"])
    check_metrics(report["metrics_int8"], of_one_process(model))
    assert torch.equal(found["output"], model.net(torch.cat(batches_of(1, TRAIN, TRAIN + VAL))))
    assert found["clean"]
    # the processes of a test read the files
    assert merged(found["tested"])["test_acc"] == report["metrics_int8"]["val_acc"]
    assert report["metrics_int8"]["val_loss"] != report["metrics_float"]["val_loss"]
    assert found["none before"]
    assert found["ptq"]["report"]["method"] == "static"
    assert found["ptq"]["report"]["num_processes"] == RANKS
    assert found["ptq"]["output"].shape == found["output"].shape


# ---- strategies


def with_strategy(*names: str) -> Any:
    """A Trainer whose strategy is of a class of the last name, derived from those before it."""
    kind: type = object
    for name in names:
        kind = type(name, (kind,), {})
    return SimpleNamespace(strategy=kind(), precision="32-true", callbacks=[])


REMEDY = (
    "Use Trainer(strategy='ddp') or one device; or train without this callback, and quantize the checkpoint with "
    "PostTrainingQuantization and validate(ckpt_path=...) on one device."
)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ("FSDPStrategy",),
            "FSDP cuts Parameters into shards and flattens them, and int8 is made from whole weights. ",
        ),
        (
            ("DDPStrategy", "DeepSpeedStrategy"),
            "DeepSpeed's engine takes over Parameters, optimizers and precision, and may shard them, and int8 is made "
            "from whole float32 weights. ",
        ),
        (
            ("DDPStrategy", "XLAStrategy"),
            "XLA (TPUs) compiles a training whose tensors have no values until it runs, and ranges are such values. ",
        ),
        (
            ("SingleDeviceStrategy", "SingleDeviceXLAStrategy"),
            "XLA (TPUs) compiles a training whose tensors have no values until it runs, and ranges are such values. ",
        ),
        (
            ("ModelParallelStrategy",),
            "it cuts Parameters into distributed tensors, and int8 is made from whole weights. ",
        ),
    ],
)
@pytest.mark.parametrize("made_by", [ptq, qat])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_strategies_that_do_not_work(names: tuple[str, ...], reason: str, made_by: Any, stage: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made_by().setup(with_strategy(*names), Classifier(convnet()), stage)
    assert str(caught.value) == f"Trainer(strategy={names[-1]}): quantization does not work with it: {reason}{REMEDY}"


def test_strategies_of_lightning_are_known_by_the_right_names() -> None:
    strategies = part("strategies")
    for name in (
        "FSDPStrategy",
        "DeepSpeedStrategy",
        "XLAStrategy",
        "SingleDeviceXLAStrategy",
        "ModelParallelStrategy",
    ):
        real = SimpleNamespace(strategy=object.__new__(getattr(strategies, name)))
        with pytest.raises(ConfigError, match=f"strategy={name}"):
            check_strategy(real)
    for name in ("SingleDeviceStrategy", "DDPStrategy"):
        real = object.__new__(getattr(strategies, name))
        real._layer_sync = None
        check_strategy(SimpleNamespace(strategy=real))


def test_a_strategy_that_is_not_known() -> None:
    with pytest.raises(ConfigError) as caught:
        check_strategy(with_strategy("Hive"))
    assert str(caught.value) == (
        "Trainer(strategy=Hive): it derives from none of SingleDeviceStrategy and DDPStrategy, and how it places and "
        f"trains Parameters is not known. {REMEDY}"
    )


@pytest.mark.parametrize("made_by", [ptq, qat])
def test_fsdp_is_refused_in_a_trainer(made_by: Any) -> None:
    """Lightning has no FSDP on the CPU: the strategy is changed where ``setup`` looks."""
    runner = trainer(made_by())
    kind = type("FSDPStrategy", (type(runner.strategy),), {})
    runner.strategy.__class__ = kind
    with pytest.raises(ConfigError, match=r"FSDP cuts Parameters into shards.*strategy='ddp'"):
        runner.fit(Classifier(convnet()), Digits())


def test_synchronised_batch_norms_on_the_cpu(ranks_found: Any) -> None:
    for of_rank in ranks_found["failures"]:
        assert of_rank["norms"] == (
            "ConfigError: Trainer(sync_batchnorm=True) on the CPU: torch's SyncBatchNorm runs on GPUs alone. Leave it "
            "out, or train on GPUs."
        )


class Synchronised(part("strategies").SingleDeviceStrategy):  # type: ignore[misc]
    """Does with batch norms what DDP's strategy does with ``sync_batchnorm=True``; alone, they compute as ever."""

    layers = part("plugins.layer_sync").TorchSyncBatchNorm()
    kinds: tuple[str, ...] = ()

    def setup(self, trainer: Any) -> None:
        self.model = self.layers.apply(self.model)
        super().setup(trainer)

    def teardown(self) -> None:
        model: Any = self.model
        Synchronised.kinds = tuple(type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__)
        self.model = self.layers.revert(model)
        super().teardown()


@pytest.mark.parametrize("frozen", [None, 1])
def test_batch_norms_that_lightning_exchanges_are_followed(frozen: int | None) -> None:
    found = []
    for strategy in ("auto", Synchronised("cpu")):
        torch.manual_seed(0)
        model, callback = Classifier(convnet()), qat(freeze_batch_norm_epoch=frozen)
        trainer(callback, strategy=strategy, max_epochs=2).fit(model, Digits(shuffle=False))
        found.append((weights(model), callback.report))
    assert set(Synchronised.kinds) == {"SyncBatchNorm"}
    (ours, report), (theirs, other) = found
    assert not different(ours, theirs)
    assert report.metrics_int8 == other.metrics_int8
    assert report.metrics_float == other.metrics_float


# ---- what is broadcast


def test_observers_and_learned_scales_are_kept_from_broadcast() -> None:
    config = QuantConfig(activation=LEARNED, weight=LEARNED)
    model = nn.Sequential(convnet())
    model._ddp_params_and_buffers_to_ignore = ["0.0.weight"]  # type: ignore[assignment]
    graph = prepare(model[0], config, method="qat", example_inputs=torch.randn(4, 1, 8, 8))
    attach(model, {"0": graph})
    before = sorted(model.__dict__)
    keep_from_broadcast(model)
    ignored: Any = model._ddp_params_and_buffers_to_ignore
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    assert set(ignored) <= names
    scales = [module for module in observers(graph).values() if is_learned(module)]
    assert sum(name.endswith(".scale") for name in ignored) == len(scales) >= 4
    assert {name for name in names if "activation_post_process" in name} <= set(ignored)
    assert {name for name in ignored if not name.startswith("_lightning_quant.")} == {"0.0.weight"}
    assert not any("running_" in name or "num_batches" in name for name in ignored)
    twin = copy.deepcopy(model)
    for module in (model, twin):
        detach(module)
        assert module._ddp_params_and_buffers_to_ignore == ["0.0.weight"]
    assert sorted(model.__dict__) == before


# ---- steps, on two ranks without a Trainer


def fake(kind: type = LearnedFakeQuantize) -> Any:
    return kind(
        observer=MovingAverageMinMaxObserver, averaging_constant=0.5, dtype=torch.quint8, quant_min=0, quant_max=255,
        qscheme=torch.per_tensor_affine,
    )  # fmt: skip


def step_by_step(rank: int) -> dict[str, Any]:
    team = all_ranks()
    found: dict[str, Any] = {"team": (team.rank, team.size, all_ranks().group is team.group)}
    found["gathered"] = team.gathered(rank)
    found["first"] = team.by_first(lambda: f"by {rank}")
    given = [torch.full((2, 3), float(rank)).t(), torch.tensor(rank, dtype=torch.int16), torch.tensor([rank == 0])]
    team.give([*given, torch.empty(0)])
    found["given"] = [x.tolist() for x in given]
    torch.manual_seed(0)
    config = QuantConfig(activation=LEARNED, weight=LEARNED)
    x = torch.linspace(-1, 1, 32).reshape(8, 4) * (1 + rank)
    graph = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), config, method="qat", example_inputs=x)
    graph.train()
    steps = RankSteps([graph])
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    if rank == 0:  # the other rank's scales have not begun
        graph(x).sum().backward()
    steps.agree()
    steps.average_gradients(optimizer)
    found["begun"] = {name: value.clone() for name, value in graph.state_dict().items()}
    found["none"] = [module.scale.grad is None for module in observers(graph).values()]  # type: ignore[union-attr]
    optimizer.zero_grad()
    if rank == 1:
        graph(x).sum().backward()
    local = {name: None if m.scale.grad is None else m.scale.grad.clone() for name, m in observers(graph).items()}  # type: ignore[union-attr,operator]
    steps.average_gradients(optimizer)
    found["local"], found["mean"] = local, {name: m.scale.grad for name, m in observers(graph).items()}
    merge_ranks(graph)
    found["merged"] = graph.state_dict()
    # without steps: two scales of which one rank learns, with zero points of their own
    alone = nn.ModuleDict({"both": fake(), "one": fake()})
    for name, module in alone.items():
        if name == "both" or rank == 1:
            module(x.clone().requires_grad_() + rank)
    merge_ranks(alone)
    found["alone"] = alone.state_dict()
    seen = nn.ModuleDict(
        {"mean": MovingAverageMinMaxObserver(), "union": MinMaxObserver(), "none": MovingAverageMinMaxObserver()}
    )
    for name, module in seen.items():
        if rank and name != "none":
            module(torch.tensor([-1.0, 2.0]))
    steps = RankSteps([])
    steps.agree()
    steps._means, steps._unions = [seen["mean"], seen["none"]], [seen["union"]]
    steps.agree()
    found["seen by one"] = seen.state_dict()
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(step_by_step, RANKS, tmp_path_factory.mktemp("steps"))


def test_steps(two_ranks: list[dict[str, Any]]) -> None:
    found = two_ranks
    assert [of_rank["team"] for of_rank in found] == [(0, 2, True), (1, 2, True)]
    for of_rank in found:
        assert of_rank["gathered"] == [0, 1]
        assert of_rank["first"] == "by 0"
        assert of_rank["given"] == [[[0.0, 0.0]] * 3, 0, [True]]
        assert all(of_rank["none"])
    first, second = found
    assert not different(first["begun"], second["begun"])
    flags = [value for name, value in first["begun"].items() if name.endswith("learned")]
    assert len(flags) == 3
    assert all(bool(flag) for flag in flags)
    for name, gradient in second["local"].items():
        assert first["local"][name] is None
        # a rank without one adds 0, as DistributedDataParallel has it
        assert torch.equal(first["mean"][name], gradient / 2)
        assert torch.equal(second["mean"][name], gradient / 2)
    assert not different(first["merged"], second["merged"])
    for name in ("both", "one"):
        state = {key: value for key, value in first["alone"].items() if key.startswith(name)}
        other = {key: value for key, value in second["alone"].items() if key.startswith(name)}
        assert not different(state, other)
        assert bool(state[f"{name}.learned"])
    x = torch.linspace(-1, 1, 32)
    # "both": as rank 0 began, with its own range; "one": as rank 1 did
    assert first["alone"]["both.scale"].item() == pytest.approx(2 / 255)
    assert first["alone"]["one.scale"].item() == pytest.approx(((2 * x + 1).max() - (2 * x + 1).min()).item() / 255)


def test_a_rank_that_saw_nothing_adds_nothing(two_ranks: list[dict[str, Any]]) -> None:
    for of_rank in two_ranks:
        for name in ("mean", "union"):
            assert of_rank["seen by one"][f"{name}.min_val"].item() == -1.0
            assert of_rank["seen by one"][f"{name}.max_val"].item() == 2.0
        assert torch.isinf(of_rank["seen by one"]["none.min_val"])


def test_a_team_of_one_asks_nobody() -> None:
    assert not dist.is_initialized()
    assert all_ranks() is ALONE
    assert ALONE.by_first(lambda: 1) == ALONE.by_each(lambda: 1) == 1
    assert ALONE.gathered(2) == [2]
    with pytest.raises(KeyError):
        ALONE.by_each(lambda: {}["x"])
    ALONE.give([torch.ones(1)])


# ---- the report, read back


def test_a_report_is_read_back(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(export=export(tmp_path / "files"))
    trainer(callback).validate(Network(), val_loader(), verbose=False)
    report = callback.report
    for read in (QuantReport.load(tmp_path / "files"), QuantReport.from_dict(report.to_dict())):
        assert read.to_dict() == report.to_dict()
        assert read.artifacts == report.artifacts
        assert read.formats == report.formats
        assert read.fused == report.fused
        assert read.to_markdown() == report.to_markdown()
    assert report.formats["torchscript"].sqnr_db == QuantReport.load(tmp_path / "files").formats["torchscript"].sqnr_db
    with pytest.raises(ArtifactError, match=r"nowhere.*no report can be read there.*Give the folder"):
        QuantReport.load(tmp_path / "nowhere")
    (tmp_path / "report.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"this is no report of lightning_quant \(TypeError"):
        QuantReport.load(tmp_path / "report.json")


def test_the_report_of_another_callback_is_not_ours(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(export=export(tmp_path))
    trainer(callback).validate(Network(), val_loader(), verbose=False)
    other = PostTrainingQuantization(export=export(tmp_path))
    assert other.report is None
    assert other.quantized_model is None
    report, model = callback.report, callback.quantized_model
    assert report is callback.report
    assert isinstance(model, Network)
    trainer(other).validate(Network(), val_loader(), verbose=False)
    assert callback.report is report
    assert callback.quantized_model is model
    # what another process would have of it
    elsewhere = pickle.loads(pickle.dumps(other))
    assert elsewhere.report == QuantReport.load(tmp_path)
    x = torch.cat(batches_of(0))
    assert torch.equal(elsewhere.quantized_model(x), other.quantized_model(x))
    # and what it leaves is newer than what is here
    assert isinstance(other.quantized_model, Network)
    again = replace(QuantReport.load(tmp_path), notes=["of another process"])
    again.write(tmp_path)
    assert other.report == again
    assert not isinstance(other.quantized_model, Network)


def test_a_file_for_each_target_is_a_submodule(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(export=export(tmp_path))
    model = ForwardUnused()
    runner = trainer(callback)
    runner.validate(model, datamodule=Digits(), verbose=False)
    int8 = pickle.loads(pickle.dumps(callback)).quantized_model
    images = torch.cat(batches_of(0))
    expected = callback.quantized_model
    assert torch.equal(int8.encoder(images), expected.encoder(images))
    assert torch.equal(int8.head(expected.encoder(images).flatten(1)), expected.logits(images))
    elsewhere = pickle.loads(pickle.dumps(callback))
    tested = merged(trainer(elsewhere).test(model, datamodule=Digits(), verbose=False))
    assert tested == as_test(callback.report.metrics_int8)
    assert tested != merged(trainer().test(model, datamodule=Digits(), verbose=False))
