"""A program in the operators that ONNX has, without tracing all of it again.

``torch.onnx.export`` decomposes each program that it is given: it traces every operator twice, which takes most of the
time of a deep network. Few operators of an int8 program need it. Here these are traced by themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._pytree import tree_leaves

Program = torch.export.ExportedProgram
Table = Mapping[Any, Callable[..., Any]]

_ATEN = torch.ops.aten
_DROPOUTS = (_ATEN.dropout_.default, _ATEN.feature_dropout_.default, _ATEN.alpha_dropout_.default)


class Quick(Program):
    """A program that is decomposed where it has to be, and as a whole only if that is not enough."""

    @classmethod
    def of(cls, program: Program) -> Program:
        """``program``, which computes the same after a decomposition, but may have other nodes."""
        quick: Program = cls.__new__(cls)
        quick.__dict__.update(program.__dict__)
        return quick

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, decompose_custom_triton_ops: bool = False
    ) -> Program:
        """A program without the operators of a table, and without any that write into their input.

        Args:
            decomp_table: Operator -> how torch decomposes it.
            decompose_custom_triton_ops: As torch says.
        """
        if decomp_table is not None and _write_out(self, decomp_table):
            return self
        return super().run_decompositions(decomp_table, decompose_custom_triton_ops)


def _write_out(program: Program, table: Table) -> bool:
    """Whether it could be done; what could not be stays as it is."""
    graph = program.graph
    if any(node.op == "get_attr" for node in graph.nodes):  # graphs inside of this one
        return False
    is_unknown = _unknown(table)
    traces: dict[str, fx.GraphModule] = {}
    for node in list(graph.nodes):
        if _writes(node.target) and not _functional(node):
            return False
        if is_unknown(node.target):
            done = node.target == _ATEN.batch_norm.default and _batch_norm(graph, node)
            if not done and not _trace(graph, node, table, traces):
                return False
    for node in list(graph.nodes):  # tracing asks for sizes, and lays tensors out anew
        if node.target == _ATEN.sym_numel.default:
            _count_values(graph, node)
        elif node.target == _ATEN.as_strided_.default and _is_as_it_was(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
        elif is_unknown(node.target) or _writes(node.target):
            return False
    for spec, result in zip(program.graph_signature.output_specs, graph.output_node().args[0], strict=True):
        if isinstance(result, fx.Node):
            spec.arg.name = result.name  # what is returned may have been written out
    graph.lint()
    program.graph_module.recompile()
    return True


def _unknown(table: Table) -> Callable[[Any], bool]:
    """Whether a decomposition would write an operator in others.

    It does so with those in the table, and with functions of several operators: torch keeps none of these but those
    that it could have been told to decompose.
    """
    optional = torch.export.default_decompositions()
    composite = torch._C.DispatchKey.CompositeImplicitAutograd

    def is_unknown(target: Any) -> bool:
        if not isinstance(target, torch._ops.OpOverload):  # an input, or one of several results
            return False
        return target in table or (target.has_kernel_for_dispatch_key(composite) and target not in optional)

    return is_unknown


def _writes(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_as_it_was(node: fx.Node) -> bool:
    """Whether each value stays in its place: an average over all of an image in ``channels_last`` gets other strides.

    They are those of dimensions of one element, where a stride says nothing.
    """
    source: Any = node.args[0]
    old, new = source.meta["val"], node.meta["val"]
    if len(node.args) > 3 or node.kwargs or old.dim() != new.dim():
        return False
    same = [
        statically_known_true(old.shape[dim] == new.shape[dim])
        and (statically_known_true(old.shape[dim] == 1) or statically_known_true(old.stride(dim) == new.stride(dim)))
        for dim in range(old.dim())
    ]
    return all(same)


def _functional(node: fx.Node) -> bool:
    """``relu_`` as ``relu``: where nothing else reads what it overwrites, the two are the same."""
    target: Any = node.target
    source = node.args[0] if node.args else None
    packet = getattr(_ATEN, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    function = getattr(packet, target._overloadname, None)
    if function is None or function._schema.is_mutable or len(function._schema.returns) != 1:
        return False
    if target in _DROPOUTS and node.args[2] is False:  # it overwrites its input with itself
        node.target = function
        return True
    if not isinstance(source, fx.Node) or not _is_new(source) or set(source.users) != {node}:
        return False
    if any(argument.alias_info is not None for argument in target._schema.arguments[1:]):
        return False
    node.target = function
    return True


def _is_new(node: fx.Node) -> bool:
    """Whether its value is in memory of its own, which nothing else sees."""
    target = node.target
    if target is operator.getitem:
        several: Any = node.args[0]
        same = [user for user in several.users if user.args[1] == node.args[1]]
        return same == [node] and _is_new(several)
    return isinstance(target, torch._ops.OpOverload) and all(
        result.alias_info is None for result in target._schema.returns
    )


def _batch_norm(graph: fx.Graph, node: fx.Node) -> bool:
    """What tracing it gives. A network can have hundreds of them."""
    data, weight, bias, mean, variance, training, momentum, epsilon = node.args[:8]
    if training is not False or mean is None or variance is None:
        return False
    arguments = (data, weight, bias, mean, variance, momentum, epsilon)
    with graph.inserting_before(node):
        both = graph.call_function(_ATEN._native_batch_norm_legit_no_training.default, arguments)
        normalized = graph.call_function(operator.getitem, (both, 0))
    value = node.meta["val"]
    normalized.meta = dict(node.meta)
    both.meta = {**node.meta, "val": (value, value.new_empty(0), value.new_empty(0))}
    node.replace_all_uses_with(normalized)
    graph.erase_node(node)
    return True


def _count_values(graph: fx.Graph, node: fx.Node) -> None:
    """The product of the sizes of a tensor."""
    tensor: Any = node.args[0]
    with graph.inserting_before(node):
        product: Any = 1
        for dim, size in enumerate(tensor.meta["val"].shape):
            if isinstance(size, int):
                product = product * size if isinstance(product, int) else _times(graph, product, size)
                continue
            asked = graph.call_function(_ATEN.sym_size.int, (tensor, dim))
            asked.meta["val"] = size
            product = asked if product == 1 else _times(graph, asked, product)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _times(graph: fx.Graph, one: fx.Node, other: Any) -> fx.Node:
    product = graph.call_function(operator.mul, (one, other))
    product.meta["val"] = one.meta["val"] * (other.meta["val"] if isinstance(other, fx.Node) else other)
    return product


def _trace(graph: fx.Graph, node: fx.Node, table: Table, traces: dict[str, fx.GraphModule]) -> bool:
    """Put in the place of a call what torch makes of it when it is traced; not where that makes tensors of its own.

    ``traces`` has what was traced before: the layers of a deep network are alike.
    """
    sources = node.all_input_nodes
    function: Any = node.target

    def call(*values: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), dict(zip(sources, values, strict=True)).__getitem__)
        return function(*args, **kwargs)

    key = _alike(node)
    traced = traces.get(key)
    if traced is None:
        # with the rules in Python: some in C++ ask for the number of samples, and it would be that of the example
        with torch.no_grad(), enable_python_dispatcher():
            traced = make_fx(call, decomposition_table=dict(table))(*(source.meta["val"] for source in sources))
        if not any(free_unbacked_symbols(inner.meta.get("val")) for inner in traced.graph.nodes):
            traces[key] = traced  # sizes that depend on values are not the same in two calls
    # what it makes by itself lies in another fake mode, and a program has one
    modes = {value.fake_mode for value in (source.meta["val"] for source in sources) if hasattr(value, "fake_mode")}
    made = [inner for inner in traced.graph.nodes if inner.op in ("call_function", "get_attr")]
    if len(modes) != 1 or not all(_lies_in(inner.meta.get("val"), *modes) for inner in made):
        return False
    places: dict[fx.Node, Any] = {}
    inputs = iter(sources)
    for inner in traced.graph.nodes:
        if inner.op == "placeholder":
            places[inner] = next(inputs)
        elif inner.op == "output":
            result = fx.node.map_arg(inner.args[0], places.__getitem__)
        else:
            with graph.inserting_before(node):
                places[inner] = graph.node_copy(inner, places.__getitem__)
            places[inner].meta = {**node.meta, **inner.meta}
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # each takes one of several results
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    return True


def _alike(node: fx.Node) -> str:
    """The same for two calls that are traced alike: of one operator, with like tensors and the same constants."""
    number = {source: f"input {i}" for i, source in enumerate(node.all_input_nodes)}
    arguments = fx.node.map_arg((node.args, node.kwargs), number.__getitem__)
    return repr((node.target, arguments, [_like(source.meta["val"]) for source in number]))


def _like(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_like(one) for one in value]
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, tuple(value.shape), value.stride(), value.storage_offset(), value.device


def _lies_in(value: Any, mode: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return value is not None and all(getattr(tensor, "fake_mode", None) is mode for tensor in tensors)
