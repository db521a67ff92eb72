"""What the user allows, turned into exact integer counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from dsr_tool.errors import UsageError

__all__ = ["Budget", "apportion"]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Budget:
    """How many weights may be active: a sparsity of the prunable weights, or parameters of the whole model.

    Exactly one of the two fields is set.

    Attributes:
        sparsity: fraction of zeros among the prunable weights, in [0, 1).
        parameters: non-zero parameters of the whole model, dense ones included.
    """

    sparsity: Fraction | None = None
    parameters: int | None = None

    @classmethod
    def of_sparsity(cls, sparsity: float | str) -> Budget:
        """A budget given as a fraction of zeros; decimal digits are taken as written (0.9 is 9/10).

        Raises:
            UsageError: `sparsity` is not a number in [0, 1).
        """
        try:
            value = Fraction(str(sparsity))
        except (ValueError, ZeroDivisionError):
            value = Fraction(-1)
        if not 0 <= value < 1:
            raise UsageError(
                f"sparsity {sparsity} is not allowed; give the fraction of zeros, from 0 up to but not including 1."
            )
        return cls(sparsity=value)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget as written on the command line: `5.1Mparams`, `300kparams` or `420000params`.

        Raises:
            UsageError: the text is not such a number.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)params", text.strip())
        if match is None:
            raise UsageError(f"budget {text!r} is not understood; write a number of parameters such as 5.1Mparams.")
        return cls(parameters=math.floor(Fraction(match[1]) * _UNITS[match[2]]))

    def active_weights(self, prunable: int, other: int, layers: int) -> int:
        """The exact number of active prunable weights.

        Args:
            prunable: number of prunable weights.
            other: parameters of the model that stay dense.
            layers: sparse layers; each keeps at least one weight.

        Returns:
            Active weights, rounded half to even where the sparsity asks for a fraction of a weight.

        Raises:
            UsageError: no assignment of zeros can meet the budget.
        """
        if self.sparsity is not None:
            count = round(prunable * (1 - self.sparsity))
            if count < layers:
                raise UsageError(
                    f"sparsity {float(self.sparsity):.12g} cannot be reached: each of the {layers} sparse layers keeps "
                    f"at least one of the {prunable:,} prunable weights; the highest reachable sparsity is "
                    f"{_rounded_down(1 - Fraction(layers, prunable)) if prunable else 0:.9g}."
                )
            return count
        if self.parameters is None:
            raise UsageError("a budget needs either a sparsity or a number of parameters; give one of the two.")
        least, most = other + layers, other + prunable
        if not least <= self.parameters <= most:
            raise UsageError(
                f"budget {self.parameters:,} parameters cannot be met: with {other:,} parameters kept dense, this "
                f"model has from {least:,} (sparsity {_rounded_down(1 - Fraction(layers, max(prunable, 1))):.9g}) "
                f"to {most:,}; give a number in that range, or keep fewer layers dense."
            )
        return self.parameters - other


def _rounded_down(value: Fraction) -> float:
    """`value` cut, not rounded, after nine digits, so that what is printed can be reached."""
    return math.floor(value * 10**9) / 10**9


def apportion(
    total: int, shares: Sequence[int | float], caps: Sequence[int], floors: Sequence[int] | None = None
) -> list[int]:
    """Split `total` into integers in proportion to `shares`, each within its floor and cap, exactly.

    Entries that would pass their cap are held there and what they leave is poured into the others in
    proportion (likewise for floors); what is left after rounding down goes to the largest remainders, the
    earlier entry first on a tie. Arithmetic is rational, so the sum is `total` at every size.

    Args:
        total: what to split.
        shares: non-negative weights; entries with share 0 get only what the others cannot hold.
        caps: largest value per entry.
        floors: smallest value per entry, zero when absent.

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
    return _round_by_remainder(total, _fill(total, [Fraction(share) for share in shares], caps, floors))


def _fill(total: int, shares: Sequence[Fraction], caps: Sequence[int], floors: Sequence[int]) -> list[Fraction]:
    """Proportional parts within floors and caps, before rounding."""
    fixed: dict[int, Fraction] = {}
    while len(fixed) < len(shares):
        free = [i for i in range(len(shares)) if i not in fixed]
        left = total - sum(fixed.values())
        # Where nobody has a share left, room decides.
        weights = shares if any(shares[i] for i in free) else [Fraction(cap) for cap in caps]
        whole = sum(weights[i] for i in free) or Fraction(1)
        parts = {i: left * weights[i] / whole for i in free}
        over = {i: parts[i] - caps[i] for i in free if parts[i] > caps[i]}
        under = {i: floors[i] - parts[i] for i in free if parts[i] < floors[i]}
        if not over and not under:
            fixed.update(parts)
        # Hold the side that is violated more: the other side may resolve itself once this is poured out.
        elif sum(over.values()) >= sum(under.values()):
            fixed.update({i: Fraction(caps[i]) for i in over})
        else:
            fixed.update({i: Fraction(floors[i]) for i in under})
    return [fixed[i] for i in range(len(shares))]


def _round_by_remainder(total: int, parts: Sequence[Fraction]) -> list[int]:
    counts = [math.floor(part) for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda i: (counts[i] - parts[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
