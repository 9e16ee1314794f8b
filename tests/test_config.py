"""Settings are frozen values, checked when they are made; every message says what, why and what to do."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, asdict, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from lightning_quant import (
    ConfigError,
    ExportConfig,
    LayerConfig,
    MissingExtraError,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    config,
)
from lightning_quant.config import (
    REFUSED,
    SUPPORT,
    BackendName,
    FormatName,
    Method,
    check_method,
    formats_of,
    near,
    resolve,
    resolve_formats,
)


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: TensorSpec(dtype="int4"),
            "TensorSpec(dtype='int4'): not one of 'auto', 'quint8', 'qint8'. Did you mean 'qint8', 'quint8'?",
        ),
        (
            lambda: TensorSpec(qscheme="per_row"),
            "TensorSpec(qscheme='per_row'): not one of 'auto', 'per_tensor_affine', 'per_tensor_symmetric', "
            "'per_channel_affine', 'per_channel_symmetric'. Known: 'auto', 'per_channel_affine', "
            "'per_channel_symmetric', 'per_tensor_affine', 'per_tensor_symmetric'.",
        ),
        (
            lambda: TensorSpec(observer="minmax"),
            "TensorSpec(observer='minmax'): not one of 'auto', 'histogram', 'percentile', 'entropy', 'min_max', "
            "'moving_average', 'balanced'. "
            "Did you mean 'min_max'?",
        ),
        (
            lambda: QuantConfig(backend="fxx"),
            "QuantConfig(backend='fxx'): not one of 'fx', 'eager', 'torchscript', 'pt2e'. Did you mean 'fx'?",
        ),
        (
            lambda: QuantConfig(engine="fbgem"),
            "QuantConfig(engine='fbgem'): not one of 'auto', 'x86', 'fbgemm', 'onednn', 'qnnpack'. "
            "Did you mean 'fbgemm'?",
        ),
        (lambda: QuantConfig(activation="quint8"), "QuantConfig(activation='quint8'): give a TensorSpec."),
        (lambda: QuantConfig(weight=None), "QuantConfig(weight=None): give a TensorSpec."),
        (lambda: QuantConfig(skip="head"), "QuantConfig(skip='head'): give a list of names, e.g. skip=('head',)."),
        (lambda: QuantConfig(targets="a"), "QuantConfig(targets='a'): give a list of names, e.g. targets=('a',)."),
        (lambda: QuantConfig(skip=("",)), "QuantConfig(skip=('',)): every pattern is a non-empty string."),
        (lambda: QuantConfig(targets=[1]), "QuantConfig(targets=[1]): every pattern is a non-empty string."),
        (
            lambda: QuantConfig(activation=TensorSpec(qscheme="per_channel_affine")),
            "QuantConfig(activation.qscheme='per_channel_affine'): int8 kernels take activations with one scale. "
            "Use 'per_tensor_affine' or 'per_tensor_symmetric'; per channel is for weights.",
        ),
        (
            lambda: QuantConfig(weight=TensorSpec(dtype="quint8")),
            "QuantConfig(weight.dtype='quint8'): int8 kernels take signed weights. Use 'qint8'.",
        ),
        *(
            (
                lambda percentile=percentile: TensorSpec(percentile=percentile),
                f"TensorSpec(percentile={percentile!r}): give a number above 50, up to 100.",
            )
            for percentile in (50, 100.1, -1, True)
        ),
        (
            lambda: QuantConfig(weight=TensorSpec(observer="histogram")),
            "QuantConfig(weight.observer='histogram'): weights are known in full, a histogram is for activations. "
            "Use 'balanced', 'min_max' or 'moving_average'.",
        ),
        *(
            (
                lambda engine=engine: QuantConfig(activation=TensorSpec(dtype="qint8"), engine=engine),
                f"QuantConfig(activation.dtype='qint8', engine={engine!r}): the x86 kernels take unsigned activations. "
                "Use 'quint8', or engine='qnnpack'.",
            )
            for engine in ("x86", "fbgemm", "onednn")
        ),
        (
            lambda: QuantConfig(corrections="adaround"),
            "QuantConfig(corrections='adaround'): give a list of names, e.g. ('adaround',).",
        ),
        (
            lambda: QuantConfig(corrections=("bias",)),
            "QuantConfig(corrections='bias'): not one of 'cross_layer_equalization', 'smoothquant', 'choose_ranges', "
            "'adaround', 'gptq', 'analytic_bias_correction', 'bias_correction'. Known: 'adaround', "
            "'analytic_bias_correction', 'bias_correction', 'choose_ranges', 'cross_layer_equalization', "
            "'gptq', 'smoothquant'.",
        ),
        (
            lambda: QuantConfig(corrections=["smoothquant", "smoothquant"]),
            "QuantConfig(corrections=('smoothquant', 'smoothquant')): name each correction once.",
        ),
        *(
            (
                lambda first=first, second=second: QuantConfig(corrections=(second, first)),
                f"QuantConfig(corrections=({second!r}, {first!r})): {first} and {second} would make up for the same "
                "errors of rounding, each taking what the other did for an error. Name one: gptq or adaround, "
                "bias_correction to leave weights as they are, analytic_bias_correction where there is no data.",
            )
            for first, second in combinations(("adaround", "gptq", "analytic_bias_correction", "bias_correction"), 2)
        ),
        (
            lambda: QuantConfig(corrections=("smoothquant",), backend="torchscript"),
            "QuantConfig(corrections=('smoothquant',), backend='torchscript'): corrections change layers of a graph, "
            "and TorchScript graph mode has none. Leave them out, or use backend='fx', 'eager' or 'pt2e'.",
        ),
        (lambda: ExportConfig(directory=""), "ExportConfig(directory=''): give the name of a folder."),
        (lambda: ExportConfig(formats="onnx"), "ExportConfig(formats='onnx'): give a list, e.g. ('onnx',)."),
        (
            lambda: ExportConfig(formats=["onx"]),
            "ExportConfig(formats='onx'): not one of 'torchscript', 'onnx', 'openvino', 'pt2', 'aoti'. "
            "Did you mean 'onnx'?",
        ),
        (lambda: ExportConfig(skip_slow="yes"), "ExportConfig(skip_slow='yes'): give True or False."),
        (lambda: ExportConfig(skip_slow=None), "ExportConfig(skip_slow=None): give True or False."),
        (
            lambda: ExportConfig(batch_sizes=()),
            "ExportConfig(batch_sizes=()): give numbers of samples, e.g. (1, 16).",
        ),
        (
            lambda: ExportConfig(batch_sizes=(0, 2)),
            "ExportConfig(batch_sizes=(0, 2)): give numbers of samples, e.g. (1, 16).",
        ),
        (lambda: ExportConfig(batch_sizes=16), "ExportConfig(batch_sizes=16): give numbers of samples, e.g. (1, 16)."),
        (lambda: ExportConfig(formats=()), "ExportConfig(formats=()): name each format once, at least one."),
        (
            lambda: ExportConfig(formats=("onnx", "onnx")),
            "ExportConfig(formats=('onnx', 'onnx')): name each format once, at least one.",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_message(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=exactly(text)):
        make()


def test_config_error_is_a_value_error() -> None:
    """So that a command line reports it as a wrong value."""
    with pytest.raises(ValueError, match="give the name of a folder"):
        ExportConfig(directory="")


@pytest.mark.parametrize("kind", [TensorSpec, QuantConfig, ExportConfig])
def test_values_are_frozen_and_keyword_only(kind: Any) -> None:
    value = kind()
    name = next(iter(asdict(value)))
    with pytest.raises(FrozenInstanceError):
        setattr(value, name, "auto")
    with pytest.raises(TypeError, match="positional argument"):
        kind("auto")
    assert value == kind()
    assert hash(value) == hash(kind())


def test_lists_of_yaml_become_tuples() -> None:
    given = yaml.safe_load("{skip: [head, '*.norm'], targets: [encoder], reduce_range: true}")
    made = QuantConfig(**given)
    assert made.skip == ("head", "*.norm")
    assert made.targets == ("encoder",)
    assert ExportConfig(formats=yaml.safe_load("[onnx]")).formats == ("onnx",)


def test_a_path_is_accepted_as_directory() -> None:
    made = ExportConfig(directory=Path("a") / "b")
    assert made.directory == str(Path("a") / "b")
    assert made.path == Path("a") / "b"


def test_a_config_survives_yaml() -> None:
    before = QuantConfig(weight=TensorSpec(qscheme="per_tensor_symmetric"), skip=("head",), reduce_range=False)
    plain = yaml.safe_load(yaml.safe_dump({**asdict(before), "targets": [], "skip": ["head"]}))
    plain["activation"], plain["weight"] = TensorSpec(**plain["activation"]), TensorSpec(**plain["weight"])
    assert QuantConfig(**plain) == before


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("encodr", ["encoder", "decoder"], "Did you mean 'encoder', 'decoder'?"),
        ("zzz", ["encoder", "decoder"], "Known: 'decoder', 'encoder'."),
        ("zzz", [f"layer{i}" for i in range(9)], "Known: " + ", ".join(f"'layer{i}'" for i in range(8)) + ", ..."),
        ("zzz", [], "There are none."),
    ],
)
def test_near_names(name: str, known: list[str], text: str) -> None:
    assert near(name, known).rstrip(".") == text.rstrip(".")


# ---- what a machine needs


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("engine", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_reduce_range_is_for_x86_kernels_without_vnni(engine: Any, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "cpu_has_vnni", lambda: vnni)
    monkeypatch.setattr(torch.backends.quantized.__class__, "supported_engines", ["none", engine])
    # qnnpack accumulates in 32 bits
    assert resolve(QuantConfig(engine=engine)).reduce_range is (engine != "qnnpack" and not vnni)


@pytest.mark.parametrize("given", [True, False])
def test_reduce_range_that_is_given_is_kept(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "cpu_has_vnni", lambda: given)
    assert resolve(QuantConfig(reduce_range=given)).reduce_range is given


@pytest.mark.parametrize(
    ("supported", "chosen"), [(["x86", "qnnpack"], "x86"), (["fbgemm", "x86"], "x86"), (["qnnpack"], "qnnpack")]
)
def test_engine_auto(supported: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.quantized.__class__, "supported_engines", supported)
    resolved = resolve(QuantConfig())
    assert resolved.engine == chosen
    assert resolve(resolved) == resolved
    assert replace(resolved, engine="auto", reduce_range=None) == QuantConfig()


def test_an_engine_that_torch_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.quantized.__class__, "supported_engines", ["none", "onednn", "qnnpack"])
    with pytest.raises(
        ConfigError, match=exactly("QuantConfig(engine='x86'): this build of torch has onednn, qnnpack.")
    ):
        resolve(QuantConfig(engine="x86"))


@pytest.mark.parametrize(("machine", "asked"), [("x86_64", True), ("AMD64", True), ("arm64", False)])
def test_vnni_is_asked_of_x86_only(machine: str, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert config.cpu_has_vnni() is not asked


# ---- the support table


@pytest.mark.parametrize(("backend", "method"), [*product(get_args(BackendName), get_args(Method))])
def test_each_cell_writes_formats_or_says_why_not(backend: Any, method: Any) -> None:
    quant_config = QuantConfig(backend=backend)
    if (backend, method) in SUPPORT:
        assert formats_of(quant_config, method) == SUPPORT[backend, method]
        assert set(SUPPORT[backend, method]) <= set(get_args(FormatName))
        check_method(quant_config, method)
        return
    text = REFUSED[backend, method]
    for refuse in (formats_of, check_method):
        with pytest.raises(ConfigError, match=exactly(text)):
            refuse(quant_config, method)


def test_the_table_has_no_unknown_names() -> None:
    assert {backend for backend, _ in SUPPORT} <= set(get_args(BackendName))
    assert {method for _, method in SUPPORT} <= set(get_args(Method))
    assert SUPPORT.keys().isdisjoint(REFUSED)


def test_torchscript_graph_mode_cannot_train() -> None:
    text = (
        "backend='torchscript' cannot train: TorchScript graph mode has no fake quantize. Train with backend='fx', "
        "'eager' or 'pt2e'; 'fx' and 'eager' write TorchScript files."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        QuantizationAwareTraining(QuantConfig(backend="torchscript"))


@pytest.mark.parametrize("settings", [{"jit": "script"}, {"debug": True}])
def test_settings_of_torchscript_graph_mode_alone(settings: Any) -> None:
    values = {"jit": "trace", "debug": False, **settings}
    text = (
        f"QuantConfig(backend='fx', jit={values['jit']!r}, debug={values['debug']}): jit and debug are settings of "
        "TorchScript graph mode. Leave them out, or use backend='torchscript'."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        QuantConfig(**settings)
    QuantConfig(backend="torchscript", **settings)


def test_torchscript_graph_mode_observes_all_activations_in_one_way() -> None:
    layer = LayerConfig(name="head", activation=TensorSpec(observer="min_max"))
    text = (
        "LayerConfig(activation=...) with backend='torchscript': TorchScript graph mode observes all activations "
        "of a program in one way. Give it to QuantConfig(activation=...), or use backend='fx', 'eager' or 'pt2e'."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        check_method(QuantConfig(backend="torchscript", layers=(layer,)), "static")


def test_pt2e_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    text = (
        "backend 'pt2e' needs the package 'torchao', which is not installed. "
        "Install it with: pip install 'lightning-quant[pt2e]'"
    )
    with pytest.raises(MissingExtraError, match=exactly(text)):
        check_method(QuantConfig(backend="pt2e"), "static")


def test_an_unknown_method() -> None:
    text = "quantize(method='ptq'): not one of 'dynamic', 'static', 'qat'. "
    with pytest.raises(ConfigError, match=re.escape(text)):
        formats_of(QuantConfig(), "ptq")


@pytest.mark.parametrize(
    ("spec", "method", "text"),
    [
        *(
            (
                TensorSpec(observer=observer),
                "qat",
                f"QuantConfig(activation.observer={observer!r}) with quantization-aware training: ranges follow the "
                "training with a moving average. Use 'auto' or 'moving_average'.",
            )
            for observer in ("histogram", "percentile", "entropy", "min_max")
        ),
        (
            TensorSpec(observer="min_max"),
            "dynamic",
            "QuantConfig(activation=TensorSpec(dtype='auto', qscheme='auto', observer='min_max', "
            "percentile=99.99, bits=8, fake_quantize='auto')) with "
            "method='dynamic': the range of each activation is taken when it is computed. Leave activation at its "
            "default, or use method='static'.",
        ),
    ],
)
def test_a_setting_without_a_meaning_for_the_method(spec: TensorSpec, method: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=exactly(text)):
        check_method(QuantConfig(activation=spec), method)


@pytest.mark.parametrize(
    ("method", "reason"), [("qat", "training corrects weights itself"), ("dynamic", "nothing is calibrated")]
)
def test_corrections_are_for_what_is_calibrated(method: Any, reason: str) -> None:
    given = QuantConfig(corrections=("bias_correction",))
    text = (
        f"QuantConfig(corrections=('bias_correction',)) with method={method!r}: {reason}. Leave them out, or use "
        "PostTrainingQuantization(method='static')."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        check_method(given, method)
    check_method(given, "static")


def test_ranges_are_chosen_among_those_of_a_histogram() -> None:
    given = QuantConfig(corrections=("choose_ranges",), activation=TensorSpec(observer="min_max"))
    text = (
        "QuantConfig(corrections=('choose_ranges',)) with activation.observer='min_max': it chooses among ranges of a "
        "histogram. Leave observer at 'auto', or choose_ranges out."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        check_method(given, "static")


def test_corrections_have_one_order() -> None:
    given = QuantConfig(corrections=["bias_correction", "smoothquant"])  # type: ignore[arg-type]
    assert given.corrections == ("smoothquant", "bias_correction")
    assert given == QuantConfig(corrections=("smoothquant", "bias_correction"))


# ---- formats


@pytest.fixture
def only_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: object())


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize("method", ["static", "qat"])
def test_formats_are_all_that_can_be_written(method: Any) -> None:
    assert resolve_formats(QuantConfig(), method, ExportConfig()) == (("torchscript", "onnx", "openvino"), {})
    pt2e = QuantConfig(backend="pt2e")
    assert resolve_formats(pt2e, method, ExportConfig()) == (("pt2", "onnx", "openvino"), {})


@pytest.mark.usefixtures("only_torch")
def test_a_format_whose_package_is_missing_is_left_out() -> None:
    chosen, left_out = resolve_formats(QuantConfig(), "static", ExportConfig())
    assert chosen == ("torchscript",)
    assert left_out == {
        "onnx": "onnx is not installed: pip install 'lightning-quant[onnx]'",
        "openvino": "openvino is not installed: pip install 'lightning-quant[openvino]'",
    }


def test_openvino_is_not_needed_for_the_other_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None if name == "openvino" else object())
    chosen, left_out = resolve_formats(QuantConfig(), "static", ExportConfig())
    assert chosen == ("torchscript", "onnx")
    assert left_out == {"openvino": "openvino is not installed: pip install 'lightning-quant[openvino]'"}


@pytest.mark.usefixtures("everything")
def test_a_format_that_the_method_cannot_write_is_left_out() -> None:
    chosen, left_out = resolve_formats(QuantConfig(), "dynamic", ExportConfig())
    assert chosen == ("torchscript",)
    reason = "backend 'fx' does not write it for method 'dynamic'"
    assert left_out == {"onnx": reason, "openvino": reason}


@pytest.mark.usefixtures("everything")
def test_named_formats_are_written_in_their_order() -> None:
    named = ExportConfig(formats=("onnx", "torchscript"))
    assert resolve_formats(QuantConfig(), "static", named) == (("onnx", "torchscript"), {})


@pytest.mark.usefixtures("everything")
def test_a_named_format_that_the_method_cannot_write() -> None:
    text = (
        "ExportConfig(formats=('onnx',)): backend='fx' with method='dynamic' cannot write 'onnx'. "
        "It writes: torchscript."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        resolve_formats(QuantConfig(), "dynamic", ExportConfig(formats=("onnx",)))


@pytest.mark.parametrize(
    ("format_name", "package"),
    [
        *(("onnx", package) for package in ("onnx", "onnxscript", "onnxruntime")),
        *(("openvino", package) for package in ("openvino", "onnx", "onnxscript")),
    ],
)
def test_a_named_format_whose_package_is_missing(
    format_name: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None if name == package else object())
    text = (
        f"format {format_name!r} needs the package {package!r}, which is not installed. "
        f"Install it with: pip install 'lightning-quant[{format_name}]'"
    )
    with pytest.raises(MissingExtraError, match=exactly(text)):
        resolve_formats(QuantConfig(), "static", ExportConfig(formats=(format_name,)))


@pytest.mark.usefixtures("only_torch")
def test_torch_alone_writes_what_torch_runs() -> None:
    named = ExportConfig(formats=("torchscript", "pt2", "aoti"))
    assert resolve_formats(QuantConfig(), "static", named) == (("torchscript", "pt2", "aoti"), {})
