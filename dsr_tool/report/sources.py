"""Footprints of whatever lies at a path: model folder, run, archive or ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.formats.archive import Archive, open_archive
from dsr_tool.formats.csr_file import CsrFile, load_csr
from dsr_tool.formats.footprint import Footprint, footprint
from dsr_tool.formats.manifest import container_header_bytes
from dsr_tool.graph.compact.record import COMPACTED, Savings
from dsr_tool.report.runlog import RunLog, read_log
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.containers import kind_of

__all__ = ["Source", "StoredBytes", "read"]


_FILES = {".dsr": "archive", ".onnx": "onnx", ".npz": "csr"}
_ONNX_START = b"\x08"
"""The key of `ir_version`, with which exporters begin a model."""


class StoredBytes(NamedTuple):
    """Bytes of one tensor in the file at hand: those that say where its entries are, and all others."""

    positions: int
    values: int


@dataclass(frozen=True)
class Source:
    """What was found at a path.

    Attributes:
        path: where.
        kind: `model folder`, `run folder`, `archive`, `onnx` or `csr`.
        footprint: what it weighs.
        config: what the model is, where the file tells.
        training: what the log of a run says, in short; empty elsewhere.
        tensors: every tensor of the footprint by name, decoded when asked for.
        stored: what each of them takes in the file, positions and values apart.
        log: the whole log of a run.
        saved: what compaction saved, where the file is compacted.
    """

    path: Path
    kind: str
    footprint: Footprint
    config: ModelConfig | None
    training: Mapping[str, Any]
    tensors: Mapping[str, SparseTensor] = field(default_factory=dict)
    stored: Mapping[str, StoredBytes] = field(default_factory=dict)
    log: RunLog | None = None
    saved: Savings | None = None


def read(path: str | Path) -> Source:
    """Measure a model folder, run folder, archive, ONNX file or .npz of CSR matrices.

    Raises:
        FileError: nothing there.
        FormatError: damaged, or none of the five.
        UsageError: a file of plain weights, which says neither what is sparse nor what is computed.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(
            f"PATH {str(path)!r} does not exist; give a model folder, run folder, .dsr, .onnx or .npz file."
        )
    if path.is_dir():
        return _folder(path)
    kind = _FILES.get(path.suffix.lower()) or kind_of(path, "PATH")
    if kind in ("safetensors", "state-dict"):
        raise UsageError(
            f"PATH {str(path)!r} is a {kind} file of plain weights, which does not say what is sparse; give the model "
            f"folder that it was exported from, or a .dsr, .onnx or .npz file."
        )
    if kind == "onnx" and (path.suffix.lower() == ".onnx" or path.read_bytes()[:1] == _ONNX_START):
        return _onnx(path)
    return _csr(load_csr(path)) if kind == "csr" else _archive(open_archive(path))


def _archive(archive: Archive) -> Source:
    specs = {name: entry.spec for name, entry in archive.entries.items()}
    stored = {name: (entry.codec, archive.entry_bytes(name)) for name, entry in archive.entries.items()}
    parts = {
        **_weight_bytes(specs, stored),
        "graph and manifest": archive.document_bytes,
        "container header": archive.header_bytes,
    }
    tensors = _Decoding(archive)
    measured = footprint(tensors, specs, stored=stored, file_bytes=archive.nbytes, parts=parts)
    apart = {name: _archive_bytes(archive, name) for name in specs}
    record = archive.config.conversion.get(COMPACTED)
    saved = None if record is None else Savings.from_dict(record)
    return Source(archive.path, "archive", measured, archive.config, {}, tensors, apart, saved=saved)


def _archive_bytes(archive: Archive, name: str) -> StoredBytes:
    """Streams of values have the suffix `values` or none; all others hold positions."""
    entry = archive.entries[name]
    others = [suffix for suffix in entry.crc32 if suffix not in ("", "values")]
    positions = sum(archive.stored_bytes(entry.stream(suffix)) for suffix in others)
    return StoredBytes(positions, archive.entry_bytes(name) - positions)


def _weight_bytes(specs: Mapping[str, LayerSpec], stored: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    sparse = sum(nbytes for name, (_, nbytes) in stored.items() if specs[name].role == "sparse")
    return {"sparse weights": sparse, "dense rest": sum(nbytes for _, nbytes in stored.values()) - sparse}


class _Decoding(Mapping[str, SparseTensor]):
    """The tensors of a file, decoded one at a time."""

    def __init__(self, archive: Archive | CsrFile) -> None:
        self._archive = archive

    def __getitem__(self, name: str) -> SparseTensor:
        return self._archive.tensor(name)

    def __iter__(self) -> Any:
        return iter(self._archive.entries)

    def __len__(self) -> int:
        return len(self._archive.entries)


def _csr(file: CsrFile) -> Source:
    specs = {name: entry.spec for name, entry in file.entries.items()}
    stored = {name: (entry.codec, file.entry_bytes(name)) for name, entry in file.entries.items()}
    parts = {
        **_weight_bytes(specs, stored),
        "description": file.description_bytes,
        "zip container": file.container_bytes,
    }
    tensors = _Decoding(file)
    measured = footprint(tensors, specs, stored=stored, file_bytes=file.nbytes, parts=parts)
    return Source(
        file.path, "csr", measured, file.config, {}, tensors, {name: _csr_bytes(file, name) for name in specs}
    )


def _csr_bytes(file: CsrFile, name: str) -> StoredBytes:
    values = sum(nbytes for array, nbytes in file.stored[name].items() if array in (name, f"{name}:data"))
    return StoredBytes(file.entry_bytes(name) - values, values)


def _onnx(path: Path) -> Source:
    from exporters.onnx.read import read_onnx

    file = read_onnx(path)
    specs = {name: entry.spec for name, entry in file.entries.items()}
    stored = {name: (entry.codec, entry.nbytes) for name, entry in file.entries.items()}
    parts = {
        **_weight_bytes(specs, stored),
        "nodes and names": file.document_bytes,
    }
    tensors = dict(file)
    measured = footprint(tensors, specs, stored=stored, file_bytes=file.nbytes, parts=parts)
    apart = {name: _onnx_bytes(entry.codec, entry.nbytes, tensors[name]) for name, entry in file.entries.items()}
    record = file.record.get(COMPACTED)
    saved = None if record is None else Savings.from_dict(record)
    return Source(path, "onnx", measured, None, {}, tensors, apart, saved=saved)


def _onnx_bytes(codec: str, nbytes: int, tensor: SparseTensor) -> StoredBytes:
    """Whatever a compact weight takes beyond its values serves their positions: fillers and operators as well."""
    values = nbytes if codec == "dense" else min(tensor.values.nbytes, nbytes)
    return StoredBytes(nbytes - values, values)


def _folder(path: Path) -> Source:
    from dsr_tool.sparse.folder import CONFIG, MASKS, WEIGHTS, read_folder

    saved = read_folder(path)
    masks = saved.masks()
    state = saved.weights()
    _same_shapes(path, {name: tuple(value.shape) for name, value in state.items()}, saved.specs)
    tensors = {}
    for name, value in state.items():
        array = (value.float() if value.is_floating_point() else value).numpy()
        tensors[name] = SparseTensor.from_dense(array, masks.get(name, Mask.full(array.shape)))
    stored = {name: ("dense", value.nbytes) for name, value in state.items()}
    positions = {name: (mask.size + 7) // 8 for name, mask in masks.items()}
    parts = {
        "weights, zeros in place": sum(nbytes for _, nbytes in stored.values()),
        "masks": sum(positions.values()),
        "description": saved.file(CONFIG).stat().st_size,
        "container headers": sum(container_header_bytes(saved.file(name)) for name in (WEIGHTS, MASKS)),
    }
    total = sum(saved.file(name).stat().st_size for name in (CONFIG, WEIGHTS, MASKS))
    measured = footprint(tensors, saved.specs, stored=stored, file_bytes=total, parts=parts)
    apart = {name: StoredBytes(positions.get(name, 0), value.nbytes) for name, value in state.items()}
    log_file = path / "log.jsonl"
    log = read_log(log_file) if log_file.is_file() else None
    kind, training = ("run folder", log.summary()) if log else ("model folder", {})
    return Source(path, kind, measured, saved.config, training, tensors, apart, log)


def _same_shapes(path: Path, shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, LayerSpec]) -> None:
    listed = {name: spec.shape for name, spec in specs.items()}
    differing = [name for name in {**listed, **shapes} if listed.get(name) != shapes.get(name)]
    if differing:
        raise FormatError(
            f"{str(path)!r}: weights and config.json disagree about {differing[0]!r}; the folder is damaged."
        )
