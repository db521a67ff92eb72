"""Coverage: where the steps of a network ran, counted while it ran."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Coverage", "Where"]


class Where(enum.Enum):
    """Where a step ran."""

    KERNEL = "on kernels"
    LANES = "in torch, in the blocked layout"
    TORCH = "in torch, on rows of images or tokens"
    NUMBER = "no tensor"


@dataclass(frozen=True)
class Coverage:
    """Where the steps of one pass ran.

    Attributes:
        kernels: number of steps on kernels.
        lanes: number of steps that torch ran in the blocked layout.
        torch: labels of the steps that torch ran on rows, in order.
        relayouts: number of tensors that changed their layout in the forward pass.
        sparse: number of uses of sparse weights.
        sparse_on_kernels: number of those that no dense weight was made for.
        notes: modules that run as they are, by name, and why.
    """

    kernels: int
    lanes: int
    torch: tuple[str, ...]
    relayouts: int
    sparse: int
    sparse_on_kernels: int
    notes: Mapping[str, str]

    @classmethod
    def of(cls, steps: Sequence[tuple[str, tuple[str, ...], Where, int]], notes: Mapping[str, str]) -> Coverage:
        """Counts steps: label, sparse weights, where, and number of relayouts."""
        places = [where for _, _, where, _ in steps]
        return cls(
            places.count(Where.KERNEL),
            places.count(Where.LANES),
            tuple(label for label, _, where, _ in steps if where is Where.TORCH),
            sum(relayouts for *_, relayouts in steps),
            sum(len(sparse) for _, sparse, _, _ in steps),
            sum(len(sparse) for _, sparse, where, _ in steps if where is Where.KERNEL),
            dict(notes),
        )

    def __str__(self) -> str:
        """Returns one line, such as `20 of 20 sparse layers on kernels; 1 of 49 steps in torch on rows (linear)`."""
        total = self.kernels + self.lanes + len(self.torch)
        labels = ", ".join(dict.fromkeys(self.torch))
        line = f"{self.sparse_on_kernels} of {self.sparse} sparse layers on kernels; "
        line += f"{len(self.torch)} of {total} steps in torch on rows" + (f" ({labels})" if labels else "")
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.notes.items())
        return line + (f"; as they are: {reasons}" if reasons else "")
