"""Trust: sees when something else than a kept step wrote weights, and checks that they are still inside their masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dsr_tool.errors import CheckFailed

__all__ = ["Trust", "outside"]

_CHUNK = 2**20
"""Weights that are looked at together, so that no second copy of a large weight is made."""


class Trust:
    """Remembers which state of each weight is known to be inside its mask.

    torch counts the writes to a tensor. Writes through `.data`, and those of fused steps, are not counted; `forget`
    makes the next check read everything.
    """

    def __init__(self) -> None:
        """Knows nothing yet, so that the first check reads everything."""
        self._versions: dict[str, tuple[int, int]] = {}
        self._stepped = False

    def forget(self) -> None:
        """Lets the next check read all weights."""
        self._versions = {}

    def stepped(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Notes that a kept step wrote these weights, by name."""
        self._versions |= {name: _version(weight) for name, weight in weights.items()}
        self._stepped = True

    def loaded(self) -> None:
        """Notes that other masks were loaded, to which the weights must be loaded too."""
        self.forget()
        self._stepped = False

    @torch.no_grad()
    def check(self, weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> None:
        """Reads the weights that were written since the last check or step.

        Args:
            weights: the weights by name.
            masks: their masks, True where active; may have more names.

        Raises:
            CheckFailed: one has a value other than zero outside its mask.
        """
        versions = {name: _version(weight) for name, weight in weights.items()}
        written = {name: now for name, now in versions.items() if now != self._versions.get(name)}
        if not written:
            return
        counts: list[int] = torch.stack([outside(weights[name], masks[name]) for name in written]).tolist()
        for name, count in zip(written, counts, strict=True):
            if count:
                raise CheckFailed(
                    f"weight {name!r} has {count:,} non-zero values outside its mask: {self._cause()}, or call "
                    f"model.apply_masks() to set them to zero."
                )
        self._versions |= written

    def _cause(self) -> str:
        if not self._stepped:
            return (
                "weights were loaded, and their masks were not; call load_state_dict() of what attach returned, with "
                "what its state_dict() returned when the weights were saved"
            )
        return (
            "something besides the steps of the optimizer wrote to it; write to the network's weights only where they "
            "are active, keep averages in a copy (see average()), and load masks together with weights"
        )


def outside(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the number of non-zero values outside a mask, NaN included, as a tensor of one integer."""
    rows = max(_CHUNK // max(weight[:1].numel(), 1), 1)
    pieces = zip(weight.split(rows), mask.split(rows), strict=True)
    # As booleans: filling under a mask is several times slower on a CPU.
    return torch.stack([piece.ne(0).gt(inside).count_nonzero() for piece, inside in pieces]).sum()


def _version(weight: torch.Tensor) -> tuple[int, int]:
    return id(weight), weight._version
