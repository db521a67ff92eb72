"""Convolutions and matrix products: the rules that follow them, and how their weights lose channels."""

from __future__ import annotations

from typing import cast

import numpy as np

from dsr_tool.graph.compact.channels import Bools, Channels, Floats
from dsr_tool.graph.compact.survey import Product, Survey
from dsr_tool.graph.ir import Node
from dsr_tool.sparsity.tensor import Array

__all__ = ["add_to_anchor", "conv", "gemm", "keep_channels", "matmul", "may_see_padding"]


def conv(survey: Survey, node: Node) -> bool:
    """Follows a convolution: its filters and input channels."""
    weight = node.inputs[1]
    if not survey.owns(weight) or not _bias_is_known(survey, node, survey.tensors[weight].mask.shape[0]):
        return False
    rank = len(survey.tensors[weight].mask.shape)
    groups = cast("int", node.attributes.get("group", 1))
    return _product(survey, node, weight, axis=1, rank=rank, groups=groups, absorbs=not may_see_padding(node))


def gemm(survey: Survey, node: Node) -> bool:
    """Follows a linear layer on (batch, features)."""
    weight, attributes = node.inputs[1], node.attributes
    # Factors would have to scale the constants too; exporters of models do not write them.
    plain = attributes.get("alpha", 1) == attributes.get("beta", 1) == 1 and not attributes.get("transA", 0)
    inputs_first = not attributes.get("transB", 0)
    if not survey.owns(weight) or not plain:
        return False
    outputs = survey.tensors[weight].mask.shape[1 if inputs_first else 0]
    return _bias_is_known(survey, node, outputs) and _product(
        survey, node, weight, axis=-1, rank=2, inputs_first=inputs_first, absorbs=True
    )


def matmul(survey: Survey, node: Node) -> bool:
    """Follows a linear layer on the last axis; its bias, if any, is an Add of its own."""
    source, right = node.inputs
    weight = survey.transposed.get(right, right)
    if not survey.owns(weight) or len(survey.tensors[weight].mask.shape) != 2 or len(survey.readers[right]) > 1:
        return False
    rank = survey.values[source].rank if source in survey.values else None
    return _product(survey, node, weight, axis=-1, rank=rank, inputs_first=weight == right, absorbs=False)


def _bias_is_known(survey: Survey, node: Node, outputs: int) -> bool:
    """Returns whether the bias is absent, or known with one entry for each output."""
    name = node.inputs[2] if node.inputs[2:] else ""
    array = survey.array(name)
    return not name or (array is not None and array.shape == (outputs,))


def _product(
    survey: Survey,
    node: Node,
    weight: str,
    *,
    axis: int,
    rank: int | None,
    absorbs: bool,
    groups: int = 1,
    inputs_first: bool = False,
) -> bool:
    array = survey.tensors[weight].to_dense()
    array = array.T if inputs_first else array
    outputs, per_group = array.shape[:2]
    source = survey.values.get(node.inputs[0])
    if source is None or source.axis != axis or source.rank != rank or source.count != per_group * groups:
        # The input is unknown or laid out in another way: it keeps its channels, but the outputs can still lose some.
        survey.pin(node.inputs[0])
        source = survey.pinned_channels(per_group * groups, axis, rank)
    kernel = array.reshape(outputs, per_group, -1)
    bias = survey.array(node.inputs[2]) if node.inputs[2:] and node.inputs[2] else None
    nonzero = (kernel != 0).any(axis=2)
    units = survey.units.fresh(outputs)
    if groups > 1 and per_group == 1:
        # Depthwise: a filter cannot exist without its input, nor the input be removed without its filters.
        survey.units.join(units, np.repeat(source.units, outputs // groups))
    uniform = absorbs or axis == -1
    constant = _constant_outputs(kernel, nonzero, bias, source.constant, groups, uniform=uniform)
    result = Channels(units, constant, axis, rank, source.batch)
    survey.products.append(Product(weight, node, inputs_first, groups, absorbs, source, result, nonzero))
    return survey.add(node.outputs[0], result)


def may_see_padding(node: Node) -> bool:
    """Returns whether a window of a convolution or pool may reach past the border of its input."""
    pads = cast("tuple[int, ...]", node.attributes.get("pads", ()))
    return any(pads) or "SAME" in str(node.attributes.get("auto_pad")) or bool(node.attributes.get("ceil_mode", 0))


def _constant_outputs(
    kernel: Array, nonzero: Bools, bias: Array | None, source: Floats, groups: int, *, uniform: bool
) -> Floats:
    """Returns the constant outputs of a product, NaN where they vary.

    Args:
        kernel: the weight, shape (outputs, inputs / groups, entries).
        nonzero: shape (outputs, inputs / groups), True where any entry is not zero.
        bias: shape (outputs,).
        source: shape (inputs,), the constant inputs, NaN where they vary.
        groups: number of groups of the inputs and outputs.
        uniform: True if a constant input gives a constant output; with zero padding only an input of zeros does.
    """
    outputs, per_group = nonzero.shape
    known = (source == 0) | (uniform & ~np.isnan(source))
    varies = (nonzero.reshape(groups, -1, per_group) & ~known.reshape(groups, 1, -1)).any(axis=2).reshape(-1)
    result = np.zeros(outputs) if bias is None else bias.astype(np.float64)
    rows, columns = np.flatnonzero(~varies), np.where(known, source, 0).reshape(groups, -1)
    for group in np.flatnonzero(columns.any(axis=1)):
        own_rows = rows[rows // (outputs // groups) == group]
        # float64, as the result is rounded only once, with the bias that absorbs it.
        weights = kernel[np.ix_(own_rows, np.flatnonzero(columns[group]))].sum(axis=2, dtype=np.float64)
        result[own_rows] += weights @ columns[group][columns[group] != 0]
    result[varies | ~np.isfinite(result)] = np.nan
    return result


# --- weights of a smaller graph --------------------------------------------------------------------------


def add_to_anchor(array: Array, active: Bools, gone: Floats, product: Product) -> tuple[Array, Bools]:
    """Adds the weights of constant inputs that go to those of the product's anchor, scaled by their values.

    Args:
        array: the weight, shape (outputs, inputs, *kernel).
        active: its mask, of the same shape.
        gone: shape (inputs,), the values of the inputs that go; zero for the others.
        product: a product with an anchor.

    Returns:
        The weight and its mask, still with every input channel.
    """
    anchor = product.anchor
    ratio = gone / product.source.constant[anchor]
    columns = np.flatnonzero(ratio)
    moved = np.tensordot(array[:, columns].astype(np.float64), ratio[columns], axes=(1, 0))
    array, active = array.copy(), active.copy()
    # Behind padding this is exact as well: at the border the anchor is padded where the others would have been.
    array[:, anchor] += moved
    active[:, anchor] |= moved != 0
    return array, active


def keep_channels(array: Array, outputs: Bools, inputs: Bools, groups: int) -> Array:
    """Returns the rows and columns of a weight or mask that stay, group by group.

    Args:
        array: shape (outputs, inputs / groups, *kernel).
        outputs: shape (outputs,), True for those that stay.
        inputs: shape (inputs,), True for those that stay.
        groups: number of groups.
    """
    rows, columns = outputs.reshape(groups, -1), inputs.reshape(groups, -1)
    blocks = array.reshape(groups, -1, *array.shape[1:])
    # A group without rows is a depthwise filter that goes; groups of other convolutions keep at least one row.
    kept = [blocks[group][np.ix_(rows[group], columns[group])] for group in range(groups) if rows[group].any()]
    return kept[0] if groups == 1 else np.concatenate(kept)
