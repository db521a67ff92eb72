"""What any ONNX file weighs: its weights, how they are stored and how much work each of them does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper

from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.files import require_file
from dsr_tool.core.graph import Array
from dsr_tool.core.layers import LayerSpec
from dsr_tool.core.mask import Mask
from dsr_tool.errors import FormatError, first_line
from exporters.onnx_compact import decode
from exporters.onnx_macs import WeightUse, weight_uses
from exporters.onnx_model import METADATA

__all__ = ["OnnxEntry", "OnnxFile", "densify", "read_onnx"]


@dataclass(frozen=True)
class OnnxEntry:
    """One weight of an ONNX file.

    Attributes:
        spec: name, shape, operator that uses it (`kind`), role, multiply-adds.
        dtype: numpy name of its type.
        codec: `dense` for an initializer, `delta` for byte distances, `coo` for a sparse initializer.
        active: entries that are not zero.
        nbytes: bytes of everything in the file that makes it.
    """

    spec: LayerSpec
    dtype: str
    codec: str
    active: int
    nbytes: int


class OnnxFile:
    """A read ONNX file.

    Attributes:
        path: where it lies.
        model: its content.
        architecture: name of the model, empty where another tool wrote the file.
        entries: every weight of floating point by name, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Use `read_onnx`."""
        self.path = path
        self.model = _load(path)
        record = _record(self.model)
        self.architecture = str(record.get("architecture", ""))
        self._stored = {stored.name: stored for stored in _stored_weights(self.model.graph)}
        uses = weight_uses(self.model, {name: stored.shape for name, stored in self._stored.items()})
        listed = record.get("sparse_weights")
        self.entries = {name: _entry(self._stored[name], uses.get(name), listed) for name in self._stored}

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size

    @property
    def document_bytes(self) -> int:
        """Bytes of everything that is no weight: nodes, constants, names."""
        return self.nbytes - sum(entry.nbytes for entry in self.entries.values())

    @property
    def decode_steps(self) -> frozenset[str]:
        """Names of the values on the way from compact weights to dense ones."""
        return frozenset(step for stored in self._stored.values() for step in stored.steps)

    def tensor(self, name: str) -> SparseTensor:
        """One weight; its mask says where it is not zero."""
        return self._stored[name].read()

    def __iter__(self) -> Iterator[tuple[str, SparseTensor]]:
        """Every weight in turn."""
        return ((name, stored.read()) for name, stored in self._stored.items())


def read_onnx(path: str | Path) -> OnnxFile:
    """Read an ONNX file, of this tool or any other, and decode its weights.

    Raises:
        FileError: there is no such file.
        FormatError: it is no ONNX file, damaged, or keeps its weights in other files.
    """
    return OnnxFile(Path(path))


def _load(path: Path) -> ModelProto:
    """The content of an ONNX file, checked; raises what `read_onnx` does."""
    require_file(path, "ONNX file")
    try:
        model = onnx.load(path, load_external_data=False)
        sparse = (part for tensor in model.graph.sparse_initializer for part in (tensor.values, tensor.indices))
        constants = (tensor for _, tensor in _constants(model.graph))
        tensors = (*model.graph.initializer, *sparse, *constants)
        if any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors):
            raise FormatError(f"{str(path)!r} keeps its weights in other files; save it again as one file.")
        onnx.checker.check_model(model)
    except FormatError:
        raise
    except (DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise FormatError(f"{str(path)!r} is not an ONNX file, or is damaged: {first_line(error)}.") from error
    return model


def densify(model: ModelProto) -> ModelProto:
    """The same model with plain initializers, for tools that look for weights there (`quantize_dynamic`)."""
    result = ModelProto()
    result.CopyFrom(model)
    compact = [stored for stored in _stored_weights(model.graph) if stored.codec == "delta"]
    made = {name for stored in compact for name in stored.steps}
    nodes = [node for node in model.graph.node if node.output[0] not in made]
    used = {name for node in nodes for name in node.input}
    plain = [numpy_helper.from_array(stored.read().to_dense(), stored.name) for stored in compact]
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for field, content in ((result.graph.node, nodes), (result.graph.initializer, plain + kept)):
        del field[:]
        field.extend(content)
    return result


@dataclass(frozen=True)
class _Stored:
    """A weight; a dense one is made sparse again whenever it is asked for, since all at once take gigabytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    active: int
    codec: str
    nbytes: int
    read: Callable[[], SparseTensor]
    steps: tuple[str, ...] = ()


def _stored_weights(graph: GraphProto) -> Iterator[_Stored]:
    """Every weight, decoded once to check it."""
    nodes = {node.output[0]: node for node in graph.node if node.output}
    arrays = {tensor.name: tensor for tensor in graph.initializer} | dict(_constants(graph))
    taken: set[str] = set()
    for name in [name for name, node in nodes.items() if node.op_type == "Reshape"]:
        if decoded := decode(nodes, arrays, name):
            tensor, steps, sources = decoded
            taken.update(sources)
            nbytes = sum(nodes[step].ByteSize() for step in steps) + sum(arrays[s].ByteSize() for s in sources)
            yield _stored(name, "delta", nbytes, partial(_itself, tensor), tuple(steps))
    for name, proto in arrays.items():
        if name not in taken and _is_float(proto):
            yield _stored(name, "dense", proto.ByteSize(), partial(_from_dense, proto))
    for sparse in graph.sparse_initializer:
        if _is_float(sparse.values):
            yield _stored(sparse.values.name, "coo", sparse.ByteSize(), partial(_from_coo, sparse))


def _stored(
    name: str, codec: str, nbytes: int, read: Callable[[], SparseTensor], steps: tuple[str, ...] = ()
) -> _Stored:
    tensor = read()
    mask = tensor.mask
    return _Stored(name, mask.shape, tensor.values.dtype.name, mask.active, codec, nbytes, read, steps)


def _itself(tensor: SparseTensor) -> SparseTensor:
    return tensor


def _constants(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    for node in graph.node:
        if node.op_type == "Constant":
            yield from ((node.output[0], attr.t) for attr in node.attribute if attr.name == "value")


def _is_float(proto: TensorProto) -> bool:
    return proto.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def _to_array(proto: TensorProto) -> Array:
    try:
        return numpy_helper.to_array(proto)
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"initializer {proto.name!r} does not fit its shape ({error}); the file is damaged."
        ) from error


def _from_dense(proto: TensorProto) -> SparseTensor:
    array = _to_array(proto)
    return SparseTensor.from_dense(array, Mask.from_bool(array != 0))


def _from_coo(sparse: onnx.SparseTensorProto) -> SparseTensor:
    shape = tuple(int(n) for n in sparse.dims)
    values, indices = _to_array(sparse.values), _to_array(sparse.indices)
    size = math.prod(shape)
    try:
        flat = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
    except ValueError as error:
        raise FormatError(f"sparse initializer {sparse.values.name!r} has an index outside {shape}.") from error
    if len(flat) != values.size or (np.diff(flat) <= 0).any() or (len(flat) and not 0 <= flat[0] <= flat[-1] < size):
        raise FormatError(f"sparse initializer {sparse.values.name!r} has indices out of order or outside {shape}.")
    return SparseTensor(Mask(shape, flat.astype(np.int64)), values.reshape(-1))


def _entry(stored: _Stored, use: WeightUse | None, listed: Any) -> OnnxEntry:
    sparse = use is not None and (stored.name in listed if isinstance(listed, list) else True)
    spec = LayerSpec(
        stored.name,
        stored.shape,
        use.operator if use else "Initializer",
        "sparse" if sparse else "dense",
        use is not None,
        f"weight of {use.operator}" if use else "no weight of a convolution or matrix product",
        use.macs_per_weight if use else 0.0,
    )
    return OnnxEntry(spec, stored.dtype, stored.codec, stored.active, stored.nbytes)


def _record(model: ModelProto) -> Mapping[str, Any]:
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA), "{}")
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
