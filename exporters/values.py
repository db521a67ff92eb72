"""The type that weights have in a file: float32, exact, or float16, rounded; and what the rounding does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.graph import Array
from dsr_tool.core.layers import LayerSpec
from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.model import SparseModel
from exporters.reference import largest_difference, outputs_of

__all__ = ["VALUES", "rounded_model", "rounding_notes", "stored_as"]

VALUES = ("fp32", "fp16")


def stored_as(
    tensors: Mapping[str, SparseTensor], specs: Mapping[str, LayerSpec], values: str
) -> dict[str, SparseTensor]:
    """The tensors as a file holds them.

    Args:
        tensors: every entry of the state_dict.
        specs: what each of them is.
        values: `fp32` for as they are; `fp16` rounds weights to the nearest float16, ties to even, and leaves norms,
            biases and buffers. Masks stay, also where a value becomes zero.

    Raises:
        UsageError: another name, or a weight that float16 cannot hold.
    """
    if values not in VALUES:
        raise unknown_name("--values", values, VALUES)
    if values == "fp32":
        return dict(tensors)
    return {name: _half(name, tensor) if specs[name].weight else tensor for name, tensor in tensors.items()}


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


def _half(name: str, tensor: SparseTensor) -> SparseTensor:
    with np.errstate(over="ignore", invalid="ignore"):
        half = tensor.values.astype(np.float16)
    lost = ~np.isfinite(half)
    if lost.any():
        value = float(tensor.values[lost][0])
        raise UsageError(
            f"--values 'fp16' cannot hold weight {name!r}, which has a value of {value:.6g} where float16 ends at "
            f"65,504; use --values fp32."
        )
    return SparseTensor(tensor.mask, half)
