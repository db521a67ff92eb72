"""Reading the weights of any ONNX file: their values, the bytes that they take and their multiply-adds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, ValueInfoProto, helper

from dsr_tool.errors import FormatError
from dsr_tool.formats.manifest import most_decoded_bytes
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.onnx.decode import LAST_OPERATORS, CompactWeight, decode, find, from_coo, from_dense, shape_of
from exporters.onnx.load import constants, load
from exporters.onnx.macs import WeightUse, weight_uses
from exporters.onnx.nodes import field_bytes
from exporters.onnx.write import METADATA

__all__ = ["OnnxEntry", "OnnxFile", "StoredWeight", "read_onnx", "stored_weights"]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class OnnxEntry:
    """One weight of an ONNX file.

    Attributes:
        spec: name, shape, operator that uses it (`kind`), role, multiply-adds.
        dtype: numpy name of the type that its values are stored in; `int8` of a weight on a grid.
        codec: `dense` for an initializer, `delta` or `bitmask` for a compact form, `coo` for a sparse initializer.
        active: number of entries that are not zero.
        nbytes: bytes of everything in the file that makes it, without the parts that other weights need too.
    """

    spec: LayerSpec
    dtype: str
    codec: str
    active: int
    nbytes: int


class OnnxFile:
    """An ONNX file and its weights.

    Attributes:
        path: path of the file.
        model: the parsed file.
        architecture: name of the model; empty in files of other tools.
        record: the metadata that dsr-tool writes; empty in files of other tools.
        entries: every weight of floating point by name, in the order of the file.
    """

    def __init__(self, path: Path) -> None:
        """Reads a file; see `read_onnx`."""
        self.path = path
        self.model, self._data_bytes = load(path)
        self.record = _record(self.model)
        self.architecture = str(self.record.get("architecture", ""))
        self._stored = {stored.name: stored for stored in stored_weights(self.model.graph)}
        # Before anything is decoded: a small file can claim weights of any size.
        _check_size(path, self.nbytes, self._stored.values())
        uses = self._uses()
        # In files of other tools every weight of a product counts as sparse: its zeros are all that is known.
        listed = self.record.get("sparse_weights")
        sparse = {str(name) for name in listed} if isinstance(listed, list) else uses
        self.entries = {name: _entry(stored, uses.get(name), name in sparse) for name, stored in self._stored.items()}

    def fix_input(self, name: str, shape: Sequence[int]) -> None:
        """Gives the free dimensions of an input sizes, the first one excepted, and counts multiply-adds for them.

        Args:
            name: name of the input.
            shape: its sizes without the first one.
        """
        dims = next(value for value in self.model.graph.input if value.name == name).type.tensor_type.shape.dim
        for dim, size in zip(dims[1:], shape, strict=True):
            dim.dim_value = size
        uses = self._uses()
        for weight, entry in self.entries.items():
            macs = uses[weight].macs_per_weight if weight in uses else 0.0
            self.entries[weight] = replace(entry, spec=replace(entry.spec, macs_per_weight=macs))

    def _uses(self) -> dict[str, WeightUse]:
        return weight_uses(self.model, self.declared(), decode_steps=self.decode_steps)

    @property
    def nbytes(self) -> int:
        """Bytes of the file, and of those beside it that hold its external data."""
        return self.path.stat().st_size + self._data_bytes

    @property
    def document_bytes(self) -> int:
        """Bytes of everything that belongs to no weight alone: nodes, constants, tables, names."""
        return self.nbytes - sum(entry.nbytes for entry in self.entries.values())

    @property
    def decode_steps(self) -> frozenset[str]:
        """Names of the values between stored bytes and weights, weights included."""
        return frozenset(step for stored in self._stored.values() for step in stored.steps)

    def declared(self) -> dict[str, ValueInfoProto]:
        """Returns name, shape and computed type of every weight."""
        return {name: stored.declared() for name, stored in self._stored.items()}

    def tensor(self, name: str) -> SparseTensor:
        """Decodes one weight in the type that is stored; its mask is where it is not zero."""
        return self._stored[name].read()

    def array(self, name: str) -> Array:
        """Decodes one weight to an array of the type that the model computes in."""
        return self._stored[name].array()

    def __iter__(self) -> Iterator[tuple[str, SparseTensor]]:
        """Yields every weight by name, decoded."""
        return ((name, stored.read()) for name, stored in self._stored.items())


def read_onnx(path: str | Path) -> OnnxFile:
    """Reads an ONNX file, of this tool or any other, and decodes its weights once.

    Raises:
        FileError: there is no such file.
        FormatError: it is no ONNX file, damaged, keeps weights outside of its folder, or claims more of them than
            its size makes likely.
    """
    return OnnxFile(Path(path))


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is not decoded: all of them decoded at once could take gigabytes.

    Attributes:
        name: name of the value that is the weight.
        shape: shape that the file claims.
        dtype: type that its values are stored in.
        computed: type that the model computes in.
        codec: see `OnnxEntry`.
        nbytes: see `OnnxEntry`.
        read: decodes the weight; raises `FormatError` if the stored numbers contradict the claims.
        steps: names of the values between stored bytes and the weight, the weight included.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    computed: np.dtype[Any]
    codec: str
    nbytes: int
    read: Callable[[], SparseTensor]
    steps: tuple[str, ...] = ()

    def array(self) -> Array:
        """Decodes the weight to an array of the type that the model computes in."""
        return self.read().to_dense().astype(self.computed, copy=False)

    def declared(self) -> ValueInfoProto:
        """Declares the weight with the type that the model computes in."""
        return helper.make_tensor_value_info(self.name, helper.np_dtype_to_tensor_dtype(self.computed), self.shape)


def stored_weights(graph: GraphProto) -> Iterator[StoredWeight]:
    """Yields every weight of floating point: compact weights, plain initializers, sparse initializers."""
    nodes = {node.output[0]: node for node in graph.node if node.output}
    arrays = {tensor.name: tensor for tensor in graph.initializer} | dict(constants(graph))
    # Initializers that are parts of compact weights, which are no weights of their own.
    taken: set[str] = set()
    for name in [name for name, node in nodes.items() if node.op_type in LAST_OPERATORS]:
        if found := find(name, nodes, arrays):
            taken.update(found.leaves.values())
            yield _compact(found, nodes, arrays)
    casts = {node.input[0]: node for node in nodes.values() if node.op_type == "Cast" and node.input}
    for name, proto in arrays.items():
        if name not in taken and proto.data_type in _FLOATS:
            yield _plain("dense", proto, name, proto, casts.get(name), partial(from_dense, proto))
    for sparse in graph.sparse_initializer:
        if sparse.values.data_type in _FLOATS:
            name = sparse.values.name
            yield _plain("coo", sparse, name, sparse.values, casts.get(name), partial(from_coo, sparse))


def _compact(found: CompactWeight, nodes: Mapping[str, NodeProto], arrays: Mapping[str, TensorProto]) -> StoredWeight:
    own = found.own()
    steps = [nodes[step] for step in found.steps]
    shared = set(found.leaves.values()).difference(own)
    nbytes = sum(field_bytes(arrays[source]) for source in own)
    # The nodes that read nothing but shared tables are shared too.
    nbytes += sum(field_bytes(node) for node in steps if not shared.issuperset(node.input))
    dtype = _dtype(arrays[found.leaves["values"]].data_type)
    computed = np.dtype(found.cast) if found.cast else dtype
    read = partial(decode, found, arrays)
    return StoredWeight(
        found.name, shape_of(found, arrays), dtype, computed, found.form.codec, nbytes, read, found.steps
    )


def _plain(
    codec: str,
    stored: TensorProto | SparseTensorProto,
    name: str,
    values: TensorProto,
    cast: NodeProto | None,
    read: Callable[[], SparseTensor],
) -> StoredWeight:
    """Describes an initializer; one of float16 that a Cast widens has the name of the result of the Cast."""
    dtype, nbytes = _dtype(values.data_type), field_bytes(stored)
    shape = tuple(int(n) for n in stored.dims)
    # Such a Cast is ours, or that of a tool that stores half precision: the graph computes with its result.
    to = cast.attribute[0].i if cast is not None and len(cast.attribute) else 0
    if cast is None or values.data_type != TensorProto.FLOAT16 or to not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return StoredWeight(name, shape, dtype, dtype, codec, nbytes, read)
    return StoredWeight(
        cast.output[0], shape, dtype, _dtype(to), codec, nbytes + field_bytes(cast), read, (cast.output[0],)
    )


def _dtype(data_type: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(data_type))


def _check_size(path: Path, file_bytes: int, weights: Iterable[StoredWeight]) -> None:
    nbytes = sum(math.prod(stored.shape) * stored.computed.itemsize for stored in weights)
    most = most_decoded_bytes(file_bytes)
    if nbytes > most:
        raise FormatError(
            f"{str(path)!r} claims weights of {nbytes:,} bytes, more than the {most:,} that are decoded from a file of "
            f"its size; it is damaged or hostile."
        )


def _entry(stored: StoredWeight, use: WeightUse | None, listed: bool) -> OnnxEntry:
    # Decoded once to count active entries and to find damage early, then dropped.
    mask = stored.read().mask
    spec = LayerSpec(
        stored.name,
        mask.shape,
        use.operator if use else "Initializer",
        "sparse" if use and listed else "dense",
        use is not None,
        f"weight of {use.operator}" if use else "no weight of a convolution or matrix product",
        use.macs_per_weight if use else 0.0,
    )
    return OnnxEntry(spec, stored.dtype.name, stored.codec, mask.active, stored.nbytes)


def _record(model: ModelProto) -> Mapping[str, Any]:
    text = next((entry.value for entry in model.metadata_props if entry.key == METADATA), "{}")
    # Metadata of other tools may have the same key; whatever is no record of ours counts as none.
    try:
        record = json.loads(text)
    except (RecursionError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
