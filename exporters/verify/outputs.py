"""Outputs on random inputs: those of PyTorch, and how far a file run by some runtime is from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dsr_tool.errors import FormatError, UsageError, first_line
from dsr_tool.graph.ir import Value
from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.feeding import require_floats, tensor_form
from dsr_tool.sparsity.tensor import Array
from exporters.verify.result import Verification

__all__ = [
    "RELATIVE_TOLERANCE",
    "ROUNDING_FACTOR",
    "Differing",
    "Run",
    "compare_outputs",
    "largest_difference",
    "largest_output",
    "mean_difference",
    "outputs_of",
    "random_inputs",
    "rounding_note",
]

Run = Callable[[Array], Array]
"""Computes the output for one batch of inputs."""

Differing = tuple[list[str], list[str]]
"""Names of tensors whose masks differ, and of others whose values differ."""

RELATIVE_TOLERANCE = 1e-5
"""Allowed difference to PyTorch, as a fraction of the largest output."""
ROUNDING_FACTOR = 4
"""Multiples of PyTorch's own rounding error that are allowed on top; that error grows with the depth of a network."""

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


def outputs_of(module: nn.Module, inputs: Sequence[Array]) -> list[Array]:
    """Returns PyTorch's outputs; of several tensors, as the raw predictions of a detector, one after the other.

    Raises:
        UsageError: the module cannot be run on such inputs (an embedding takes no random numbers), or it returns no
            real numbers.
    """
    network = tensor_form(module)
    try:
        with torch.no_grad():
            outputs = [network(torch.from_numpy(x)) for x in inputs]
    except Exception as error:  # a network of the user's own may raise anything
        raise UsageError(
            f"the model cannot be verified: it fails on random inputs of {inputs[0].shape} ({first_line(error)}); "
            f"only models of continuous inputs can be exported."
        ) from error
    return [_joined(require_floats(output, type(module).__name__)) for output in outputs]


def _joined(tensors: Sequence[torch.Tensor]) -> Array:
    """Returns one tensor as it is, and several as one vector."""
    if len(tensors) > 1:
        tensors = [torch.cat([tensor.reshape(-1) for tensor in tensors])]
    joined: Array = tensors[0].detach().numpy()
    return joined


def largest_difference(expected: Sequence[Array], found: Sequence[Array]) -> float:
    """Returns the largest absolute difference, NaN included; infinity if shapes differ."""
    pairs = list(zip(expected, found, strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.max([np.abs(one - other).max(initial=0.0) for one, other in pairs]))


def mean_difference(expected: Sequence[Array], found: Sequence[Array]) -> float:
    """Returns the mean absolute difference over all entries; infinity if shapes differ, zero without entries."""
    pairs = list(zip(expected, found, strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.concatenate([np.abs(one - other).reshape(-1).astype(np.float64) for one, other in pairs])
        return float(differences.mean()) if differences.size else 0.0


def largest_output(outputs: Sequence[Array]) -> float:
    """Returns the largest absolute output; NaN if one of them is."""
    return float(np.max([np.abs(y).max(initial=0.0) for y in outputs]))


def rounding_note(how: str, exact: Sequence[Array], rounded: Sequence[Array]) -> str:
    """Says how far outputs move when weights are rounded.

    Args:
        how: as in `rounded to float16`.
        exact: outputs of the model as it was, by batch.
        rounded: outputs with the rounded weights.
    """
    return (
        f"with weights {how}, outputs differ by up to {largest_difference(exact, rounded):.3g} from those of the model "
        f"as it was, {mean_difference(exact, rounded):.3g} on average (largest output {largest_output(exact):.3g})"
    )


def compare_outputs(
    path: Path,
    kind: str,
    module: nn.Module,
    *,
    runs: Mapping[str, Run],
    value: Value,
    samples: int,
    seed: int,
    differing: Differing,
    problems: Sequence[str] = (),
    notes: Sequence[str] = (),
    rounded: Run | None = None,
    exact: nn.Module | None = None,
    how: str = "rounded",
) -> Verification:
    """Runs a file on random inputs and compares the outputs with those of PyTorch.

    Args:
        path: the file.
        kind: name of its container.
        module: the network that the file should compute.
        runs: the file as some runtimes run it, by name of the runtime.
        value: name, shape and type of the input.
        samples: size of the second batch of inputs; the first has one.
        seed: seed of the inputs.
        differing: tensors that differ.
        problems: other faults that were found.
        notes: comparisons that were not possible, and remarks.
        rounded: runs the model with its weights rounded as in the file, to compare with in place of PyTorch.
        exact: the network before its weights were rounded, if `module` has rounded ones.
        how: how they are rounded, for the note about it.
    """
    # A batch of one and a larger one: a batch that was captured as a constant shows in one of them.
    inputs = random_inputs(value, samples, seed)
    frozen = frozen_copy(module)
    reference = outputs_of(frozen, inputs)
    before = None if exact is None else outputs_of(frozen_copy(exact), inputs)
    if rounded is not None:
        before, reference = reference, [rounded(x) for x in inputs]
    lost = () if before is None else (rounding_note(how, before, reference),)
    scale = largest_output(reference)
    runtimes = {name: largest_difference(reference, [run(x) for x in inputs]) for name, run in runs.items()}
    tolerance = RELATIVE_TOLERANCE * scale
    if max(runtimes.values()) > tolerance and rounded is None:
        # Double precision is slow, and needed only for networks that round more than most.
        tolerance += ROUNDING_FACTOR * _rounding_error(frozen, inputs, reference)
    masks, values = differing
    faults = [
        *(f"the zeros of {name!r} differ" for name in masks[:1]),
        *(f"the values of {name!r} differ" for name in values[:1]),
        *_output_faults(runtimes, scale, tolerance, "PyTorch" if rounded is None else _ROUNDED),
    ]
    # A network that outputs zeros agrees with anything, so the user is told.
    dead = () if scale else ("every output is zero, so that only the weights were compared",)
    return Verification(
        path,
        kind,
        path.stat().st_size,
        runtimes,
        scale,
        tolerance,
        masks_equal=not masks,
        weights_equal=not (masks or values),
        problems=(*faults, *problems),
        notes=(*lost, *notes, *dead),
        rounding_largest=None if before is None else largest_difference(before, reference),
        rounding_mean=None if before is None else mean_difference(before, reference),
    )


_ROUNDED = "the same rounded weights, stored dense,"
"""Reference of a file with rounded weights, as messages name it."""


def _output_faults(runtimes: Mapping[str, float], scale: float, tolerance: float, reference: str) -> list[str]:
    faults = [] if np.isfinite(scale) else ["the outputs of the model itself are not finite numbers"]
    return faults + [
        f"{name} differs from {reference} by {difference:.3g} where {tolerance:.3g} is allowed"
        for name, difference in runtimes.items()
        if not difference <= tolerance  # written so that NaN counts as a difference
    ]


def _rounding_error(module: nn.Module, inputs: Sequence[Array], reference: Sequence[Array]) -> float:
    """Returns the largest rounding error of PyTorch's outputs; the module is in double precision afterwards."""
    try:
        exact = outputs_of(module.double(), [x.astype(np.float64) for x in inputs])
    except UsageError:  # the network's code asks for float32 by name
        return 0.0
    return largest_difference(exact, reference)
