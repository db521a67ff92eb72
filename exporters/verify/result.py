"""The result of comparing a file with its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsr_tool.errors import CheckFailed

__all__ = ["Verification", "require"]


@dataclass(frozen=True)
class Verification:
    """The result of comparing a file with its model.

    Attributes:
        path: the file.
        kind: name of its container.
        file_bytes: size on disk.
        runtimes: largest absolute difference of outputs to the reference, for each runtime that ran the file; of
            several outputs, that of the one which is the nearest to its tolerance.
        scale: largest absolute value of that output in the reference.
        tolerance: largest absolute difference allowed in it.
        masks_equal: True if the same weights are zero; None if they were not compared.
        weights_equal: True if every stored value is the same, bit for bit; None if they were not compared.
        problems: everything that does not agree, in words; empty if the file passed.
        notes: comparisons that were not possible, with the reason, and remarks.
        rounding_largest: largest absolute difference of outputs between the model and the one with rounded weights, on
            the same random inputs; None if weights are exact.
        rounding_mean: mean of these differences; None if weights are exact.
        pictures: number of pictures on which answers were compared.
        agreement: share of these pictures for which the file gives the same top-1 answer as the model before rounding;
            None without pictures.
    """

    path: Path
    kind: str
    file_bytes: int
    runtimes: Mapping[str, float]
    scale: float
    tolerance: float
    masks_equal: bool | None
    weights_equal: bool | None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rounding_largest: float | None = None
    rounding_mean: float | None = None
    pictures: int = 0
    agreement: float | None = None

    @property
    def largest_difference(self) -> float:
        """Largest absolute difference of any runtime to the reference."""
        return max(self.runtimes.values())

    @property
    def passed(self) -> bool:
        """True if everything agrees."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        # The two properties belong to the documented keys, though they follow from the fields.
        return {
            **asdict(self),
            "path": str(self.path),
            "largest_difference": self.largest_difference,
            "passed": self.passed,
        }


def require(verification: Verification) -> Verification:
    """Returns the verification if the file passed.

    Raises:
        CheckFailed: something does not agree; the message lists it all.
    """
    # All of them at once: a second export would take as long as the first.
    if verification.problems:
        problems = "; ".join(verification.problems)
        raise CheckFailed(f"{verification.kind} file does not hold the model: {problems}.")
    return verification
