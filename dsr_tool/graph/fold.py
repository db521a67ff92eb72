"""Graph pass: folds batch normalisation into the convolution or linear layer before it.

Requires: a valid graph in inference mode, with a tensor for each parameter.
Does: scales the layer's weight and bias by the norm's factors, and removes the norm. A norm stays if another node reads
the layer's output or weight, or if its parameters are not known.
Ensures: outputs as before, up to rounding; masks as before, even where a scaled weight becomes zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt

from dsr_tool.graph.ir import Graph, Node
from dsr_tool.sparsity.at_rest import dtype_of
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["fold_norms"]

_EPSILON = 1e-5
"""Value of a norm's attribute epsilon if the node has none; given by the standard."""
_Float64 = npt.NDArray[np.float64]


def fold_norms(graph: Graph, tensors: Mapping[str, SparseTensor]) -> tuple[Graph, dict[str, SparseTensor]]:
    """Folds every BatchNormalization that directly follows a convolution or linear layer; see the module's docstring.

    Args:
        graph: a computation in inference mode.
        tensors: a tensor for each of its parameters.

    Returns:
        The graph without those norms, and the tensors that it reads. Scaled values are computed in float64 and rounded
        once, to the type that they had but at least float32.
    """
    folder = _Folder(graph, tensors)
    # A norm that divides by zero gives infinities, folded or not.
    with np.errstate(all="ignore"):
        for node in graph:
            folder.add(node)
    return folder.result()


class _Folder:
    """Copies a graph node by node; `add` replaces a layer when the node is its norm."""

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
        """Folds the node into the one that makes its input, or copies it."""
        index = self._maker.get(node.inputs[0], -1) if node.inputs else -1
        if index >= 0 and self._foldable(self._nodes[index], node):
            node = self._folded(self._nodes[index], node)
            self._nodes[index] = node
        else:
            index = len(self._nodes)
            self._nodes.append(node)
        self._maker.update(dict.fromkeys(node.outputs, index))

    def result(self) -> tuple[Graph, dict[str, SparseTensor]]:
        """Returns the new graph and the tensors that it reads."""
        used = {name for node in self._nodes for name in node.inputs} | self._outputs
        tensors = {name: tensor for name, tensor in self._tensors.items() if name in used}
        constants = {name: array for name, array in self._graph.constants.items() if name in used}
        graph = replace(self._graph, nodes=tuple(self._nodes), constants=constants, parameters=tuple(tensors))
        return graph, tensors

    def _foldable(self, conv: Node, norm: Node) -> bool:
        return (
            norm.op == "BatchNormalization"
            and not norm.attributes.get("training_mode", 0)
            # Anything else is an invalid graph; the code that computes the norm says so.
            and isinstance(norm.attributes.get("epsilon", _EPSILON), float)
            and len(norm.inputs) == 5
            and (conv.op == "Conv" or _is_linear(conv))
            and len(conv.inputs) > 1
            and conv.inputs[1] in self._tensors
            # Another reader would see the scaled output or weight.
            and self._only_reader(conv.outputs[0])
            and self._only_reader(conv.inputs[1])
            and all(self._per_channel(name, conv) for name in (*filter(None, conv.inputs[2:]), *norm.inputs[1:]))
        )

    def _only_reader(self, name: str) -> bool:
        return len(self._users[name]) == 1 and name not in self._outputs

    def _per_channel(self, name: str, conv: Node) -> bool:
        """Returns whether a value is known and has one entry for each output channel."""
        channels = self._tensors[conv.inputs[1]].mask.shape[:1]
        if name in self._tensors:
            return self._tensors[name].mask.shape == channels
        return name in self._graph.constants and self._graph.constants[name].shape == channels

    def _folded(self, conv: Node, norm: Node) -> Node:
        """Returns the convolution that computes both, and stores its new weight and bias."""
        scale, shift, mean, variance = (self._float64(name) for name in norm.inputs[1:5])
        factor = scale / np.sqrt(variance + cast("float", norm.attributes.get("epsilon", _EPSILON)))
        source, weight = conv.inputs[:2]
        old = self._float64(conv.inputs[2]) if conv.inputs[2:] and conv.inputs[2] else np.zeros(1)
        self._tensors[weight] = scaled = _scaled(self._tensors[weight], factor)
        bias = self._bias_name(conv)
        self._tensors[bias] = _full((shift + (old - mean) * factor).astype(dtype_of(scaled)))
        return replace(conv, inputs=(source, weight, bias), outputs=norm.outputs[:1])

    def _bias_name(self, conv: Node) -> str:
        """Returns the name of the new bias: the old bias's name if no other node reads it, else a new one."""
        old = conv.inputs[2] if conv.inputs[2:] else ""
        # A bias that an earlier fold made has no readers in the original graph.
        if old in self._tensors and len(self._users.get(old, ())) <= 1 and old not in self._outputs:
            return old
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


def _is_linear(node: Node) -> bool:
    """Returns whether a node is x W^T + b, with an output channel in each row of W, as a convolution has it."""
    defaults = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    values = {name: node.attributes.get(name, default) for name, default in defaults.items()}
    return node.op == "Gemm" and values == {**defaults, "transB": 1}


def _scaled(weight: SparseTensor, factor: _Float64) -> SparseTensor:
    """Returns a weight with each output channel times its factor, under the same mask."""
    if isinstance(weight, GridTensor):
        return weight.scaled(factor)
    _, columns = matrix_shape(weight.mask.shape)
    # An output channel is a row of the weight as a matrix, so a position tells its channel.
    values = weight.values * factor[weight.mask.positions // columns]
    return SparseTensor(weight.mask, values.astype(np.result_type(weight.values.dtype, np.float32)))


def _full(array: Array) -> SparseTensor:
    return SparseTensor(Mask(array.shape, np.arange(array.size, dtype=np.int64)), array)
