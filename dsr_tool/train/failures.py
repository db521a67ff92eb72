"""What goes wrong in a training step, as one sentence that says what to do."""

from __future__ import annotations

from typing import Any

import torch

from dsr_tool.errors import DsrError, UsageError, first_line
from dsr_tool.train.settings import TrainSettings

__all__ = ["check_finite", "diverged", "explained", "require_scores"]


def require_scores(outputs: Any, classes: int) -> None:
    """Raise `UsageError` unless a model gives one score per class and image."""
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or outputs.shape[1] < classes:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise UsageError(
            f"the model gives outputs of {found}, where training needs a score for each of the {classes} classes of "
            f"the data, (batch, classes); give a classification model with as many outputs."
        )


def check_finite(losses: torch.Tensor, first: int) -> None:
    """Raise `DsrError` when one of the losses of steps `first` on is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise diverged(first + int(bad[0]))


def explained(error: RuntimeError, settings: TrainSettings) -> DsrError | None:
    """What torch ran into, where the user can do something about it."""
    if isinstance(error, torch.OutOfMemoryError):
        return DsrError(
            f"the GPU's memory ran out at batch size {settings.batch_size}; lower --batch-size, or give "
            f"--precision bf16."
        )
    if any(words in str(error) for words in ("Output size is too small", "Kernel size can't be greater")):
        reason = first_line(error)
        return DsrError(f"the model's input is too small to train ({reason}); convert it with a larger --input-size.")
    if settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(str(error).split("\n")[:2]).strip()
        return DsrError(f"torch.compile failed ({reason}); leave out --compile, or install a C++ compiler.")
    return None


def diverged(step: int) -> DsrError:
    """The error to raise when the loss is no longer finite."""
    return DsrError(
        f"the loss is no longer finite at step {step}; what was saved before is kept; lower --lr, or give "
        f"--warmup-epochs."
    )
