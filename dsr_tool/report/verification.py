"""The result of a verification as a document and as text."""

from __future__ import annotations

from typing import Any

from exporters.verify.result import Verification

__all__ = ["verification_document", "verification_text"]


def verification_document(command: str, verification: Verification) -> dict[str, Any]:
    """Returns the verification as plain values, schema `dsr-tool/<command>/1`."""
    return {"schema": f"dsr-tool/{command}/1", **verification.to_dict()}


def verification_text(verification: Verification) -> str:
    """Returns the file, the comparisons and their results as text."""
    # Differences are absolute, so the line also has the largest output, without which they say nothing.
    runs = ", ".join(f"{name} {difference:.2g}" for name, difference in verification.runtimes.items())
    lines = [
        f"{verification.path}: {verification.kind}, {verification.file_bytes:,} bytes, "
        f"{'verified' if verification.passed else 'NOT VERIFIED'}",
        f"  largest difference of outputs: {runs} (allowed {verification.tolerance:.2g}, "
        f"largest output {verification.scale:.3g})",
    ]
    if verification.masks_equal is not None:
        masks = "equal" if verification.masks_equal else "DIFFER"
        weights = "equal bit for bit" if verification.weights_equal else "DIFFER"
        lines.append(f"  masks {masks}, weights {weights}")
    if verification.agreement is not None:
        share = f"{verification.agreement:.2%} of {verification.pictures:,} pictures"
        lines.append(f"  top-1 answers equal to those of the model: {share}")
    # Problems fail the verification; notes do not, such as a runtime that is not installed.
    return "\n".join(
        [*lines, *(f"  problem: {text}" for text in verification.problems), *map("  {}".format, verification.notes)]
    )
