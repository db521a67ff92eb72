"""What a comparison of a file with its model found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsr_tool.errors import CheckFailed

__all__ = ["Verification", "require"]


@dataclass(frozen=True)
class Verification:
    """What was compared between a file and its model, and what came out.

    Attributes:
        path: the file.
        kind: `archive` or `onnx`.
        file_bytes: its size on disk.
        runtimes: largest absolute difference to PyTorch of each runtime that ran the file.
        scale: largest absolute output of PyTorch.
        tolerance: largest absolute difference allowed.
        masks_equal: whether the same weights are zero.
        weights_equal: whether every stored value is the same, bit for bit.
        problems: everything that does not agree, in words; empty when the file passed.
        notes: what could not be compared, and why.
    """

    path: Path
    kind: str
    file_bytes: int
    runtimes: Mapping[str, float]
    scale: float
    tolerance: float
    masks_equal: bool
    weights_equal: bool
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def largest_difference(self) -> float:
        """Largest absolute difference of any runtime to PyTorch."""
        return max(self.runtimes.values())

    @property
    def passed(self) -> bool:
        """Whether everything agrees."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **asdict(self),
            "path": str(self.path),
            "largest_difference": self.largest_difference,
            "passed": self.passed,
        }


def require(verification: Verification) -> Verification:
    """The verification itself, or `CheckFailed` in one sentence when something does not agree."""
    if verification.problems:
        problems = "; ".join(verification.problems)
        raise CheckFailed(f"{verification.kind} file does not hold the model: {problems}.")
    return verification
