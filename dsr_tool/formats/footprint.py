"""Footprint: parameters, active weights, bytes per codec and multiply-adds, for each layer and for the model.

All numbers carry their unit in the name: `_bytes`, `_macs`. Sparsity is the fraction of zeros, in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsr_tool.formats.codecs import column_bytes, size_columns
from dsr_tool.formats.coding import encode_planes
from dsr_tool.formats.value_bits import entropy_bits
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.pattern import found_pattern, pattern_bits
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["Footprint", "LayerFootprint", "Sizes", "footprint"]


@dataclass(frozen=True)
class Sizes:
    """Memory and computation of one tensor, or of several together.

    Attributes:
        parameters: number of entries, zeros included.
        active: number of entries that may differ from zero.
        dense_bytes: bytes of all entries in their own type, without a mask.
        codec_bytes: exact bytes of the smallest codec of each column in reports, by the name of its first.
        bound_bytes: least bytes of an entropy-coded mask, log2 C(parameters, active) bits or with N:M log2 C(M, N) for
            each group, and of raw active values; of weights on a grid, their scales and the entropy of their codes.
        dense_macs: multiply-adds for one input with all weights.
        sparse_macs: multiply-adds for one input with the active weights.
    """

    parameters: int = 0
    active: int = 0
    dense_bytes: int = 0
    codec_bytes: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(size_columns(), 0))
    bound_bytes: int = 0
    dense_macs: int = 0
    sparse_macs: int = 0

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(
            self.parameters + other.parameters,
            self.active + other.active,
            self.dense_bytes + other.dense_bytes,
            {name: nbytes + other.codec_bytes[name] for name, nbytes in self.codec_bytes.items()},
            self.bound_bytes + other.bound_bytes,
            self.dense_macs + other.dense_macs,
            self.sparse_macs + other.sparse_macs,
        )

    @property
    def density(self) -> float:
        """Fraction of active entries, in [0, 1]."""
        return self.active / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, int | float]:
        """Returns plain values for JSON, the bytes of each codec under the key of its column."""
        return {
            "parameters": self.parameters,
            "active": self.active,
            "dense_bytes": self.dense_bytes,
            **{column.key: self.codec_bytes[name] for name, column in size_columns().items()},
            "bound_bytes": self.bound_bytes,
            "dense_macs": self.dense_macs,
            "sparse_macs": self.sparse_macs,
            "density": self.density,
        }


@dataclass(frozen=True)
class LayerFootprint:
    """Footprint of one entry of the state_dict.

    Attributes:
        spec: name, shape and role of the entry.
        sizes: its memory and computation.
        stored_bytes: its bytes in the file that was read; None if the file does not tell them apart.
        codec: codec that stores it there.
        pattern: pattern of a sparse weight's mask, such as `2:4`, `kernel` or `fan-in`; None for any other.
    """

    spec: LayerSpec
    sizes: Sizes
    stored_bytes: int | None = None
    codec: str = "dense"
    pattern: str | None = None


@dataclass(frozen=True)
class Footprint:
    """Footprint of a whole model.

    Attributes:
        layers: every parameter and buffer.
        file_bytes: size on disk of the file or folder that was read.
        parts: bytes of that file by part; they add up to `file_bytes`.
    """

    layers: tuple[LayerFootprint, ...]
    file_bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def prunable(self) -> Sizes:
        """Sizes of the sparse weights."""
        return _total(layer for layer in self.layers if layer.spec.role == "sparse")

    @property
    def model(self) -> Sizes:
        """Sizes of all parameters, without buffers."""
        return _total(layer for layer in self.layers if layer.spec.role != "buffer")

    @property
    def everything(self) -> Sizes:
        """Sizes of all parameters and buffers, which is what files hold."""
        return _total(self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return 1 - self.prunable.density if self.prunable.parameters else 0.0

    @property
    def model_sparsity(self) -> float:
        """Fraction of zeros among all parameters of the model."""
        return 1 - self.model.density if self.model.parameters else 0.0

    @property
    def computed_bytes(self) -> int:
        """Sum of the parts, to be compared with `file_bytes`."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "sparsity_of_prunable_weights": self.sparsity,
            "sparsity_of_whole_model": self.model_sparsity,
            "prunable": self.prunable.to_dict(),
            "model": self.model.to_dict(),
            "with_buffers": self.everything.to_dict(),
            "file_bytes": self.file_bytes,
            "computed_bytes": self.computed_bytes,
            "parts_bytes": dict(self.parts),
            "layers": [
                {
                    **layer.spec.to_dict(),
                    **layer.sizes.to_dict(),
                    "codec": layer.codec,
                    "pattern": layer.pattern,
                    "stored_bytes": layer.stored_bytes,
                }
                for layer in self.layers
            ],
        }


def footprint(
    tensors: Mapping[str, SparseTensor],
    specs: Mapping[str, LayerSpec],
    *,
    stored: Mapping[str, tuple[str, int]] | None = None,
    file_bytes: int = 0,
    parts: Mapping[str, int] | None = None,
) -> Footprint:
    """Measures a model.

    Args:
        tensors: every entry of the state_dict, with full masks for dense ones. They are read one at a time, so a
            mapping that decodes on demand keeps the memory low.
        specs: name, shape and role of each.
        stored: codec and bytes of each in the file that was read.
        file_bytes: size of that file.
        parts: bytes of that file by part.
    """
    layers = []
    for name, spec in specs.items():
        codec, nbytes = (stored or {}).get(name, ("dense", None))
        tensor = tensors[name]
        pattern = found_pattern(tensor.mask) if spec.role == "sparse" else None
        layers.append(
            LayerFootprint(spec, _measure(tensor, spec), nbytes, codec, None if pattern is None else str(pattern))
        )
    return Footprint(tuple(layers), file_bytes, dict(parts or {}))


def _measure(tensor: SparseTensor, spec: LayerSpec) -> Sizes:
    size, active, width = tensor.mask.size, tensor.mask.active, tensor.values.dtype.itemsize
    dense = size * width
    if isinstance(tensor, GridTensor):
        # Each codec with codes of a byte in place of floats; scales come on top of any.
        codes, scales = SparseTensor(tensor.mask, tensor.codes), encode_planes(tensor.scales).nbytes
        sparse = spec.role == "sparse"
        stored = column_bytes(codes) if sparse else dict.fromkeys(size_columns(), size)
        codecs = {name: nbytes + scales for name, nbytes in stored.items()}
        bound = math.ceil((pattern_bits(tensor.mask) + entropy_bits(tensor)) / 8) + scales
    elif spec.role == "sparse":
        codecs = column_bytes(tensor)
        bound = math.ceil(pattern_bits(tensor.mask) / 8) + active * width
    else:
        # The columns compare ways to store sparse weights; dense tensors are the same constant in each.
        codecs, bound = dict.fromkeys(size_columns(), dense), dense
    macs = round(size * spec.macs_per_weight), round(active * spec.macs_per_weight)
    return Sizes(size, active, dense, codecs, bound, *macs)


def _total(layers: Iterable[LayerFootprint]) -> Sizes:
    return sum((layer.sizes for layer in layers), Sizes())  # Sizes() for a model without layers
