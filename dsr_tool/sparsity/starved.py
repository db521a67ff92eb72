"""Starved layers: those with so few active weights that a network can hardly pass anything through them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["STARVED_DENSITY", "silent_layers", "starved_layers"]

STARVED_DENSITY = 0.02
"""Density below which a layer is named. MobileNetV2 at sparsity .8 keeps .05 or more everywhere with LAMP, and 3e-5
somewhere by a global threshold, which gave 0 of 100 photographs right."""
_LEAST_OUTPUTS = 0.1
"""Fraction of the outputs below which a layer carries no signal: what is left of the others are constants."""


def starved_layers(specs: Mapping[str, LayerSpec], active: Mapping[str, int]) -> dict[str, str]:
    """Finds sparse layers with a density below `STARVED_DENSITY`, or with fewer active weights than outputs.

    Args:
        specs: spec of each sparse weight by name; others are ignored.
        active: number of active weights of each sparse layer.

    Returns:
        For each starved layer by name what it has, in words: "36 of 65,536 weights, density 0.00055".
    """
    found = {}
    for spec in _sparse(specs):
        count = active[spec.name]
        if count < STARVED_DENSITY * spec.size or count < min(spec.shape[_outputs_axis(spec)], spec.size):
            found[spec.name] = f"{count:,} of {spec.size:,} weights, density {count / spec.size:.2g}"
    return found


def silent_layers(specs: Mapping[str, LayerSpec], tensors: Mapping[str, SparseTensor]) -> dict[str, str]:
    """Finds sparse layers that carry no signal: fewer than a tenth of their outputs depend on any input.

    An output depends on an input if it has an active weight that is not zero. Outputs that were zero before the
    conversion count as well, since it makes no difference to what reads them.

    Args:
        specs: spec of each sparse weight by name; others are ignored.
        tensors: mask and values of each sparse weight.

    Returns:
        For each such layer by name what it has, in words: "3 of 512 outputs have a weight".
    """
    found = {}
    for spec in _sparse(specs):
        tensor, axis = tensors[spec.name], _outputs_axis(spec)
        positions = tensor.mask.positions[np.asarray(tensor.values).reshape(-1) != 0]
        alive = np.unique(np.unravel_index(positions, spec.shape)[axis]).size
        if alive < _LEAST_OUTPUTS * spec.shape[axis]:
            found[spec.name] = f"{alive:,} of {spec.shape[axis]:,} outputs have a weight"
    return found


def _sparse(specs: Mapping[str, LayerSpec]) -> Iterable[LayerSpec]:
    return (spec for spec in specs.values() if spec.role == "sparse")


def _outputs_axis(spec: LayerSpec) -> int:
    """Returns the dimension of a weight that counts its outputs; transposed convolutions have their inputs first."""
    return 1 if spec.kind.startswith(("ConvTranspose", "Embedding")) and len(spec.shape) > 1 else 0
