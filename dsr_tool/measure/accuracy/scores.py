"""Counts right and equal answers over batches, with intervals that say how much their number tells."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["Scores", "wilson"]

_Z = 1.959964
"""Standard deviations on both sides of the mean that hold 95 % of a normal distribution."""
_TOP = 5

Logits = npt.NDArray[np.float32]
"""Scores of a batch, shape (inputs, classes)."""


class Scores:
    """Sums over all batches so far.

    Attributes:
        count: number of inputs.
        classes: number of classes; 0 before the first batch.
        right: right answers among the first 1 and 5 of each network, this one first.
        equal: inputs for which both networks have the same first answer.
        divergence: sum of KL(other || this) over the inputs, in nats.
    """

    def __init__(self) -> None:
        self.count = self.classes = self.equal = 0
        self.right = [[0, 0], [0, 0]]
        self.divergence = 0.0

    def add(self, this: Logits, other: Logits | None, classes: npt.NDArray[np.int64] | None) -> None:
        """Counts a batch.

        Args:
            this: scores of the network that is measured, shape (inputs, classes).
            other: scores of the network that it is compared with; None without one.
            classes: class numbers, shape (inputs,); None if they are not known.
        """
        self.count += len(this)
        self.classes = this.shape[1]
        # Stable, so that of equal scores the class of the smaller number comes first on every machine.
        ranked = [
            np.argsort(-logits, axis=1, kind="stable")[:, :_TOP] for logits in (this, other) if logits is not None
        ]
        if classes is not None:
            for right, answers in zip(self.right, ranked, strict=False):  # without another network, only the first
                hits = answers == classes[:, None]
                right[0] += int(hits[:, 0].sum())
                right[1] += int(hits.any(axis=1).sum())
        if other is not None:
            self.equal += int((ranked[0][:, 0] == ranked[1][:, 0]).sum())
            expected, found = _log_softmax(other), _log_softmax(this)
            self.divergence += float((np.exp(expected) * (expected - found)).sum())

    @property
    def has_top5(self) -> bool:
        """True if there are more classes than answers; otherwise every answer would be right."""
        return self.classes > _TOP


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a fraction (Wilson, JASA 22, 1927), which holds for few trials and near 0 and 1.

    Args:
        hits: number of successes.
        count: number of trials, at least 1.
    """
    fraction, weight = hits / count, _Z**2 / count
    middle = (fraction + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(fraction * (1 - fraction) / count + weight / (4 * count))
    # The interval ends at 0 or 1 exactly if no or every trial was a success, which rounding may miss by a hair.
    return max(middle - half, 0.0) if hits else 0.0, min(middle + half, 1.0) if hits < count else 1.0


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Returns log-probabilities in float64: the divergence of two close networks is a small difference of them."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
