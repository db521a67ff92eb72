"""Plans of models that are too dense for sparse kernels: ONNX Runtime computes them if it is installed.

The model is serialized here, field by field in the wire format of protocol buffers, because this package runs without
`onnx`. Field numbers are those of `onnx.proto`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from dsr_tool.errors import FormatError, first_line
from dsr_tool.graph.ir import Attribute, Graph, Node, Value
from dsr_tool.runtime.kernels.forks import start_anew_in_children
from dsr_tool.sparsity.tensor import Array, SparseTensor, dense

__all__ = ["OnnxRuntimePlan"]

_IR_VERSION = 9
_MAX_MESSAGE_BYTES = 1 << 31
"""Largest message in bytes that protocol buffers can hold."""
_TENSOR_TYPES = {"bool": 9, "int32": 6, "int64": 7, "uint8": 2, "float16": 10, "float32": 1, "float64": 11}
"""numpy type -> its number in `TensorProto.DataType`."""
_LOG_ERRORS = 3
"""Log level of ONNX Runtime from which warnings are not printed."""

# Wire types of protocol buffers, the low three bits of a field's key.
_VARINT, _LENGTH_DELIMITED, _FIXED32 = 0, 2, 5


class _InferenceSession(Protocol):
    """The part of `onnxruntime.InferenceSession` that is used; the package has no types."""

    def run(self, output_names: Sequence[str], input_feed: Mapping[str, Array]) -> Sequence[Array]:
        """Computes the outputs with these names."""


class OnnxRuntimePlan:
    """Computes the outputs of a graph with ONNX Runtime, from dense weights."""

    def __init__(
        self, session: _InferenceSession, graph: Graph, tensors: Mapping[str, SparseTensor], threads: int
    ) -> None:
        """Wraps a loaded model; `OnnxRuntimePlan.of` loads one."""
        self._session: _InferenceSession | None = session
        self._graph, self._tensors, self._threads = graph, tensors, threads
        start_anew_in_children(self)

    @classmethod
    def of(cls, graph: Graph, tensors: Mapping[str, SparseTensor], threads: int) -> OnnxRuntimePlan | None:
        """Loads a graph into ONNX Runtime.

        Args:
            graph: one input.
            tensors: a tensor for each of its parameters.
            threads: number of threads that compute one operator.

        Returns:
            The plan; None if ONNX Runtime is not installed or refuses the model, or if the weights exceed one message.
        """
        session = _load(graph, tensors, threads)
        return None if session is None else cls(session, graph, tensors, threads)

    def run(self, x: Array) -> tuple[Array, ...]:
        """Computes the outputs for an input, in the order of the graph.

        Raises:
            FormatError: ONNX Runtime refuses the input, or fails on it.
        """
        if self._session is None:
            self._session = _load(self._graph, self._tensors, self._threads)
        if self._session is None:
            raise FormatError("onnxruntime cannot load the model again in a forked process.")
        try:
            names = [value.name for value in self._graph.outputs]
            return tuple(map(np.asarray, self._session.run(names, {self._graph.inputs[0].name: x})))
        except Exception as error:  # its errors have no common class
            raise FormatError(f"onnxruntime cannot run inputs of shape {x.shape}: {first_line(error)}.") from error

    def start_anew(self) -> None:
        """Drops the session in a forked process: a run would wait for its threads, which are missing there."""
        if self._session is not None:
            # Never freed, since that would wait for the threads too.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
            self._session = None


def _load(graph: Graph, tensors: Mapping[str, SparseTensor], threads: int) -> _InferenceSession | None:
    """Returns a session of ONNX Runtime; None as in `OnnxRuntimePlan.of`."""
    try:
        import onnxruntime
    except ImportError:
        return None
    if sum(tensor.mask.size * 4 for tensor in tensors.values()) >= _MAX_MESSAGE_BYTES:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _LOG_ERRORS
    try:
        session: _InferenceSession = onnxruntime.InferenceSession(
            _model(graph, tensors), options, ["CPUExecutionProvider"]
        )
    except Exception:  # noqa: BLE001 - its errors have no common class, and the kernels can run the model too
        return None
    return session


def _model(graph: Graph, tensors: Mapping[str, SparseTensor]) -> bytes:
    """Returns a `ModelProto`."""
    opset = _field(2, graph.opset)
    return _field(1, _IR_VERSION) + _field(8, opset) + _field(7, _graph(graph, tensors))


def _graph(graph: Graph, tensors: Mapping[str, SparseTensor]) -> bytes:
    """Returns a `GraphProto` whose initializers are the constants and the dense weights."""
    arrays = {**graph.constants, **{name: dense(tensors[name]) for name in graph.parameters}}
    return b"".join(
        [
            *(_field(1, _node(node)) for node in graph),
            _field(2, "model"),
            *(_field(5, _tensor(name, array)) for name, array in arrays.items()),
            *(_field(11, _value(value)) for value in graph.inputs),
            *(_field(12, _value(value)) for value in graph.outputs),
        ]
    )


def _node(node: Node) -> bytes:
    """Returns a `NodeProto`."""
    names = [*(_field(1, name) for name in node.inputs), *(_field(2, name) for name in node.outputs)]
    attributes = [_field(5, _attribute(name, value)) for name, value in node.attributes.items()]
    return b"".join([*names, _field(4, node.op), *attributes])


def _attribute(name: str, value: Attribute) -> bytes:
    """Returns an `AttributeProto`; the type of the value decides which field holds it."""
    first = value[0] if isinstance(value, tuple) and value else value
    # (field of one value, field of several, number of the type); the type of a list is five further.
    scalar, several, number = {int: (3, 8, 2), float: (2, 7, 1), str: (4, 9, 3)}.get(type(first), (3, 8, 2))
    if isinstance(value, tuple):
        return _field(1, name) + b"".join(_field(several, item) for item in value) + _field(20, number + 5)
    return _field(1, name) + _field(scalar, value) + _field(20, number)


def _tensor(name: str, array: Array) -> bytes:
    """Returns a `TensorProto` with raw little-endian data."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    sizes = b"".join(_field(1, n) for n in array.shape)
    return sizes + _field(2, _TENSOR_TYPES[array.dtype.name]) + _field(8, name) + _field(9, little.tobytes())


def _value(value: Value) -> bytes:
    """Returns a `ValueInfoProto`; every free dimension is called `batch`."""
    sizes = (_field(2, "batch") if n is None else _field(1, n) for n in value.shape)
    shape = b"".join(_field(1, size) for size in sizes)
    return _field(1, value.name) + _field(2, _field(1, _field(1, _TENSOR_TYPES[value.dtype]) + _field(2, shape)))


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """Returns one field: its key, and the value as a varint, as a float32, or as bytes with their length before."""
    if isinstance(value, float):
        return _varint(number << 3 | _FIXED32) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    content = value.encode("utf-8") if isinstance(value, str) else value
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Returns an integer in groups of seven bits, the lowest first; each byte but the last has its high bit set."""
    return bytes(_septets(value & (1 << 64) - 1))  # negative ones as 64 bits in two's complement


def _septets(value: int) -> Iterable[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
