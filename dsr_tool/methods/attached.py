"""A method at work: it counts optimizer steps, reallocates when due, and keeps inactive weights at zero."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import optim

from dsr_tool.errors import UsageError, join_words
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.optimizer_state import momentum_of
from dsr_tool.methods.plugins import plugin_error, reporting_plugin
from dsr_tool.methods.table import METHODS, make
from dsr_tool.methods.validation import check_counts, check_density, check_positions
from dsr_tool.sparse.active import ActiveWeights, gather
from dsr_tool.sparse.compact.keeper import CompactKeeper
from dsr_tool.sparse.keeper import Keeper, MaskKeeper
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.sharding import refuse_sharded

__all__ = ["Attached", "attach"]


class Attached:
    """A method bound to a model and its optimizer. The optimizer's own `step` drives it; nothing else is called.

    Attributes:
        model: the sparse model.
        method: the training method.
        method_name: name of the method; for a plugin method, of its entry point.
        names: names of the sparse layers it trains, without frozen ones (`requires_grad=False`).
        step: number of optimizer steps so far.
        last: the latest reallocation, or None.
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
        """Registers hooks on the optimizer.

        Args:
            model: the sparse model, already on its device.
            optimizer: an optimizer of `model.module.parameters()`.
            method: the training method.
            seed: seed of random positions; the same on every rank of a distributed run.
            on_reallocation: called after each reallocation with the step and the weights that were pruned and grown.

        Raises:
            UsageError: the method cannot train this model, or FSDP has sharded it.
        """
        refuse_sharded(model.module)
        self.model = model
        self.method = method
        self.method_name = method.plugin.name if method.plugin else method.name
        self.step = 0
        self.last: Reallocation | None = None
        self._notify = on_reallocation
        self._gradients: tuple[torch.Tensor, ...] | None = None
        _check_granularity(self.method_name, model, method)
        _check_storage(self.method_name, model, method)
        self._keeper = self._make_keeper(optimizer, seed)
        self.names = self._keeper.names
        sizes, counts = model.sizes, model.counts
        # After `keep`, which is where a method may look at more of the model.
        try:
            with self._calling("begin"):
                method.begin([sizes[name] for name in self.names], [counts[name] for name in self.names])
        except BaseException:
            # The caller gets no Attached object whose remove() would take the hooks off again.
            self._keeper.remove()
            raise
        device = next((p.device for p in model.module.parameters()), torch.device("cpu"))
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._hook = optimizer.register_step_post_hook(self._after_step)
        self._expect()

    def mask_gradients(self) -> None:
        """Zeroes gradients of inactive weights now. Call it once before clipping by norm, or they count in the norm."""
        # Drops gradients saved for a step that GradScaler skipped.
        self._gradients = None
        self._keeper.mask_gradients()

    def remove(self) -> None:
        """Removes all hooks from the optimizer."""
        self._hook.remove()
        self._keeper.remove()

    def state_dict(self) -> dict[str, Any]:
        """Returns step, method state and random state; masks are saved with the model."""
        with self._calling("state_dict"):
            state = self.method.state_dict()
        return {
            "step": self.step,
            "method": state,
            "random": self._generator.get_state(),
            "device": self._generator.device.type,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; on another type of device, the random numbers are new ones."""
        self.step = int(state["step"])
        self._expect()
        with self._calling("load_state_dict"):
            self.method.load_state_dict(state["method"])
        if state["device"] == self._generator.device.type:
            self._generator.set_state(state["random"].cpu())
        else:
            # The states of CPU and CUDA generators differ in format. A seed that depends on the step at least does not
            # repeat the positions of the first steps.
            self._generator.manual_seed(self._generator.initial_seed() + self.step)

    def _make_keeper(self, optimizer: optim.Optimizer, seed: int) -> Keeper:
        before_masking = self._save_gradients if self.method.needs_gradients else None
        with self._calling("keep"):
            keeper = self.method.keep(self.model, optimizer, seed=seed, before_masking=before_masking)
        expected = MaskKeeper if self.model.store is None else CompactKeeper
        if self.method.plugin and not isinstance(keeper, expected):
            raise plugin_error(
                self.method.plugin, f"returned {type(keeper).__name__} from keep(), expected a {expected.__name__}"
            )
        return keeper

    def _calling(self, name: str) -> AbstractContextManager[None]:
        """Names the plugin in any error of the method that is called inside."""
        return reporting_plugin(self.method.plugin, f"failed in {name}()")

    def _due(self, step: int) -> bool:
        with self._calling("due"):
            return bool(self.method.due(step))

    def _wants_gradients(self, step: int) -> bool:
        with self._calling("wants_gradients"):
            return self.method.needs_gradients and bool(self.method.wants_gradients(step))

    def _save_gradients(self) -> None:
        """Copies the dense gradients of a step if the method updates after it."""
        # `mask_gradients` may have been called before clipping: keep what it saved, because the gradients that are
        # there now are masked already.
        if self._gradients is None and self.model.store is None and self._wants_gradients(self.step + 1):
            parameters = self.model.weights
            weights = (parameters[name] for name in self.names)
            dense = (torch.zeros_like(w) if w.grad is None else w.grad.detach().clone() for w in weights)
            self._gradients = tuple(gradient.reshape(-1).float() for gradient in dense)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        self.step += 1
        if self.names and self._due(self.step):
            self._reallocate()
        self._expect()

    def _expect(self) -> None:
        """Lets the keeper prepare for the next step."""
        self._keeper.expect(update=bool(self.names) and self._wants_gradients(self.step + 1))

    def _reallocate(self) -> None:
        """Updates the method once."""
        # Gathered anew at each update: the optimizer changed the values, and the last update the positions.
        gradients = self._keeper.gradients() if self._gradients is None else self._gradients
        weights = replace(gather(self.model, self.names), gradients=gradients)
        if self.method.needs_momentum:
            momentum = momentum_of(self.model, self._keeper.optimizer, self.names, weights)
            weights = replace(weights, momentum=momentum)
        moved = self._updated(weights)
        self._gradients = None
        self.last = moved.in_weights(weights.units)
        # Values first: a weight that is then pruned must end at zero.
        if self.last.values is not None:
            self._keeper.write(weights.positions, self.last.values)
        self._keeper.move(self.last.dropped, self.last.grown)
        if self._notify is not None:
            self._notify(self.step, self.last)

    def _updated(self, weights: ActiveWeights) -> Reallocation:
        """Returns the method's reallocation, checked before anything changes."""
        with self._calling("update"):
            moved = self.method.update(weights, self.step, self._generator)
        check_counts(self.method_name, weights, moved)
        if self.method.plugin:
            check_positions(self.method_name, weights, moved)
            with self._calling("sparsity"):
                check_density(self.method_name, self.method, weights, moved, self.step)
        return moved


def attach(
    model: SparseModel,
    optimizer: optim.Optimizer,
    method: Method | str = "dsr",
    *,
    total_steps: int = 0,
    seed: int = 0,
    **options: Any,
) -> Attached:
    """Attaches a method to any training loop: after this, `optimizer.step()` drives it.

    Args:
        model: the sparse model, already on its device.
        optimizer: an optimizer of `model.module.parameters()`.
        method: a method, or the name of one.
        total_steps: optimizer steps of the whole training, for the schedule of a method given by name; not needed for
            `static`.
        seed: seed of random positions.
        options: as for `make`, for a method given by name: `final_sparsity=0.9` for `gmp`, for example.

    Raises:
        UsageError: options with a method object, or a value that `make` or the method refuses.
    """
    if isinstance(method, str):
        method = make(method, total_steps, **options)
    elif options:
        raise UsageError(
            f"option {next(iter(options))} can only be passed with a method name; pass it to make(), or to the "
            f"constructor of the method."
        )
    return Attached(model, optimizer, method, seed=seed)


def _check_storage(name: str, model: SparseModel, method: Method) -> None:
    if model.storage not in method.storages:
        raise UsageError(
            f"method {name} trains in {join_words(method.storages)} storage, and the model is in {model.storage} "
            f"storage; call model.to_storage({method.storages[0]!r}) before the optimizer is made."
        )


def _check_granularity(name: str, model: SparseModel, method: Method) -> None:
    granularity = model.granularity
    if granularity not in method.granularities:
        fitting = [row.name for row in METHODS.values() if granularity in row.granularities and not row.starts_dense]
        raise UsageError(
            f"method {name} prunes and grows single weights, and the model was converted with --granularity "
            f"{granularity}; train it with {join_words(fitting)}, or convert it with --granularity weight."
        )
    if granularity == "kernel":
        kernels = {name: mask.flatten(2) for name, mask in model.masks.items() if mask.ndim > 2}
        torn = [name for name, mask in kernels.items() if not bool((mask == mask[..., :1]).all())]
        if torn:
            raise UsageError(
                f"the mask of {torn[0]!r} has kernels that are active in part; convert the model with --granularity "
                f"weight."
            )
