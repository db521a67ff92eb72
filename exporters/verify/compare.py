"""Comparing a file with its network: the outputs of every runtime, each output by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Value
from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.feeding import tensor_form
from dsr_tool.sparsity.tensor import Array
from exporters.verify.outputs import (
    Form,
    Outputs,
    Run,
    largest_difference,
    largest_output,
    mean_difference,
    outputs_of,
    random_inputs,
    rounding_note,
)
from exporters.verify.result import Verification

__all__ = [
    "RELATIVE_TOLERANCE",
    "ROUNDING_FACTOR",
    "Compared",
    "Differing",
    "compare_each",
    "compare_outputs",
    "output_faults",
]

Differing = tuple[list[str], list[str]]
"""Names of tensors whose masks differ, and of others whose values differ."""

RELATIVE_TOLERANCE = 1e-5
"""Allowed difference to PyTorch, as a fraction of the largest output."""
ROUNDING_FACTOR = 4
"""Multiples of PyTorch's own rounding error that are allowed on top; that error grows with the depth of a network."""


def compare_outputs(
    path: Path,
    kind: str,
    module: nn.Module,
    *,
    runs: Mapping[str, Run],
    value: Value,
    samples: int,
    seed: int,
    differing: Differing | None,
    problems: Sequence[str] = (),
    notes: Sequence[str] = (),
    rounded: Run | None = None,
    exact: nn.Module | None = None,
    how: str = "rounded",
    form: Form = tensor_form,
) -> Verification:
    """Runs a file on random inputs and compares the outputs with those of PyTorch.

    Each output has a tolerance of its own, from its own scale; the result tells that of the one that is the nearest to
    its tolerance.

    Args:
        path: the file.
        kind: name of its container.
        module: the network that the file should compute.
        runs: the file as some runtimes run it, by name of the runtime.
        value: name, shape and type of the input.
        samples: size of the second batch of inputs; the first has one.
        seed: seed of the inputs.
        differing: tensors that differ; None for a file whose tensors cannot be compared.
        problems: other faults that were found.
        notes: comparisons that were not possible, and remarks.
        rounded: runs the model with its weights rounded as in the file, to compare with in place of PyTorch.
        exact: the network before its weights were rounded, if `module` has rounded ones.
        how: how they are rounded, for the note about it.
        form: the form of the network that the file computes.
    """
    # A batch of one and a larger one: a batch that was captured as a constant shows in one of them.
    inputs = random_inputs(value, samples, seed)
    frozen = frozen_copy(module)
    reference = outputs_of(frozen, inputs, form)
    before = None if exact is None else outputs_of(frozen_copy(exact), inputs, form)
    if rounded is not None:
        before, reference = reference, [rounded(x) for x in inputs]
    lost = () if before is None else (rounding_note(how, before, reference),)
    found = {name: [run(x) for x in inputs] for name, run in runs.items()}
    compared = compare_each(reference, found)
    if not compared.agree and rounded is None:
        # Double precision is slow, and needed only for networks that round more than most.
        compared = compare_each(reference, found, _in_double(frozen, inputs, form))
    scale, whose = compared.scale, "PyTorch" if rounded is None else _ROUNDED
    masks, values = differing or ([], [])
    faults = [
        *(f"the zeros of {name!r} differ" for name in masks[:1]),
        *(f"the values of {name!r} differ" for name in values[:1]),
        *(_name_faults(reference, found) or output_faults(compared, whose, "the model", several=len(reference[0]) > 1)),
    ]
    # A network that outputs zeros agrees with anything, so the user is told.
    dead = () if largest_output(reference) else ("every output is zero, so that only the weights were compared",)
    return Verification(
        path,
        kind,
        path.stat().st_size,
        compared.runtimes,
        scale,
        compared.tolerance,
        masks_equal=None if differing is None else not masks,
        weights_equal=None if differing is None else not (masks or values),
        problems=(*faults, *problems),
        notes=(*lost, *notes, *dead),
        rounding_largest=None if before is None else largest_difference(before, reference),
        rounding_mean=None if before is None else mean_difference(before, reference),
    )


_ROUNDED = "the same rounded weights, stored dense,"
"""Reference of a file with rounded weights, as messages name it."""


@dataclass(frozen=True)
class Compared:
    """One output in the runtimes that ran a file.

    Attributes:
        name: its name.
        runtimes: largest absolute difference to the reference, by runtime; infinity if one has no such output.
        scale: largest absolute value of the reference.
        tolerance: largest absolute difference allowed.
    """

    name: str
    runtimes: Mapping[str, float]
    scale: float
    tolerance: float

    @property
    def agree(self) -> bool:
        """True if all runtimes are within the tolerance."""
        return all(difference <= self.tolerance for difference in self.runtimes.values())

    @property
    def nearness(self) -> float:
        """The largest difference as a multiple of the tolerance; infinity if it is beyond, or NaN."""
        if not self.agree:
            return math.inf
        return max(self.runtimes.values()) / self.tolerance if self.tolerance else 0.0


def compare_each(
    reference: Sequence[Outputs], found: Mapping[str, Sequence[Outputs]], exact: Sequence[Outputs] | None = None
) -> Compared:
    """Compares every output; returns the one that is the nearest to its tolerance, or beyond it.

    Args:
        reference: the outputs to compare with, by batch.
        found: those of each runtime.
        exact: the reference in double precision, from which its rounding error follows; None if that is not needed.
    """
    results = []
    for name in reference[0]:
        one = _only(reference, name)
        scale = largest_output(one)
        tolerance = RELATIVE_TOLERANCE * scale
        if exact is not None:
            tolerance += ROUNDING_FACTOR * largest_difference(_only(exact, name), one)
        runtimes = {runtime: largest_difference(one, _only(runs, name)) for runtime, runs in found.items()}
        results.append(Compared(name, runtimes, scale, tolerance))
    return max(results, key=lambda each: each.nearness)


def _only(outputs: Sequence[Outputs], name: str) -> list[Outputs]:
    """Returns one output of every batch; nothing of a batch without it, which then differs from any other."""
    return [{name: batch[name]} if name in batch else {} for batch in outputs]


def _name_faults(reference: Sequence[Outputs], found: Mapping[str, Sequence[Outputs]]) -> list[str]:
    """Names runtimes that return other outputs, or the same in another order, since callers may take the first."""
    expected = list(reference[0])
    return [
        f"{runtime} returns the outputs {str(list(batch))[:200]} where {str(expected)[:200]} are expected"
        for runtime, batches in found.items()
        if list(batch := batches[0]) != expected
    ]


def output_faults(compared: Compared, reference: str, itself: str, *, several: bool) -> list[str]:
    """Says which runtimes are beyond the tolerance, and whether the reference has finite outputs.

    Args:
        compared: the output that is the nearest to its tolerance.
        reference: what runtimes are compared with, for the sentence about one that differs.
        itself: what the outputs of the reference come from.
        several: whether there are other outputs, so that this one is named.
    """
    faults = [] if np.isfinite(compared.scale) else [f"the outputs of {itself} itself are not finite numbers"]
    where = f" in output {compared.name!r}" if several else ""
    return faults + [
        f"{runtime} differs from {reference} by {difference:.3g}{where} where {compared.tolerance:.3g} is allowed"
        for runtime, difference in compared.runtimes.items()
        if not difference <= compared.tolerance  # written so that NaN counts as a difference
    ]


def _in_double(module: nn.Module, inputs: Sequence[Array], form: Form) -> list[Outputs] | None:
    """Returns the outputs in double precision, in which the module is afterwards; None if its code asks for float32."""
    try:
        return outputs_of(module.double(), [x.astype(np.float64) for x in inputs], form)
    except UsageError:
        return None
