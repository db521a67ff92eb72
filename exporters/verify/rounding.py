"""The effect of rounding weights on a model in PyTorch, and what a file with rounded weights should hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch

from dsr_tool.sparse.aliases import assign
from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.compact.change import held_state
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.grid_rounding import distance
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.checked import CheckedModel
from exporters.values import stored_like

__all__ = ["expected_tensors", "how_rounded", "rounded_model", "steps_note", "zeros_note"]


def expected_tensors(
    checked: CheckedModel,
    exact: Mapping[str, SparseTensor],
    specs: Mapping[str, LayerSpec],
    held: Collection[str],
    read: Callable[[str], SparseTensor],
) -> dict[str, SparseTensor]:
    """Returns the tensors that a file should hold, bit for bit.

    Args:
        checked: the model. Within an export it knows how its values are rounded; else each tensor of the file tells.
        exact: the tensors before rounding, in the shapes of the file.
        specs: description of each.
        held: names of the tensors that the file holds.
        read: returns one of them.

    Raises:
        FormatError: a tensor of the file is damaged.
        UsageError: float16 cannot hold a weight.
    """
    if checked.values is not None:
        return checked.stored(exact, specs)
    # Exact tensors are not read here: whoever compares the file reads them anyway.
    return {
        name: stored_like(read(name), tensor, specs[name])
        if name in held and name in specs and specs[name].weight
        else tensor
        for name, tensor in exact.items()
    }


def how_rounded(tensors: Mapping[str, SparseTensor], specs: Mapping[str, LayerSpec]) -> str:
    """Says how weights are stored, as in `rounded to float16`; an empty text if they are exact."""
    weights = [tensor for name, tensor in tensors.items() if name in specs and specs[name].weight]
    if any(isinstance(tensor, GridTensor) for tensor in weights):
        return "rounded to few bits"
    return "rounded to float16" if any(tensor.values.dtype == np.float16 for tensor in weights) else ""


def rounded_model(model: SparseModel, tensors: Mapping[str, SparseTensor]) -> SparseModel:
    """Returns a model with other values in its weights, in float32; it shares everything else.

    Args:
        model: the model.
        tensors: a tensor for each entry of its state_dict, of which weights are taken.
    """
    module = frozen_copy(model.module)
    state = {name: tensor for name, tensor, _ in held_state(module)}
    for name, tensor in tensors.items():
        if model.specs[name].weight:
            state[name] = torch.from_numpy(tensor.to_dense().astype(np.float32))
    # Assigned, not copied into place: the copy shares its tensors with the model, which must not change.
    assign(module, state)
    return SparseModel(module, model.specs, model.masks, model.config)


def zeros_note(model: SparseModel, rounded: SparseModel) -> tuple[str, ...]:
    """Says how many weights became zero by rounding; nothing if none did. Their masks stay active.

    Args:
        model: the model before rounding.
        rounded: the result of `rounded_model`.
    """
    before, after = _nonzero(model), _nonzero(rounded)
    return (f"{before - after:,} weights became zero by rounding",) if before != after else ()


def steps_note(expected: Mapping[str, SparseTensor], exact: Mapping[str, SparseTensor]) -> tuple[str, ...]:
    """Says how far values on grids lie from the exact ones, in steps; nothing if there are none on grids."""
    steps = [distance(tensor, exact[name]) for name, tensor in expected.items() if isinstance(tensor, GridTensor)]
    if not steps:
        return ()
    return (f"rounded weights lie within {max(steps):.2f} steps of their grids from those of the model",)


def _nonzero(model: SparseModel) -> int:
    state = model.module.state_dict()
    return sum(int(torch.count_nonzero(state[name])) for name, spec in model.specs.items() if spec.weight)
