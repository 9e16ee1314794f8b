"""What is said otherwise to OpenVINO, because its plugin for CPUs is slow with what ONNX says, or silently wrong."""

from __future__ import annotations

import math
from typing import Any

#: Changes no sum of activations, and is not 0, with which OpenVINO would simplify.
_ALMOST_ZERO = 1e-30


def rewrite(model: Any) -> None:
    """Rewrite an ``openvino.Model`` in place; it computes the same."""
    _use_hsigmoid(model)
    _keep_dimensions(model)
    _pad_in_front_of_averages(model)
    _tell_channels_apart(model)


def _use_hsigmoid(model: Any) -> None:
    """Say ``HSigmoid`` where ONNX says ``HardSigmoid`` with torch's slope and offset.

    The plugin for CPUs fuses the first with what stands around it, and runs the second by itself, in float32.
    """
    from openvino import opset13, utils

    for node in model.get_ordered_ops():
        if node.get_type_name() != "HardSigmoid":
            continue
        slope, offset = (node.input_value(index).get_node() for index in (1, 2))
        if not all(value.get_type_name() == "Constant" for value in (slope, offset)):
            continue
        if math.isclose(slope.data.item(), 1 / 6, rel_tol=1e-6) and offset.data.item() == 0.5:
            new = opset13.hsigmoid(node.input_value(0), name=node.get_friendly_name())
            utils.replace_node(node, new)


def _keep_dimensions(model: Any) -> None:
    """Take means over other dimensions than the last ones, as over tokens, with ``keep_dims``, and drop these after it.

    The plugin for CPUs computes a quantize behind a mean in the same kernel, with a range for each channel where it has
    moved the scales of a linear layer there. It looks for the channels in the second dimension of the mean's input:
    right for pixels, and for tokens a silently wrong result.
    """
    from openvino import opset13, utils

    for node in model.get_ordered_ops():
        if node.get_type_name() != "ReduceMean" or node.get_attributes()["keep_dims"]:
            continue
        rank, axes = node.input_value(0).get_partial_shape().rank, node.input_value(1).get_node()
        if rank.is_dynamic or axes.get_type_name() != "Constant":
            continue
        reduced = {int(axis) % rank.get_length() for axis in axes.get_data().ravel()}
        if min(reduced, default=0) >= rank.get_length() - len(reduced):
            continue
        kept = opset13.reduce_mean(node.input_value(0), axes, keep_dims=True)
        utils.replace_node(node, opset13.squeeze(kept, axes, name=node.get_friendly_name()))


def _pad_in_front_of_averages(model: Any) -> None:
    """Let an average that counts its padding read a padded tensor.

    OpenVINO averages the integers themselves, and pads these with 0: with a zero point, that is not the value 0.
    """
    import numpy
    from openvino import opset13, utils

    for node in model.get_ordered_ops():
        if node.get_type_name() != "AvgPool":
            continue
        settings = node.get_attributes()
        before, after = ([0, 0, *settings[name]] for name in ("pads_begin", "pads_end"))
        source = node.input_value(0)
        if settings["exclude-pad"] or settings["auto_pad"] != "explicit" or not any(before + after):
            continue
        if _is_positive(source.get_node()):
            continue
        value = opset13.constant(numpy.float32(_ALMOST_ZERO))
        padded = opset13.pad(source, numpy.array(before), numpy.array(after), "constant", value)
        none = [0] * len(settings["pads_begin"])
        pooled = opset13.avg_pool(
            padded, settings["strides"], none, none, settings["kernel"], True, settings["rounding_type"],
            name=node.get_friendly_name(),
        )  # fmt: skip
        utils.replace_node(node, pooled)


def _is_positive(node: Any) -> bool:
    """Whether a node quantizes with a zero point of 0."""
    if node.get_type_name() != "FakeQuantize":
        return False
    low = node.input_value(3).get_node()
    return low.get_type_name() == "Constant" and not low.get_data().any()


def _tell_channels_apart(model: Any) -> None:
    """Give linear layers without a bias, or with the same one for each of several channels, one that differs.

    The plugin for CPUs computes a sequence of up to 256 wide ones in one kernel, unless they have biases, and that
    kernel is silently wrong with int8 and some batch sizes: 4 and 8, with two threads.
    """
    import numpy
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or not _is_int8_weight(node.input_value(1).get_node()):
            continue
        output = node.output(0)
        readers = list(output.get_target_inputs())
        added = _constants_added(readers)
        if any((values != values.flat[0]).any() for values in added):
            continue
        shape = output.get_partial_shape()
        channels = shape[len(shape) - 1].get_length()
        if channels == 1:
            continue
        bias = numpy.full(channels, _ALMOST_ZERO, numpy.float32)
        bias[1::2] *= -1
        summed = opset13.add(output, opset13.constant(bias))
        for reader in readers:
            reader.replace_source_output(summed.output(0))


def _is_int8_weight(node: Any) -> bool:
    """Whether a node dequantizes a constant."""
    if node.get_type_name() == "Multiply":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Convert" and node.input_value(0).get_node().get_type_name() == "Constant"


def _constants_added(readers: list[Any]) -> list[Any]:
    """The constants that are added, where every reader adds one."""
    found = []
    for reader in readers:
        node = reader.get_node()
        other = node.input_value(1 - reader.get_index()).get_node() if node.get_type_name() == "Add" else None
        if other is None or other.get_type_name() != "Constant":
            return []
        found.append(other.get_data())
    return found
