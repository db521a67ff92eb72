"""The types that weights have in a file: exact floats, float16, or whole numbers of few bits on a grid."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.grid_rounding import balanced, distance, to_grid
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["EXACT", "GRID_BITS", "MOST_STEPS", "PALETTE", "VALUES", "stored_as", "stored_like"]

VALUES = ("fp32", "fp16", "int8", "int6", "int5", "int4", "palette")
PALETTE = "palette"
"""Values that keep every bit, as tables of the distinct ones and coded indices; a choice of archives alone."""
EXACT = ("fp32", PALETTE)
"""Values that keep every bit."""
GRID_BITS = {"int8": 8, "int6": 6, "int5": 5, "int4": 4}
"""Bits of a code, by the names of values that lie on a grid with one scale for each output channel."""
MOST_STEPS = 2.0
"""Steps of the grid by which a value in a file may lie from that of its model: half of one if each value was rounded by
itself, and more if rounding kept the outputs of a layer."""


def stored_as(
    tensors: Mapping[str, SparseTensor], specs: Mapping[str, LayerSpec], values: str
) -> dict[str, SparseTensor]:
    """Returns the tensors as a file holds them.

    Args:
        tensors: every entry of the state_dict.
        specs: description of each entry.
        values: `fp32` and `palette` change nothing; `fp16` rounds weights to the nearest float16, ties to even; `int8`
            to `int4` round them to a grid (`to_grid` and `balanced` in `dsr_tool.sparsity.grid`). Norms, biases and
            buffers stay. Masks stay, even if a value becomes zero.

    Raises:
        UsageError: another name, or a weight that float16 or a grid cannot hold.
    """
    if values not in VALUES:
        raise unknown_name("--values", values, VALUES)
    if values in EXACT:
        return dict(tensors)
    # Norms and biases are a small part of the bytes, and rounding them moves every output of a channel.
    # Biases that folding made have no description.
    weights = {name for name, spec in specs.items() if spec.weight}
    return {name: _rounded(name, tensor, values) if name in weights else tensor for name, tensor in tensors.items()}


def stored_like(found: SparseTensor, exact: SparseTensor, spec: LayerSpec) -> SparseTensor:
    """Returns the tensor that a file should have, judged by the one that it has: the file tells how it was rounded.

    Args:
        found: the tensor in the file.
        exact: that of the model.
        spec: its description.

    Returns:
        `found` itself if it is a weight on a grid whose values lie within `MOST_STEPS` steps of the exact ones; the
        exact values as float16 if it is a weight of that type; else `exact`.

    Raises:
        UsageError: float16 cannot hold the exact values.
    """
    if not spec.weight:
        return exact
    if isinstance(found, GridTensor):
        return found if found.mask.equals(exact.mask) and distance(found, exact) <= MOST_STEPS else exact
    return _half(spec.name, exact) if found.values.dtype == np.float16 else exact


def _rounded(name: str, tensor: SparseTensor, values: str) -> SparseTensor:
    if tensor.values.dtype.kind != "f":
        return tensor
    if values == "fp16":
        return _half(name, tensor)
    if not np.isfinite(tensor.values).all():
        raise UsageError(
            f"--values {values!r} cannot hold weight {name!r}, which has values that are not finite numbers; use "
            f"--values fp32, or replace them in the model first."
        )
    bits = GRID_BITS[values]
    return balanced(to_grid(tensor, bits), tensor, bits)


def _half(name: str, tensor: SparseTensor) -> SparseTensor:
    with np.errstate(over="ignore", invalid="ignore"):
        half = tensor.values.astype(np.float16)
    # Infinity would be stored without a complaint and would spoil every output, so it is refused here.
    lost = ~np.isfinite(half)
    if lost.any():
        value = float(tensor.values[lost][0])
        raise UsageError(
            f"--values 'fp16' cannot hold weight {name!r}, which has a value of {value:.6g} where float16 ends at "
            f"65,504; use --values fp32."
        )
    return SparseTensor(tensor.mask, half)
