"""Outputs on random inputs: those of PyTorch, and how far others are from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from dsr_tool.errors import FormatError, UsageError, first_line
from dsr_tool.graph.ir import Value
from dsr_tool.sparse.feeding import require_floats, tensor_form
from dsr_tool.sparsity.tensor import Array

__all__ = [
    "Form",
    "Outputs",
    "Run",
    "largest_difference",
    "largest_output",
    "mean_difference",
    "outputs_of",
    "random_inputs",
    "rounding_note",
]

Outputs = Mapping[str, Array]
"""Every output of a network for one batch, by name."""

Run = Callable[[Array], Outputs]
"""Computes the outputs for one batch of inputs."""

Form = Callable[[nn.Module], nn.Module]
"""Returns the network of tensors whose outputs are compared: `tensor_form`, or `graph_form` for files with a graph."""

_MOST_ENTRIES = 1 << 27
"""Largest number of entries of one random input: half a GiB in float32."""


def random_inputs(value: Value, samples: int, seed: int) -> list[Array]:
    """Returns two batches of random inputs: one input alone, then `samples` of them.

    Raises:
        FormatError: the shape, which comes from a file, is negative, empty or too large.
    """
    one = [1 if n is None else n for n in value.shape[1:]]
    if min(one, default=1) < 1 or math.prod(one) > _MOST_ENTRIES:
        raise FormatError(f"input {value.name[:80]!r} has the shape {str(value.shape)[:80]}, which cannot be filled.")
    random = np.random.default_rng(seed)
    return [random.standard_normal((batch, *one)).astype(value.dtype) for batch in (1, samples)]


def outputs_of(module: nn.Module, inputs: Sequence[Array], form: Form = tensor_form) -> list[Outputs]:
    """Returns PyTorch's outputs for each batch of inputs; of a detector its raw predictions.

    Raises:
        UsageError: the module cannot be run on such inputs (an embedding takes no random numbers), or it returns no
            real numbers.
    """
    network = form(module)
    try:
        with torch.no_grad():
            outputs = [network(torch.from_numpy(x)) for x in inputs]
    except Exception as error:  # a network of the user's own may raise anything
        raise UsageError(
            f"the model cannot be verified: it fails on random inputs of {inputs[0].shape} ({first_line(error)}); "
            f"only models of continuous inputs can be exported."
        ) from error
    found = [require_floats(output, type(module).__name__) for output in outputs]
    return [{name: tensor.detach().numpy() for name, tensor in one.items()} for one in found]


def largest_difference(expected: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    """Returns the largest absolute difference, NaN included; infinity if names or shapes differ."""
    pairs = _pairs(expected, found)
    with np.errstate(invalid="ignore", over="ignore"):
        return float("inf") if pairs is None else _largest(one - other for one, other in pairs)


def mean_difference(expected: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    """Returns the mean absolute difference over all entries; infinity if names or shapes differ, 0 without entries."""
    pairs = _pairs(expected, found)
    if pairs is None:
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.concatenate([np.abs(one - other).reshape(-1).astype(np.float64) for one, other in pairs])
        return float(differences.mean()) if differences.size else 0.0


def largest_output(outputs: Sequence[Outputs]) -> float:
    """Returns the largest absolute output; NaN if one of them is."""
    return _largest(array for batch in outputs for array in batch.values())


def _pairs(expected: Sequence[Outputs], found: Sequence[Outputs]) -> list[tuple[Array, Array]] | None:
    """Returns the arrays of both sides that belong together; None if names or shapes differ."""
    if any(list(one) != list(other) for one, other in zip(expected, found, strict=True)):
        return None
    pairs = [(one[name], other[name]) for one, other in zip(expected, found, strict=True) for name in one]
    return None if any(one.shape != other.shape for one, other in pairs) else pairs


def _largest(arrays: Iterable[Array]) -> float:
    return float(np.max([np.abs(array).max(initial=0.0) for array in arrays]))


def rounding_note(how: str, exact: Sequence[Outputs], rounded: Sequence[Outputs]) -> str:
    """Says how far outputs move when weights are rounded.

    Outputs of several have scales of their own, so of these the one is told that moves furthest for its scale.

    Args:
        how: as in `rounded to float16`.
        exact: outputs of the model as it was, by batch.
        rounded: outputs with the rounded weights.
    """
    names = list(exact[0])
    measured = []
    for name in names:
        one, other = _only(name, exact), _only(name, rounded)
        largest = largest_output(one)
        measured.append((largest_difference(one, other), mean_difference(one, other), largest))
    # NaN and what differs from zeros alone count as furthest.
    moves = [
        difference / largest if largest else math.inf if difference else 0.0 for difference, _, largest in measured
    ]
    furthest = max(range(len(names)), key=lambda number: (math.isnan(moves[number]), moves[number]))
    difference, mean, largest = measured[furthest]
    which = f"outputs differ by up to {difference:.3g} from those"
    if len(names) > 1:
        which = f"{names[furthest][:80]!r} of {len(names)} outputs moves most, by up to {difference:.3g} from that"
    return f"with weights {how}, {which} of the model as it was, {mean:.3g} on average (largest output {largest:.3g})"


def _only(name: str, outputs: Sequence[Outputs]) -> list[Outputs]:
    """Returns one output of each batch; none of a batch that lacks it."""
    return [{name: batch[name]} if name in batch else {} for batch in outputs]
