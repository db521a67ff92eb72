"""The contents of a file as a container measures them: tensors, footprint, and the bytes of every part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from dsr_tool.formats.footprint import Footprint, footprint
from dsr_tool.graph.compact.record import Savings
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["Contents", "StoredBytes", "measured"]


class StoredBytes(NamedTuple):
    """Bytes that one tensor takes in a file.

    Attributes:
        positions: bytes that say where its active entries are.
        values: all its other bytes.
    """

    positions: int
    values: int


@dataclass(frozen=True)
class Contents:
    """The contents of one file.

    Attributes:
        footprint: parameters, bytes and multiply-adds of every tensor, and the parts of the file.
        config: description of the model; None if the file has none.
        tensors: every tensor of the footprint by name, decoded when asked for.
        stored: bytes of each tensor in the file.
        saved: record of what compaction removed; None for a file that was not compacted.
    """

    footprint: Footprint
    config: ModelConfig | None = None
    tensors: Mapping[str, SparseTensor] = field(default_factory=dict)
    stored: Mapping[str, StoredBytes] = field(default_factory=dict)
    saved: Savings | None = None


class _Entry(Protocol):
    """A row of a file's table of tensors."""

    @property
    def spec(self) -> LayerSpec:
        """Name, shape and role of the tensor."""

    @property
    def codec(self) -> str:
        """Name of the way in which the tensor is stored."""


class _File(Protocol):
    """An open file of tensors."""

    @property
    def path(self) -> Path:
        """Path of the file."""

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""

    @property
    def entries(self) -> Mapping[str, _Entry]:
        """The table of tensors by name."""

    def tensor(self, name: str) -> SparseTensor:
        """Decodes one tensor."""


def measured(
    file: _File,
    stored: Mapping[str, StoredBytes],
    other_parts: Mapping[str, int],
    *,
    config: ModelConfig | None = None,
    record: object = None,
    tensors: Mapping[str, SparseTensor] | None = None,
) -> Contents:
    """Measures an open file.

    Args:
        file: the file.
        stored: bytes of each tensor in it.
        other_parts: bytes of everything in the file that is not a tensor, by name. With the tensors, the parts should
            add up to the size of the file; the report compares both.
        config: description of the model.
        record: the record of compaction as the file holds it; None if there is none.
        tensors: the decoded tensors, if they are in memory already.

    Raises:
        FormatError: a tensor or the record is damaged.
    """
    # Roles, not codecs, tell sparse weights: the smallest encoding of a nearly dense weight is `dense`.
    specs = {name: entry.spec for name, entry in file.entries.items()}
    sparse = sum(sum(stored[name]) for name, spec in specs.items() if spec.role == "sparse")
    dense = sum(sum(stored[name]) for name in specs) - sparse
    # Not held unless the caller holds them anyway: whoever reads a tensor later decodes it again.
    decoded = _Decoded(file) if tensors is None else tensors
    found = footprint(
        decoded,
        specs,
        stored={name: (entry.codec, sum(stored[name])) for name, entry in file.entries.items()},
        file_bytes=file.nbytes,
        parts={"sparse weights": sparse, "dense rest": dense, **other_parts},
    )
    return Contents(found, config, decoded, stored, None if record is None else Savings.from_dict(record))


class _Decoded(Mapping[str, SparseTensor]):
    """The tensors of a file, decoded one at a time: all of them at once would take the size of the dense model."""

    def __init__(self, file: _File) -> None:
        self._file = file

    def __getitem__(self, name: str) -> SparseTensor:
        return self._file.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.entries)

    def __len__(self) -> int:
        return len(self._file.entries)
