"""Models too dense for sparse products, handed to ONNX Runtime where it is installed.

The model is written in the encoding of protocol buffers by hand, since this package runs without `onnx`. Field numbers
are those of `onnx.proto`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError, first_line
from dsr_tool.graph.ir import Attribute, Graph, Node, Value
from dsr_tool.sparsity.tensor import Array, SparseTensor, dense

__all__ = ["DensePlan"]

_IR_VERSION = 9
_MOST_BYTES = 1 << 31  # of one message
_TYPES = {"bool": 9, "int32": 6, "int64": 7, "uint8": 2, "float16": 10, "float32": 1, "float64": 11}
_ERRORS_ONLY = 3


class DensePlan:
    """The first output of a graph as ONNX Runtime computes it."""

    def __init__(self, session: Any, name: str, output: str) -> None:
        """Use `DensePlan.of`."""
        self._session, self._name, self._output = session, name, output

    @classmethod
    def of(cls, graph: Graph, tensors: Mapping[str, SparseTensor], threads: int) -> DensePlan | None:
        """The plan of a graph; None where ONNX Runtime is not installed or does not take it."""
        try:
            import onnxruntime
        except ImportError:
            return None
        if sum(tensor.mask.size * 4 for tensor in tensors.values()) >= _MOST_BYTES:
            return None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = _ERRORS_ONLY
        try:
            session = onnxruntime.InferenceSession(_model(graph, tensors), options, ["CPUExecutionProvider"])
        except Exception:  # noqa: BLE001 - its errors have no common class; the kernels run the model as well
            return None
        return cls(session, graph.inputs[0].name, graph.outputs[0].name)

    def run(self, x: Array) -> Array:
        """Compute the output for an input.

        Raises:
            FormatError: ONNX Runtime cannot.
        """
        try:
            return np.asarray(self._session.run([self._output], {self._name: x})[0])
        except Exception as error:  # as in `of`
            raise FormatError(f"onnxruntime cannot run inputs of shape {x.shape}: {first_line(error)}.") from error


def _model(graph: Graph, tensors: Mapping[str, SparseTensor]) -> bytes:
    opset = _field(2, graph.opset)
    return _field(1, _IR_VERSION) + _field(8, opset) + _field(7, _graph(graph, tensors))


def _graph(graph: Graph, tensors: Mapping[str, SparseTensor]) -> bytes:
    known = {**graph.constants, **{name: dense(tensors[name]) for name in graph.parameters}}
    return b"".join(
        [
            *(_field(1, _node(node)) for node in graph),
            _field(2, "model"),
            *(_field(5, _tensor(name, array)) for name, array in known.items()),
            *(_field(11, _value(value)) for value in graph.inputs),
            *(_field(12, _value(value)) for value in graph.outputs[:1]),
        ]
    )


def _node(node: Node) -> bytes:
    names = [*(_field(1, name) for name in node.inputs), *(_field(2, name) for name in node.outputs)]
    attributes = [_field(5, _attribute(name, value)) for name, value in node.attributes.items()]
    return b"".join([*names, _field(4, node.op), *attributes])


def _attribute(name: str, value: Attribute) -> bytes:
    """The field that holds a value, and the number of its kind, go by its type."""
    first = value[0] if isinstance(value, tuple) and value else value
    scalar, several, number = {int: (3, 8, 2), float: (2, 7, 1), str: (4, 9, 3)}.get(type(first), (3, 8, 2))
    if isinstance(value, tuple):
        return _field(1, name) + b"".join(_field(several, item) for item in value) + _field(20, number + 5)
    return _field(1, name) + _field(scalar, value) + _field(20, number)


def _tensor(name: str, array: Array) -> bytes:
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    sizes = b"".join(_field(1, n) for n in array.shape)
    return sizes + _field(2, _TYPES[array.dtype.name]) + _field(8, name) + _field(9, little.tobytes())


def _value(value: Value) -> bytes:
    sizes = (_field(2, "batch") if n is None else _field(1, n) for n in value.shape)
    shape = b"".join(_field(1, size) for size in sizes)
    return _field(1, value.name) + _field(2, _field(1, _field(1, _TYPES[value.dtype]) + _field(2, shape)))


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """One field: a whole number, a float, or bytes with their length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode("utf-8") if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    return bytes(_septets(value))


def _septets(value: int) -> Iterable[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
