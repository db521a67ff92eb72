"""Explicit padding: `auto_pad` of convolutions and pools becomes the pads that it means, where sizes are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from dsr_tool.graph.ir import Node
from dsr_tool.graph.operators import operator_of

__all__ = ["SAME", "explicit_pads"]

SAME = ("SAME_UPPER", "SAME_LOWER")
"""Values of `auto_pad` whose pads depend on the size of the input."""
_Sizes = tuple[int, ...]


def explicit_pads(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> Node:
    """Returns a node with pads in place of `auto_pad`, by which kernels compute it too.

    Args:
        node: any node.
        shapes: static shapes of the values that have one, and of weights.

    Returns:
        The node itself if it has no such padding, or if the pads are not known: they depend on the size of the input
        unless the stride is 1.
    """
    if node.attributes.get("auto_pad") not in SAME or not operator_of(node.op).windowed:
        return node
    weight = shapes.get(node.inputs[1], ()) if len(node.inputs) > 1 else ()
    kernel = cast("_Sizes", node.attributes.get("kernel_shape", weight[2:]))
    ones = (1,) * len(kernel)
    strides, dilations = (cast("_Sizes", node.attributes.get(name, ones)) for name in ("strides", "dilations"))
    size = shapes.get(node.inputs[0], ())[2:] or (ones if strides == ones else ())
    if not kernel or not len(kernel) == len(strides) == len(dilations) == len(size) or min(strides) < 1:
        return node
    # The output has the size of the input divided by the stride, rounded up.
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    total = [max((-(-n // s) - 1) * s + r - n, 0) for n, s, r in zip(size, strides, reach, strict=True)]
    small, large = [n // 2 for n in total], [n - n // 2 for n in total]
    pads = (*small, *large) if node.attributes["auto_pad"] == "SAME_UPPER" else (*large, *small)
    kept = {name: value for name, value in node.attributes.items() if name != "auto_pad"}
    return replace(node, attributes={**kept, "pads": pads})
