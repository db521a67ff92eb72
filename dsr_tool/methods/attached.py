"""A method at work: it counts optimizer steps, reallocates when due, and keeps everything inside the masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.validation import check_counts
from dsr_tool.sparse.active import gather
from dsr_tool.sparse.model import SparseModel

__all__ = ["Attached"]


class Attached:
    """A method bound to a model and its optimizer.

    Nothing needs to be called: the optimizer's own `step` drives it.

    Attributes:
        model: the sparse model.
        method: the method.
        names: the sparse layers it works on, without frozen ones (`requires_grad=False`).
        step: optimizer steps so far.
        last: the latest reallocation, if any.
    """

    def __init__(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        method: Method,
        *,
        seed: int = 0,
        on_reallocation: Callable[[int, Reallocation], None] | None = None,
    ) -> None:
        """Hook into the optimizer.

        Args:
            model: the sparse model, already on its device.
            optimizer: made from `model.module.parameters()`.
            method: what decides.
            seed: of the random positions; the same on every rank of a distributed run.
            on_reallocation: called after each reallocation with the step and what moved.

        Raises:
            UsageError: the method cannot work on this model.
        """
        _check_granularity(model, method)
        self.model = model
        self.method = method
        self.step = 0
        self.last: Reallocation | None = None
        self._notify = on_reallocation
        self._gradients: tuple[torch.Tensor, ...] | None = None
        before_masking = self._keep_gradients if method.needs_gradients else None
        self._keeper = method.keep(model, optimizer, seed=seed, before_masking=before_masking)
        self.names = self._keeper.names
        masks = [model.masks[name] for name in self.names]
        try:
            method.begin([mask.numel() for mask in masks], [int(mask.count_nonzero()) for mask in masks])
        except BaseException:
            # Nobody holds anything yet to take the hooks off with.
            self._keeper.remove()
            raise
        device = model.masks[self.names[0]].device if self.names else torch.device("cpu")
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def mask_gradients(self) -> None:
        """Zero gradients outside the masks now; call it once before clipping by norm, so that only kept ones count."""
        # Those of a step that a scaler left out, as they overflowed, count no more.
        self._gradients = None
        self._keeper.mask_gradients()

    def remove(self) -> None:
        """Take all hooks off the optimizer."""
        self._hook.remove()
        self._keeper.remove()

    def state_dict(self) -> dict[str, Any]:
        """Step, method state and random state; masks are saved with the model."""
        return {
            "step": self.step,
            "method": self.method.state_dict(),
            "random": self._generator.get_state(),
            "device": self._generator.device.type,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; on another kind of device, random numbers begin anew."""
        self.step = int(state["step"])
        self.method.load_state_dict(state["method"])
        if state["device"] == self._generator.device.type:
            self._generator.set_state(state["random"].cpu())
        else:
            self._generator.manual_seed(self._generator.initial_seed() + self.step)

    def _keep_gradients(self) -> None:
        """Copy the dense gradients of a step after which the method will ask for them."""
        # What `mask_gradients` kept before a clipping must not be replaced by what it left.
        if self._gradients is None and self.method.due(self.step + 1):
            parameters = self.model.weights
            weights = (parameters[name] for name in self.names)
            dense = (torch.zeros_like(w) if w.grad is None else w.grad.detach().clone() for w in weights)
            self._gradients = tuple(gradient.reshape(-1).float() for gradient in dense)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self.step += 1
        if not self.names or not self.method.due(self.step):
            return
        weights = replace(gather(self.model, self.names), gradients=self._gradients)
        moved = self.method.update(weights, self.step, self._generator)
        check_counts(self.method.name, weights, moved)
        self._gradients = None
        self.last = moved.in_weights(weights.units)
        if self.last.values is not None:
            self._keeper.write(weights.positions, self.last.values)
        self._keeper.move(self.last.dropped, self.last.grown)
        if self._notify is not None:
            self._notify(self.step, self.last)


def _check_granularity(model: SparseModel, method: Method) -> None:
    granularity = model.granularity
    if granularity not in method.granularities:
        raise UsageError(
            f"method {method.name} moves single weights, and the model was converted with --granularity {granularity}; "
            f"train it with dsr, set or static, or convert it with --granularity weight."
        )
    if granularity == "kernel":
        kernels = {name: mask.flatten(2) for name, mask in model.masks.items() if mask.ndim > 2}
        torn = [name for name, mask in kernels.items() if not bool((mask == mask[..., :1]).all())]
        if torn:
            raise UsageError(
                f"the mask of {torn[0]!r} cuts kernels apart; convert the model with --granularity weight."
            )
