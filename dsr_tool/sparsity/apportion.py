"""Splits a number into integer shares exactly: every count of active weights comes from here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from dsr_tool.errors import UsageError

__all__ = ["apportion"]


def apportion(
    total: int, shares: Sequence[int | float], caps: Sequence[int], floors: Sequence[int] | None = None
) -> list[int]:
    """Splits `total` into integers in proportion to `shares`, each within its floor and cap, exactly.

    An entry over its cap is set to the cap, and the surplus goes to the others in proportion; floors likewise. What
    rounding down leaves goes to the largest remainders, on a tie to the earlier entry. Arithmetic is rational, so the
    sum is `total` at every size.

    Args:
        total: number to split.
        shares: non-negative weights; entries with share 0 get only what the others cannot hold.
        caps: largest value per entry.
        floors: smallest value per entry; default: zero.

    Returns:
        One integer per entry; they sum to `total`.

    Raises:
        UsageError: `total` is below the sum of floors or above the sum of caps.
    """
    floors = floors or [0] * len(caps)
    if not sum(floors) <= total <= sum(caps):
        raise UsageError(
            f"{total:,} active weights cannot be spread over these layers; they hold {sum(floors):,} to {sum(caps):,}."
        )
    # Fractions: rounding errors of floats would add or lose single weights.
    return _round_by_remainder(total, _fill(total, [Fraction(share) for share in shares], caps, floors))


def _fill(total: int, shares: Sequence[Fraction], caps: Sequence[int], floors: Sequence[int]) -> list[Fraction]:
    """Returns proportional parts within floors and caps, before rounding."""
    fixed: dict[int, Fraction] = {}
    while len(fixed) < len(shares):
        free = [i for i in range(len(shares)) if i not in fixed]
        left = total - sum(fixed.values())
        # If all free entries have share 0, split by their caps.
        weights = shares if any(shares[i] for i in free) else [Fraction(cap) for cap in caps]
        whole = sum(weights[i] for i in free) or Fraction(1)
        parts = {i: left * weights[i] / whole for i in free}
        over = {i: parts[i] - caps[i] for i in free if parts[i] > caps[i]}
        under = {i: floors[i] - parts[i] for i in free if parts[i] < floors[i]}
        if not over and not under:
            fixed.update(parts)
        # Fix the side that is violated more: redistributing its surplus may resolve the other side.
        elif sum(over.values()) >= sum(under.values()):
            fixed.update({i: Fraction(caps[i]) for i in over})
        else:
            fixed.update({i: Fraction(floors[i]) for i in under})
    return [fixed[i] for i in range(len(shares))]


def _round_by_remainder(total: int, parts: Sequence[Fraction]) -> list[int]:
    """Rounds parts that sum to `total` to integers with the same sum, by largest remainder."""
    counts = [math.floor(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (counts[i] - parts[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
