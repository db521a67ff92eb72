"""Compares the zeros of weights with those of what a network computes with, which may be a function of a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dsr_tool.errors import CheckFailed, join_words
from dsr_tool.sparse.flow import WeightFlow
from dsr_tool.sparse.macs import run_once, split_weights
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["Shortfall", "computes_functions", "require_zeros", "shortfalls"]

_SHOWN = 6
"""Largest number of layers that a sentence names."""


@dataclass(frozen=True)
class Shortfall:
    """Sparse weights that a network computes with a denser function of.

    Attributes:
        names: the weights; several if they are computed with together.
        wanted: fraction of zeros in the weights, by their masks.
        found: fraction of zeros in what the network computes with.
    """

    names: tuple[str, ...]
    wanted: float
    found: float


def shortfalls(model: SparseModel) -> list[Shortfall]:
    """Returns the sparse weights whose zeros are lost on the way to the operator that reads them.

    A convolution that standardises its weight subtracts the mean of each filter, zeros included, and multiplies by a
    dense weight. One that masks, scales or rounds its weight keeps the zeros.

    Args:
        model: the model, with an input shape, in masked storage. Only if it computes with functions of weights, it runs
            on noise.

    Raises:
        UsageError: the network does not accept such an input.
    """
    if not computes_functions(model.module, model.specs, model.config.input_shape):
        return []
    active = {name: spec.size for name, spec in model.specs.items()} | model.counts
    found = []
    operands = _operands(model.module, model.specs, model.config.input_shape, values=True)
    for names, (nonzeros, size) in operands.of.items():
        wanted = sum(active[name] for name in names) / sum(model.specs[name].size for name in names)
        if any(name in model.masks for name in names) and nonzeros / size > wanted:
            found.append(Shortfall(names, 1 - wanted, 1 - nonzeros / size))
    return found


def computes_functions(module: nn.Module, specs: Mapping[str, LayerSpec], input_shape: tuple[int, ...]) -> bool:
    """Returns whether a network computes with a function of a weight anywhere, not with the weight itself.

    Args:
        module: the network, in masked storage. It runs on the meta device, where a run costs nothing.
        specs: its specs by name.
        input_shape: shape of one input, without the batch dimension.

    Raises:
        UsageError: the network does not accept such an input.
    """
    return bool(_operands(module, specs, input_shape, values=False).of)


def require_zeros(model: SparseModel) -> None:
    """Checks that a network computes with as many zeros as its masks have; without an input shape it cannot be known.

    Raises:
        CheckFailed: it computes with a denser function of a weight.
        UsageError: the network does not accept inputs of its shape.
    """
    if not (model.masks and model.config.input_shape):
        return
    found = sorted(shortfalls(model), key=lambda one: one.found - one.wanted)
    if found:
        named = [
            f"{join_words(one.names, 'and')} ({one.found:.1%} zeros for {one.wanted:.1%})" for one in found[:_SHOWN]
        ]
        named += [f"{len(found) - _SHOWN} more"] * (len(found) > _SHOWN)
        layer = next(name for name in found[0].names if name in model.masks).rpartition(".")[0]
        raise CheckFailed(
            f"{model.config.architecture} computes with a function of its weights that has fewer zeros than asked: "
            f"{join_words(named, 'and')}; keep such layers dense (--keep-dense {layer!r}), or let them compute with "
            f"the weight itself."
        )


def _operands(
    module: nn.Module, specs: Mapping[str, LayerSpec], input_shape: tuple[int, ...], *, values: bool
) -> _Operands:
    made: list[_Operands] = []

    def watch(state: Mapping[str, torch.Tensor]) -> _Operands:
        made.append(_Operands(*split_weights(state, specs), values=values))
        return made[-1]

    run_once(module, input_shape, watch, values=values)
    return made[-1]


class _Operands(WeightFlow):
    """Collects the operands that are functions of weights.

    Attributes:
        of: non-zeros and size of the densest operand, by the names of its weights; both in entries.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], others: Iterable[torch.Tensor], *, values: bool) -> None:
        """Takes the state that a run reads, see `WeightFlow`, and whether it has values."""
        super().__init__(weights, others)
        self.of: dict[tuple[str, ...], tuple[int, int]] = {}
        self._values = values

    def multiplied(self, names: Sequence[str], operand: torch.Tensor, macs: int, *, itself: bool) -> None:  # noqa: ARG002
        """Counts the non-zeros of an operand that is not the weight itself."""
        if itself:
            return
        nonzeros = int(torch.count_nonzero(operand)) if self._values else 0
        before, size = self.of.get(tuple(names), (0, 1))
        if nonzeros * size >= before * operand.numel():
            self.of[tuple(names)] = nonzeros, operand.numel()
