"""Graph pass: removes filters and input channels that do no work, and folds their constants into what stays.

Requires: a valid graph in inference mode, its norms folded (`fold_norms`), with a tensor for each parameter.
Does: a filter without weights makes a constant, its bias, through whatever follows. A constant that reaches a
convolution without padding, or a linear layer, becomes part of the bias; behind zero padding one constant channel stays
and takes over the weights of all others, scaled to it. `docs/compaction.md` says when this pays.
Ensures: outputs as before, up to rounding; parameters under their old names, in smaller shapes; the same inputs and
outputs of the graph. Values that an operator without a rule reads (attention, layer norms, reshapes of channels) keep
all their channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from dsr_tool.graph.compact.channels import Bools, Channels, Floats
from dsr_tool.graph.compact.needs import kept_units
from dsr_tool.graph.compact.products import add_to_anchor, keep_channels
from dsr_tool.graph.compact.survey import Product, Survey
from dsr_tool.graph.compact.walk import survey_graph
from dsr_tool.graph.fold import fold_norms
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["Compacted", "Removed", "compact", "fold_and_compact"]


@dataclass(frozen=True)
class Removed:
    """The channels that one layer lost.

    Attributes:
        weight: name of the layer's weight.
        filters: number of output channels before and after.
        inputs: number of input channels before and after.
    """

    weight: str
    filters: tuple[int, int]
    inputs: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Compacted:
    """A smaller computation of the same function.

    Attributes:
        graph: the computation.
        tensors: its parameters, under their old names and possibly smaller.
        removed: the channels that each layer lost, for layers that lost any.
    """

    graph: Graph
    tensors: Mapping[str, SparseTensor]
    removed: tuple[Removed, ...]


def compact(graph: Graph, tensors: Mapping[str, SparseTensor]) -> Compacted:
    """Removes every filter and input channel that no output depends on; see the module's docstring.

    A weight counts as absent where its value is zero, whether it is active or not.

    Args:
        graph: a computation whose norms are folded (`fold_norms`), so that filters without weights are seen as such.
        tensors: a tensor for each of its parameters.
    """
    survey = survey_graph(graph, tensors)
    return _Rewriter(graph, tensors, survey, kept_units(survey)).result()


def fold_and_compact(graph: Graph, tensors: Mapping[str, SparseTensor]) -> tuple[dict[str, SparseTensor], Compacted]:
    """Folds the norms of a model and compacts it.

    Args:
        graph: the computation.
        tensors: a tensor for each of its parameters, and possibly others.

    Returns:
        The parameters after folding and before compaction, and the compacted computation.
    """
    graph, folded = fold_norms(graph, tensors)
    return folded, compact(graph, folded)


class _Rewriter:
    def __init__(self, graph: Graph, tensors: Mapping[str, SparseTensor], survey: Survey, kept: Bools) -> None:
        self._graph, self._survey, self._kept = graph, survey, kept
        self._tensors = {name: tensors[name] for name in graph.parameters}
        self._constants = dict(graph.constants)
        self._products = {product.node.outputs[0]: product for product in survey.products}
        self._names = {name for node in graph for name in (*node.inputs, *node.outputs)} | set(tensors)
        self._removed: list[Removed] = []

    def result(self) -> Compacted:
        """Rewrites every node and drops what no output depends on any more."""
        nodes = _needed_nodes([new for node in self._graph for new in self._rewrite(node)], self._graph)
        read = {name for node in nodes for name in node.inputs} | {value.name for value in self._graph.outputs}
        tensors = {name: tensor for name, tensor in self._tensors.items() if name in read}
        constants = {name: array for name, array in self._constants.items() if name in read}
        graph = replace(self._graph, nodes=tuple(nodes), constants=constants, parameters=tuple(tensors))
        return Compacted(graph, tensors, tuple(self._removed))

    def _stays(self, channels: Channels) -> Bools:
        return self._kept[channels.units]

    def _rewrite(self, node: Node) -> list[Node]:
        if node.outputs[0] in self._products:
            return [self._product(self._products[node.outputs[0]])]
        if node.outputs[0] not in self._survey.followed:
            return [node]
        if node.op == "Split":
            return [self._split(node)]
        if node.op == "Reshape":
            return self._reshape(node)
        return [replace(node, inputs=tuple(self._sliced(node, name) for name in node.inputs))]

    def _sliced(self, node: Node, name: str) -> str:
        """Removes channels from an operand, and returns the name under which it is stored then."""
        axis, channels = self._survey.sliced.get((node.outputs[0], name), (0, None))
        if channels is None or (stays := self._stays(channels)).all():
            return name
        if name not in self._tensors:
            return self._constant(name, np.compress(stays, self._graph.constants[name], axis))
        self._tensors[name] = _compressed(self._tensors[name], stays, axis)
        return name

    def _split(self, node: Node) -> Node:
        pieces = [self._stays(self._survey.values[name]) for name in node.outputs]
        if all(piece.all() for piece in pieces):
            return node
        sizes = self._constant(f"{node.outputs[0]}:sizes", np.array([piece.sum() for piece in pieces], np.int64))
        # num_outputs asks for pieces of equal size, and may not stand beside explicit sizes.
        attributes = {name: value for name, value in node.attributes.items() if name != "num_outputs"}
        return replace(node, inputs=(node.inputs[0], sizes), attributes=attributes)

    def _reshape(self, node: Node) -> list[Node]:
        features = self._stays(self._survey.values[node.outputs[0]])
        if features.all():
            return [node]
        # The old shape may have other readers, so the node gets a new one of the same batch and fewer features.
        batch, _ = self._survey.flat_shapes[node.inputs[1]]
        last = self._constant(f"{node.outputs[0]}:features", np.array([features.sum()], np.int64))
        shape = self._fresh(f"{node.outputs[0]}:shape")
        concat = Node("Concat", (batch, last), (shape,), {"axis": 0})
        return [concat, replace(node, inputs=(node.inputs[0], shape))]

    def _product(self, product: Product) -> Node:
        outputs, inputs = self._stays(product.result), self._stays(product.source)
        if outputs.all() and inputs.all():
            return product.node
        # A layer is listed if it lost anything, also a depthwise one that only follows its neighbours.
        self._removed.append(
            Removed(product.weight, (outputs.size, int(outputs.sum())), (inputs.size, int(inputs.sum())))
        )
        node, weight = product.node, self._tensors[product.weight]
        # An input that goes is constant, or its weights are all zero: then its share is zero, whatever it holds.
        gone: Floats = np.where(inputs, 0, np.nan_to_num(product.source.constant))
        array, active = (_outputs_first(a, product) for a in (weight.to_dense(), weight.mask.to_bool()))
        bias = self._bias(product, array, gone)
        if product.anchor is not None and gone.any():
            array, active = add_to_anchor(array, active, gone, product)
        array, active = (keep_channels(a, outputs, inputs, product.groups) for a in (array, active))
        if product.inputs_first:
            array, active = array.T, active.T
        self._tensors[product.weight] = SparseTensor.from_dense(np.ascontiguousarray(array), Mask.from_bool(active))
        attributes = dict(node.attributes)
        if product.depthwise:
            attributes["group"] = int(inputs.sum())
        return replace(
            node, inputs=(*node.inputs[:2], *self._store_bias(product, bias, outputs)), attributes=attributes
        )

    def _bias(self, product: Product, array: Array, gone: Floats) -> Floats | None:
        """Returns the bias of all outputs plus the share of the constant inputs that go; None if there is neither.

        Args:
            product: the layer.
            array: its weight, shape (outputs, inputs / groups, *kernel).
            gone: shape (inputs,), the values of the inputs that go; zero for the others.
        """
        name = product.node.inputs[2] if product.node.inputs[2:] else ""
        bias = None
        if name:
            bias = (self._tensors[name].to_dense() if name in self._tensors else self._constants[name]).astype(float)
        if product.absorbs and gone.any():
            bias = np.zeros(len(array)) if bias is None else bias
            values, rows = gone.reshape(product.groups, -1), np.arange(len(array)).reshape(product.groups, -1)
            for group in np.flatnonzero(values.any(axis=1)):
                columns = np.flatnonzero(values[group])
                # Without padding every tap reads the same constant, so a kernel contributes the sum of its taps.
                weights = array[np.ix_(rows[group], columns)].reshape(rows.shape[1], len(columns), -1)
                bias[rows[group]] += weights.sum(axis=2, dtype=np.float64) @ values[group][columns]
        return bias

    def _store_bias(self, product: Product, bias: Floats | None, outputs: Bools) -> tuple[str, ...]:
        """Stores the bias of the outputs that stay, under its old name if no other node reads it.

        Returns:
            The name as a tuple; an empty tuple if the layer needs no bias.
        """
        if bias is None or not (product.node.inputs[2:] or bias[outputs].any()):
            return ()
        name = product.node.inputs[2] if product.node.inputs[2:] else ""
        # A constant may be shared with other nodes; a parameter is this node's own, as the survey made sure.
        if name not in self._tensors:
            name = self._fresh(product.weight.removesuffix(".weight") + ".bias")
        values = bias[outputs].astype(self._tensors[product.weight].values.dtype)
        self._tensors[name] = SparseTensor.from_dense(values, Mask.full(values.shape))
        return (name,)

    def _constant(self, stem: str, array: Array) -> str:
        name = self._fresh(stem)
        self._constants[name] = array
        return name

    def _fresh(self, stem: str) -> str:
        name, count = stem, 0
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name


def _outputs_first(array: Array, product: Product) -> Array:
    return array.T if product.inputs_first else array


def _compressed(tensor: SparseTensor, stays: Bools, axis: int) -> SparseTensor:
    active = np.compress(stays, tensor.mask.to_bool(), axis)
    return SparseTensor.from_dense(np.compress(stays, tensor.to_dense(), axis), Mask.from_bool(active))


def _needed_nodes(nodes: list[Node], graph: Graph) -> list[Node]:
    """Returns the nodes that an output of the graph depends on."""
    read = {value.name for value in graph.outputs}
    result = []
    for node in reversed(nodes):
        if read.intersection(node.outputs):
            read.update(node.inputs)
            result.append(node)
    return result[::-1]
