"""What running a graph takes in each runtime, computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsr_tool.graph.fold import fold_norms
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.measure.memory.arena import arena_bytes
from dsr_tool.measure.memory.peak import Size, csr_weight_bytes, fused_steps, in_order_steps, peak
from dsr_tool.measure.memory.activations import kernel_scratch, value_sizes
from dsr_tool.runtime.reference.matrices import MAX_CSR_DENSITY
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["Row", "Running", "folded"]

_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})

Row = tuple[int, int, str]
"""Bytes of weights, bytes of activations with all that goes with them, and the operator at which they are most."""


@dataclass(frozen=True)
class Running:
    """A graph that is ready to be looked at.

    Attributes:
        graph: norms folded.
        weights: the dense array of each parameter.
        tensors: the same sparse, for our runtime; none where it does not run the file.
    """

    graph: Graph
    weights: Callable[[str], Array]
    tensors: Mapping[str, SparseTensor] = field(default_factory=dict)

    def computed(self, batch: int, shape: Sequence[int]) -> tuple[dict[str, Any], dict[str, Row]]:
        """Activations by liveness, and a row for each runtime.

        Raises:
            UsageError: an operator that our runtime does not know, or an input that does not fit.
        """
        graph, sizes = self.graph, value_sizes(self.graph, self.weights, batch, shape)
        in_order = peak(graph, in_order_steps(graph, sizes), sizes)
        steps, shared = fused_steps(graph, sizes)
        fused = peak(graph, steps, shared)
        activations = {
            "in_order_bytes": in_order.nbytes,
            "in_order_moment": in_order.moment,
            "fused_bytes": fused.nbytes,
            "fused_moment": fused.moment,
        }
        dense = sum(self.weights(name).nbytes for name in graph.parameters)
        given = sizes[graph.inputs[0].name].nbytes
        rows = {"ONNX Runtime": (dense, given + arena_bytes(graph, steps, shared), fused.moment)}
        if self.tensors:
            ours = peak(graph, in_order_steps(graph, sizes, lambda node: self._scratch(node, sizes)), sizes)
            rows["scipy runtime"] = (self._kept_bytes(), ours.nbytes, ours.moment)
        return activations, rows

    def _scratch(self, node: Node, sizes: Mapping[str, Size]) -> int:
        weight = self.tensors.get(node.inputs[1]) if len(node.inputs) > 1 else None
        return kernel_scratch(node, sizes, weight.mask.shape if weight is not None else ())

    def _kept_bytes(self) -> int:
        """Bytes of all weights as our runtime keeps them: those of products as CSR where they are sparse enough."""
        products = [node for node in self.graph if node.op in _PRODUCTS and len(node.inputs) > 1]
        multiplied = {node.inputs[1] for node in products if not self._depthwise(node)}
        return sum(
            csr_weight_bytes(tensor, max_density=MAX_CSR_DENSITY if name in multiplied else -1)
            for name, tensor in self.tensors.items()
        )

    def _depthwise(self, node: Node) -> bool:
        weight = self.tensors.get(node.inputs[1])
        return node.attributes.get("group", 1) != 1 and weight is not None and weight.mask.shape[1] == 1


def folded(graph: Graph, tensors: Mapping[str, SparseTensor]) -> Running:
    """With norms folded and weights in the type of the input, as both runtimes compute."""
    dtype = graph.inputs[0].dtype
    taken = {name: _as_type(tensors[name], dtype) for name in graph.parameters}
    folded, ready = fold_norms(graph, taken)
    return Running(folded, lambda name: ready[name].to_dense(), ready)


def _as_type(tensor: SparseTensor, dtype: str) -> SparseTensor:
    if not np.issubdtype(tensor.values.dtype, np.floating):
        return tensor
    return SparseTensor(tensor.mask, tensor.values.astype(dtype, copy=False))
