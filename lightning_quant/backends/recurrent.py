"""Subclasses of recurrent layers: what their forward adds is traced, and the layer inside is a layer as any other.

A class derived from ``nn.LSTM`` reaches the computation of its base by ``super().forward(...)``. While it is traced its
class is one whose next base after its own classes is ours, so that this call is that of a child: a plain ``nn.LSTM``
with the same Parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_quant.qconfig import RNNS

#: The child that computes what ``super().forward`` did.
CHILD = "recurrent"


def _call_child(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.recurrent(*args, **kwargs)


#: Stands in the order of bases between the user's classes and torch's.
_BETWEEN: dict[type[nn.Module], type] = {kind: type(kind.__name__, (kind,), {"forward": _call_child}) for kind in RNNS}


def _plain(layer: Any, kind: Any) -> nn.Module:
    """A module of torch's own class with the Parameters of ``layer``."""
    names = ["input_size", "hidden_size", "bias"]
    if issubclass(kind, nn.RNNBase):
        names += ["num_layers", "batch_first", "dropout", "bidirectional", *(["proj_size"] if kind is nn.LSTM else [])]
    elif kind is nn.RNNCell:
        names += ["nonlinearity"]
    with torch.device("meta"):
        plain = kind(**{name: getattr(layer, name) for name in names})
    for name in plain._parameters:
        plain._parameters[name] = layer._parameters[name]
    if isinstance(plain, nn.RNNBase):
        flat: Any = plain
        flat._flat_weights = [layer._parameters[name] for name in flat._flat_weights_names]
    plain.train(layer.training)
    return plain


@contextlib.contextmanager
def expose_recurrent(root: nn.Module) -> Iterator[dict[str, str]]:
    """Give each instance of a class derived from a recurrent layer a child :data:`CHILD`, the layer inside of it.

    Yields:
        Name of the child -> name of the module whose Parameters it has.
    """
    exposed: dict[str, str] = {}
    classes: list[tuple[Any, type]] = []
    for name, module in list(root.named_modules()):
        kind = next((kind for kind in RNNS if isinstance(module, kind)), None)
        if kind is None or type(module) is kind or type(module).__module__.startswith("torch."):
            continue
        if parametrize.is_parametrized(module) or CHILD in module._modules or hasattr(module, CHILD):
            continue
        own = type(module)
        try:
            plain = _plain(module, kind)
            between = type(own.__name__, (own, _BETWEEN[kind]), {"__module__": own.__module__})
            module.__class__ = between
        except (
            AttributeError,
            KeyError,
            TypeError,
        ):  # it has not what its base has, or its class cannot be derived from
            continue
        module.add_module(CHILD, plain)
        classes.append((module, own))
        exposed[f"{name}.{CHILD}" if name else CHILD] = name
    try:
        yield exposed
    finally:
        for module, own in classes:
            del module._modules[CHILD]
            module.__class__ = own


# ---- of libraries


def with_lengths(self: Any, x: Any, hx: Any = None, lengths: Any = None, enforce_sorted: bool = True) -> Any:
    """``forward`` of ``LSTM`` and ``GRU`` of pytorch-forecasting without its branches on the data.

    Sequences may have no step: their state is then the initial one.
    """
    if lengths is None:
        return self.recurrent(x, hx)
    rows = 0 if self.batch_first else 1
    # torch sorts as well, but for a number of sequences that a traced file would keep
    order = torch.argsort(lengths, descending=True, stable=True)
    back = torch.argsort(order)
    pair = isinstance(self, nn.LSTM)
    if hx is None:
        # given, because a traced file would keep the number of sequences in the zeros that torch's int8 layers make
        layers = self.num_layers * (2 if self.bidirectional else 1)
        zeros = zero_state(x, rows, layers, getattr(self, "proj_size", 0) or self.hidden_size)
        hx = (zeros, zero_state(x, rows, layers, self.hidden_size)) if pair else zeros
    initial = (hx[0].index_select(1, order), hx[1].index_select(1, order)) if pair else hx.index_select(1, order)
    packed, state = self.recurrent(pack(x.index_select(rows, order), lengths[order], self.batch_first), initial)
    state = (state[0].index_select(1, back), state[1].index_select(1, back)) if pair else state.index_select(1, back)
    state = self.handle_no_encoding(state, (lengths == 0)[None, :, None], hx)
    return unpack(packed, x, lengths, self.batch_first).index_select(rows, back), state


@torch.fx.wrap
def zero_state(x: torch.Tensor, rows: int, layers: int, width: int) -> torch.Tensor:
    """Zeros ``(layers, batch, width)`` for sequences ``x``, of which dimension ``rows`` is the batch."""
    return x.new_zeros(layers, x.shape[rows], width)


@torch.fx.wrap
def pack(x: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> PackedSequence:
    """Sorted sequences ``(batch, length, width)`` (or the first two exchanged), of one step where there is none."""
    return pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first)


@torch.fx.wrap
def unpack(packed: PackedSequence, x: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> torch.Tensor:
    """What :func:`pack` took apart; zeros of the length of ``x`` where no sequence has a step."""
    if not torch.jit.is_tracing() and not bool((lengths > 0).any()):
        return x.new_zeros(*x.shape[:2], packed.data.shape[-1])
    return pad_packed_sequence(packed, batch_first)[0]


#: By module and name of the class, so that nothing has to be imported.
OF_LIBRARIES: dict[tuple[str, str], Callable[..., Any]] = {
    ("pytorch_forecasting.models.nn.rnn", "LSTM"): with_lengths,
    ("pytorch_forecasting.models.nn.rnn", "GRU"): with_lengths,
}
