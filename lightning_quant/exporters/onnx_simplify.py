"""An ONNX graph without the steps that it does not need: what ``onnxscript.optimizer`` does, in linear time.

The rewriter of ``onnxscript`` tries each of its rules on each node, and one of them looks at all nodes for each. On a
deep network most of the time of an export goes to patterns that are not there. Here the same passes run once, with the
rules whose operators the graph has, and without that one (two slices as a ``Split``), which quantized graphs do not
need.
"""

from __future__ import annotations

from typing import Any


def simplify(model: Any) -> None:
    """Fold constants, rewrite, and remove what is not used or there twice; in place.

    Args:
        model: An ``onnx_ir.Model``, as torch.onnx exports it.
    """
    import onnx_ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import rewrite

    common.InlinePass()(model)
    fold_constants(model, onnx_shape_inference=True)
    operators = {node.op_type for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph)}
    rewrite(model, _rules(operators))
    for step in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)


def _rules(operators: set[str]) -> list[Any]:
    """Those that can match a graph with these operators."""
    from onnxscript.rewriter.rules import common as rules

    by_operators: dict[tuple[str, ...], tuple[Any, ...]] = {
        ("Mul",): tuple(rules.mul_by_1_rule.commute()),
        ("Add",): tuple(rules.add_0_rule.commute()),
        ("Sub",): (rules.sub_0_rule,),
        ("Div",): (rules.div_by_1_rule,),
        ("Dropout",): (rules.dropout_zero_rule, rules.dropout_inference_rule),
        ("MatMul", "Reshape"): (rules.two_reshapes_matmul_reshape_rule, rules.one_reshape_matmul_reshape_rule),
        ("Cast", "ConstantOfShape"): (
            rules.cast_constant_of_shape_rule,
            rules.cast_constant_of_shape_without_value_rule,
        ),
        ("Slice",): (rules.collapse_slice_rule, rules.collapse_slice2_rule),
        ("Min",): (rules.min_min_rule,),
        ("Max",): (rules.max_max_rule,),
        ("Max", "Min"): (rules.min_max_rule, rules.max_min_rule),
        ("Clip", "Relu"): (rules.successive_clip_relu_rule, rules.successive_relu_clip_rule),
        ("Relu",): (rules.successive_relu_rule,),
        ("Clip",): (rules.successive_clip_rule,),
        ("Cast",): (rules.cast_cast_rule, rules.no_op_cast_rule),
        ("Expand",): (rules.no_op_expand_rule,),
        ("Reshape",): (rules.materialize_reshape_shape_rule, rules.reshape_reshape_rule),
        ("Flatten",): (rules.flatten_to_reshape_rule,),
        ("Transpose",): (rules.no_op_transpose_rule, rules.transpose_transpose_rule),
        ("Unsqueeze",): (rules.unsqueeze_unsqueeze_rule,),
        ("Reshape", "Squeeze"): (rules.squeeze_reshape_1d_rule,),
        ("ScatterND",): (rules.no_op_dynamic_scatter_nd_rule, rules.no_op_static_scatter_nd_rule),
        ("Conv", "Pad"): (rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule),
        ("BatchNormalization", "Conv"): (rules.fuse_batchnorm_into_conv_rule,),
        ("BatchNormalization", "ConvTranspose"): (rules.fuse_batchnorm_into_conv_transpose_rule,),
        ("BatchNormalization", "Gemm"): (rules.fuse_batchnorm_into_gemm_rule,),
        ("Conv",): (rules.remove_optional_bias_from_conv_rule,),
        ("ConvTranspose",): (rules.remove_optional_bias_from_conv_transpose_rule,),
        ("Gemm",): (rules.remove_optional_bias_from_gemm_rule,),
    }
    return [rule for needed, some in by_operators.items() if operators.issuperset(needed) for rule in some]
