"""Checks of a training, and errors that say what went wrong and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dsr_tool.errors import CheckFailed, DsrError, UsageError, first_line
from dsr_tool.methods import Attached
from dsr_tool.methods.final_sparsity import active_count
from dsr_tool.sparse.compact.marks import held_values
from dsr_tool.sparse.detectors import detector_kind
from dsr_tool.train.settings import TrainSettings

__all__ = [
    "diverged",
    "explained",
    "first_bad",
    "first_bad_step",
    "require_budget",
    "require_classifier",
    "require_end",
    "require_scores",
]


def require_classifier(module: nn.Module) -> None:
    """Raises `UsageError` for a detector, whose losses need boxes, which no data set here has."""
    if detector_kind(module) is not None:
        raise UsageError(
            f"the model is a detector ({type(module).__name__}), but `dsr-tool train` trains classifiers; train it in "
            f"a loop of your own with `dsr_tool.attach`, which takes any model."
        )


def require_scores(outputs: object, classes: int) -> torch.Tensor:
    """Returns a model's outputs; raises `UsageError` unless they are one score per image and class."""
    if isinstance(outputs, torch.Tensor) and outputs.ndim == 2 and outputs.shape[1] >= classes:
        return outputs
    found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else f"type {type(outputs).__name__}"
    raise UsageError(
        f"the model's outputs have {found}, but training needs (batch, classes), a score for each of the {classes} "
        f"classes of the data; give a classification model with as many outputs."
    )


def require_budget(active: int, budget: int, epoch: int) -> None:
    """Raises `CheckFailed` if the number of active weights is not what the method's updates left."""
    if active != budget:
        raise CheckFailed(
            f"the model has {active:,} active weights after epoch {epoch}, expected {budget:,}; something other than "
            f"the method changed its masks."
        )


def require_end(attached: Attached, steps: int) -> None:
    """Raises `CheckFailed` if the method is not at its final sparsity after all `steps` of the training."""
    final_step = attached.method.final_step
    if attached.step < final_step:
        raise CheckFailed(
            f"method {attached.method_name} reaches its final sparsity at step {final_step}, but "
            f"{steps - attached.step} of {steps} steps overflowed in fp16 and were skipped; lower --stop, or give "
            f"--precision bf16."
        )
    _require_declared(attached)


def _require_declared(attached: Attached) -> None:
    """Raises `CheckFailed` unless exactly the declared weights are active; a method may never have been due."""
    method, model = attached.method, attached.model
    if method.final_sparsity is None:
        return
    sizes, counts = model.sizes, model.counts
    # Sparsities of methods count what they prune and grow, which may be whole kernels.
    units = {name: model.granularity.unit(model.specs[name].shape) for name in attached.names}
    active = sum(counts[name] // unit for name, unit in units.items())
    declared = active_count(method.final_sparsity, [sizes[name] // unit for name, unit in units.items()])
    if active != declared:
        raise CheckFailed(
            f"method {attached.method_name} ended with {active:,} active weights, but its final sparsity "
            f"{float(method.final_sparsity):.6g} means {declared:,}; it must update at its final step "
            f"{method.final_step}."
        )


def first_bad_step(losses: torch.Tensor, first: int) -> int | None:
    """Returns the first step whose loss is NaN or inf, or None; `losses` begin with that of step `first`."""
    bad = (~losses.isfinite()).nonzero()
    return first + int(bad[0]) if len(bad) else None


def explained(error: RuntimeError, settings: TrainSettings) -> DsrError | None:
    """Returns torch's error as one that says what to do, or None if the user can do nothing about it."""
    if isinstance(error, torch.OutOfMemoryError):
        return DsrError(
            f"the GPU ran out of memory at batch size {settings.batch_size}; lower --batch-size, or give "
            f"--accumulate or --precision bf16."
        )
    # torch raises plain RuntimeError for these, so that only the text tells them apart.
    if any(words in str(error) for words in ("Output size is too small", "Kernel size can't be greater")):
        reason = first_line(error)
        return DsrError(f"the model's input is too small to train ({reason}); convert it with a larger --input-size.")
    if settings.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = " ".join(str(error).split("\n")[:2]).strip()
        return DsrError(f"torch.compile failed ({reason}); leave out --compile, or install a C++ compiler.")
    return None


def diverged(when: str, blame: str, saved: int) -> DsrError:
    """Returns the error for a loss that is NaN or inf.

    Args:
        when: the moment, as in `at step 12`.
        blame: what `first_bad` returned.
        saved: the last epoch whose state is on disk; 0 for none.
    """
    where = f" ({blame})" if blame else ""
    kept = f"; the state after epoch {saved} is kept" if saved else ""
    return DsrError(f"the loss is NaN or inf {when}{where}{kept}; lower --lr, or give --warmup-epochs.")


@torch.no_grad()
def first_bad(module: nn.Module, inputs: torch.Tensor) -> str:
    """Runs a network again and names the first place where a value is NaN or inf.

    Layers are checked in the order in which they run; in each, first its inputs, then its weights, then its outputs.

    Returns:
        A few words; empty if all values are finite.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def check(layer: nn.Module, inputs: tuple[Any, ...], outputs: object) -> None:
            if not found:
                found.extend(_blame(name, layer, inputs, outputs))

        return check

    # Leaves, and layers with children that hold weights themselves, such as attention.
    layers = {name: layer for name, layer in module.named_modules() if not any(layer.children()) or _tensors(layer)}
    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        module(inputs)
    except RuntimeError:  # what was found until then is still true
        pass
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else ""


def _blame(name: str, layer: nn.Module, inputs: object, outputs: object) -> Iterator[str]:
    """Yields what is NaN or inf in a layer that has just run."""
    kind = type(layer).__name__
    if not _finite(inputs):
        yield f"an input of {kind} {name!r} is NaN or inf"
    for own, tensor in _tensors(layer).items():
        if not _finite(tensor):
            yield f"{own} of {kind} {name!r} is NaN or inf"
    if not _finite(outputs):
        yield f"{kind} {name!r} is the first layer with an output that is NaN or inf"


def _tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the parameters of a layer itself, and its buffers if they take part, which is in evaluation."""
    own: dict[str, torch.Tensor] = held_values(layer) | dict(layer.named_parameters(recurse=False))
    return own if layer.training else own | dict(layer.named_buffers(recurse=False))


def _finite(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())
