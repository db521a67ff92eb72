"""Reader and writer of CSR files: a .npz with a scipy matrix for every sparse weight and arrays for the rest.

`docs/format.md` describes the file. Reading needs only numpy and scipy, with this module or without it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.files import require_file
from dsr_tool.formats.codecs import CODECS
from dsr_tool.formats.documents import parse_json
from dsr_tool.formats.manifest import Entry, check_decoded_bytes
from dsr_tool.formats.npz import NpzReader, write_npz
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec, matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["CsrFile", "load_csr", "write_csr"]

SCHEMA = "dsr-tool/csr/1"
DESCRIPTION = ":description"
"""Name of the array that holds the description, a JSON document."""

_PARTS = ("data", "indices", "indptr", "shape")
"""Arrays of one matrix, named like the arguments of `scipy.sparse.csr_matrix`."""

_FREE_DESCRIPTION_BYTES, _MAX_DESCRIPTION_RATIO = 4 << 20, 64
"""The description may have this many bytes plus this many times its stored bytes, so small files fail fast."""

_MAX_INDEX = 2**31 - 1
"""Largest number of rows, columns or active entries: indices are int32."""


def write_csr(
    path: Path,
    tensors: Mapping[str, SparseTensor],
    specs: Mapping[str, LayerSpec],
    config: ModelConfig,
    *,
    versions: Mapping[str, str] | None = None,
) -> None:
    """Writes a model as CSR matrices and plain arrays to `path` directly; see `new_file` for a safe path.

    Args:
        path: the file.
        tensors: every entry of the state_dict, with full masks for dense ones.
        specs: name, shape and role of each tensor.
        config: description of the model.
        versions: names and versions of the packages that write the file, for the record.

    Raises:
        UsageError: a name cannot be a name in a .npz file, or a weight is too large for int32 indices.
    """
    arrays: dict[str, Array] = {}
    entries = []
    for name, tensor in tensors.items():
        entry = Entry(specs[name], tensor.values.dtype.name, _codec_of(specs[name]), tensor.mask.active, {})
        entries.append(entry)
        _check_storable(entry, arrays)
        arrays |= _matrix_arrays(name, tensor) if entry.codec == "csr" else {name: tensor.to_dense()}
    document = {
        "schema": SCHEMA,
        "versions": dict(versions or {}),
        "model": config.to_dict(),
        "tensors": [entry.to_dict() for entry in entries],
    }
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("utf-8")
    write_npz(path, {DESCRIPTION: np.frombuffer(text, np.uint8), **arrays})


def load_csr(path: str | Path, *, max_decoded_bytes: int | None = None) -> CsrFile:
    """Reads a CSR file and checks everything in it, since scipy trusts its arguments and a bad index can crash it.

        layers = load_csr("model.npz")
        y = layers["fc.weight"] @ x

    Args:
        path: a file written by `dsr-tool export --to csr`.
        max_decoded_bytes: largest size, decoded to dense tensors, that the file may claim. Default: 10,000 times the
            size of the file plus 256 MiB, and at most 16 GiB.

    Returns:
        The tensors by state_dict name. A sparse weight is a `csr_matrix` with int32 indices and shape (first size,
        product of the others); every other tensor is an array.

    Raises:
        FileError: the file does not exist.
        FormatError: the file is not a CSR file, is damaged, or claims too much.
    """
    path = Path(path)
    require_file(path, "CSR file")
    return CsrFile(path, max_decoded_bytes)


class CsrFile(Mapping[str, "csr_matrix[Any] | Array"]):
    """The tensors of a CSR file by name. Weights stored as float16 are float32 here, with the same values.

    Attributes:
        path: path of the file.
        nbytes: its size in bytes.
        config: description of the model.
        entries: spec, dtype and codec of each tensor, in the order of the model.
        versions: names and versions of the packages that wrote the file.
        stored: stored bytes by tensor and name of the array.
        description_bytes: stored bytes of the description.
        container_bytes: bytes of the zip container that are not arrays.
    """

    def __init__(self, path: Path, max_decoded_bytes: int | None = None) -> None:
        """Reads and checks the file; see `load_csr`."""
        self.path = path
        # Everything is read here, so the file is closed afterwards and scipy gets checked matrices only.
        with NpzReader(path) as file:
            document = _read_description(file)
            try:
                self.config = ModelConfig.from_dict(document["model"])
                # A tensor needs an array at least; without this check a long list costs time before it is refused.
                if len(document["tensors"]) > len(file.names):
                    raise ValueError("it lists more tensors than there are arrays")
                entries = [Entry.from_dict(data) for data in document["tensors"]]
                self.versions = {str(name): str(text) for name, text in document["versions"].items()}
            except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
                raise file.damaged(f"its description is invalid ({error})") from error
            self.entries = {entry.spec.name: entry for entry in entries}
            _check_entries(file, entries, max_decoded_bytes)
            self._tensors = {name: _read_tensor(file, entry) for name, entry in self.entries.items()}
            self.stored = {
                name: {array: file.stored_bytes(array) for array in _array_names(entry)}
                for name, entry in self.entries.items()
            }
            self.description_bytes = file.stored_bytes(DESCRIPTION)
            self.container_bytes, self.nbytes = file.container_bytes, file.nbytes

    def __getitem__(self, name: str) -> csr_matrix[Any] | Array:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def entry_bytes(self, name: str) -> int:
        """Returns the stored bytes of one tensor."""
        return sum(self.stored[name].values())

    def tensor(self, name: str) -> SparseTensor:
        """Returns one tensor as mask and values, in the dtype that it has in the file."""
        entry, array = self.entries[name], self._tensors[name]
        if isinstance(array, np.ndarray):
            stored = array.astype(entry.dtype, copy=False)
            return SparseTensor.from_dense(stored, Mask.full(entry.spec.shape))
        # The codec checks the matrix again, since the caller may have changed it.
        streams = {"indptr": array.indptr, "indices": array.indices, "values": array.data.astype(entry.dtype)}
        return CODECS["csr"].decode(streams, entry.spec.shape, entry.active, np.dtype(entry.dtype))


def _codec_of(spec: LayerSpec) -> str:
    """Returns the codec of a tensor in such a file: scipy reads CSR, and everything else is a plain array."""
    return "csr" if spec.role == "sparse" else "dense"


def _array_names(entry: Entry) -> list[str]:
    """Returns the names of the arrays that hold a tensor."""
    name = entry.spec.name
    return [f"{name}:{part}" for part in _PARTS] if entry.codec == "csr" else [name]


def _check_storable(entry: Entry, arrays: Mapping[str, Array]) -> None:
    """Raises `UsageError` if a tensor cannot be written beside the `arrays` that are there already."""
    name = entry.spec.name
    # Members of a zip archive with a path can be extracted outside of the folder, so readers refuse them.
    if "/" in name or "\\" in name or any(array in arrays or array == DESCRIPTION for array in _array_names(entry)):
        raise UsageError(f"tensor {name!r} has a name that is not possible in a .npz file; rename the module.")
    if entry.codec == "csr" and max(entry.active, *entry.spec.matrix_shape) > _MAX_INDEX:
        raise UsageError(f"weight {name!r} is too large for int32 indices; export an archive (.dsr) instead.")


def _matrix_arrays(name: str, tensor: SparseTensor) -> dict[str, Array]:
    """Returns the arrays of one matrix by their names in the file."""
    streams = CODECS["csr"].encode(tensor)
    parts = {**streams, "data": streams["values"], "shape": np.array(matrix_shape(tensor.mask.shape), np.int64)}
    return {f"{name}:{part}": parts[part] for part in _PARTS}


def _read_description(file: NpzReader) -> dict[str, Any]:
    """Returns the description; raises `FormatError` if the file has none of this schema."""
    not_ours = FormatError(f"{str(file.path)!r} is a .npz file but not one that dsr-tool exports.")
    if DESCRIPTION not in file.names:
        raise not_ours
    # Bounded by its stored bytes, so that a small file is refused fast, whatever it decompresses to.
    most = _FREE_DESCRIPTION_BYTES + _MAX_DESCRIPTION_RATIO * file.stored_bytes(DESCRIPTION)
    raw = file.read_bytes(DESCRIPTION, most)
    try:
        document = parse_json(raw, "its description")
    except FormatError as error:
        raise file.damaged(str(error)) from error
    if document.get("schema") != SCHEMA:
        raise not_ours
    return document


def _check_entries(file: NpzReader, entries: list[Entry], max_decoded_bytes: int | None) -> None:
    """Raises unless the file has exactly the arrays of the listed tensors, each stored as its role requires."""
    expected = [DESCRIPTION, *(name for entry in entries for name in _array_names(entry))]
    if len(set(expected)) != len(expected) or set(expected) != file.names:
        raise file.damaged("its arrays are not those that its description lists")
    for entry in entries:
        rows, columns = entry.spec.matrix_shape
        if entry.codec != _codec_of(entry.spec) or (entry.codec == "dense" and entry.active != entry.spec.size):
            raise file.damaged(f"tensor {entry.spec.name!r} is not stored as its role requires")
        if entry.codec == "csr" and max(entry.active, rows, columns) > _MAX_INDEX:
            raise file.damaged(f"weight {entry.spec.name!r} is too large for int32 indices")
    check_decoded_bytes(file.path, entries, file.nbytes, max_decoded_bytes)


def _read_tensor(file: NpzReader, entry: Entry) -> csr_matrix[Any] | Array:
    if entry.codec == "csr":
        return _read_matrix(file, entry)
    return _widened(file.read(entry.spec.name, entry.dtype, entry.spec.shape), entry)


def _widened(values: Array, entry: Entry) -> Array:
    """Returns float16 weights as float32, because scipy cannot multiply with float16."""
    return values.astype(np.float32) if entry.spec.weight and entry.dtype == "float16" else values


def _read_matrix(file: NpzReader, entry: Entry) -> csr_matrix[Any]:
    """Reads one matrix and checks everything that scipy assumes about it."""
    name, (rows, columns) = entry.spec.name, entry.spec.matrix_shape
    if file.read(f"{name}:shape", np.int64, (2,)).tolist() != [rows, columns]:
        raise file.damaged(f"weight {name!r} is not a {rows} x {columns} matrix")
    indptr = file.read(f"{name}:indptr", np.int32, (rows + 1,))
    # Compare the pointers; scipy subtracts them, and a difference of int32 numbers can wrap around to a positive one.
    if indptr[0] != 0 or (indptr[1:] < indptr[:-1]).any() or indptr[-1] != entry.active:
        raise file.damaged(f"the row pointers of {name!r} do not rise from 0 to {entry.active}")
    indices = file.read(f"{name}:indices", np.int32, (entry.active,))
    data = file.read(f"{name}:data", entry.dtype, (entry.active,))
    try:
        matrix = csr_matrix((_widened(data, entry), indices, indptr), shape=(rows, columns))
        matrix.check_format(full_check=True)  # indices in range, which scipy never checks by itself
    except ValueError as error:
        raise file.damaged(f"weight {name!r} is not a CSR matrix ({error})") from error
    # Repeated columns are legal in scipy, which adds them up, but a mask has no entry twice.
    if not matrix.has_canonical_format:
        raise file.damaged(f"the columns of a row of {name!r} are not strictly increasing")
    return matrix
