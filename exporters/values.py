"""The types that weights have in a file: float32, exact, or float16, rounded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["VALUES", "stored_as"]

VALUES = ("fp32", "fp16")


def stored_as(
    tensors: Mapping[str, SparseTensor], specs: Mapping[str, LayerSpec], values: str
) -> dict[str, SparseTensor]:
    """Returns the tensors as a file holds them.

    Args:
        tensors: every entry of the state_dict.
        specs: description of each entry.
        values: `fp32` changes nothing; `fp16` rounds weights to the nearest float16, ties to even, and leaves norms,
            biases and buffers. Masks stay, even if a value becomes zero.

    Raises:
        UsageError: another name, or a weight that float16 cannot hold.
    """
    if values not in VALUES:
        raise unknown_name("--values", values, VALUES)
    if values == "fp32":
        return dict(tensors)
    # Norms and biases are a small part of the bytes, and rounding them moves every output of a channel.
    return {name: _half(name, tensor) if specs[name].weight else tensor for name, tensor in tensors.items()}


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
