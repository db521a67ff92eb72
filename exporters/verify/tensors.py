"""Comparing the tensors of a file with those of its model, and running the module with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from dsr_tool.errors import CheckFailed
from dsr_tool.sparse.aliases import assign
from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.checked import CheckedModel
from exporters.verify.compare import Differing, compare_outputs
from exporters.verify.outputs import outputs_of
from exporters.verify.result import Verification
from exporters.verify.rounding import expected_tensors, how_rounded, rounded_model, steps_note, zeros_note

__all__ = ["differing_tensors", "verify_tensors"]


def differing_tensors(
    path: Path,
    model: SparseModel,
    expected: Mapping[str, SparseTensor],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], SparseTensor],
) -> Differing:
    """Compares the tensors of a file bit for bit.

    Args:
        path: the file, for messages.
        model: the model, for messages.
        expected: the tensors that the file should have, by name.
        shapes: shapes of the tensors that it has.
        read: returns one of them.

    Raises:
        CheckFailed: names or shapes differ.
    """
    _check_architecture(path, model, {name: tensor.mask.shape for name, tensor in expected.items()}, shapes)
    masks, values = [], []
    for name, tensor in expected.items():
        other = read(name)
        if not tensor.mask.equals(other.mask):
            masks.append(name)
        # Bytes, since -0.0 equals 0.0 and NaN differs from itself.
        elif tensor.values.dtype != other.values.dtype or tensor.values.tobytes() != other.values.tobytes():
            values.append(name)
    return masks, values


def verify_tensors(
    path: Path,
    kind: str,
    checked: CheckedModel,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], SparseTensor],
    *,
    samples: int,
    seed: int,
) -> Verification:
    """Verifies a file without a graph: every tensor bit for bit, and a copy of the module that runs with them.

    Args:
        path: the file.
        kind: name of its container.
        checked: the model.
        shapes: shapes of the tensors in the file, by state_dict name.
        read: returns one of them.
        samples: size of the second batch of inputs; the first has one.
        seed: seed of the inputs.

    Raises:
        CheckFailed: names or shapes differ.
    """
    model, exact = checked.model, checked.model.tensors()
    # The file itself tells how it was exported, so `verify` needs no options.
    expected = expected_tensors(checked, exact, model.specs, shapes, read)
    notes: tuple[str, ...] = ()
    if how := how_rounded(expected, model.specs):
        # Everything below compares with the rounded model.
        model = rounded_model(model, expected)
        notes = zeros_note(checked.model, model) + steps_note(expected, exact)
    differing = differing_tensors(path, model, expected, shapes, read)
    filled = _filled(model.module, {name: read(name).to_dense() for name in shapes})
    return compare_outputs(
        path,
        kind,
        model.module,
        runs={"pytorch": lambda x: outputs_of(filled, [x])[0]},
        value=checked.input,
        samples=samples,
        seed=seed,
        differing=differing,
        notes=notes,
        exact=checked.model.module if how else None,
        how=how,
    )


def _check_architecture(
    path: Path,
    model: SparseModel,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    name = next((n for n in (*expected, *found) if expected.get(n) != found.get(n)), None)
    if name is not None:
        there, here = (f"of shape {shapes[name]}" if name in shapes else "absent" for shapes in (found, expected))
        raise CheckFailed(
            f"{str(path)!r} does not hold {model.config.architecture} as given: {name!r} is {there} in the file and "
            f"{here} in the model; compare it with the model that it was exported from."
        )


def _filled(module: nn.Module, state: Mapping[str, Array]) -> nn.Module:
    """Returns a copy of the module in eval mode with a state loaded strictly, in the module's own types."""
    types = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    copied = frozen_copy(module)
    # Assigned, not copied into place: the copy shares its tensors with the model, which must not change.
    filled = {name: torch.from_numpy(array).to(types[name]) for name, array in state.items()}
    assign(copied, filled)
    return copied
