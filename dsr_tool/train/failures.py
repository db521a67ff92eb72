"""What goes wrong in a training step, as one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dsr_tool.errors import CheckFailed, DsrError, UsageError, first_line
from dsr_tool.methods import Attached
from dsr_tool.train.settings import TrainSettings

__all__ = ["diverged", "explained", "first_bad", "require_budget", "require_end", "require_scores", "stepped_off"]


def require_scores(outputs: Any, classes: int) -> None:
    """Raise `UsageError` unless a model gives one score per class and image."""
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or outputs.shape[1] < classes:
        found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise UsageError(
            f"the model gives outputs of {found}, where training needs a score for each of the {classes} classes of "
            f"the data, (batch, classes); give a classification model with as many outputs."
        )


def require_budget(active: int, budget: int, epoch: int) -> None:
    """Raise `CheckFailed` when there are more or fewer active weights than the method's moves left."""
    if active != budget:
        raise CheckFailed(
            f"the model has {active:,} active weights after epoch {epoch}, not {budget:,}; something outside the "
            f"method changed its masks."
        )


def require_end(attached: Attached, steps: int) -> None:
    """Raise `CheckFailed` when a method that ends at a final sparsity has not come there in all steps of a training."""
    last = getattr(attached.method, "last", 0)
    if attached.step < last:
        raise CheckFailed(
            f"method {attached.method.name} reaches its final sparsity at step {last}, but {steps - attached.step} of "
            f"{steps} steps overflowed in fp16 and were left out; lower --stop, or give --precision bf16."
        )


def stepped_off(losses: torch.Tensor, first: int) -> int | None:
    """The first step whose loss is not finite, where `losses` begin with that of step `first`; None for none."""
    bad = (~losses.isfinite()).nonzero()
    return first + int(bad[0]) if len(bad) else None


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


def diverged(when: str, blame: str, kept: int) -> DsrError:
    """The error to raise when a loss is no longer finite.

    Args:
        when: `at step 12`, say.
        blame: from `first_bad`.
        kept: the last epoch whose state lies on the disk; 0 for none.
    """
    where = f" ({blame})" if blame else ""
    saved = f"; the state after epoch {kept} is kept" if kept else ""
    return DsrError(f"the loss is no longer finite {when}{where}{saved}; lower --lr, or give --warmup-epochs.")


@torch.no_grad()
def first_bad(module: nn.Module, inputs: torch.Tensor) -> str:
    """Run a network once more, and tell the first layer where something is not finite.

    Layers come in the order in which they run. Of each, what enters it is looked at first, then its weights, then what
    it makes of them.

    Returns:
        A few words; none when all is finite.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def look(layer: nn.Module, entered: tuple[Any, ...], made: Any) -> None:
            if not found:
                found.extend(_blame(name, layer, entered, made))

        return look

    layers = {name: layer for name, layer in module.named_modules() if not any(layer.children()) or _own(layer)}
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        module(inputs)
    except RuntimeError:  # what was found until then counts
        pass
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""


def _blame(name: str, layer: nn.Module, entered: tuple[Any, ...], made: Any) -> Iterator[str]:
    """What is not finite about a layer that has just run."""
    kind = type(layer).__name__
    if not _finite(entered):
        yield f"what enters {kind} {name!r} is not finite"
    for own, tensor in _own(layer).items():
        if not _finite(tensor):
            yield f"{own} of {kind} {name!r} is not finite"
    if not _finite(made):
        yield f"{kind} {name!r} is the first layer whose output is not finite"


def _own(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of a layer itself, and what it has counted where that takes part."""
    own: dict[str, torch.Tensor] = dict(layer.named_parameters(recurse=False))
    return own if layer.training else own | dict(layer.named_buffers(recurse=False))


def _finite(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())
