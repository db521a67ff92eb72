"""What PyTorch computes on random inputs, and how far another runtime is from it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from dsr_tool.errors import FormatError, UsageError, first_line
from dsr_tool.graph.ir import Value
from dsr_tool.sparsity.tensor import Array

__all__ = ["largest_difference", "outputs_of", "random_inputs", "rounding_error"]

_MOST_ENTRIES = 1 << 27
"""Of one input: half a GiB in float32."""


def random_inputs(value: Value, samples: int, seed: int) -> list[Array]:
    """Random inputs: one alone, then a batch of `samples`.

    Raises:
        FormatError: the shape, which comes out of a file, is not one that can be filled.
    """
    one = [1 if n is None else n for n in value.shape[1:]]
    if min(one, default=1) < 1 or math.prod(one) > _MOST_ENTRIES:
        raise FormatError(f"input {value.name[:80]!r} has the shape {str(value.shape)[:80]}, which cannot be filled.")
    random = np.random.default_rng(seed)
    return [random.standard_normal((batch, *one)).astype(value.dtype) for batch in (1, samples)]


def rounding_error(module: nn.Module, inputs: list[Array], reference: list[Array]) -> float:
    """Largest rounding error of PyTorch's outputs; the module is of double precision afterwards."""
    try:
        exact = outputs_of(module.double(), [x.astype(np.float64) for x in inputs])
    except UsageError:  # a type is written into its code
        return 0.0
    return largest_difference(exact, reference)


def outputs_of(module: nn.Module, inputs: list[Array]) -> list[Array]:
    """What PyTorch computes.

    Raises:
        UsageError: the module cannot be run on such inputs (an embedding takes no random numbers).
    """
    try:
        with torch.no_grad():
            outputs = [module(torch.from_numpy(x)) for x in inputs]
    except Exception as error:  # whatever the code of a user's own network raises
        raise UsageError(
            f"the model cannot be verified: it fails on random inputs of {inputs[0].shape} ({first_line(error)}); "
            f"only models of continuous inputs can be exported."
        ) from error
    return [(y["out"] if isinstance(y, Mapping) else y).numpy() for y in outputs]


def largest_difference(expected: list[Array], found: list[Array]) -> float:
    """Largest absolute difference, NaN included; infinite where shapes differ."""
    pairs = list(zip(expected, found, strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.max([np.abs(one - other).max(initial=0.0) for one, other in pairs]))
