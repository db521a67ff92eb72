"""The formats of the storage benchmark: each writes a model into one file and reads it back as dense arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.numpy

from dsr_tool.formats.archive import encode_archive, open_archive
from dsr_tool.graph.ir import Graph
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec, matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIG", "FORMATS", "Format", "Item", "halved"]

Dense = dict[str, Array]
CONFIG = ModelConfig("torchvision", "resnet50", 1000, (3, 224, 224))


@dataclass(frozen=True)
class Item:
    """A model to store.

    Attributes:
        tensors: every entry of the state_dict by name.
        specs: layer and role of each entry.
        graph: the computation.
    """

    tensors: dict[str, SparseTensor]
    specs: dict[str, LayerSpec]
    graph: Graph

    @property
    def sparse(self) -> list[SparseTensor]:
        """The sparse weights."""
        return [tensor for name, tensor in self.tensors.items() if self.specs[name].role == "sparse"]

    @property
    def bound_bytes(self) -> float:
        """Entropy bound of all masks, in bytes."""
        return sum(tensor.mask.entropy_bound_bits for tensor in self.sparse) / 8

    @property
    def rest_bytes(self) -> int:
        """Bytes of all entries that are not sparse, raw."""
        return sum(t.values.nbytes for name, t in self.tensors.items() if self.specs[name].role != "sparse")

    def reference_bytes(self, width: int) -> float:
        """Returns B4 (`width` 4) or B2 (2): the bound of the masks, `width` bytes per active weight, the rest raw."""
        return self.bound_bytes + width * sum(tensor.mask.active for tensor in self.sparse) + self.rest_bytes


@dataclass(frozen=True)
class Format:
    """One way to store a model.

    Attributes:
        write: function that encodes a model into a file.
        read: function that decodes a file to dense arrays by name.
        libraries: modules that are imported before the clock starts.
        width: bytes of one stored weight.
        slow: True for a format that runs only with `--slow`.
    """

    write: Callable[[Item, Path], None]
    read: Callable[[Path], Dense]
    libraries: tuple[str, ...] = ()
    width: int = 4
    slow: bool = False


def halved(item: Item) -> dict[str, SparseTensor]:
    """Returns the tensors with weights rounded to float16."""
    return {
        name: SparseTensor(t.mask, t.values.astype(np.float16)) if item.specs[name].weight else t
        for name, t in item.tensors.items()
    }


def _archive(item: Item, path: Path, tensors: dict[str, SparseTensor]) -> None:
    encode_archive(tensors, item.specs, item.graph, CONFIG).save(path)


def _read_archive(path: Path) -> Dense:
    return open_archive(path).dense()


def _zstd(level: int) -> Format:
    def write(item: Item, path: Path) -> None:
        import zstandard

        # Over the dense file: what a user can do without any tool for sparse models.
        dense = safetensors.numpy.save({name: tensor.to_dense() for name, tensor in item.tensors.items()})
        path.write_bytes(zstandard.ZstdCompressor(level).compress(dense))

    def read(path: Path) -> Dense:
        import zstandard

        return safetensors.numpy.load(zstandard.ZstdDecompressor().decompress(path.read_bytes()))

    return Format(write, read, ("zstandard",), slow=level > 10)


def _npz(save: Callable[..., None]) -> Format:
    def write(item: Item, path: Path) -> None:
        arrays: Dense = {}
        for name, tensor in item.tensors.items():
            if item.specs[name].role != "sparse":
                arrays[name] = tensor.to_dense()
                continue
            rows, columns = matrix_shape(tensor.mask.shape)
            row, column = np.divmod(tensor.mask.positions, columns)
            # scipy's own save_npz holds a single matrix, so all of them are stored array by array.
            arrays[f"{name}/indptr"] = np.searchsorted(row, np.arange(rows + 1)).astype(np.int32)
            arrays[f"{name}/indices"] = column.astype(np.int32)
            arrays[f"{name}/data"], arrays[f"{name}/shape"] = tensor.values, np.array(tensor.mask.shape)
        with path.open("wb") as file:
            save(file, **arrays)

    def read(path: Path) -> Dense:
        import scipy.sparse

        with np.load(path) as file:
            dense = {name: file[name] for name in file.files if "/" not in name}
            for name in (part.removesuffix("/data") for part in file.files if part.endswith("/data")):
                shape = tuple(file[f"{name}/shape"])
                parts = (file[f"{name}/data"], file[f"{name}/indices"], file[f"{name}/indptr"])
                matrix = scipy.sparse.csr_matrix(parts, shape=matrix_shape(shape))
                # Our archives are checked as they are read, so this reader checks too.
                matrix.check_format(full_check=True)
                dense[name] = matrix.toarray().reshape(shape)
        return dense

    return Format(write, read, ("scipy.sparse",))


def _torch_csr(index: str) -> Format:
    def write(item: Item, path: Path) -> None:
        import torch

        def matrix(tensor: SparseTensor) -> torch.Tensor:
            rows, columns = matrix_shape(tensor.mask.shape)
            row, column = np.divmod(tensor.mask.positions, columns)
            indptr = np.searchsorted(row, np.arange(rows + 1))
            # The constructor keeps the type of its indices; `to_sparse_csr` makes int64, twice the bytes.
            indices = (torch.from_numpy(array.astype(index)) for array in (indptr, column))
            return torch.sparse_csr_tensor(*indices, torch.from_numpy(tensor.values), (rows, columns))

        state = {
            name: (matrix(tensor), tensor.mask.shape)
            if item.specs[name].role == "sparse"
            else (torch.from_numpy(tensor.values), tensor.mask.shape)
            for name, tensor in item.tensors.items()
        }
        torch.save(state, path)

    def read(path: Path) -> Dense:
        import torch

        state = torch.load(path, weights_only=True)
        return {
            name: (value.to_dense() if value.layout == torch.sparse_csr else value).numpy().reshape(shape)
            for name, (value, shape) in state.items()
        }

    return Format(write, read, ("torch",))


def _write_compressed_tensors(item: Item, path: Path) -> None:
    import torch
    from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
    from safetensors.torch import save_file

    state = {}
    for name, tensor in item.tensors.items():
        dense = torch.from_numpy(tensor.to_dense())
        if item.specs[name].role == "sparse":
            # On the shapes of convolutions it stores ten times as much.
            packed = BitmaskTensor.from_dense(dense.reshape(matrix_shape(tensor.mask.shape)))
            state |= packed.dict(name_prefix=name, device="cpu")
        else:
            state[name] = dense
    save_file(state, path)


def _read_compressed_tensors(path: Path) -> Dense:
    from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor
    from safetensors.torch import load_file

    state = load_file(path)
    names = [part.removesuffix(".compressed") for part in state if part.endswith(".compressed")]
    parts = ("shape", "compressed", "bitmask", "row_offsets")
    dense = {}
    for name in names:
        packed = {part: state.pop(f"{name}.{part}") for part in parts}
        packed["shape"] = packed["shape"].tolist()
        dense[name] = BitmaskTensor(**packed).decompress().numpy()
    return dense | {name: value.numpy() for name, value in state.items()}


def _write_bitmask(item: Item, path: Path) -> None:
    streams: Dense = {}
    for name, tensor in item.tensors.items():
        streams[name] = tensor.values
        if item.specs[name].role == "sparse":
            streams[f"{name}/bits"] = tensor.mask.bits
            streams[f"{name}/shape"] = np.array(tensor.mask.shape)
    safetensors.numpy.save_file(streams, path)


def _read_bitmask(path: Path) -> Dense:
    streams = safetensors.numpy.load_file(path)
    dense = {}
    for name in [name for name in streams if "/" not in name]:
        if f"{name}/bits" in streams:
            mask = Mask.from_bits(streams[f"{name}/bits"], tuple(streams[f"{name}/shape"].tolist()))
            dense[name] = SparseTensor(mask, streams[name]).to_dense()
        else:
            dense[name] = streams[name]
    return dense


# Ours first; then masks of one bit an entry, lists of positions, and general compression.
FORMATS = {
    "archive, fp32": Format(lambda item, path: _archive(item, path, item.tensors), _read_archive),
    "archive, fp16": Format(lambda item, path: _archive(item, path, halved(item)), _read_archive, width=2),
    "raw bitmask": Format(_write_bitmask, _read_bitmask),
    "compressed-tensors bitmask": Format(
        _write_compressed_tensors,
        _read_compressed_tensors,
        ("compressed_tensors.compressors.sparse_compressors.sparse_bitmask", "safetensors.torch"),
    ),
    "scipy npz, int32 CSR": _npz(np.savez),
    "the same, compressed": _npz(np.savez_compressed),
    "torch CSR, int64": _torch_csr("int64"),
    "torch CSR, int32": _torch_csr("int32"),
    "zstd -3 of dense": _zstd(3),
    "zstd -19 of dense": _zstd(19),
}
