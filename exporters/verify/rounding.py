"""What rounding weights to float16 does to a model in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.tensor import Array
from exporters.values import stored_as
from exporters.verify.outputs import largest_difference, outputs_of

__all__ = ["rounded_model", "rounding_notes"]


def rounded_model(model: SparseModel) -> SparseModel:
    """The model with its weights as float16 holds them, in float32 again; it shares everything else.

    Raises:
        UsageError: float16 cannot hold a weight.
    """
    rounded = stored_as(model.tensors(), model.specs, "fp16")
    module = frozen_copy(model.module)
    state = module.state_dict()
    for name, tensor in rounded.items():
        if model.specs[name].weight:
            state[name] = torch.from_numpy(tensor.to_dense().astype(np.float32))
    # Assigned, since the copy shares its tensors with the model.
    module.load_state_dict(state, assign=True)
    return SparseModel(module, model.specs, model.masks, model.config)


def rounding_notes(model: SparseModel, rounded: SparseModel, inputs: Sequence[Array]) -> tuple[str, ...]:
    """What rounding changed, measured, in words.

    Args:
        model: as it was.
        rounded: see `rounded_model`.
        inputs: batches on which both are run.
    """
    exact, moved = (outputs_of(frozen_copy(one.module), list(inputs)) for one in (model, rounded))
    largest = max((float(np.abs(y).max(initial=0.0)) for y in exact), default=0.0)
    notes = [
        f"with weights rounded to float16, outputs differ by up to {largest_difference(exact, moved):.3g} from those "
        f"of the model as it was (largest output {largest:.3g})"
    ]
    before, after = _nonzero(model), _nonzero(rounded)
    if before != after:
        notes.append(f"{before - after:,} weights became zero by rounding")
    return tuple(notes)


def _nonzero(model: SparseModel) -> int:
    state = model.module.state_dict()
    return sum(int(torch.count_nonzero(state[name])) for name, spec in model.specs.items() if spec.weight)
