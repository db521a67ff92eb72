"""The size of every value of a graph, by computing it: no rule of shapes can be wrong or missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dsr_tool.errors import DsrError, UsageError, first_line
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.graph.windows import Window
from dsr_tool.measure.memory.peak import Size, at_batch
from dsr_tool.runtime.reference.convolution import COLUMN_BYTES
from dsr_tool.runtime.reference.interpreter import INERT, OPERATORS
from dsr_tool.sparsity.tensor import Array

__all__ = ["kernel_scratch", "value_sizes"]

# Arrays of the size of the result that our operators hold besides it.
_TEMPORARIES = dict.fromkeys(("Clip", "Elu", "Gelu", "LayerNormalization", "LeakyRelu", "Softmax"), 1)


def value_sizes(
    graph: Graph, weights: Callable[[str], Array], batch: int, input_shape: Sequence[int]
) -> dict[str, Size]:
    """Sizes of all values that depend on the input.

    Args:
        graph: one input, the batch first.
        weights: the dense array of each parameter.
        batch: number of inputs; at most two are computed with, since all dimensions are affine in it.
        input_shape: of one input.

    Raises:
        UsageError: an operator that our runtime does not know, or an input that does not fit.
    """
    if batch < 1:
        raise UsageError(f"--batch {batch} is not allowed; give 1 or more.")
    fixed = graph.inputs[0].shape[0] if graph.inputs[0].shape else None
    if fixed not in (None, batch):
        raise UsageError(f"--batch {batch} does not fit; this file takes a batch of {fixed}.")
    dtype = np.dtype(graph.inputs[0].dtype)
    runs = (1, 2) if batch > 2 and fixed is None else (batch,)
    sizes = [_recorded(graph, weights, np.ones((n, *input_shape), dtype)) for n in runs]
    return at_batch(sizes[0], sizes[1], batch) if len(sizes) > 1 else sizes[0]


def _recorded(graph: Graph, weights: Callable[[str], Array], x: Array) -> dict[str, Size]:
    given = graph.inputs[0].name
    values, sizes = {given: x}, {given: Size(x.shape, x.itemsize, given)}
    known, parameters = dict(graph.constants), frozenset(graph.parameters)
    last = {name: i for i, node in enumerate(graph) for name in (*node.inputs, *node.outputs)}
    for i, node in enumerate(graph):
        arguments = [_argument(name, values, known, parameters, weights) for name in node.inputs]
        for name, array in zip(node.outputs, _computed(node, arguments), strict=False):
            # What says a shape is small, and counts as known once the input's shape is.
            if node.op == "Shape" or not any(read in sizes for read in node.inputs):
                known[name] = array
            elif name:
                shared = [read for read in node.inputs if read in values and _base(values[read]) is _base(array)]
                sizes[name] = Size(array.shape, array.itemsize, sizes[shared[0]].storage if shared else name)
                values[name] = array
        for name in (*node.inputs, *node.outputs):
            if last[name] == i:
                values.pop(name, None)
    return sizes


def _argument(
    name: str,
    values: Mapping[str, Array],
    known: Mapping[str, Array],
    parameters: frozenset[str],
    weights: Callable[[str], Array],
) -> Array | None:
    if not name:
        return None
    if name in values:
        return values[name]
    return weights(name) if name in parameters else known[name]


def _computed(node: Node, arguments: Sequence[Array | None]) -> list[Array]:
    if node.op not in OPERATORS:
        raise UsageError(f"operator {node.op} is not known to the sparse runtime, so its memory cannot be computed.")
    attributes = {name: value for name, value in node.attributes.items() if name not in INERT}
    with _explained(node), np.errstate(all="ignore"):
        result = OPERATORS[node.op](*arguments, **attributes)
        return [np.asarray(array) for array in (result if isinstance(result, tuple) else (result,))]


@contextmanager
def _explained(node: Node) -> Iterator[None]:
    try:
        yield
    except DsrError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise UsageError(
            f"the memory of operator {node.op} (which makes {node.outputs[0]!r}) cannot be computed: "
            f"{first_line(error)}; the graph does not fit this input."
        ) from error


def _base(array: Array) -> Any:
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    return base


def kernel_scratch(node: Node, sizes: Mapping[str, Size], weight_shape: Sequence[int]) -> int:
    """Bytes that an operator of our runtime takes besides its result.

    Args:
        node: the operator.
        sizes: of all values.
        weight_shape: of a convolution's weight; empty for other operators.
    """
    out = sizes[node.outputs[0]]
    if node.op in _TEMPORARIES:
        return _TEMPORARIES[node.op] * out.nbytes
    if node.op not in ("Conv", "MaxPool", "AveragePool") or node.inputs[0] not in sizes:
        return 0
    x = sizes[node.inputs[0]]
    window = _window(node, weight_shape)
    if node.op != "Conv":
        return _padded_bytes(window, x)
    image = _image_bytes(node, window, x, out, weight_shape)
    # Images are computed one by one and then joined.
    return max(image, out.nbytes) if x.shape[0] > 1 else image


def _image_bytes(node: Node, window: Window, x: Size, out: Size, weight_shape: Sequence[int]) -> int:
    """Of one image: its padded copy, im2col blocks, and the rows computed so far."""
    padded, image, taps = _padded_bytes(window, x) // x.shape[0], out.nbytes // out.shape[0], math.prod(window.kernel)
    if node.attributes.get("group", 1) != 1 and weight_shape[1] == 1:
        return padded + image
    row = taps * x.shape[1] * math.prod(out.shape[3:]) * x.itemsize
    rows = out.shape[2] if taps == 1 else max(COLUMN_BYTES // max(row, 1), 1)
    plain = taps == 1 and set(window.strides) == {1}
    columns = 0 if plain else row * min(rows, out.shape[2])
    return padded + (columns if rows >= out.shape[2] else max(columns, image))


def _window(node: Node, weight_shape: Sequence[int]) -> Window:
    def of(name: str) -> tuple[int, ...]:
        value = node.attributes.get(name, ())
        return tuple(int(n) for n in value) if isinstance(value, tuple) else ()

    kernel = of("kernel_shape") or tuple(weight_shape[2:])
    auto_pad = str(node.attributes.get("auto_pad", "NOTSET"))
    return Window.of(kernel, of("strides"), of("pads"), of("dilations"), auto_pad)


def _padded_bytes(window: Window, x: Size) -> int:
    if not any((*window.begin, *window.end)):
        return 0
    sides = zip(x.shape[2:], window.begin, window.end, strict=True)
    return math.prod((*x.shape[:2], *(n + b + e for n, b, e in sides))) * x.itemsize
