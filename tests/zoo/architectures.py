"""The zoo: architectures with random weights, each with the input that it is tried on.

An entry is data. ``FLOORS`` says what is asked of all; an entry that cannot hold a floor for a reason of its
architecture carries a lower one and the reason, and both are printed in docs/zoo.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tasks import DIGITS, MASKS, NEXT_LETTERS, PLACES, TEXTS, WAVES, Task
from torch import nn

#: Output SQNR in dB, and share of the multiply-accumulates of layers with weights.
MIN_SQNR_DB = 15.0
MIN_COVERAGE = 0.95


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        name: Unique; as its library names it.
        library: torchvision, timm or transformers.
        family: Networks that are built alike; the training test takes one of each.
        build: Gives the module with random weights.
        inputs: ``inputs(batch)`` gives the positional or keyword arguments of one call.
        task: What it is trained on.
        fast: In the subset that every run of the tests takes.
        min_sqnr_db: The floor.
        min_coverage: The floor.
        reason: Why a floor is lower than the zoo's.
        without: Format -> why there is no file of it. The export has to say so.
    """

    name: str
    library: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    task: Task = DIGITS
    fast: bool = False
    min_sqnr_db: float = MIN_SQNR_DB
    min_coverage: float = MIN_COVERAGE
    reason: str = ""
    without: Mapping[str, str] = field(default_factory=dict)


#: Two runtimes that round one value in a million otherwise differ by more than a file may.
AMPLIFIES = "no files: random weights amplify what runtimes round otherwise"
_WITHOUT: dict[str, dict[str, str]] = {
    "edgenext_xx_small": {"openvino": "OpenVINO cannot compile it"},
    "efficientnet_lite0": dict.fromkeys(("onnx", "openvino"), AMPLIFIES),
    "tf_efficientnet_lite0": {"openvino": AMPLIFIES},
    "selecsls42b": dict.fromkeys(("onnx", "openvino"), AMPLIFIES),
}


def _images(size: int, channels: int = 3) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda batch: (torch.randn(batch, channels, size, size),)


def _torchvision(name: str, family: str, size: int = 96, *, fast: bool = False, **options: Any) -> Architecture:
    def build() -> nn.Module:
        from torchvision import models

        settings = {"weights": None, **options}
        if name in ("googlenet", "inception_v3"):
            settings.update(init_weights=True, aux_logits=False)  # saying so silences a warning
        return models.get_model(name, **settings)

    task = MASKS if family == "segmentation" else DIGITS
    without = _WITHOUT.get(name, {})
    return Architecture(name, "torchvision", family, build, _images(size), task, fast, without=without)


def _detection_backbone(name: str, family: str) -> Architecture:
    def build() -> nn.Module:
        from torchvision.models.detection import backbone_utils

        if name.startswith("mobilenet"):
            return backbone_utils.mobilenet_backbone(
                backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=nn.BatchNorm2d
            )
        return backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
        )

    return Architecture(name, "torchvision", family, build, _images(96), PLACES)


def _video(name: str) -> Architecture:
    def build() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None)

    return Architecture(name, "torchvision", "video", build, lambda batch: (torch.randn(batch, 3, 8, 48, 48),))


#: Lower floors: SQNR, coverage, and why.
_LOWER: dict[str, tuple[float, float, str]] = {
    "dla34": (14.0, MIN_COVERAGE, "random weights amplify: 1e-6 of the input moves the int8 output by 28 dB"),
    "selecsls42b": (14.0, MIN_COVERAGE, "random weights amplify: 1e-6 of the input moves the int8 output by 29 dB"),
    "resnetv2_50x1_bit": (
        6.0,
        MIN_COVERAGE,
        "random weights amplify: 1e-6 of the input moves the int8 output by 19 dB (50 layers, no batch norm)",
    ),
}


def _timm(name: str, family: str, size: int = 96, *, fast: bool = False, **options: Any) -> Architecture:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, **options)
        return model

    low, without = _LOWER.get(name, ()), _WITHOUT.get(name, {})
    return Architecture(name, "timm", family, build, _images(size), DIGITS, fast, *low, without=without)


def _tokens(batch: int, length: int = 24, vocabulary: int = 200) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(0, vocabulary, (batch, length)), "attention_mask": mask}


_SMALL = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}


def _transformers(
    name: str,
    family: str,
    task: Task,
    model: str,
    config: str,
    inputs: Callable[[int], Any],
    *,
    fast: bool = False,
    **options: Any,
) -> Architecture:
    def build() -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**options)
        built: nn.Module = getattr(transformers, model)(settings)
        return built

    return Architecture(name, "transformers", family, build, inputs, task, fast, without=_WITHOUT.get(name, {}))


ARCHITECTURES: tuple[Architecture, ...] = (
    _torchvision("alexnet", "plain"),
    _torchvision("vgg11_bn", "plain", 64),
    _torchvision("squeezenet1_1", "squeezenet"),
    _torchvision("resnet18", "resnet", fast=True),
    _torchvision("resnet50", "resnet"),
    _torchvision("resnext50_32x4d", "resnet"),
    _torchvision("wide_resnet50_2", "resnet", 64),
    _torchvision("densenet121", "densenet", 64),
    _torchvision("googlenet", "inception"),
    _torchvision("inception_v3", "inception", 128),
    _torchvision("mobilenet_v2", "mobilenet", fast=True),
    _torchvision("mobilenet_v3_small", "mobilenet", fast=True),
    _torchvision("mobilenet_v3_large", "mobilenet"),
    _torchvision("mnasnet1_0", "mobilenet"),
    _torchvision("shufflenet_v2_x1_0", "shufflenet"),
    _torchvision("efficientnet_b0", "efficientnet"),
    _torchvision("efficientnet_v2_s", "efficientnet"),
    _torchvision("regnet_x_400mf", "regnet"),
    _torchvision("regnet_y_400mf", "regnet"),
    _torchvision("convnext_tiny", "convnext"),
    _torchvision("vit_b_32", "vit", 96, image_size=96),
    _torchvision("swin_t", "swin"),
    _torchvision("swin_v2_t", "swin", 256),
    _torchvision("maxvit_t", "maxvit", 224),
    _torchvision("fcn_resnet50", "segmentation", 64, weights_backbone=None),
    _torchvision("deeplabv3_mobilenet_v3_large", "segmentation", 96, weights_backbone=None),
    _torchvision("lraspp_mobilenet_v3_large", "segmentation", 96, weights_backbone=None),
    _detection_backbone("resnet18_fpn", "detection"),
    _detection_backbone("mobilenet_v3_large_fpn", "detection"),
    _video("r3d_18"),
    _timm("efficientnet_lite0", "efficientnet", fast=True),
    _timm("tf_efficientnet_lite0", "same padding"),
    _timm("tf_efficientnetv2_b0", "same padding"),
    _timm("mobilenetv4_conv_small", "mobilenet"),
    _timm("mobileone_s0", "reparameterized"),
    _timm("fastvit_t8", "reparameterized", 128),
    _timm("repvgg_a0", "reparameterized"),
    _timm("rexnet_100", "rexnet"),
    _timm("ghostnet_100", "ghostnet"),
    _timm("lcnet_050", "mobilenet"),
    _timm("tinynet_e", "mobilenet"),
    _timm("hardcorenas_a", "mobilenet"),
    _timm("res2net50_26w_4s", "res2net"),
    _timm("resnest14d", "resnest"),
    _timm("dla34", "dla"),
    _timm("hrnet_w18_small", "hrnet"),
    _timm("cspresnet50", "csp"),
    _timm("ese_vovnet19b_dw", "vovnet"),
    _timm("selecsls42b", "selecsls"),
    _timm("dpn48b", "dpn"),
    _timm("skresnet18", "attention cnn"),
    _timm("nf_resnet26", "weight standardised"),
    _timm("nfnet_l0", "weight standardised"),
    _timm("resnetv2_50x1_bit", "weight standardised", 64),
    _timm("convnextv2_atto", "convnext"),
    _timm("edgenext_xx_small", "hybrid", 128),
    _timm("mobilevit_xxs", "hybrid", 128),
    _timm("mobilevitv2_050", "hybrid", 128),
    _timm("levit_128s", "hybrid", 224),
    _timm("efficientformer_l1", "hybrid", 224),
    _timm("coatnet_nano_rw_224", "hybrid", 224),
    _timm("vit_tiny_patch16_224", "vit", 96, img_size=96, fast=True),
    _timm("deit_tiny_distilled_patch16_224", "vit", 96, img_size=96),
    _timm("cait_xxs24_224", "vit", 96, img_size=96),
    _timm("swin_tiny_patch4_window7_224", "swin", 224),
    _timm("pvt_v2_b0", "pvt"),
    _timm("poolformer_s12", "metaformer"),
    _timm("xcit_nano_12_p16_224", "vit", 96, img_size=96),
    _timm("mixer_s32_224", "mixer", 224),
    _timm("resmlp_12_224", "mixer", 224),
    _timm("gmlp_s16_224", "mixer", 224),
    _transformers(
        "bert",
        "transformer",
        TEXTS,
        "BertForSequenceClassification",
        "BertConfig",
        lambda b: _tokens(b),
        **_SMALL,
        fast=True,
    ),
    _transformers(
        "distilbert",
        "transformer",
        TEXTS,
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        lambda b: _tokens(b),
        vocab_size=200,
        dim=64,
        n_layers=3,
        n_heads=4,
        hidden_dim=256,
    ),
    _transformers(
        "vit",
        "vit",
        DIGITS,
        "ViTForImageClassification",
        "ViTConfig",
        _images(64),
        image_size=64,
        patch_size=8,
        **{k: v for k, v in _SMALL.items() if k != "vocab_size"},
    ),
    _transformers(
        "wav2vec2",
        "speech",
        WAVES,
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        lambda b: (torch.randn(b, 4000),),
        **{**_SMALL, "vocab_size": 32},
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    _transformers(
        "gpt2",
        "language model",
        NEXT_LETTERS,
        "GPT2LMHeadModel",
        "GPT2Config",
        lambda b: {**_tokens(b), "use_cache": False},
        vocab_size=200,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=64,
    ),
    _transformers(
        "llama",
        "language model",
        NEXT_LETTERS,
        "LlamaForCausalLM",
        "LlamaConfig",
        lambda b: {**_tokens(b), "use_cache": False},
        **_SMALL,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    _transformers(
        "t5_encoder",
        "transformer",
        TEXTS,
        "T5EncoderModel",
        "T5Config",
        lambda b: _tokens(b),
        vocab_size=200,
        d_model=64,
        d_kv=16,
        d_ff=256,
        num_layers=3,
        num_heads=4,
    ),
)


#: Trained in the place of the first of its family, which takes 9 GB.
_LIGHTER = ("vit_tiny_patch16_224",)

#: One architecture of each family: what is trained.
FAMILIES: dict[str, Architecture] = {
    family: min((e for e in ARCHITECTURES if e.family == family), key=lambda e: e.name not in _LIGHTER)
    for family in dict.fromkeys(entry.family for entry in ARCHITECTURES)
}


def by_name(name: str) -> Architecture:
    """The entry with this name.

    Raises:
        KeyError: There is none.
    """
    return next(entry for entry in ARCHITECTURES if entry.name == name) if name in names() else _missing(name)


def names() -> tuple[str, ...]:
    """All names, in the order of the table."""
    return tuple(entry.name for entry in ARCHITECTURES)


def _missing(name: str) -> Architecture:
    raise KeyError(f"{name}: not in the zoo, which has {', '.join(names())}")
