"""LayerSpec: name, shape and role of a parameter, and the reason why it is sparse or dense."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.mask import MAX_RANK

__all__ = ["LayerSpec", "matrix_shape"]

_LARGEST = 1 << 40
"""Upper bound of the entries of a tensor and of the multiply-adds of a weight that a file may claim."""


@dataclass(frozen=True)
class LayerSpec:
    """One entry of a model's state_dict, parameter or buffer.

    Attributes:
        name: full name in the state_dict.
        shape: its shape.
        kind: type of the module that owns it (`Conv2d`, `MultiheadAttention`).
        role: `sparse`, `dense` (a weight or another parameter that stays dense) or `buffer`.
        weight: whether it is a weight by type: of a convolution, linear layer, embedding or attention projection.
        reason: reason for the role, in a few words for reports.
        macs_per_weight: multiply-adds per weight for one input; 0 if it is not a weight or not known.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    role: str
    weight: bool
    reason: str
    macs_per_weight: float = 0.0

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix view: the first dimension by the product of the others."""
        return matrix_shape(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerSpec:
        """Returns the spec of plain values, the inverse of `to_dict`.

        Raises:
            FormatError: a field is missing, of the wrong type or out of range.
        """
        try:
            # Ignore fields that a newer minor version adds.
            known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
            spec = cls(**{**known, "shape": tuple(int(n) for n in data["shape"])})
            well_typed = (
                all(isinstance(text, str) for text in (spec.name, spec.kind, spec.reason))
                and spec.role in ("sparse", "dense", "buffer")
                and isinstance(spec.weight, bool)
                and isinstance(spec.macs_per_weight, (int, float))
                and 0 <= spec.macs_per_weight < _LARGEST
                and len(spec.shape) <= MAX_RANK
                and all(n >= (spec.role == "sparse") for n in spec.shape)
                # A size of 0 does not make the others harmless: numpy multiplies them as well.
                and math.prod(n or 1 for n in spec.shape) < _LARGEST
            )
        except (ArithmeticError, TypeError, ValueError, KeyError) as error:
            raise FormatError(f"layer entry {str(data)[:80]!r} is invalid: {error}.") from error
        if not well_typed:
            raise FormatError(f"layer entry {str(data)[:80]!r} has a value of the wrong type or range.")
        return spec


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns rows and columns of the matrix view of a shape; vectors and scalars have one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])
