"""Tables of embeddings in 8 bits: a row is read from the table and taken to float.

There are no multiply-accumulates to save, but tables are often most of the bytes of a model. Each row has a scale and
a zero point of its own, ``row ~ (q - zero_point) * scale`` with a zero point that is a float, so that the ends of the
row's range are exact, and so is a row of zeros. They depend on nothing but the row: there is nothing to observe, and in
training only the rows that a batch reads are rounded, so that sparse gradients stay sparse.

This does not go through torch.ao's own path, which rounds the whole table at every step, and gives a row whose values
span less than 3e-5 a step of 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from lightning_quant._torch_ao import quantized_modules, quiet
from lightning_quant.qconfig import EMBEDDINGS

_LARGEST = 255


@dataclass(frozen=True)
class Reading:
    """What an embedding does with the rows that it reads: the arguments of ``nn.Embedding`` and ``nn.EmbeddingBag``."""

    width: int
    is_bag: bool
    mode: str
    padding_idx: int | None
    include_last_offset: bool
    scale_grad_by_freq: bool
    sparse: bool


def _reading_of(layer: Any) -> Reading:
    bag = isinstance(layer, nn.EmbeddingBag)
    return Reading(
        layer.embedding_dim, bag, layer.mode if bag else "", layer.padding_idx, bag and layer.include_last_offset,
        layer.scale_grad_by_freq, layer.sparse,
    )  # fmt: skip


def row_qparams(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, float32 ``(..., 1)``, of rows ``(..., width)``: from 0 for the least value to 255."""
    low, high = torch.aminmax(rows.detach().float(), dim=-1, keepdim=True)
    scale = (high - low) / _LARGEST
    # where all values of a row are equal q is 0, and the zero point holds the value
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    return scale, -low / scale


def quantized(rows: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The integers of rows ``(..., width)`` as uint8, rounded as ``torch.quantize_per_channel`` does."""
    return torch.clamp(torch.round(rows.detach().float() / scale + zero_point), 0, _LARGEST).to(torch.uint8)


def fake_quantized(rows: torch.Tensor) -> torch.Tensor:
    """Rows ``(..., width)`` as they will be read from the int8 table. The gradient passes through unchanged."""
    if not rows.numel():
        return rows
    scale, zero_point = row_qparams(rows)
    read = (quantized(rows, scale, zero_point).float() - zero_point) * scale
    return rows + (read.to(rows.dtype) - rows).detach()


def _read(
    reading: Reading,
    rows_of: Callable[[torch.Tensor], torch.Tensor],
    indices: torch.Tensor,
    offsets: torch.Tensor | None,
    per_sample_weights: torch.Tensor | None,
) -> torch.Tensor:
    """What the float layer gives, where ``rows_of`` gives the rows ``(n, width)`` of indices ``(n,)``."""
    flat = indices.reshape(-1)
    rows = rows_of(flat)
    if not reading.is_bag:
        return rows.reshape(*indices.shape, reading.width)
    if reading.padding_idx is not None:
        rows = rows * (flat != reading.padding_idx).unsqueeze(1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    sums = _sums(reading, rows, indices, offsets)
    return sums / _counts(reading, indices, offsets, rows.dtype) if reading.mode == "mean" else sums


def _sums(reading: Reading, rows: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """The sums ``(bags, width)`` of rows ``(n, width)``."""
    if offsets is None:
        return rows.reshape(*indices.shape, rows.shape[-1]).sum(1)
    places = torch.arange(indices.shape[0], device=offsets.device, dtype=offsets.dtype)
    sums: torch.Tensor = F.embedding_bag(
        places, rows, offsets, mode="sum", include_last_offset=reading.include_last_offset
    )
    return sums


def _counts(reading: Reading, indices: torch.Tensor, offsets: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """How many rows ``(bags, 1)`` a mean is taken of: at least 1."""
    flat = indices.reshape(-1, 1)
    counted = torch.ones_like(flat) if reading.padding_idx is None else flat != reading.padding_idx
    return _sums(reading, counted.to(dtype), indices, offsets).clamp(min=1)


class Table(nn.Module):
    """A float embedding that will be read from a table in 8 bits.

    Attributes:
        weight: ``(rows, width)``, the float layer's own Parameter.
        fake_quantize: Its rows are rounded as they are read (in training); else they are read as they are.
    """

    def __init__(self, layer: Any, *, fake_quantize: bool) -> None:
        super().__init__()
        self.reading = _reading_of(layer)
        self.fake_quantize = fake_quantize
        self.weight: nn.Parameter = layer.weight
        self.train(layer.training)

    def forward(
        self, input: torch.Tensor, offsets: torch.Tensor | None = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``nn.Embedding`` and ``nn.EmbeddingBag``."""
        return _read(self.reading, self._rows, input, offsets, per_sample_weights)

    def _rows(self, indices: torch.Tensor) -> torch.Tensor:
        padding = None if self.reading.is_bag else self.reading.padding_idx
        rows = F.embedding(
            indices, self.weight, padding, None, 2.0, self.reading.scale_grad_by_freq, self.reading.sparse
        )
        return fake_quantized(rows) if self.fake_quantize else rows

    def stored(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Integers, uint8 ``(rows, width)``, and scales and zero points, float32 ``(rows, 1)``."""
        weight = self.weight.detach().cpu()
        if self.reading.is_bag and self.reading.padding_idx is not None:
            # the kernel leaves no row out of a bag, but one of zeros adds nothing to it
            weight = weight.index_fill(0, torch.tensor([self.reading.padding_idx]), 0)
        scale, zero_point = row_qparams(weight)
        return quantized(weight, scale, zero_point), scale, zero_point

    def extra_repr(self) -> str:
        """The shape of the table."""
        return f"{tuple(self.weight.shape)}, fake_quantize={self.fake_quantize}"


class Int8Table(nn.Module):
    """An embedding whose table is packed for torch's kernels. Takes and gives what the float layer does."""

    def __init__(self, reading: Reading, packed: nn.Module) -> None:
        super().__init__()
        self.reading = reading
        self.packed = packed

    def forward(
        self, input: torch.Tensor, offsets: torch.Tensor | None = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``nn.Embedding`` and ``nn.EmbeddingBag``."""
        packed: Any = self.packed
        weight = packed._packed_params._packed_weight
        if not self.reading.is_bag:
            # the kernel takes one or two dimensions
            rows: torch.Tensor = torch.ops.quantized.embedding_byte(weight, input.reshape(-1).contiguous())
            return rows.reshape(*input.shape, self.reading.width)
        # the kernel wants one type, and no strides
        input = input.contiguous()
        offsets = None if offsets is None else offsets.to(input.dtype).contiguous()
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.contiguous()
        last = offsets is not None and self.reading.include_last_offset  # it would leave the last bag out
        sums: torch.Tensor = torch.ops.quantized.embedding_bag_byte(
            weight, input, offsets, False, 0, False, per_sample_weights, None, last
        )
        return sums / _counts(self.reading, input, offsets, sums.dtype) if self.reading.mode == "mean" else sums

    def extra_repr(self) -> str:
        """The shape of the table."""
        packed: Any = self.packed
        return f"{tuple(packed.weight().shape)}"


class StoredTable(nn.Module):
    """An embedding in the neutral form: integers, and the arithmetic that makes floats of them.

    Attributes:
        weight: uint8 ``(rows, width)``.
        scale: float32 ``(rows, 1)``.
        zero_point: float32 ``(rows, 1)``.
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.reading = table.reading
        for name, tensor in zip(("weight", "scale", "zero_point"), table.stored(), strict=True):
            self.register_buffer(name, tensor)

    def forward(
        self, input: torch.Tensor, offsets: torch.Tensor | None = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``nn.Embedding`` and ``nn.EmbeddingBag``."""
        return _read(self.reading, self._rows, input, offsets, per_sample_weights)

    def _rows(self, indices: torch.Tensor) -> torch.Tensor:
        integers, scale, zero_point = (
            self.get_buffer(name).index_select(0, indices) for name in ("weight", "scale", "zero_point")
        )
        return (integers.float() - zero_point) * scale


def _packed(integers: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> nn.Module:
    weight = torch._make_per_channel_quantized_tensor(integers, scale.reshape(-1), zero_point.reshape(-1), 0)
    return quantized_modules.Embedding(integers.shape[0], integers.shape[1], _weight=weight)


@functools.cache
def is_right(width: int, is_bag: bool) -> bool:
    """Whether torch's kernel reads a table of random rows of this width as they are, to float32 precision."""
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        layer: Any = (nn.EmbeddingBag if is_bag else nn.Embedding)(17, width, _weight=torch.randn(17, width))
        table = Table(layer, fake_quantize=False)
        indices = torch.randint(0, 17, (40,))
        offsets = torch.tensor([0, 3, 3, 20]) if is_bag else None
        try:
            found = Int8Table(table.reading, _packed(*table.stored()))(indices, offsets)
        except RuntimeError:  # there is no kernel for it
            return False
        # 1e-4: sums of 20 values of about 1, in float32
        return torch.allclose(found, StoredTable(table)(indices, offsets), atol=1e-4)


def _reason(layer: Any) -> str:
    """Why an embedding has to stay float, or ``""``."""
    if layer.max_norm is not None:
        return "max_norm changes the rows of the table as they are read"
    if isinstance(layer, nn.EmbeddingBag) and layer.mode not in ("sum", "mean"):
        return f"there is no int8 kernel of an embedding bag with mode={layer.mode!r}"
    if layer.weight.dtype != torch.float32:
        return f"the int8 kernel gives float32, and its table is {str(layer.weight.dtype).removeprefix('torch.')}"
    if not is_right(layer.embedding_dim, isinstance(layer, nn.EmbeddingBag)):
        return f"the int8 kernel for it is wrong on this CPU with torch {torch.__version__}"
    return ""


def place(graph_module: fx.GraphModule, skip: Collection[str], *, training: bool) -> dict[str, str]:
    """Put a :class:`Table` in the place of every embedding of a traced graph that can be read in 8 bits.

    Args:
        graph_module: Changed in place.
        skip: Names of modules that stay float.
        training: Rows are rounded as they are read.

    Returns:
        Names of the embeddings that stay float for a reason of their own -> that reason.
    """
    reasons: dict[str, str] = {}
    tables: dict[int, Table] = {}
    names = dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    for name in names:
        layer: Any = graph_module.get_submodule(name)
        if type(layer) not in EMBEDDINGS or name in skip:
            continue
        if reason := _reason(layer):
            reasons[name] = reason
            continue
        graph_module.add_submodule(name, tables.setdefault(id(layer), Table(layer, fake_quantize=training)))
    return reasons


def pack(graph_module: nn.Module) -> None:
    """Put an :class:`Int8Table` in the place of each :class:`Table`. Tables with one Parameter are packed once."""
    known: dict[Any, nn.Module] = {}

    def int8(table: Table) -> nn.Module:
        left_out = table.reading.padding_idx if table.reading.is_bag else None
        key = (id(table.weight), left_out)
        if key not in known:
            known[key] = _packed(*table.stored())
        return Int8Table(table.reading, known[key])

    _replace(graph_module, int8)


def store(graph_module: nn.Module) -> None:
    """Put a :class:`StoredTable` in the place of each :class:`Table`."""
    _replace(graph_module, StoredTable)


def _replace(graph_module: nn.Module, change: Callable[[Table], nn.Module]) -> None:
    changed: dict[int, nn.Module] = {}
    for name, module in list(graph_module.named_modules(remove_duplicate=False)):
        if isinstance(module, Table):
            if id(module) not in changed:
                changed[id(module)] = change(module)
            parent, _, child = name.rpartition(".")
            setattr(graph_module.get_submodule(parent), child, changed[id(module)])
