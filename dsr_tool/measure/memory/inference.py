"""The memory of running a model in the sparse runtime, computed.

With kernels it is read from the compiler's plan, which fixes where every value lies before the first run. Without them
the reference runs the model, and its memory follows from the sizes of the values. ONNX Runtime's memory depends on its
allocator and on what its release fuses, so it is not computed but measured (`process.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsr_tool.graph.ir import Graph
from dsr_tool.graph.operators import operator_of
from dsr_tool.measure.memory.activations import Peak, peak, value_sizes
from dsr_tool.runtime.compiler.memory import PlanMemory
from dsr_tool.runtime.kernels.library import level
from dsr_tool.runtime.reference.matrices import MAX_CSR_DENSITY
from dsr_tool.runtime.session import Session, decode
from dsr_tool.runtime.source import Model
from dsr_tool.sparsity.at_rest import arrays_of, dtype_of
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["ComputedRow", "computed_inference", "csr_weight_bytes"]

_INDEX_BYTES = np.dtype(np.int32).itemsize
"""Bytes of one column index or row offset in the reference's CSR matrices."""


@dataclass(frozen=True)
class ComputedRow:
    """The computed memory of one runtime; None stands for what only a measurement tells.

    Attributes:
        runtime: its name, with the instruction set of its kernels or what it hands the model to.
        weights_bytes: bytes that stay from run to run: weights, and the tables and tensors that go with them.
        activations_bytes: bytes of the input, of all values alive at the worst moment, and of scratch.
        moment: the operator that runs at that moment, as `Conv -> conv_0`; None if values lie in an arena.
    """

    runtime: str
    weights_bytes: int | None = None
    activations_bytes: int | None = None
    moment: str | None = None


def computed_inference(model: Model, batch: int, shape: Sequence[int]) -> tuple[Peak, ComputedRow]:
    """Computes the largest sum of activations that are alive, and the memory of the sparse runtime as users run it.

    Args:
        model: an archive or ONNX file, or a traced module.
        batch: inputs at once.
        shape: shape of one input.

    Returns:
        The peak of the values, computed operator by operator, and the row of the sparse runtime.

    Raises:
        UsageError: the runtime does not know an operator, or the input does not fit.
    """
    graph, tensors = decode(model)
    # The graph after folding, which is what sessions run.
    sizes = value_sizes(graph, tensors, batch, shape)
    in_order = peak(graph, sizes)
    session = Session(model, batch=batch)
    if session.runtime == "scipy":
        run = peak(graph, sizes, scratch=True)
        row = ComputedRow("scipy runtime", _reference_weight_bytes(graph, tensors), run.nbytes, run.moment)
    elif (memory := session.memory) and (coverage := session.coverage):
        # Fallbacks run one at a time, so only the largest scratch counts.
        outputs = [fallback.output for fallback in coverage.fallbacks]
        scratch = max((sizes[name].scratch_bytes for name in outputs if name in sizes), default=0)
        row = _kernels_row(memory, tensors, sizes[graph.inputs[0].name].nbytes + scratch)
    else:
        # `auto` gave a dense model to ONNX Runtime, or the input is too large to be planned for in advance.
        row = ComputedRow(f"sparse runtime ({level() if session.runtime == 'native' else session.runtime})")
    return in_order, row


def _kernels_row(memory: PlanMemory, tensors: Mapping[str, SparseTensor], other_bytes: int) -> ComputedRow:
    """Returns the row of a plan.

    Args:
        memory: the plan's own account.
        tensors: the tensors of its graph.
        other_bytes: bytes of the input, and of scratch of nodes that run on the reference.
    """
    # A session keeps the decoded tensors beside the packed weights: an input of another shape needs another plan.
    decoded = sum(array.nbytes for tensor in tensors.values() for array in arrays_of(tensor))
    weights = memory.weight_bytes + memory.table_bytes + memory.constant_bytes + decoded
    return ComputedRow(f"sparse runtime ({level()})", weights, memory.arena_bytes + memory.array_bytes + other_bytes)


def _reference_weight_bytes(graph: Graph, tensors: Mapping[str, SparseTensor]) -> int:
    """Returns the bytes of all weights as the reference keeps them: CSR where they multiply and are sparse enough."""
    multiplied: set[str] = set()
    for node in graph:
        inputs = [node.inputs[i] for i in operator_of(node.op).weights if i < len(node.inputs)]
        weights = [name for name in inputs if name in tensors]
        # The reference applies filters of single channels densely, tap by tap.
        depthwise = node.attributes.get("group", 1) != 1 and all(tensors[name].mask.shape[1] == 1 for name in weights)
        multiplied.update([] if depthwise else weights)
    return sum(
        csr_weight_bytes(tensor, max_density=MAX_CSR_DENSITY if name in multiplied else -1)
        for name, tensor in tensors.items()
    )


def csr_weight_bytes(tensor: SparseTensor, *, max_density: float) -> int:
    """Returns the bytes of a weight as CSR with int32 indices up to a density, as a dense array above it."""
    width = dtype_of(tensor).itemsize
    # Above it BLAS is faster than scipy's CSR product, so the reference keeps the dense matrix.
    if tensor.mask.density > max_density:
        return tensor.mask.size * width
    # One row per output channel, and one offset more than rows.
    rows, _ = matrix_shape(tensor.mask.shape)
    return tensor.mask.active * (width + _INDEX_BYTES) + (rows + 1) * _INDEX_BYTES
