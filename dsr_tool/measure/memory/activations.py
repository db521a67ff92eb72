"""Sizes of the values of a graph, and the most bytes of them that are alive at once.

Sizes come from running every operator in the reference instead of from shape inference, so no shape rule can be wrong
or missing. A value lives from the operator that computes it to the last one that reads it. Inputs and outputs belong to
the caller: an input is alive throughout, an output from its operator on. A view takes no memory of its own; it shares
the storage of the array that it looks into.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.graph.ir import Graph
from dsr_tool.graph.operators import operator_of
from dsr_tool.runtime.reference.call import Call, bind, fold
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight, dense

__all__ = ["Peak", "Size", "at_batch", "peak", "value_sizes"]


@dataclass(frozen=True)
class Size:
    """The memory of one value.

    Attributes:
        shape: its dimensions, the batch first.
        itemsize: bytes of one entry.
        storage: name of the value whose memory holds it; its own name unless it is a view.
        scratch_bytes: bytes that the reference allocates besides the value while it computes it.
    """

    shape: tuple[int, ...]
    itemsize: int
    storage: str
    # Python's own small objects are traced too, and differ from run to run.
    scratch_bytes: int = field(default=0, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Peak:
    """The largest number of bytes that are alive at once.

    Attributes:
        nbytes: inputs, values and scratch together.
        moment: the operator that runs then, as `Conv -> conv_0`; `input` if nothing exceeds the inputs.
    """

    nbytes: int
    moment: str


def peak(graph: Graph, sizes: Mapping[str, Size], *, scratch: bool = False) -> Peak:
    """Returns the largest sum of live bytes over the nodes, computed one after the other in the graph's order.

    Args:
        graph: the computation.
        sizes: the size of every value that depends on the input; nodes without such a value cost nothing.
        scratch: also count what the reference allocates besides the values.
    """
    nodes = [node for node in graph if any(name in sizes for name in node.outputs)]
    # Views share a storage, so a value is freed after the last reader of any of its views.
    touched = [_storages((*node.inputs, *node.outputs), sizes) for node in nodes]
    last = {name: i for i, names in enumerate(touched) for name in names}
    inputs, outputs = (_storages((v.name for v in values), sizes) for values in (graph.inputs, graph.outputs))
    live = set(inputs)
    best = Peak(sum(sizes[name].nbytes for name in live), "input")
    for i, node in enumerate(nodes):
        # While a node runs, what it reads and what it writes are both alive.
        live.update(_storages(node.outputs, sizes))
        now = sum(sizes[name].nbytes for name in live)
        if scratch:
            now += max(sizes[name].scratch_bytes for name in node.outputs if name in sizes)
        if now > best.nbytes:
            best = Peak(now, f"{node.op} -> {node.outputs[0]}")
        live -= {name for name in touched[i] if last[name] == i} - {*inputs, *outputs}
    return best


def _storages(names: Iterable[str], sizes: Mapping[str, Size]) -> tuple[str, ...]:
    """Returns the storages of those values that depend on the input, each once."""
    return tuple(dict.fromkeys(sizes[name].storage for name in names if name in sizes))


def value_sizes(
    graph: Graph, tensors: Mapping[str, SparseTensor], batch: int, input_shape: Sequence[int]
) -> dict[str, Size]:
    """Returns the size of every value that depends on the input.

    Args:
        graph: a computation with one input, the batch first.
        tensors: a tensor for each of its parameters.
        batch: number of inputs. At most two are computed: every dimension is affine in the batch.
        input_shape: shape of one input, without the batch.

    Raises:
        UsageError: the reference does not compute an operator, or the input does not fit the graph.
    """
    if batch < 1:
        raise UsageError(f"--batch {batch} is not in 1, 2, ...; give the number of inputs at once.")
    declared = graph.inputs[0].shape[0] if graph.inputs[0].shape else None
    if declared not in (None, batch):
        raise UsageError(f"--batch {batch} does not fit; this file takes a batch of {declared}.")
    dtype = np.dtype(graph.inputs[0].dtype)
    # Two small batches instead of a large one: 100,000 photographs would need 60 GB for the input alone.
    batches = (1, 2) if batch > 2 and declared is None else (batch,)
    try:
        with _traced_allocations():
            sizes = [_computed_sizes(graph, tensors, np.ones((n, *input_shape), dtype)) for n in batches]
    except FormatError as error:
        # The graph was checked when it was opened, so the input is what does not fit.
        raise UsageError(f"the memory for an input of {list(input_shape)} cannot be computed: {error}") from error
    return sizes[0] if len(sizes) == 1 else _joined(graph, sizes[0], at_batch(sizes[0], sizes[1], batch))


def at_batch(one: Mapping[str, Size], two: Mapping[str, Size], batch: int) -> dict[str, Size]:
    """Returns the sizes at any batch from those at batches of one and two, by a straight line through both."""

    def line(first: int, second: int) -> int:
        return first + (second - first) * (batch - 1)

    return {
        name: Size(
            tuple(map(line, size.shape, two[name].shape)),
            size.itemsize,
            size.storage,
            # A line through two measured points may fall below zero by some bytes of Python's own.
            max(line(size.scratch_bytes, two[name].scratch_bytes), 0),
        )
        for name, size in one.items()
    }


def _joined(graph: Graph, one: Mapping[str, Size], sizes: Mapping[str, Size]) -> dict[str, Size]:
    """Corrects the scratch of convolutions, which is not affine in the batch.

    The reference convolves image by image, with a padded copy and an im2col block of one image at a time, and joins the
    results in the end. At that moment every result is there twice.

    Args:
        graph: the computation.
        one: sizes at a batch of one.
        sizes: sizes at the batch that is asked for.
    """
    convolutions = [node for node in graph if operator_of(node.op).windowed and operator_of(node.op).weights]
    names = [node.outputs[0] for node in convolutions if node.outputs[0] in sizes]
    return {
        **sizes,
        **{
            name: replace(sizes[name], scratch_bytes=max(one[name].scratch_bytes, sizes[name].nbytes)) for name in names
        },
    }


@contextmanager
def _traced_allocations() -> Iterator[None]:
    """Has Python trace numpy's allocations; leaves a trace running that somebody else has started."""
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    try:
        yield
    finally:
        if started:
            tracemalloc.stop()


def _computed_sizes(graph: Graph, tensors: Mapping[str, SparseTensor], x: Array) -> dict[str, Size]:
    """Runs the graph on `x` and returns the sizes of its values."""
    input_name = graph.inputs[0].name
    values, sizes = {input_name: x}, {input_name: Size(x.shape, x.itemsize, input_name)}
    known: dict[str, Weight] = {**graph.constants, **{name: tensors[name] for name in graph.parameters}}
    last = {name: i for i, node in enumerate(graph) for name in (*node.inputs, *node.outputs)}
    for i, node in enumerate(graph):
        # Binding builds CSR matrices of the weights, before the trace of this node begins.
        call = bind(node, known)
        if all(name in known for name in call.inputs if name):
            known.update(fold(call, known))
            continue
        outputs, scratch = _run(call, values, known)
        # A shape is known as soon as the input's is: what is computed from it is a constant, not an activation.
        if node.op == "Shape":
            known.update(outputs)
            continue
        for name, array in outputs.items():
            viewed = [read for read in node.inputs if read in values and _owner(values[read]) is _owner(array)]
            storage = sizes[viewed[0]].storage if viewed else name
            sizes[name] = Size(array.shape, array.itemsize, storage, scratch)
        values.update(outputs)
        # Freed as early as the reference frees them, so that deep graphs fit into memory.
        for name in (*node.inputs, *node.outputs):
            if last[name] == i:
                values.pop(name, None)
    return sizes


def _run(call: Call, values: Mapping[str, Array], known: Mapping[str, Weight]) -> tuple[dict[str, Array], int]:
    """Runs one operator; returns its outputs and the most bytes that it had allocated besides them."""
    arguments = [None if not name else values[name] if name in values else dense(known[name]) for name in call.inputs]
    # numpy reports its allocations to tracemalloc, so temporaries inside of functions are seen too.
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    with np.errstate(all="ignore"):
        outputs = call.compute(arguments)
    after, most = tracemalloc.get_traced_memory()
    return outputs, most - max(before, after)


def _owner(array: Array) -> object:
    """Returns the object that owns the memory of an array: the array itself unless it is a view."""
    owner: object = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    return owner
