"""Footprint: parameters, active weights, bytes per codec and multiply-adds, per layer and in all.

Plain numbers, with units in their names: `_bytes`, `_macs`; sparsity is a fraction of zeros in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dsr_tool.formats.codecs import CODECS, bitmask_bytes, csr_bytes
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["Footprint", "LayerFootprint", "Sizes", "footprint"]


@dataclass(frozen=True)
class Sizes:
    """What one tensor, or several, take and cost.

    Attributes:
        parameters: entries, zeros included.
        active: entries that may differ from zero.
        dense_bytes: every entry in its own type.
        csr_bytes: int32 row pointers and column indices, and the active values.
        bitmask_bytes: one bit an entry, and the active values.
        coded_bytes: run lengths and byte planes, Huffman-coded, exactly as the archive's delta codec writes them.
        bound_bytes: the entropy bound of the mask, log2 C(parameters, active) bits, and the raw active values.
        dense_macs: multiply-adds for one input with every weight.
        sparse_macs: multiply-adds for one input with the active weights alone.
    """

    parameters: int = 0
    active: int = 0
    dense_bytes: int = 0
    csr_bytes: int = 0
    bitmask_bytes: int = 0
    coded_bytes: int = 0
    bound_bytes: int = 0
    dense_macs: int = 0
    sparse_macs: int = 0

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Sizes)))

    @property
    def density(self) -> float:
        """Active share, in [0, 1]."""
        return self.active / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class LayerFootprint:
    """One entry of the state_dict.

    Attributes:
        spec: what it is.
        sizes: what it takes.
        stored_bytes: bytes in the file at hand; None where the file does not tell.
        codec: how it is stored there.
    """

    spec: LayerSpec
    sizes: Sizes
    stored_bytes: int | None = None
    codec: str = "dense"


@dataclass(frozen=True)
class Footprint:
    """A whole model.

    Attributes:
        layers: every parameter and buffer.
        file_bytes: size on disk of what was read.
        parts: bytes of that file by part; they add up to `file_bytes`.
    """

    layers: tuple[LayerFootprint, ...]
    file_bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def prunable(self) -> Sizes:
        """The sparse weights."""
        return _total(layer for layer in self.layers if layer.spec.role == "sparse")

    @property
    def model(self) -> Sizes:
        """All parameters, without buffers."""
        return _total(layer for layer in self.layers if layer.spec.role != "buffer")

    @property
    def everything(self) -> Sizes:
        """All parameters and buffers, which is what files hold."""
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
        """Sum of the parts."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sparsity_of_prunable_weights": self.sparsity,
            "sparsity_of_whole_model": self.model_sparsity,
            "prunable": _sizes(self.prunable),
            "model": _sizes(self.model),
            "with_buffers": _sizes(self.everything),
            "file_bytes": self.file_bytes,
            "computed_bytes": self.computed_bytes,
            "parts_bytes": dict(self.parts),
            "layers": [
                {
                    **layer.spec.to_dict(),
                    **_sizes(layer.sizes),
                    "codec": layer.codec,
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
    """Measure a model.

    Args:
        tensors: every entry of the state_dict; full masks for dense ones. Taken one at a time, so a mapping that
            decodes on demand keeps the memory low.
        specs: what each of them is.
        stored: codec and bytes of each in the file at hand.
        file_bytes: size of that file.
        parts: its parts in bytes.
    """
    layers = []
    for name, spec in specs.items():
        codec, nbytes = (stored or {}).get(name, ("dense", None))
        layers.append(LayerFootprint(spec, _measure(tensors[name], spec), nbytes, codec))
    return Footprint(tuple(layers), file_bytes, dict(parts or {}))


def _measure(tensor: SparseTensor, spec: LayerSpec) -> Sizes:
    size, active, width = tensor.mask.size, tensor.mask.active, tensor.values.dtype.itemsize
    dense = size * width
    macs = {"dense_macs": round(size * spec.macs_per_weight), "sparse_macs": round(active * spec.macs_per_weight)}
    if spec.role != "sparse":
        return Sizes(size, active, *[dense] * 5, **macs)
    csr, bitmask = csr_bytes(tensor), bitmask_bytes(tensor)
    coded = sum(array.nbytes for array in CODECS["delta"].encode(tensor).values())
    bound = math.ceil(tensor.mask.entropy_bound_bits / 8) + active * width
    return Sizes(size, active, dense, csr, bitmask, coded, bound, **macs)


def _total(layers: Iterable[LayerFootprint]) -> Sizes:
    return sum((layer.sizes for layer in layers), Sizes())


def _sizes(sizes: Sizes) -> dict[str, Any]:
    return {**asdict(sizes), "density": sizes.density}
