"""A method at work: it counts optimizer steps, reallocates when due, and keeps inactive weights at zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import distributed, nn, optim

from dsr_tool.errors import UsageError, join_words
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.optimizer_state import momentum_of
from dsr_tool.methods.plugins import plugin_error, reporting_plugin
from dsr_tool.methods.saved_masks import packed_masks, unpacked_masks
from dsr_tool.methods.table import METHODS, make
from dsr_tool.methods.validation import check_counts, check_density, check_positions
from dsr_tool.sparse.active import ActiveWeights, gather
from dsr_tool.sparse.agreement import require_agreement, several_processes
from dsr_tool.sparse.averages import averaged
from dsr_tool.sparse.compact.keeper import CompactKeeper
from dsr_tool.sparse.keeper import Keeper
from dsr_tool.sparse.mask_keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.pattern import torn_layer
from dsr_tool.sparse.sharding import refuse_sharded

__all__ = ["Attached", "attach"]


class Attached:
    """A method bound to a model and its optimizer. The optimizer's own `step` drives it; nothing else is called.

    Attributes:
        model: the sparse model.
        method: the training method.
        method_name: name of the method; for a plugin method, of its entry point.
        step: number of optimizer steps so far, without those that a GradScaler left out.
        last: the latest reallocation, or None.
    """

    def __init__(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        method: Method,
        *,
        seed: int = 0,
        process_group: distributed.ProcessGroup | None = None,
        on_reallocation: Callable[[int, Reallocation], None] | None = None,
    ) -> None:
        """Registers hooks on the optimizer.

        Args:
            model: the sparse model, already on its device.
            optimizer: an optimizer of `model.module.parameters()`, or of some of them.
            method: the training method.
            seed: seed of random positions; the same on every rank of a distributed run.
            process_group: the ranks that train this model together, as for DistributedDataParallel; None for all.
            on_reallocation: called after each reallocation with the step and the weights that were pruned and grown.

        Raises:
            UsageError: the method cannot train this model, a weight is in another optimizer with a method, or FSDP has
                sharded the model.
            CheckFailed: the ranks have different masks or seeds.
        """
        refuse_sharded(model.module)
        self.model = model
        self.method = method
        self.method_name = method.plugin.name if method.plugin else method.name
        self.step = 0
        self.last: Reallocation | None = None
        self._notify = on_reallocation
        self._gradients: tuple[torch.Tensor, ...] | None = None
        self._seed, self._group, self._agreed = seed, process_group, False
        _check_granularity(self.method_name, model, method)
        _check_storage(self.method_name, model, method)
        self._keeper = self._make_keeper(optimizer, seed)
        # After `keep`, which is where a method may look at more of the model.
        try:
            self._begin()
            self._agree()
        except BaseException:
            # The caller gets no Attached object whose remove() would take the hooks off again.
            self._keeper.remove()
            raise
        device = next((p.device for p in model.module.parameters()), torch.device("cpu"))
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._keeper.before_step, self._keeper.after_step = self._before_step, self._after_step
        self._expect()

    @property
    def names(self) -> list[str]:
        """Names of the sparse layers it trains: those of the optimizer that are not frozen (`requires_grad=False`)."""
        return self._keeper.names

    def mask_gradients(self) -> None:
        """Zeroes gradients of inactive weights now. Call it once before clipping by norm, or they count in the norm."""
        # Drops gradients saved for a step that GradScaler skipped.
        self._gradients = None
        self._keeper.mask_gradients()

    def average(self, copy: nn.Module) -> SparseModel:
        """Keeps an averaged copy of the network, such as an exponential moving average, inside the masks as they move.

        Weights that are pruned become zero in the copy too, at once, and grown ones start from zero there. Call it
        before the first step, and again when a run resumes; once, also if several optimizers have a method each.

        Args:
            copy: a deepcopy of `model.module`, or torch's `AveragedModel` of it. Its owner goes on to update it.

        Returns:
            The copy as a sparse model, to evaluate, save or export.

        Raises:
            UsageError: this is no copy of the network.
        """
        average = averaged(self.model, copy)
        self.model.averages.append(average)
        return average

    def remove(self) -> None:
        """Removes all hooks from the optimizer."""
        self._keeper.remove()

    def state_dict(self, *, masks: bool = True) -> dict[str, Any]:
        """Returns masks, step, method state and random state: with weights and optimizer, all that a loop resumes from.

        Args:
            masks: whether to include the masks, at one bit per weight; not needed where the model itself is saved.
        """
        with self._calling("state_dict"):
            state = self.method.state_dict()
        return {
            "name": self.method_name,
            "step": self.step,
            "method": state,
            "random": self._generator.get_state(),
            "device": self._generator.device.type,
            **({"masks": packed_masks(self.model)} if masks else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; on another type of device, the random numbers are new ones.

        Weights and optimizer may be loaded before or after; in compact storage, weights after. The next step checks
        that all fit together.

        Raises:
            UsageError: the state is from another model or method.
        """
        if state.get("name", self.method_name) != self.method_name:
            raise UsageError(
                f"the state is from method {state['name']}, and method {self.method_name} is attached; attach method "
                f"{state['name']} to go on with it."
            )
        if "masks" in state:
            self._keeper.restore_masks(unpacked_masks(self.model, state["masks"]))
            self._agreed = False
        self.step = int(state["step"])
        self._gradients = None
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

    def _begin(self) -> None:
        """Shows the method the layers that it trains."""
        self._begun = self.names
        sizes, counts = self.model.sizes, self.model.counts
        with self._calling("begin"):
            self.method.begin([sizes[name] for name in self._begun], [counts[name] for name in self._begun])

    def _agree(self) -> None:
        """Compares the masks with those of the other ranks once, as soon as there are any."""
        if not self._agreed and several_processes(self._group):
            if self.method.needs_gradients and self.model.store is not None:
                raise UsageError(
                    f"method {self.method_name} reads gradients of inactive weights, which compact storage keeps for "
                    f"each process alone; on several processes, train it with storage='masked'."
                )
            require_agreement(self.model, {"the seed": self._seed, "the method": self.method_name}, self._group)
            self._agreed = True

    def _before_step(self) -> None:
        due = self._due(self.step + 1)
        # torch does not count all writes to a weight, so an update, which reads all of them anyway, trusts none.
        self._keeper.check(everything=due and not self.method.continuous)
        self._agree()
        if self.names != self._begun and self.names:
            self._follow_freezing()

    def _follow_freezing(self) -> None:
        """Lets the method go on with other layers than before, or refuses that."""
        changed = min(set(self.names) ^ set(self._begun))
        if not self.method.layers_may_change:
            what = "is trained only since" if changed in self.names else "was frozen after"
            raise UsageError(
                f"{changed!r} {what} method {self.method_name} was attached, which remembers facts of each layer; set "
                f"requires_grad before attach, or call remove() on what attach returned and attach again."
            )
        self._begin()

    @torch.no_grad()
    def _after_step(self, taken: bool) -> None:
        if taken:
            self.step += 1
            if self.names and self._due(self.step):
                self._reallocate()
        self._gradients = None
        self._expect()

    def _expect(self) -> None:
        """Lets the keeper prepare for the next step."""
        self._keeper.expect(update=bool(self.names) and self._wants_gradients(self.step + 1))

    def _reallocate(self) -> None:
        """Updates the method once."""
        # Gathered anew at each update: the optimizer changed the values, and the last update the positions.
        gradients = self._keeper.gradients() if self._gradients is None else self._unscaled(self._gradients)
        weights = replace(gather(self.model, self.names), gradients=gradients)
        if self.method.needs_momentum:
            momentum = momentum_of(self.model, self._keeper.optimizer, self.names, weights)
            weights = replace(weights, momentum=momentum)
        moved = self._updated(weights)
        self.last = moved.in_weights(weights.units)
        # Values first: a weight that is then pruned must end at zero.
        if self.last.values is not None:
            self._keeper.write(weights.positions, self.last.values)
        self._keeper.move(self.last.dropped, self.last.grown)
        if self._notify is not None:
            self._notify(self.step, self.last)

    def _unscaled(self, gradients: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Divides copied gradients in place by the loss scale, if a fused step took it out of the others only."""
        scale = self._keeper.view.loss_scale
        return gradients if scale is None else [gradient.div_(scale.to(gradient.device)) for gradient in gradients]

    def _updated(self, weights: ActiveWeights) -> Reallocation:
        """Returns the method's reallocation, checked before anything changes."""
        with self._calling("update"):
            moved = self.method.update(weights, self.step, self._generator)
        check_counts(self.method_name, weights, moved)
        # The methods of this package are held to their rules by their tests; all others here, plugins or not.
        if type(self.method) not in METHODS.values():
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
    process_group: distributed.ProcessGroup | None = None,
    **options: Any,
) -> Attached:
    """Attaches a method to any training loop: after this, `optimizer.step()` drives it.

    In a distributed training, all ranks must call it.

    Args:
        model: the sparse model, already on its device.
        optimizer: an optimizer of `model.module.parameters()`, or of some of them; each keeps the masks of its own.
        method: a method, or the name of one.
        total_steps: optimizer steps of the whole training, for the schedule of a method given by name; not needed for
            `static`.
        seed: seed of random positions; the same on every rank.
        process_group: the ranks that train this model together, as for DistributedDataParallel; None for all.
        options: as for `make`, for a method given by name: `final_sparsity=0.9` for `gmp`, for example.

    Raises:
        UsageError: options with a method object, a value that `make` or the method refuses, a weight in another
            optimizer with a method, or a model that FSDP has sharded.
        CheckFailed: the ranks have different masks or seeds.
    """
    if isinstance(method, str):
        method = make(method, total_steps, **options)
    elif options:
        raise UsageError(
            f"option {next(iter(options))} can only be passed with a method name; pass it to make(), or to the "
            f"constructor of the method."
        )
    return Attached(model, optimizer, method, seed=seed, process_group=process_group)


def _check_storage(name: str, model: SparseModel, method: Method) -> None:
    if model.storage not in method.storages:
        raise UsageError(
            f"method {name} trains in {join_words(method.storages)} storage, and the model is in {model.storage} "
            f"storage; call model.to_storage({method.storages[0]!r}) before the optimizer is made."
        )


def _check_granularity(name: str, model: SparseModel, method: Method) -> None:
    granularity = model.granularity
    if granularity.kind not in method.granularities:
        rows = METHODS.values()
        fitting = [row.name for row in rows if granularity.kind in row.granularities and not row.starts_dense]
        raise UsageError(
            f"method {name} does not keep the pattern of --granularity {granularity}, with which the model was "
            f"converted; train it with {join_words(fitting)}, or convert it with --granularity weight."
        )
    torn = torn_layer(model.masks, granularity)
    if torn is not None:
        raise UsageError(
            f"the mask of {torn!r} does not have the pattern of --granularity {granularity}; convert the model "
            f"with --granularity weight."
        )
