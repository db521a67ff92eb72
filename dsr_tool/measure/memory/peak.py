"""Memory of running a graph: activations by liveness, and weights as each runtime keeps them.

An activation lives from the operator that makes it to the last one that reads it. The input is the caller's and lives
throughout. What takes no memory of its own (views, values computed in place) shares the storage of what it views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsr_tool.graph.ir import Graph, Node
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["Peak", "Size", "Step", "at_batch", "csr_weight_bytes", "fused_steps", "in_order_steps", "peak"]

# Operators that onnxruntime computes inside the convolution before them.
_ACTIVATIONS = frozenset({"Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "HardSigmoid"})
# Operators that write into their first input, or either of two, where nobody reads it any more.
_IN_PLACE = _ACTIVATIONS | {"Add", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSwish", "Mul", "Neg", "Sqrt", "Sub"}


@dataclass(frozen=True)
class Size:
    """What a value takes.

    Attributes:
        shape: its dimensions.
        itemsize: bytes of one entry.
        storage: name of the value whose memory holds it; its own name unless it is a view.
    """

    shape: tuple[int, ...]
    itemsize: int
    storage: str

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Step:
    """One operator, or several that a runtime computes as one.

    Attributes:
        node: the operator, the first of several.
        reads: storages that must be there.
        writes: storages that it makes.
        scratch_bytes: what its computation takes besides.
    """

    node: Node
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    scratch_bytes: int = 0


@dataclass(frozen=True)
class Peak:
    """The most that is alive at once.

    Attributes:
        nbytes: inputs, activations and scratch together.
        moment: the operator at which they are most, as `Conv -> conv_0`.
        live: the storages that are alive then.
    """

    nbytes: int
    moment: str
    live: tuple[str, ...]


def at_batch(first: Mapping[str, Size], second: Mapping[str, Size], batch: int) -> dict[str, Size]:
    """Sizes at any batch from those at batches of one and two: every dimension is affine in the batch."""
    return {
        name: replace(size, shape=tuple(a + (b - a) * (batch - 1) for a, b in zip(size.shape, other, strict=True)))
        for name, size in first.items()
        for other in [second[name].shape]
    }


def peak(graph: Graph, steps: Sequence[Step], sizes: Mapping[str, Size]) -> Peak:
    """The largest sum of live storages over the steps.

    Args:
        graph: says what lives throughout: its inputs.
        steps: in the order in which they run.
        sizes: of every storage that the steps name.
    """
    held = {sizes[value.name].storage for value in graph.inputs if value.name in sizes}
    kept = {sizes[value.name].storage for value in graph.outputs if value.name in sizes}
    last = {name: i for i, step in enumerate(steps) for name in (*step.reads, *step.writes)}
    live = set(held)
    best = Peak(sum(sizes[name].nbytes for name in live), "input", tuple(sorted(live)))
    for i, step in enumerate(steps):
        live.update(step.writes)
        now = sum(sizes[name].nbytes for name in live) + step.scratch_bytes
        if now > best.nbytes:
            best = Peak(now, f"{step.node.op} -> {step.node.outputs[0]}", tuple(sorted(live)))
        live -= {name for name in (*step.reads, *step.writes) if last[name] == i and name not in held | kept}
    return best


def in_order_steps(graph: Graph, sizes: Mapping[str, Size], scratch: Callable[[Node], int] = lambda _: 0) -> list[Step]:
    """Each operator by itself; views cost nothing.

    Args:
        graph: the computation.
        sizes: of every value that depends on the input; nodes that make no such value are left out.
        scratch: bytes that the computation of a node takes besides its result.
    """
    return [
        Step(node, _storages(node.inputs, sizes), _storages(node.outputs, sizes), scratch(node))
        for node in graph
        if any(name in sizes for name in node.outputs)
    ]


def fused_steps(graph: Graph, sizes: Mapping[str, Size]) -> tuple[list[Step], dict[str, Size]]:
    """As onnxruntime computes a graph: sums and activations inside convolutions, and in place where it can.

    Args:
        graph: the computation, normalisation folded.
        sizes: of every value that depends on the input.

    Returns:
        The steps, and the sizes with the storages that they share.
    """
    groups = _fused([node for node in graph if any(name in sizes for name in node.outputs)], graph)
    storage = {name: size.storage for name, size in sizes.items()}
    last = {storage[name]: i for i, group in enumerate(groups) for n in group for name in n.inputs if name in storage}
    kept = {storage[value.name] for value in (*graph.inputs, *graph.outputs) if value.name in storage}
    place: dict[str, str] = {}
    steps = []
    for i, group in enumerate(groups):
        final = group[-1].outputs[0]
        for name in _written_over(group):
            free = name in storage and last[storage[name]] == i and storage[name] not in kept
            if free and storage[final] == final and sizes[name].nbytes == sizes[final].nbytes:
                place[final] = place.get(storage[name], storage[name])
                break
        inner = {node.outputs[0] for node in group[:-1]}
        reads = [storage[name] for node in group for name in node.inputs if name in storage and name not in inner]
        writes = [storage[name] for name in group[-1].outputs if name in storage]
        read, written = (tuple(dict.fromkeys(place.get(name, name) for name in names)) for names in (reads, writes))
        steps.append(Step(group[0], read, written))
    return steps, {name: replace(size, storage=place.get(size.storage, size.storage)) for name, size in sizes.items()}


def _fused(nodes: Iterable[Node], graph: Graph) -> list[list[Node]]:
    """Nodes in groups that are computed at once: a convolution, a sum, an activation."""
    readers, outputs = graph.users(), {value.name for value in graph.outputs}
    groups: list[list[Node]] = []
    ends: dict[str, list[Node]] = {}  # the last value of a group that has room for more -> the group
    for node in nodes:
        open_ = [ends[name] for name in node.inputs if name in ends and len(readers[name]) == 1 and name not in outputs]
        open_ = [group for group in open_ if _has_room(group, node.op)]
        if not open_:
            groups.append([node])
        else:
            # Of the two sides of a sum the later one, as the other is there by then.
            group = max(open_, key=groups.index)
            del ends[group[-1].outputs[0]]
            group.append(node)
            groups.append(groups.pop(groups.index(group)))
        if groups[-1][0].op == "Conv":
            ends[node.outputs[0]] = groups[-1]
    return groups


def _has_room(group: Sequence[Node], op: str) -> bool:
    taken = {node.op for node in group}
    return not taken & _ACTIVATIONS and (op in _ACTIVATIONS or (op == "Add" and "Add" not in taken))


def _written_over(group: Sequence[Node]) -> list[str]:
    """Values whose place the result of a group may take."""
    if group[0].op == "Conv":
        inner = {node.outputs[0] for node in group}
        return [name for node in group[1:] if node.op == "Add" for name in node.inputs if name not in inner]
    return list(group[0].inputs[:2]) if group[0].op in _IN_PLACE else []


def _storages(names: Iterable[str], sizes: Mapping[str, Size]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(sizes[name].storage for name in names if name in sizes))


def csr_weight_bytes(tensor: SparseTensor, *, max_density: float) -> int:
    """Bytes of a weight as our runtime keeps it: CSR with int32 indices up to a density, dense above it."""
    width = tensor.values.dtype.itemsize
    if tensor.mask.density > max_density:
        return tensor.mask.size * width
    rows, _ = matrix_shape(tensor.mask.shape)
    return tensor.mask.active * (width + np.dtype(np.int32).itemsize) + (rows + 1) * np.dtype(np.int32).itemsize
