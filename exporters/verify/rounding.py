"""The effect of rounding weights to float16 on a model in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.tensor import Array
from exporters.values import stored_as
from exporters.verify.outputs import outputs_of, rounding_note

__all__ = ["rounded_model", "rounding_notes"]


def rounded_model(model: SparseModel) -> SparseModel:
    """Returns a model with its weights rounded to float16, in float32 again; it shares everything else.

    Raises:
        UsageError: float16 cannot hold a weight.
    """
    rounded = stored_as(model.tensors(), model.specs, "fp16")
    module = frozen_copy(model.module)
    state = module.state_dict()
    for name, tensor in rounded.items():
        if model.specs[name].weight:
            state[name] = torch.from_numpy(tensor.to_dense().astype(np.float32))
    # Assigned, not copied into place: the copy shares its tensors with the model, which must not change.
    module.load_state_dict(state, assign=True)
    return SparseModel(module, model.specs, model.masks, model.config)


def rounding_notes(model: SparseModel, rounded: SparseModel, inputs: Sequence[Array]) -> tuple[str, ...]:
    """Measures the effect of rounding and describes it.

    Args:
        model: the model before rounding.
        rounded: the result of `rounded_model`.
        inputs: batches on which both are run.

    Returns:
        A sentence about the outputs, and one about weights that became zero if there are any.
    """
    notes = [rounding_note(*(outputs_of(frozen_copy(one.module), inputs) for one in (model, rounded)))]
    # Values below half of float16's smallest subnormal, 3e-8, round to zero; their masks stay active.
    before, after = _nonzero(model), _nonzero(rounded)
    if before != after:
        notes.append(f"{before - after:,} weights became zero by rounding")
    return tuple(notes)


def _nonzero(model: SparseModel) -> int:
    state = model.module.state_dict()
    return sum(int(torch.count_nonzero(state[name])) for name, spec in model.specs.items() if spec.weight)
