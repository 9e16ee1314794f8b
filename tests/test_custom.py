"""A user's own observer, fake quantize and modules, for all layers or for some, by class or import path."""

from __future__ import annotations

import copy
import re
from typing import Any

import own_classes
import pytest
import torch
import yaml
from own_classes import (
    CountingFakeQuantize,
    Doubled,
    HalfRange,
    Network,
    NotAnObserver,
    ObservedDoubled,
    ObservedWithItsOwnWeight,
    QuantizedDoubled,
    QuantizedFromFloat,
    TwiceTheMean,
)
from torch import nn

from lightning_quant import (
    ConfigError,
    LayerConfig,
    PostTrainingQuantization,
    QuantConfig,
    QuantizationAwareTraining,
    TensorSpec,
    convert,
    coverage,
    prepare,
)
from lightning_quant.backends import reference
from lightning_quant.backends.float_results import LinearToFloat
from lightning_quant.config import check_method
from lightning_quant.exporters.torchscript import freeze
from lightning_quant.layers import nearest

OWN = "own_classes."


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12)


def calibrated(model: nn.Module, config: QuantConfig, method: Any = "static") -> Any:
    prepared = prepare(model.eval(), config, method=method, example_inputs=images(2))
    with torch.no_grad():
        prepared(images(16))
    return prepared


def scales(converted: nn.Module) -> dict[str, float]:
    """Of what is rounded."""
    return {
        name: float(m.scale)
        for name, m in converted.named_modules()
        if isinstance(getattr(m, "scale", None), float) and not isinstance(m, LinearToFloat)
    }


# ---- names and paths


@pytest.mark.parametrize("given", [HalfRange, OWN + "HalfRange"])
def test_a_class_and_its_import_path_are_the_same_config(given: Any) -> None:
    spec = TensorSpec(observer=given)
    assert spec == TensorSpec(observer=OWN + "HalfRange")
    assert yaml.safe_load(yaml.safe_dump(spec.observer)) == OWN + "HalfRange"


def test_wrong_classes_and_paths() -> None:
    class Local(HalfRange):
        pass

    cases: list[tuple[Any, str]] = [
        (
            lambda: TensorSpec(observer="own_classes.HalfRang"),
            "TensorSpec(observer='own_classes.HalfRang'): 'own_classes.HalfRang' cannot be imported: module "
            "'own_classes' has no attribute 'HalfRang'. Give 'package.module.Class', with the package installed or on "
            "the Python path.",
        ),
        (
            lambda: TensorSpec(observer="own_classes.images.nothing"),
            "TensorSpec(observer='own_classes.images.nothing'): 'own_classes.images.nothing' cannot be imported: No "
            "module named 'own_classes.images'; 'own_classes' is not a package. Give 'package.module.Class', with the "
            "package installed or on the Python path.",
        ),
        (
            lambda: TensorSpec(observer="torch.relu"),
            "TensorSpec(observer='torch.relu'): 'torch.relu' is a builtin_function_or_method, not a class.",
        ),
        (
            lambda: TensorSpec(fake_quantize=3),  # type: ignore[arg-type]
            "TensorSpec(fake_quantize=3): 3 is no class. Give a class, or its import path as a text.",
        ),
        (
            lambda: TensorSpec(observer=Local),  # type: ignore[arg-type]
            f"TensorSpec(observer={Local!r}): test_wrong_classes_and_paths.<locals>.Local cannot be imported by its "
            "name, so that checkpoints and files could not say what they were made with. Define it in a module, "
            "outside of any function.",
        ),
    ]
    for make, text in cases:
        with pytest.raises(ConfigError, match=exactly(text)):
            make()


@pytest.mark.parametrize(
    ("spec", "method", "text"),
    [
        (
            TensorSpec(observer=OWN + "NotAnObserver"),
            "static",
            "TensorSpec(observer='own_classes.NotAnObserver'): it does not derive from "
            "torch.ao.quantization.ObserverBase, which this backend asks for.",
        ),
        (
            TensorSpec(fake_quantize=OWN + "HalfRange"),
            "qat",
            "TensorSpec(fake_quantize='own_classes.HalfRange'): it does not derive from "
            "torch.ao.quantization.FakeQuantizeBase, which this backend asks for.",
        ),
        (
            TensorSpec(fake_quantize=OWN + "CountingFakeQuantize"),
            "static",
            "TensorSpec(fake_quantize='own_classes.CountingFakeQuantize') with method='static': fake quantize is for "
            "training. Leave it out, or use QuantizationAwareTraining.",
        ),
    ],
)
def test_a_class_that_is_not_what_it_is_given_for(spec: TensorSpec, method: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=exactly(text)):
        prepare(Network().eval(), QuantConfig(activation=spec), method=method, example_inputs=images(2))
    # with a callback: when it is made
    kind: Any = QuantizationAwareTraining if method == "qat" else PostTrainingQuantization
    layer = LayerConfig(name="head", activation=spec)
    with pytest.raises(ConfigError, match=exactly(text)):
        kind(QuantConfig(layers=(layer,)))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"keep": True},
            "LayerConfig(name=None, type=None): give the name of the layers (or a pattern), or their type.",
        ),
        (
            {"name": "head"},
            "LayerConfig(name='head', type=None): give one of: activation and weight (or dtype='int8' alone), or "
            "dtype='float', or keep=True, or quantized=...",
        ),
        (
            {"name": "head", "dtype": "float", "weight": TensorSpec()},
            "LayerConfig(name='head', type=None): give one of: activation and weight (or dtype='int8' alone), or "
            "dtype='float', or keep=True, or quantized=...",
        ),
        (
            {"name": "head", "dtype": "int4"},
            "LayerConfig(dtype='int4'): not one of 'int8', 'float'. Did you mean 'int8'?",
        ),
        (
            {"name": "head", "observed": OWN + "ObservedDoubled", "keep": True},
            "LayerConfig(name='head', type=None): observed='own_classes.ObservedDoubled' needs quantized=..., the "
            "module that follows it.",
        ),
        (
            {"name": "head", "weight": TensorSpec(observer="histogram")},
            "LayerConfig(weight.observer='histogram'): weights are known in full, a histogram is for activations. Use "
            "'balanced', 'min_max' or 'moving_average'.",
        ),
        ({"name": "head", "weight": "int8"}, "LayerConfig(name='head', type=None): weight='int8': give a TensorSpec."),
    ],
)
def test_entries_that_cannot_be(settings: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=exactly(text)):
        LayerConfig(**settings)


@pytest.mark.parametrize("backend", ["torchscript", "pt2e"])
def test_exchange_needs_a_backend_with_modules(backend: Any) -> None:
    config = QuantConfig(backend=backend, layers=(LayerConfig(name="own", quantized=QuantizedFromFloat),))  # type: ignore[arg-type]
    text = (
        f"LayerConfig(quantized='own_classes.QuantizedFromFloat') with backend={backend!r}: it captures operators, not "
        "modules that could be exchanged. Use backend='fx' or 'eager'."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        check_method(config, "static")


# ---- which entry counts


def own(observer: str) -> TensorSpec:
    return TensorSpec(observer=observer)


def test_the_nearest_entry_counts() -> None:
    model = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "head": nn.Linear(2, 2)}
    )
    entries = (
        LayerConfig(name="*", weight=own("min_max")),
        LayerConfig(name="encoder.0", weight=own("moving_average")),
        LayerConfig(name="encoder.*", activation=own("min_max")),
        LayerConfig(type=nn.Linear, activation=own("moving_average")),  # type: ignore[arg-type]
        LayerConfig(name="encoder", keep=True),
    )
    found = {name: (e.activation, e.weight, e.keep) for name, e in nearest(entries, model).items()}
    assert found == {
        "encoder": (None, None, True),
        "encoder.0": (None, own("moving_average"), False),  # a name before a pattern
        "encoder.1": (own("min_max"), None, False),  # more letters before fewer
        "encoder.2": (own("min_max"), None, False),
        "head": (None, own("min_max"), False),  # a name before a type
    }


def test_an_entry_for_a_module_speaks_of_what_is_inside() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))})
    entries = (
        LayerConfig(name="encoder", weight=own("min_max")),
        LayerConfig(name="encoder.1", weight=own("moving_average")),
    )
    found = {name: e.weight.observer for name, e in nearest(entries, model).items() if e.weight}
    assert found == {
        "encoder": "min_max",
        "encoder.0": "min_max",
        "encoder.1": "moving_average",
        "encoder.1.0": "moving_average",
    }


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            LayerConfig(name="heads", keep=True),
            "LayerConfig(name='heads', type=None) matches no submodule. Did you mean 'head'?",
        ),
        (
            LayerConfig(type="torch.nn.Conv3d", keep=True),
            "LayerConfig(name=None, type='torch.nn.modules.conv.Conv3d') matches no submodule. Did you mean "
            "'torch.nn.modules.conv.Conv2d'?",
        ),
    ],
)
def test_an_entry_that_matches_nothing(entry: LayerConfig, text: str) -> None:
    if entry.type:
        text = text.replace("torch.nn.modules.conv.Conv3d", entry.type)
    with pytest.raises(ConfigError) as error:
        prepare(Network().eval(), QuantConfig(layers=(entry,)), method="static", example_inputs=images(2))
    assert str(error.value).startswith(text[: text.index("matches") + 8])


# ---- what they do


@pytest.mark.parametrize("backend", ["fx", "eager"])
@pytest.mark.parametrize("observer", [HalfRange, TwiceTheMean])
def test_an_observer_of_all_activations(backend: Any, observer: Any) -> None:
    model = Network()
    torch.manual_seed(1)
    stock = convert(calibrated(model, QuantConfig(backend=backend, activation=own("min_max"))))
    torch.manual_seed(1)
    other = convert(calibrated(model, QuantConfig(backend=backend, activation=TensorSpec(observer=observer))))
    before, after = scales(stock), scales(other)
    assert before.keys() == after.keys()
    assert before
    if observer is HalfRange:
        for name in before:
            assert after[name] == pytest.approx(before[name] / 2)


@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_an_observer_of_one_layer(backend: Any) -> None:
    model = Network()
    spec = TensorSpec(observer=HalfRange)  # type: ignore[arg-type]
    torch.manual_seed(1)
    stock = scales(convert(calibrated(model, QuantConfig(backend=backend, activation=own("min_max")))))
    torch.manual_seed(1)
    config = QuantConfig(
        backend=backend, activation=own("min_max"), layers=(LayerConfig(name="second", activation=spec),)
    )
    other = scales(convert(calibrated(model, config)))
    assert other["second"] == pytest.approx(stock["second"] / 2)
    assert {k: v for k, v in other.items() if k != "second"} == {k: v for k, v in stock.items() if k != "second"}


@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_weights_of_one_type(backend: Any) -> None:
    spec = TensorSpec(qscheme="per_tensor_symmetric")
    config = QuantConfig(backend=backend, layers=(LayerConfig(type="torch.nn.Conv2d", weight=spec),))
    converted = convert(calibrated(Network(), config))
    schemes = {
        name: m.weight().qscheme() for name, m in converted.named_modules() if callable(getattr(m, "weight", None))
    }
    assert schemes["first"] == schemes["second"] == torch.per_tensor_affine
    assert schemes["head"] == torch.per_channel_affine


@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_a_fake_quantize_of_ones_own_trains(backend: Any) -> None:
    spec = TensorSpec(fake_quantize=CountingFakeQuantize, observer=HalfRange)  # type: ignore[arg-type]
    model = Network()
    config = QuantConfig(backend=backend, activation=spec, weight=TensorSpec(fake_quantize=CountingFakeQuantize))  # type: ignore[arg-type]
    prepared = prepare(model, config, method="qat", example_inputs=images(2))
    prepared(images()).sum().backward()
    found = [m for m in prepared.modules() if isinstance(m, CountingFakeQuantize)]
    assert len(found) >= 6  # three weights, and what goes in and out
    assert all(m.calls for m in found)
    assert all(p.grad is not None for p in model.parameters() if p is not model.own.weight)
    convert(prepared)


@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_a_module_is_kept_whole(backend: Any) -> None:
    model = Network()
    config = QuantConfig(backend=backend, layers=(LayerConfig(name="second", keep=True),))
    converted = convert(calibrated(model, config))
    rows = {row.name: row for row in coverage(converted, images(2)).rows}
    assert not rows["second"].int8
    assert rows["first"].int8
    assert rows["head"].int8


@pytest.mark.parametrize("backend", ["fx", "eager"])
@pytest.mark.parametrize("by", [{"name": "own"}, {"type": Doubled}])
def test_a_module_is_exchanged(backend: Any, by: Any) -> None:
    model = Network().eval()
    entry = LayerConfig(observed=ObservedDoubled, quantized=QuantizedDoubled, **by)  # type: ignore[arg-type]
    prepared = calibrated(model, QuantConfig(backend=backend, layers=(entry,)))
    observed = [m for m in prepared.modules() if isinstance(m, ObservedDoubled)]
    assert len(observed) == 1
    assert observed[0].largest > 0
    converted, neutral = convert(prepared), reference(prepared)
    for graph in (converted, neutral):
        (quantized,) = [m for m in graph.modules() if isinstance(m, QuantizedDoubled)]
        assert quantized.step == pytest.approx(float(observed[0].largest) / 8)
        assert not [m for m in graph.modules() if isinstance(m, (Doubled, ObservedDoubled))]
    x = images()
    # what it gives is what the class computes of the data before it
    seen: list[torch.Tensor] = []
    (module,) = [m for m in converted.modules() if isinstance(m, QuantizedDoubled)]
    module.register_forward_hook(lambda m, args, output: seen.extend([args[0], output]))
    converted(x)
    step = module.step
    assert torch.equal(seen[1], 2 * (torch.round(seen[0] / step) * step) @ model.own.weight)


def test_a_module_is_exchanged_for_one_made_from_float() -> None:
    model = Network().eval()
    entry = LayerConfig(name="own", quantized=OWN + "QuantizedFromFloat")
    converted = convert(calibrated(model, QuantConfig(layers=(entry,))))
    (module,) = [m for m in converted.modules() if isinstance(m, QuantizedFromFloat)]
    assert torch.equal(module.weight, torch.round(model.own.weight * 16) / 16)


def test_what_observes_trains_the_layer() -> None:
    model = Network()
    entry = LayerConfig(name="own", observed=ObservedDoubled, quantized=QuantizedDoubled)  # type: ignore[arg-type]
    prepared = prepare(model, QuantConfig(layers=(entry,)), method="qat", example_inputs=images(2))
    prepared(images()).sum().backward()
    assert model.own.weight.grad is not None
    wrong = copy.copy(entry)
    object.__setattr__(wrong, "observed", OWN + ObservedWithItsOwnWeight.__name__)
    text = (
        "own_classes.ObservedWithItsOwnWeight.from_float(own) has 1 Parameters less than the layer: training would not "
        "reach them. Let from_float use the Parameter objects of what it is given."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        prepare(model, QuantConfig(layers=(wrong,)), method="qat", example_inputs=images(2))


def test_a_class_without_a_maker() -> None:
    entry = LayerConfig(name="own", quantized=OWN + NotAnObserver.__name__)
    text = (
        "LayerConfig(quantized='own_classes.NotAnObserver'): it has no class method from_observed or from_float that "
        "makes it from a module."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        prepare(Network().eval(), QuantConfig(layers=(entry,)), method="static", example_inputs=images(2))


@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_weights_of_one_layer_without_calibration(backend: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    spec = TensorSpec(qscheme="per_tensor_symmetric")
    config = QuantConfig(backend=backend, layers=(LayerConfig(name="0", weight=spec),))
    int8 = convert(prepare(model, config, method="dynamic", example_inputs=torch.randn(2, 4)))
    layers = [m for m in int8.modules() if callable(getattr(m, "weight", None))]
    assert [m.weight().qscheme() for m in layers] == [torch.per_tensor_affine, torch.per_channel_affine]


# ---- torchao's kinds


class Plain(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


def quantizers(prepared: nn.Module) -> list[tuple[float, str]]:
    """Scale of every tensor that is quantized in the graph, in order, and what gave the tensor."""
    graph: Any = reference(prepared)
    nodes = [n for n in graph.graph.nodes if ".quantize_per_tensor" in str(n.target)]
    return [(float(n.args[1]), n.args[0].name) for n in nodes]


def test_observers_of_torchao_for_all_and_for_some() -> None:
    model = Plain()
    found = {}
    half = TensorSpec(observer="own_torchao_classes.HalfRange")
    for name, config in {
        "stock": QuantConfig(backend="pt2e", activation=own("min_max")),
        "all": QuantConfig(backend="pt2e", activation=half),
        "one": QuantConfig(
            backend="pt2e", activation=own("min_max"), layers=(LayerConfig(name="second", activation=half),)
        ),
    }.items():
        torch.manual_seed(1)
        found[name] = [scale for scale, _ in quantizers(calibrated(model, config))]
    stock = found["stock"]
    assert len(stock) >= 3
    assert found["all"] == pytest.approx([scale / 2 for scale in stock])
    changed = [a == pytest.approx(b / 2) for a, b in zip(found["one"], stock, strict=True)]
    assert any(changed)
    assert not all(changed)
    assert all(c or a == b for a, b, c in zip(found["one"], stock, changed, strict=True))


def test_weights_of_one_type_in_pt2e() -> None:
    spec = TensorSpec(qscheme="per_tensor_symmetric")
    config = QuantConfig(backend="pt2e", layers=(LayerConfig(type="torch.nn.Conv2d", weight=spec),))
    graph: Any = reference(calibrated(Plain(), config))
    per_channel = [n for n in graph.graph.nodes if "dequantize_per_channel" in str(n.target)]
    assert [next(iter(n.users)).target for n in per_channel] == [torch.ops.aten.linear.default]


def test_a_fake_quantize_of_torchao_trains() -> None:
    path = "own_torchao_classes.CountingFakeQuantize"
    spec = TensorSpec(fake_quantize=path)
    model = Plain()
    prepared = prepare(
        model, QuantConfig(backend="pt2e", activation=spec, weight=spec), method="qat", example_inputs=images(2)
    )
    prepared(images()).sum().backward()
    found = [m for m in prepared.modules() if type(m).__name__ == "CountingFakeQuantize"]
    assert len(found) >= 6
    assert all(getattr(m, "calls", 0) for m in found)
    assert all(p.grad is not None for p in model.parameters())
    convert(prepared)


@pytest.mark.parametrize("backend", ["pt2e"])
def test_a_class_of_torch_ao_is_none_of_torchao(backend: Any) -> None:
    spec = TensorSpec(observer=OWN + "HalfRange")
    text = (
        "TensorSpec(observer='own_classes.HalfRange'): it does not derive from torchao.quantization.pt2e.ObserverBase, "
        "which this backend asks for."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        prepare(
            Plain().eval(), QuantConfig(backend=backend, activation=spec), method="static", example_inputs=images(2)
        )


@pytest.mark.parametrize("jit", ["trace", "script"])
def test_weights_of_one_type_in_torchscript(jit: Any) -> None:
    spec = TensorSpec(qscheme="per_tensor_symmetric")
    config = QuantConfig(backend="torchscript", jit=jit, layers=(LayerConfig(type="torch.nn.Conv2d", weight=spec),))
    program = freeze(convert(calibrated(Plain(), config)), (images(2),))
    nodes = [n for n in program.inlined_graph.nodes() if n.kind().startswith(("quantized::conv", "quantized::linear"))]
    packed = {n.kind(): list(n.inputs())[1].toIValue() for n in nodes}
    schemes = {kind: weight.unpack()[0].qscheme() for kind, weight in packed.items()}
    assert schemes == {
        "quantized::conv2d_relu": torch.per_tensor_affine,
        "quantized::linear": torch.per_channel_affine,
    }


@pytest.mark.parametrize("jit", ["trace", "script"])
def test_an_observer_that_can_be_scripted(jit: Any) -> None:
    model = Plain()
    found = []
    for observer in ("min_max", OWN + "Wider"):
        torch.manual_seed(1)
        config = QuantConfig(backend="torchscript", jit=jit, activation=own(observer))
        program = freeze(convert(calibrated(model, config)), (images(2),))
        nodes = [n for n in program.inlined_graph.nodes() if n.kind() == "quantized::conv2d_relu"]
        found.append([list(n.inputs())[2].toIValue() for n in nodes])
    assert found[1] == pytest.approx([2 * scale for scale in found[0]])


def test_layers_of_a_module_that_was_scripted_before_have_one_setting() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), nn.Linear(4, 2)).eval()
    spec = TensorSpec(qscheme="per_tensor_symmetric")
    config = QuantConfig(backend="torchscript", layers=(LayerConfig(name="0.0", weight=spec),))
    text = (
        "LayerConfig(name='0.0'): it is part of a module that was scripted before, of which all layers have one "
        "setting. Give it to QuantConfig(weight=...), or script the module with jit='script'."
    )
    with pytest.raises(ConfigError, match=exactly(text)):
        prepare(model, config, method="static", example_inputs=torch.randn(2, 4))


@pytest.mark.parametrize("backend", ["torchscript", "pt2e"])
def test_what_is_around_a_module_that_is_kept_whole_is_cut_there(backend: Any) -> None:
    model = Plain().eval()
    config = QuantConfig(backend=backend, layers=(LayerConfig(name="second", keep=True),))
    converted = convert(calibrated(model, config))
    x = images(2)
    rows = coverage(converted, x).rows
    assert [row.int8 for row in rows] == [True, False, True]


def test_the_classes_of_this_test_are_the_users() -> None:
    assert HalfRange.__module__ == own_classes.__name__
