"""Convolutions and products with a weight matrix: which inputs they need, and what constant inputs become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from dsr_tool.graph.compact.channels import Bools, Channels, Floats
from dsr_tool.graph.ir import Node
from dsr_tool.sparsity.tensor import Array

if TYPE_CHECKING:
    from dsr_tool.graph.compact.survey import Survey

__all__ = ["Product", "conv", "gemm", "matmul", "padded"]


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution or a product with a weight matrix.

    Attributes:
        weight: name of the parameter.
        node: the operator.
        inputs_first: whether the parameter is (inputs, outputs) and not (outputs, inputs / groups, *kernel).
        groups: inputs and outputs are cut into this many groups that do not see each other.
        absorbs: whether a constant input becomes part of a bias; zero padding and a missing bias forbid it.
        source: the channels read.
        result: the channels made.
        live: shape (outputs, inputs / groups), where any weight of the kernel is not zero.
    """

    weight: str
    node: Node
    inputs_first: bool
    groups: int
    absorbs: bool
    source: Channels
    result: Channels
    live: Bools

    @property
    def channelwise(self) -> bool:
        """Whether each group reads one channel, so that groups go one by one."""
        return self.groups > 1 and self.live.shape[1] == 1

    def needed(self, kept: Bools) -> Bools:
        """Which inputs must exist for the outputs in `kept`.

        Constant inputs need not: they become part of the bias, or are all expressed through the `anchor`.
        """
        live = self.live.reshape(self.groups, -1, self.live.shape[1])
        used: Bools = (live & kept.reshape(self.groups, -1, 1)).any(axis=1).reshape(-1)
        varies = np.isnan(self.source.constant)
        zero = self.source.constant == 0
        result = used & (varies if self.absorbs or self.anchor is not None else ~zero)
        if self.anchor is not None and (used & ~varies & ~zero).any():
            result[self.anchor] = True
        return result

    @property
    def anchor(self) -> int | None:
        """The constant input that stands for all others, where a bias cannot; the largest, for accuracy."""
        if self.absorbs or self.groups > 1:
            return None
        size = np.abs(np.nan_to_num(self.source.constant))
        return int(size.argmax()) if size.any() else None


def conv(survey: Survey, node: Node) -> bool:
    """A convolution: its filters and input channels."""
    weight = node.inputs[1]
    if not survey.owns(weight) or not _has_bias(survey, node, survey.tensors[weight].mask.shape[0]):
        return False
    rank = len(survey.tensors[weight].mask.shape)
    groups = cast("int", node.attributes.get("group", 1))
    return _product(survey, node, weight, axis=1, rank=rank, groups=groups, absorbs=not padded(node))


def gemm(survey: Survey, node: Node) -> bool:
    """A linear layer on (batch, features)."""
    weight, attributes = node.inputs[1], node.attributes
    plain = attributes.get("alpha", 1) == attributes.get("beta", 1) == 1 and not attributes.get("transA", 0)
    inputs_first = not attributes.get("transB", 0)
    if not survey.owns(weight) or not plain:
        return False
    outputs = survey.tensors[weight].mask.shape[1 if inputs_first else 0]
    return _has_bias(survey, node, outputs) and _product(
        survey, node, weight, axis=-1, rank=2, inputs_first=inputs_first, absorbs=True
    )


def matmul(survey: Survey, node: Node) -> bool:
    """A linear layer on the last axis, without a bias."""
    source, right = node.inputs
    weight = survey.turned.get(right, right)
    if not survey.owns(weight) or len(survey.tensors[weight].mask.shape) != 2 or len(survey.readers[right]) > 1:
        return False
    rank = survey.values[source].rank if source in survey.values else None
    return _product(survey, node, weight, axis=-1, rank=rank, inputs_first=weight == right, absorbs=False)


def _has_bias(survey: Survey, node: Node, outputs: int) -> bool:
    """Whether the bias is absent or known, with one entry for each output."""
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
        survey.pin(node.inputs[0])
        source = survey.unknown(per_group * groups, axis, rank)
    kernel = array.reshape(outputs, per_group, -1)
    bias = survey.array(node.inputs[2]) if node.inputs[2:] and node.inputs[2] else None
    live = (kernel != 0).any(axis=2)
    units = survey.units.fresh(outputs)
    if groups > 1 and per_group == 1:
        survey.units.join(units, np.repeat(source.units, outputs // groups))
    constant = _constant(kernel, live, bias, source.constant, groups, even=absorbs or axis == -1)
    result = Channels(units, constant, axis, rank, source.batch)
    survey.products.append(Product(weight, node, inputs_first, groups, absorbs, source, result, live))
    return survey.add(node.outputs[0], result)


def padded(node: Node) -> bool:
    """Whether a window of a convolution or pool may reach beyond its input."""
    pads = cast("tuple[int, ...]", node.attributes.get("pads", ()))
    return any(pads) or "SAME" in str(node.attributes.get("auto_pad")) or bool(node.attributes.get("ceil_mode", 0))


def _constant(kernel: Array, live: Bools, bias: Array | None, source: Floats, groups: int, *, even: bool) -> Floats:
    """What the outputs of a product hold, NaN where they vary.

    Args:
        kernel: the weight, shape (outputs, inputs / groups, entries).
        live: shape (outputs, inputs / groups), where any entry is not zero.
        bias: shape (outputs,).
        source: shape (inputs,), what the inputs hold.
        groups: of the inputs and outputs.
        even: whether a constant input other than zero makes a constant; with zero padding it does not.
    """
    outputs, per_group = live.shape
    known = (source == 0) | (even & ~np.isnan(source))
    varies = (live.reshape(groups, -1, per_group) & ~known.reshape(groups, 1, -1)).any(axis=2).reshape(-1)
    result = np.zeros(outputs) if bias is None else bias.astype(np.float64)
    rows, columns = np.flatnonzero(~varies), np.where(known, source, 0).reshape(groups, -1)
    for group in np.flatnonzero(columns.any(axis=1)):
        mine = rows[rows // (outputs // groups) == group]
        weights = kernel[np.ix_(mine, np.flatnonzero(columns[group]))].sum(axis=2, dtype=np.float64)
        result[mine] += weights @ columns[group][columns[group] != 0]
    result[varies | ~np.isfinite(result)] = np.nan
    return result
