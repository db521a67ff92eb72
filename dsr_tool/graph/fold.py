"""Folding of batch normalisation into the convolution before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt

from dsr_tool.graph.ir import Graph, Node
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["fold_norms"]

_EPSILON = 1e-5
_Float64 = npt.NDArray[np.float64]


def fold_norms(graph: Graph, tensors: Mapping[str, SparseTensor]) -> tuple[Graph, dict[str, SparseTensor]]:
    """Fold every BatchNormalization that directly follows a convolution into its weight and bias.

    Values are scaled in float64 and rounded once, to float32 at least; masks stay as they are, also where a
    scaled value becomes zero. A norm stays where its convolution's output or weight has another reader.

    Args:
        graph: a computation in inference mode.
        tensors: a tensor for each of its parameters.

    Returns:
        The graph without those norms, and the tensors that it uses.
    """
    folder = _Folder(graph, tensors)
    # A norm that divides by zero gives what it would give unfolded.
    with np.errstate(all="ignore"):
        for node in graph:
            folder.add(node)
    return folder.result()


class _Folder:
    """Copies a graph node by node; `add` replaces a convolution when its norm comes by."""

    def __init__(self, graph: Graph, tensors: Mapping[str, SparseTensor]) -> None:
        self._graph = graph
        self._tensors = dict(tensors)
        self._nodes: list[Node] = []
        self._maker: dict[str, int] = {}
        self._users = graph.users()
        self._outputs = {value.name for value in graph.outputs}
        self._names = {name for node in graph for name in (*node.inputs, *node.outputs)}
        self._names |= {value.name for value in graph.inputs} | set(graph.constants) | set(tensors)

    def add(self, node: Node) -> None:
        """Fold the node into the one before it, or take it as it is."""
        index = self._maker.get(node.inputs[0], -1) if node.inputs else -1
        if index >= 0 and self._foldable(self._nodes[index], node):
            node = self._folded(self._nodes[index], node)
            self._nodes[index] = node
        else:
            index = len(self._nodes)
            self._nodes.append(node)
        self._maker.update(dict.fromkeys(node.outputs, index))

    def result(self) -> tuple[Graph, dict[str, SparseTensor]]:
        """The new graph and what it uses."""
        used = {name for node in self._nodes for name in node.inputs} | self._outputs
        tensors = {name: tensor for name, tensor in self._tensors.items() if name in used}
        constants = {name: array for name, array in self._graph.constants.items() if name in used}
        graph = replace(self._graph, nodes=tuple(self._nodes), constants=constants, parameters=tuple(tensors))
        return graph, tensors

    def _foldable(self, conv: Node, norm: Node) -> bool:
        return (
            norm.op == "BatchNormalization"
            and not norm.attributes.get("training_mode", 0)
            and isinstance(norm.attributes.get("epsilon", _EPSILON), float)
            and len(norm.inputs) == 5
            and conv.op == "Conv"
            and len(conv.inputs) > 1
            and conv.inputs[1] in self._tensors
            and self._only_reader(conv.outputs[0])
            and self._only_reader(conv.inputs[1])
            and all(self._per_channel(name, conv) for name in (*filter(None, conv.inputs[2:]), *norm.inputs[1:]))
        )

    def _only_reader(self, name: str) -> bool:
        return len(self._users[name]) == 1 and name not in self._outputs

    def _per_channel(self, name: str, conv: Node) -> bool:
        """Whether a value is known, with one entry for each output channel."""
        channels = self._tensors[conv.inputs[1]].mask.shape[:1]
        if name in self._tensors:
            return self._tensors[name].mask.shape == channels
        return name in self._graph.constants and self._graph.constants[name].shape == channels

    def _folded(self, conv: Node, norm: Node) -> Node:
        """The convolution that computes both; its new weight and bias go to the tensors."""
        scale, shift, mean, variance = (self._float64(name) for name in norm.inputs[1:5])
        factor = scale / np.sqrt(variance + cast("float", norm.attributes.get("epsilon", _EPSILON)))
        source, weight = conv.inputs[:2]
        old = self._float64(conv.inputs[2]) if conv.inputs[2:] and conv.inputs[2] else np.zeros(1)
        self._tensors[weight] = scaled = _scaled(self._tensors[weight], factor)
        bias = self._bias_name(conv)
        self._tensors[bias] = _full((shift + (old - mean) * factor).astype(scaled.values.dtype))
        return replace(conv, inputs=(source, weight, bias), outputs=norm.outputs[:1])

    def _bias_name(self, conv: Node) -> str:
        """Name of the new bias: that of the old one where nobody else reads it, else a fresh one."""
        given = conv.inputs[2] if conv.inputs[2:] else ""
        # A bias that an earlier fold made has no readers in the graph as it came.
        if given in self._tensors and len(self._users.get(given, ())) <= 1 and given not in self._outputs:
            return given
        name = stem = conv.inputs[1].removesuffix(".weight") + ".bias"
        count = 0
        while name in self._names:
            count += 1
            name = f"{stem}_{count}"
        self._names.add(name)
        return name

    def _float64(self, name: str) -> _Float64:
        array = self._tensors[name].to_dense() if name in self._tensors else self._graph.constants[name]
        return array.astype(np.float64)


def _scaled(weight: SparseTensor, factor: _Float64) -> SparseTensor:
    """Each output channel of a weight times its factor, under the same mask."""
    _, columns = matrix_shape(weight.mask.shape)
    values = weight.values * factor[weight.mask.positions // columns]
    return SparseTensor(weight.mask, values.astype(np.result_type(weight.values.dtype, np.float32)))


def _full(array: Array) -> SparseTensor:
    return SparseTensor(Mask(array.shape, np.arange(array.size, dtype=np.int64)), array)
