"""What hides its layers from a trace, written out: the same numbers as the original, and its layers in int8."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import decibels
from torch import nn

from lightning_quant import convert, coverage, prepare
from lightning_quant.arguments import Call
from lightning_quant.backends.graph import info, link
from lightning_quant.backends.tracing import trace
from lightning_quant.backends.written_out import is_written_out
from lightning_quant.config import Method
from lightning_quant.phases import set_observing
from lightning_quant.structures import plain

METHODS = pytest.mark.parametrize("method", ["static", "qat"])
WIDTH, HEADS, BATCH, TARGET, SOURCE = 8, 2, 3, 5, 7


@pytest.fixture(autouse=True)
def _without_fused_path() -> Iterator[None]:
    """torch's fused path gives zeros at padded positions: it is not what we hold ours against."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def randomised(module: nn.Module) -> nn.Module:
    """Biases that torch starts at zero, and norms that it starts at one, would hide mistakes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name and name.endswith("weight")))
    return module.eval()


def run_graph(graph: Any, call: Call) -> Any:
    interface = info(graph).interface
    return interface.restore(graph(*interface.flatten(call.args, call.keywords)))


def assert_traced(module: nn.Module, call: Call, *, training: bool = False) -> None:
    """The graph gives what the module gives: in float32, with sums in another order."""
    traced = trace(module, call, training=training)
    traced.graph_module.train(module.training)
    with torch.no_grad():
        expected = module(*call.args, **call.keywords)
        found = traced.graph_module(*traced.interface.flatten(call.args, call.keywords))
    found = traced.interface.restore(found)
    assert traced.kept == {}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def quantized(module: nn.Module, call: Call, method: Method) -> tuple[nn.Module, nn.Module]:
    """The prepared graph and the converted one."""
    prepared: Any = prepare(module, method=method, example_inputs=call)
    with torch.no_grad():
        run_graph(prepared.eval(), call)
    return prepared, convert(prepared)


def assert_int8(module: nn.Module, call: Call, method: Method, layers: int) -> None:
    """All layers run in int8, and what comes out is close to float: a dozen roundings, of 36 dB each, are 25 dB."""
    _, int8 = quantized(module, call, method)
    found = coverage(int8, (), run=lambda: run_graph(int8, call))
    assert found.share == 1.0
    assert len([row for row in found.rows if row.int8]) == layers
    expected, actual = module(*call.args, **call.keywords), run_graph(int8, call)
    if isinstance(expected, tuple):
        expected, actual = expected[0], actual[0]
    assert decibels(expected, actual) > 20


# ---- nn.MultiheadAttention


def attention(**options: Any) -> Any:
    return randomised(nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options}))


def sequence(length: int, width: int = WIDTH, *, batch_first: bool = True, batched: bool = True) -> torch.Tensor:
    if not batched:
        return torch.randn(length, width)
    return torch.randn((BATCH, length, width) if batch_first else (length, BATCH, width))


def masks(source: int, batch: int = BATCH) -> dict[str, dict[str, torch.Tensor]]:
    """Arguments of attention. No position sees nothing."""
    flat = torch.rand(TARGET, source) > 0.6
    each = torch.rand(batch * HEADS, TARGET, source) > 0.6
    padding = torch.zeros(batch, source, dtype=torch.bool)
    flat[:, 0] = each[..., 0] = False
    padding[-1, -2:] = True
    penalty = torch.where(padding, float("-inf"), 0.0)
    return {
        "none": {},
        "bool": {"attn_mask": flat},
        "float": {"attn_mask": torch.randn(TARGET, source)},
        "bool 3D": {"attn_mask": each},
        "float 3D": {"attn_mask": torch.randn(batch * HEADS, TARGET, source)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": penalty},
        "both": {"attn_mask": flat, "key_padding_mask": padding},
        "both 3D": {"attn_mask": torch.randn(batch * HEADS, TARGET, source), "key_padding_mask": penalty},
    }


KINDS = pytest.mark.parametrize("kind", ["self", "cross", "key and value", "kdim and vdim"])


def inputs(kind: str, **layout: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = sequence(TARGET, **layout)
    if kind == "self":
        return query, query, query
    if kind == "cross":
        memory = sequence(SOURCE, **layout)
        return query, memory, memory
    widths = (6, 4) if kind == "kdim and vdim" else (WIDTH, WIDTH)
    return query, sequence(SOURCE, widths[0], **layout), sequence(SOURCE, widths[1], **layout)


def widths_of(kind: str) -> dict[str, int]:
    return {"kdim": 6, "vdim": 4} if kind == "kdim and vdim" else {}


@KINDS
@pytest.mark.parametrize(("batch_first", "bias"), [(True, True), (False, False)])
@pytest.mark.parametrize("weights", [None, "averaged", "of each head"])
def test_attention(kind: str, batch_first: bool, bias: bool, weights: str | None) -> None:
    module = attention(bias=bias, batch_first=batch_first, **widths_of(kind))
    data = inputs(kind, batch_first=batch_first)
    options = {"need_weights": weights is not None, "average_attn_weights": weights == "averaged"}
    assert_traced(module, Call(data, options))


@KINDS
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_without_a_batch(kind: str, batch_first: bool, need_weights: bool) -> None:
    module = attention(batch_first=batch_first, **widths_of(kind))
    data = inputs(kind, batched=False)
    padding = torch.arange(len(data[1])) > 3
    assert_traced(module, Call(data, {"need_weights": need_weights}))
    assert_traced(module, Call(data, {"need_weights": need_weights, "key_padding_mask": padding}))
    each = torch.randn(HEADS, TARGET, len(data[1]))
    assert_traced(module, Call(data, {"need_weights": need_weights, "attn_mask": each, "average_attn_weights": False}))


@pytest.mark.parametrize("kind", ["self", "kdim and vdim"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", masks(1))
def test_masks_of_attention(kind: str, need_weights: bool, name: str) -> None:
    module, data = attention(**widths_of(kind)), inputs(kind)
    options = masks(data[1].shape[1])[name]
    assert_traced(module, Call(data, {"need_weights": need_weights, **options}))


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_position_that_sees_nothing(need_weights: bool) -> None:
    """NaN with weights, zeros without: as torch gives them."""
    mask = torch.zeros(TARGET, TARGET, dtype=torch.bool)
    mask[2] = True
    options: dict[str, Any] = {"need_weights": need_weights, "attn_mask": mask}
    assert_traced(attention(), Call(inputs("self"), options))
    options["key_padding_mask"] = torch.where(torch.arange(TARGET) > 3, float("-inf"), 0.0).repeat(BATCH, 1)
    assert_traced(attention(), Call(inputs("self"), options))


def test_causal_attention_asks_for_its_mask_as_torch_does() -> None:
    module, data = attention(), inputs("self")
    mask = nn.Transformer.generate_square_subsequent_mask(TARGET)
    assert_traced(module, Call(data, {"attn_mask": mask, "is_causal": True, "need_weights": False}))
    for call in (module, lambda *a, **k: trace(module, Call(a, k))):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            call(*data, is_causal=True)


def test_the_comparison_with_torch_can_fail() -> None:
    module, data = attention(), inputs("self")
    traced = trace(module, Call(data))
    with torch.no_grad():
        expected = module(*data)
        module.out_proj.weight.add_(0.01)
        found = traced.graph_module(*data)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@METHODS
@pytest.mark.parametrize("bias", [True, False])
@KINDS
def test_projections_of_attention_are_int8(kind: str, bias: bool, method: Method) -> None:
    """A graph does not know that two of its inputs are one tensor: query, key and value, and the output."""
    module = attention(bias=bias, **widths_of(kind))
    assert_int8(module, Call(inputs(kind)), method, 4)


@METHODS
def test_masks_are_inputs_of_the_int8_graph(method: Method) -> None:
    module, data = attention(), inputs("self")
    call = Call(data, masks(TARGET)["both"])
    _, int8 = quantized(module, call, method)
    other = Call(data, masks(TARGET)["both"])
    assert not torch.equal(call.keywords["attn_mask"], other.keywords["attn_mask"])
    assert decibels(module(*other.args, **other.keywords)[0], run_graph(int8, other)[0]) > 20
    assert decibels(module(*call.args, **call.keywords)[0], run_graph(int8, other)[0]) < 20


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention_with_more_keys_stays_as_it_is(options: Any) -> None:
    module = attention(**options)
    assert not is_written_out(module)
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True).eval()
    model.self_attn = module
    call = Call((sequence(TARGET),))
    assert_traced(model, call)
    _, int8 = quantized(model, call, "static")
    rows = coverage(int8, (), run=lambda: run_graph(int8, call)).rows
    assert [row.int8 for row in rows if row.name.startswith("self_attn") and row.weighted] == [False, False]
    assert decibels(model(*call.args), run_graph(int8, call)) > 20


def test_subclasses_stay_as_they_are() -> None:
    class Own(nn.MultiheadAttention):
        pass

    class OwnLayer(nn.TransformerEncoderLayer):
        pass

    assert is_written_out(nn.MultiheadAttention(4, 2))
    assert not is_written_out(Own(4, 2))
    assert is_written_out(nn.TransformerEncoderLayer(4, 2, 8))
    assert not is_written_out(OwnLayer(4, 2, 8))
    assert not is_written_out(nn.Linear(4, 2))


# ---- training


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_in_training_drops_what_torch_drops(kind: str, need_weights: bool) -> None:
    """With one seed the same weights are dropped, as the same number of them is drawn."""
    module = attention(dropout=0.4).train()
    data = inputs(kind)
    traced = trace(module, Call(data, {"need_weights": need_weights}), training=True)
    outputs = []
    for run in (module, traced.graph_module):
        torch.manual_seed(5)
        outputs.append(run(*data, need_weights=need_weights) if run is module else run(*data))
    torch.testing.assert_close(outputs[1], plain(outputs[0]), rtol=1e-5, atol=1e-6)


def encoder_layer(**options: Any) -> nn.Module:
    return randomised(nn.TransformerEncoderLayer(16, 4, 32, **{"batch_first": True, **options}))


def decoder_layer(**options: Any) -> nn.Module:
    return randomised(nn.TransformerDecoderLayer(16, 4, 32, **{"batch_first": True, **options}))


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: attention(dropout=0.5), 3),
        (lambda: attention(dropout=0.5, kdim=8, vdim=8), 3),
        (lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.5, batch_first=True), 1),
        (lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, 16, dropout=0.5, batch_first=True), 2),
    ],
    ids=["attention", "cross attention", "encoder layer", "decoder layer"],
)
def test_dropout_follows_the_mode(make: Any, count: int) -> None:
    module, call = make(), Call(tuple([sequence(TARGET)] * count))
    prepared: Any = prepare(module, method="qat", example_inputs=call)

    def output(training: bool) -> torch.Tensor:
        found = run_graph(prepared.train(training), call)
        return found[0] if isinstance(found, tuple) else found

    output(False)
    set_observing(prepared, activations=False, weights=False)
    assert not torch.equal(output(True), output(True))
    assert torch.equal(output(False), output(False))
    expected = module.eval()(*call.args)
    assert decibels(expected[0] if isinstance(expected, tuple) else expected, output(False)) > 20


@pytest.mark.parametrize("kind", ["self", "cross", "kdim and vdim"])
def test_every_parameter_of_attention_is_trained(kind: str) -> None:
    module = attention(**widths_of(kind))
    call = Call(inputs(kind))
    prepared: Any = prepare(module, method="qat", example_inputs=call)
    run_graph(prepared, call)[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
        assert name.endswith("bias") or bool(parameter.grad.any()), name
    if kind != "kdim and vdim":  # all three parts of the one matrix
        assert all(part.any() for part in module.in_proj_weight.grad.chunk(3))


# ---- transformers of torch.nn

CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
PADDED = torch.arange(6).repeat(4, 1) >= torch.tensor([[6], [4], [6], [3]])
PADDED_MEMORY = torch.arange(9).repeat(4, 1) >= torch.tensor([[9], [9], [6], [8]])
#: torch's remark on nested tensors, which nobody asked for.
NESTED = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


def x() -> torch.Tensor:
    return torch.randn(4, 6, 16)


def memory() -> torch.Tensor:
    return torch.randn(4, 9, 16)


def encoder(norm_first: bool) -> nn.Module:
    layer = encoder_layer(norm_first=norm_first)
    return randomised(nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False))


def decoder(norm_first: bool) -> nn.Module:
    return randomised(nn.TransformerDecoder(decoder_layer(norm_first=norm_first), 2, norm=nn.LayerNorm(16)))


def transformer(norm_first: bool, *, batch_first: bool = True) -> nn.Module:
    return randomised(nn.Transformer(16, 4, 1, 2, 32, batch_first=batch_first, norm_first=norm_first))


#: name -> module, given norm_first; its call; how many layers run in int8
ENCODERS: dict[str, tuple[Any, Any, int]] = {
    "layer": (lambda first: encoder_layer(norm_first=first), lambda: Call((x(),)), 4),
    "layer with gelu": (lambda first: encoder_layer(norm_first=first, activation="gelu"), lambda: Call((x(),)), 4),
    "layer without bias": (lambda first: encoder_layer(norm_first=first, bias=False), lambda: Call((x(),)), 4),
    "sequence first": (lambda first: encoder_layer(norm_first=first, batch_first=False), lambda: Call((x(),)), 4),
    "causal layer": (
        lambda first: encoder_layer(norm_first=first),
        lambda: Call((x(),), {"src_mask": CAUSAL, "is_causal": True}),
        4,
    ),
    "masked layer": (
        lambda first: encoder_layer(norm_first=first),
        lambda: Call((x(),), {"src_mask": CAUSAL, "src_key_padding_mask": torch.where(PADDED, float("-inf"), 0.0)}),
        4,
    ),
    "encoder": (encoder, lambda: Call((x(),)), 8),
    "masked encoder": (encoder, lambda: Call((x(),), {"mask": CAUSAL > 0, "src_key_padding_mask": PADDED}), 8),
    "causal encoder": (encoder, lambda: Call((x(),), {"mask": CAUSAL, "is_causal": True}), 8),
}
DECODERS: dict[str, tuple[Any, Any, int]] = {
    "decoder layer": (lambda first: decoder_layer(norm_first=first), lambda: Call((x(), memory())), 8),
    "decoder layer without bias": (
        lambda first: decoder_layer(norm_first=first, bias=False),
        lambda: Call((x(), memory())),
        8,
    ),
    "masked decoder layer": (
        lambda first: decoder_layer(norm_first=first),
        lambda: Call((x(), memory()), {"tgt_mask": CAUSAL, "memory_mask": torch.randn(6, 9)}),
        8,
    ),
    "decoder": (
        decoder,
        lambda: Call(
            (x(), memory()),
            {"tgt_mask": CAUSAL < 0, "tgt_key_padding_mask": PADDED, "memory_key_padding_mask": PADDED_MEMORY},
        ),
        16,
    ),
    "transformer": (transformer, lambda: Call((memory(), x()), {"tgt_mask": CAUSAL, "tgt_is_causal": True}), 20),
    "sequence first transformer": (
        lambda first: transformer(first, batch_first=False),
        lambda: Call(
            (memory().transpose(0, 1), x().transpose(0, 1)),
            {"src_key_padding_mask": PADDED_MEMORY, "memory_key_padding_mask": PADDED_MEMORY},
        ),
        20,
    ),
}
TRANSFORMERS = {**ENCODERS, **DECODERS}
NORM_FIRST = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])


@NESTED
@NORM_FIRST
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_a_transformer_for_inference(name: str, norm_first: bool) -> None:
    make, call, _ = TRANSFORMERS[name]
    assert_traced(make(norm_first), call())


@NESTED
@NORM_FIRST
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_for_training(name: str, norm_first: bool) -> None:
    make, call, _ = TRANSFORMERS[name]
    assert_traced(make(norm_first), call(), training=True)


@NESTED
@METHODS
@pytest.mark.parametrize(
    ("name", "norm_first"),
    [
        ("layer", True),
        ("masked layer", False),
        ("masked encoder", True),
        ("decoder layer", True),
        ("masked decoder layer", False),
        ("decoder", True),
        ("transformer", False),
    ],
)
def test_projections_of_transformers_are_int8(name: str, norm_first: bool, method: Method) -> None:
    make, call, layers = TRANSFORMERS[name]
    assert_int8(make(norm_first), call(), method, layers)


def test_the_graph_does_not_keep_the_fused_path_of_torch_from_the_user() -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(given := x())
        trace(copy.deepcopy(model), Call((given,)))
        prepare(model, method="static", example_inputs=given)
        assert torch.equal(model(given), expected)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- torchvision's shifted windows


def window_attention(name: str, **options: Any) -> nn.Module:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    kind = getattr(swin, name)
    module = kind(8, **{"window_size": [4, 4], "shift_size": [2, 2], "num_heads": 2, **options})
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "bias" in key:
                parameter.copy_(torch.randn(parameter.shape))
    return module.eval()


VERSIONS = pytest.mark.parametrize("version", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])


@pytest.mark.torchvision
@VERSIONS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("window", "shift", "size"),
    [
        ([4, 4], [0, 0], (8, 8)),
        ([4, 4], [2, 2], (8, 8)),
        ([4, 4], [0, 0], (5, 6)),
        ([4, 4], [2, 2], (7, 9)),
        ([7, 7], [3, 3], (7, 7)),
        ([7, 7], [3, 3], (5, 14)),
        ([4, 2], [2, 1], (6, 6)),
        ([4, 2], [1, 1], (12, 3)),
    ],
)
def test_window_attention(version: str, bias: bool, window: list[int], shift: list[int], size: tuple[int, int]) -> None:
    """Padded where windows do not fit, and not shifted where one window holds all."""
    module = window_attention(version, window_size=window, shift_size=shift, qkv_bias=bias, proj_bias=bias)
    assert_traced(module, Call((torch.randn(2, *size, 8),)))


@pytest.mark.torchvision
@VERSIONS
def test_window_attention_in_other_sizes_than_it_was_traced_with(version: str) -> None:
    module = window_attention(version)
    traced = trace(module, Call((torch.randn(1, 8, 8, 8),)))
    for size in ((3, 8, 8), (2, 7, 9), (1, 3, 4)):
        x = torch.randn(*size, 8)
        torch.testing.assert_close(traced.graph_module(x), module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.torchvision
@METHODS
@VERSIONS
def test_projections_of_window_attention_are_int8(version: str, method: Method) -> None:
    """Two of the attention; the second version computes its position bias with two more."""
    module = window_attention(version, dropout=0.3, attention_dropout=0.3)
    call = Call((torch.randn(2, 7, 9, 8),))
    assert_int8(module, call, method, 4 if version.endswith("V2") else 2)


@pytest.mark.torchvision
@VERSIONS
def test_dropout_in_window_attention_drops_what_torchvision_drops(version: str) -> None:
    module, call = window_attention(version, attention_dropout=0.5), Call((torch.randn(2, 7, 9, 8),))
    traced = trace(module, call, training=True)
    for training in (True, False):
        outputs = []
        for run in (module.train(training), traced.graph_module.train(training)):
            torch.manual_seed(3)
            outputs.append(run(*call.args))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.torchvision
@VERSIONS
def test_dropout_behind_window_attention_follows_the_mode(version: str) -> None:
    """torchvision drops before it takes the padding away, so that it draws more numbers."""
    module, call = window_attention(version, dropout=0.5), Call((torch.randn(4, 7, 9, 8),))
    graph = trace(module, call, training=True).graph_module
    zeros = (graph.train()(*call.args) == 0).float().mean()
    assert 0.4 < float(zeros) < 0.6  # of 2016 draws: five standard deviations are 0.06
    torch.testing.assert_close(graph.eval()(*call.args), module.eval()(*call.args), rtol=1e-5, atol=1e-6)


# ---- timm's batch norm with an activation


def convolutions(**options: Any) -> nn.Sequential:
    layers = pytest.importorskip("timm.layers", reason="pip install 'lightning-quant[zoo]'")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8, **options), nn.Conv2d(8, 4, 3))
    randomised(model)
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(16, 3, 9, 9))
    return model.eval()


ACTIVATIONS = pytest.mark.parametrize(
    "options",
    [{}, {"act_layer": nn.SiLU}, {"apply_act": False}, {"act_layer": nn.ReLU, "inplace": False}],
    ids=["relu", "silu", "none", "not in place"],
)


@pytest.mark.torchvision
@METHODS
@ACTIVATIONS
def test_a_batch_norm_with_an_activation_is_folded(options: Any, method: Method) -> None:
    model, x = convolutions(**options), torch.randn(8, 3, 9, 9)
    expected = model(x)
    prepared, int8 = quantized(model, Call((x,)), method)
    assert decibels(expected, int8(x)) > 25
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in int8.modules())
    assert not any("norm" in str(node.target) for node in int8.graph.nodes)
    assert info(prepared).fused[0].members[:2] == ("0", "1.norm")
    assert coverage(int8, x).share == 1.0
    if options == {}:
        assert "ConvReLU2d" in type(getattr(int8, "0")).__name__


@pytest.mark.torchvision
@METHODS
def test_the_users_batch_norm_has_no_child_afterwards(method: Method) -> None:
    model, x = convolutions(), torch.randn(8, 3, 9, 9)
    names, keys = [name for name, _ in model.named_modules()], list(model.state_dict())
    traced = trace(model, Call((x,)), training=method == "qat")
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    assert "1.norm" not in traced.replaced
    assert "1" in traced.replaced
    assert traced.origins["1.norm"] == "1"
    prepare(model, method=method, example_inputs=x)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.torchvision
def test_a_trace_that_fails_leaves_no_child_either() -> None:
    class Refusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = convolutions()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return y if y.sum() > 0 else -y

    model = Refusing()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(Exception, match="cannot be traced as one graph"):
        trace(model, Call((torch.randn(2, 3, 9, 9),)))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.torchvision
def test_a_batch_norm_with_an_activation_is_trained() -> None:
    model, x = convolutions(), torch.randn(8, 3, 9, 9)
    prepared: Any = prepare(model, method="qat", example_inputs=x)
    before = model[1].running_mean.clone()
    link(prepared, model)
    prepared.train()(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    assert not torch.equal(model[1].running_mean, before)  # it is the one that the graph moves
