"""Modules of libraries written out, so that a trace sees the layers in them.

``nn.MultiheadAttention`` hides four linear layers in one operator, which no int8 kernel takes. :func:`written_out`
gives the same computation in which they are calls of ``F.linear`` that a trace sees. Scores and softmax stay float.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightning_quant.backends import recurrent
from lightning_quant.backends.swin import shifted_window_attention


def written_out(module: nn.Module) -> Callable[..., Any] | None:
    """A function to trace in the place of ``module.forward``, or None if it is to stay as it is."""
    if type(module) is nn.MultiheadAttention:
        plain = module.bias_k is None and module.bias_v is None and not module.add_zero_attn
        return _attention if plain else None
    kind = type(module)
    if (kind.__module__, kind.__name__) in _OF_LIBRARIES:
        return _OF_LIBRARIES[kind.__module__, kind.__name__]
    return _FORWARDS.get(kind)


def _batch_norm_and_activation(self: Any, x: Any) -> Any:
    """``forward`` of timm's ``BatchNormAct2d``: a batch norm that fuses with the convolution before it, and the rest.

    ``norm`` is put there by :func:`expose_batch_norms`.
    """
    return self.act(self.drop(self.norm(x)))


#: By module and name of the class, so that nothing has to be imported.
_OF_LIBRARIES: dict[tuple[str, str], Callable[..., Any]] = {
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"): shifted_window_attention,
    ("torchvision.models.swin_transformer", "ShiftedWindowAttentionV2"): shifted_window_attention,
    ("timm.layers.norm_act", "BatchNormAct2d"): _batch_norm_and_activation,
    **recurrent.OF_LIBRARIES,
}


@contextlib.contextmanager
def expose_batch_norms(root: nn.Module) -> Iterator[dict[str, str]]:
    """Give each batch norm with an activation inside a child ``norm``, which is the batch norm alone.

    Yields:
        Name of the child -> name of the module whose Parameters and buffers it has.
    """
    exposed: dict[str, str] = {}
    for name, module in list(root.named_modules()):
        if written_out(module) is not _batch_norm_and_activation or "norm" in module._modules:
            continue
        owner: Any = module
        with torch.device("meta"):
            norm = nn.BatchNorm2d(
                owner.num_features, owner.eps, owner.momentum, owner.affine, owner.track_running_stats
            )
        norm._parameters, norm._buffers = dict(owner._parameters), dict(owner._buffers)
        norm.train(owner.training)
        owner.add_module("norm", norm)
        exposed[f"{name}.norm" if name else "norm"] = name
    try:
        yield exposed
    finally:
        for name in exposed.values():
            del root.get_submodule(name)._modules["norm"]


def is_written_out(module: nn.Module) -> bool:
    """Whether a trace goes into ``module`` although it is of ``torch.nn``."""
    return written_out(module) is not None


def _attention(
    self: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """``nn.MultiheadAttention.forward``."""
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    width = self.embed_dim
    bias = self.in_proj_bias
    if self._qkv_same_embed_dim and query is key and key is value:
        q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
    else:
        weights = (
            (self.in_proj_weight[:width], self.in_proj_weight[width : 2 * width], self.in_proj_weight[2 * width :])
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None,) * 3 if bias is None else (bias[:width], bias[width : 2 * width], bias[2 * width :])
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    mixed, scores = attend(
        q, k, v, self.num_heads, attn_mask, key_padding_mask, self.dropout, self.training,
        need_weights, average_attn_weights, self.batch_first,
    )  # fmt: skip
    return F.linear(mixed, self.out_proj.weight, self.out_proj.bias), scores if need_weights else None


@torch.fx.wrap
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    dropout: float,
    training: bool,
    need_weights: bool,
    average: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot-product attention of several heads, between the projections.

    Args:
        q: ``(batch, target, width)``, ``(target, batch, width)`` unless ``batch_first``, or ``(target, width)``.
        k: As ``q``, with the length of the source.
        v: As ``k``.
        heads: Divides ``width``.
        attn_mask: ``(target, source)`` or ``(batch * heads, target, source)``; True, or minus infinity, is not seen.
        key_padding_mask: ``(batch, source)`` or ``(source,)``.
        dropout: Share of the weights that are dropped in training.
        training: Whether they are.
        need_weights: Give the attention weights as well.
        average: Their mean over the heads.
        batch_first: The layout of the inputs.

    Returns:
        What the heads see, in the layout of ``q``, and the weights: ``(batch, target, source)``, with the heads as
        second dimension unless ``average``.
    """
    single = q.dim() == 2
    if single:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    batch, target, width = q.shape
    source = k.shape[1]
    q, k, v = (x.reshape(batch, -1, heads, x.shape[-1] // heads).transpose(1, 2) for x in (q, k, v))
    mask = _additive(attn_mask, q.dtype)
    if mask is not None and mask.dim() == 3:
        mask = mask.reshape(-1, heads, target, source)
    padding = _additive(key_padding_mask, q.dtype)
    if padding is not None:
        padding = padding.reshape(batch, 1, 1, source)
        mask = padding if mask is None else mask + padding
    if not need_weights:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout if training else 0.0)
        weights = None
    else:
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout, training)
        mixed = weights @ v
        weights = weights.mean(dim=1) if average else weights
        weights = weights.squeeze(0) if single else weights
    mixed = mixed.transpose(1, 2).reshape(batch, target, width)
    if single:
        return mixed.squeeze(0), weights
    return mixed if batch_first else mixed.transpose(0, 1), weights


@torch.fx.wrap
def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask that is added to the scores: minus infinity where a boolean one is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _encoder_layer(
    self: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    """``nn.TransformerEncoderLayer.forward`` without its fused path."""
    mask, padding = _additive(src_mask, torch.float32), _additive(src_key_padding_mask, torch.float32)
    if self.norm_first:
        x = src + self._sa_block(self.norm1(src), mask, padding, is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + self._sa_block(src, mask, padding, is_causal=is_causal))
    return self.norm2(x + self._ff_block(x))


def _decoder_layer(
    self: Any,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool = False,
    memory_is_causal: bool = False,
) -> Any:
    """``nn.TransformerDecoderLayer.forward``."""
    own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
    other = (memory_mask, memory_key_padding_mask, memory_is_causal)
    if self.norm_first:
        x = tgt + self._sa_block(self.norm1(tgt), *own)
        x = x + self._mha_block(self.norm2(x), memory, *other)
        return x + self._ff_block(self.norm3(x))
    x = self.norm1(tgt + self._sa_block(tgt, *own))
    x = self.norm2(x + self._mha_block(x, memory, *other))
    return self.norm3(x + self._ff_block(x))


def _encoder(
    self: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
) -> Any:
    """``nn.TransformerEncoder.forward`` without its nested tensors. A causal mask is a mask as any other."""
    for layer in self.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return src if self.norm is None else self.norm(src)


def _decoder(
    self: Any,
    tgt: Any,
    memory: Any,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Any:
    """``nn.TransformerDecoder.forward``."""
    for layer in self.layers:
        tgt = layer(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )
    return tgt if self.norm is None else self.norm(tgt)


def _transformer(
    self: Any,
    src: Any,
    tgt: Any,
    src_mask: Any = None,
    tgt_mask: Any = None,
    memory_mask: Any = None,
    src_key_padding_mask: Any = None,
    tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None,
    src_is_causal: bool | None = None,
    tgt_is_causal: bool | None = None,
    memory_is_causal: bool = False,
) -> Any:
    """``nn.Transformer.forward`` without its checks of shapes."""
    memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
    return self.decoder(
        tgt,
        memory,
        tgt_mask=tgt_mask,
        memory_mask=memory_mask,
        tgt_key_padding_mask=tgt_key_padding_mask,
        memory_key_padding_mask=memory_key_padding_mask,
    )


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerDecoderLayer: _decoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _transformer,
}
