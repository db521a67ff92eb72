"""Reports what values of weights take in a file: bits each, their entropy, and what the next step would save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dsr_tool.formats.coding import encode_planes
from dsr_tool.formats.grid import encode_grid
from dsr_tool.formats.value_bits import entropy_bits
from dsr_tool.report.sources import Source
from dsr_tool.sparsity.grid import GridTensor, largest_code
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.values import GRID_BITS, stored_as

__all__ = ["ValueBits", "value_bits", "value_document", "value_text"]

_STEPS = ("fp32", "fp16", *GRID_BITS)
"""Values from the most bits to the fewest."""
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class ValueBits:
    """The values of all weights of a file, positions aside.

    Attributes:
        values: how they are stored, as `--values` names it: that of the weight with the most bits.
        weights: number of active weights.
        stored_bits: bits for each of them in the file, tables and scales included; of a folder, which keeps zeros in
            place, those of its archive.
        entropy_bits: fewest bits for each by any code of single symbols.
        next_values: the next step to fewer bits; None if there is none.
        saved_bytes: bytes that an archive would save by it, norms and biases as they are.
    """

    values: str
    weights: int
    stored_bits: float
    entropy_bits: float
    next_values: str | None
    saved_bytes: int | None


def value_bits(source: Source) -> ValueBits | None:
    """Measures the values of a file or folder; None without weights.

    Of a folder or a file that is no archive, the bytes that a step would save are those of the archive of its weights.
    """
    specs = {layer.spec.name: layer.spec for layer in source.footprint.layers}
    weights = {
        name: tensor
        for name, spec in specs.items()
        if spec.weight and (tensor := source.tensors[name]).values.dtype.kind == "f"
    }
    count = sum(tensor.mask.active for tensor in weights.values())
    if not count:
        return None
    coded = sum(map(_coded_bytes, weights.values()))
    stored = coded if source.is_folder else sum(source.stored[name].values for name in weights)
    entropy = sum(map(entropy_bits, weights.values()))
    values = min((_kind(tensor) for tensor in weights.values()), key=_STEPS.index)
    following = _next(values, weights)
    saved = None
    if following is not None:
        now = stored if source.kind == "archive" else coded
        saved = now - sum(_coded_bytes(_rounded(specs[name], tensor, following)) for name, tensor in weights.items())
    return ValueBits(values, count, 8 * stored / count, entropy / count, following, saved)


def value_document(found: ValueBits | None) -> dict[str, Any] | None:
    """Returns plain values for JSON."""
    return asdict(found) if found else None


def value_text(found: Mapping[str, Any] | None) -> list[str]:
    """Returns the line of a report; nothing without weights."""
    if not found:
        return []
    line = (
        f"values: {found['values']}, {found['stored_bits']:.2f} bits for each of {found['weights']:,} active weights, "
        f"entropy {found['entropy_bits']:.2f}"
    )
    if found["next_values"] is None:
        return [line]
    return [f"{line}; --values {found['next_values']} would save {found['saved_bytes']:,} bytes of an archive"]


def _kind(tensor: SparseTensor) -> str:
    if not isinstance(tensor, GridTensor):
        return "fp16" if tensor.values.dtype == np.float16 else "fp32"
    largest = int(np.abs(tensor.codes.astype(np.int16)).max(initial=0))
    return next(name for name in reversed(GRID_BITS) if largest <= largest_code(GRID_BITS[name]))


def _next(values: str, weights: Mapping[str, SparseTensor]) -> str | None:
    """Returns the next step that every weight can take; float16 ends early, and no grid holds what is no number."""
    finite = all(np.isfinite(tensor.values).all() for tensor in weights.values())
    short = finite and all(np.abs(tensor.values).max(initial=0) <= _LARGEST_HALF for tensor in weights.values())
    allowed = {"fp16": short, **dict.fromkeys(GRID_BITS, finite)}
    return next((name for name in _STEPS[_STEPS.index(values) + 1 :] if allowed[name]), None)


def _rounded(spec: LayerSpec, tensor: SparseTensor, values: str) -> SparseTensor:
    return stored_as({spec.name: SparseTensor(tensor.mask, tensor.values)}, {spec.name: spec}, values)[spec.name]


def _coded_bytes(tensor: SparseTensor) -> int:
    """Returns the bytes of the values of a tensor in an archive."""
    if isinstance(tensor, GridTensor):
        streams = encode_grid(tensor)
        return streams["codes"].nbytes + streams["scales"].nbytes
    return encode_planes(tensor.values).nbytes
