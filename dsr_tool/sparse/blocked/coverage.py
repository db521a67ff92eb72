"""Coverage: where the steps of a network ran, counted while it ran."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Coverage", "Where"]


class Where(enum.Enum):
    """A place where steps run."""

    KERNEL = "on kernels"
    LANES = "in torch, in the blocked layout"
    TORCH = "in torch, outside of the blocked layout"
    NUMBER = "no tensor"


@dataclass(frozen=True)
class Coverage:
    """Counts of the steps of one pass by the place where they ran.

    Attributes:
        kernels: number of steps on kernels.
        lanes: number of steps that torch ran in the blocked layout.
        torch: labels of the steps that torch ran on images in rows, or tokens, in order.
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
        """Returns one line for a log.

        Such as `20 of 20 sparse layers on kernels; 1 of 44 steps in torch outside of the blocked layout (Conv2d)`.
        """
        total = self.kernels + self.lanes + len(self.torch)
        labels = ", ".join(f"{count} {label}" for label, count in Counter(self.torch).most_common())
        line = f"{self.sparse_on_kernels} of {self.sparse} sparse layers on kernels; "
        line += f"{len(self.torch)} of {total} steps in torch outside of the blocked layout"
        line += f" ({labels})" if labels else ""
        # One module of each kind of reason is enough for a line; `notes` has all.
        first = {reason: name for name, reason in reversed(list(self.notes.items()))}
        reasons = "; ".join(f"{name}: {reason}" for reason, name in list(first.items())[:3])
        return line + (f"; {len(self.notes)} modules as they are ({reasons})" if reasons else "")
