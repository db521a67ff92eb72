"""CompactKeeper: moves values, gradients and optimizer state when a method moves weights in compact storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import overload

import torch
from torch import nn, optim
from torch.utils._pytree import tree_leaves

from dsr_tool.errors import UsageError
from dsr_tool.sparse.active import Positions, global_positions, segment_counts
from dsr_tool.sparse.compact.groups import refuse_groups_by_layer
from dsr_tool.sparse.compact.store import CompactStore, frozen_before
from dsr_tool.sparse.keeper import Keeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["CompactKeeper", "LargestGradients"]

_BY_SHAPE = ("Adafactor", "Muon", "Shampoo", "SOAP")
"""Optimizers whose step depends on the shape of a weight, by the name of their class."""

_BY_NORM = ("LARS", "Lars", "LAMB", "Lamb")
"""Optimizers whose step depends on the norm of a weight: they need a parameter for each layer."""


class CompactKeeper(Keeper):
    """Keeps one optimizer's view of a compact network whole while positions move.

    There is nothing outside the masks, so nothing has to be cleared around a step.
    """

    def __init__(self, model: SparseModel, optimizer: optim.Optimizer, store: CompactStore, *, gradients: bool) -> None:
        """Checks the optimizer, and claims it.

        Args:
            model: the sparse model, in compact storage and on its device.
            optimizer: any torch optimizer that treats each value by itself.
            store: the model's store.
            gradients: whether the method grows by the gradients of inactive weights.

        Raises:
            UsageError: the values are not among the optimizer's parameters, or twice; the optimizer has a keeper
                already; its steps depend on shapes, or on copies of weights outside its state; a layer was frozen after
                the model became compact; or its state has another length than the weights.
        """
        super().__init__(model, optimizer, store.trained if store.values.requires_grad else [])
        self._store, self._gradients = store, gradients
        self._layers: Mapping[str, nn.Parameter] = {} if store.by_layer is None else store.by_layer
        self._check()
        self._check_state()
        self._refuse_hidden()
        refuse_groups_by_layer(model, self.optimizer)
        self.claim(self.owned_weights())

    def owned_weights(self) -> Sequence[torch.Tensor]:
        """Returns the flat parameter, and those of the layers if there are any."""
        return [self._store.values, *self._layers.values()]

    def name_of(self, weight: torch.Tensor) -> str:
        """Returns the name of a layer's parameter, or of the first layer in the flat one."""
        first = next(iter((*self._store.trained, *self._store.layers)))
        return next((name for name, mine in self._layers.items() if mine is weight), first)

    def follow(self) -> None:
        """Looks whether the optimizer still has all values, and whether they are frozen.

        Raises:
            UsageError: the values are not among the optimizer's parameters any more, or its state does not fit them.
        """
        if self.model.store is not self._store:
            raise UsageError("the model was put into another storage after attach; make the optimizer and attach then.")
        self.names = self._store.trained if self._store.values.requires_grad else []
        self._check()
        if self._loaded:
            self._check_state()

    def _check(self) -> None:
        store, layers = self._store, self._layers
        optimized = self.view.parameters()
        flat, own = id(store.values) in optimized, [name for name in self.names if id(layers.get(name)) in optimized]
        if flat and own:
            raise UsageError(
                f"the optimizer has the values of {own[0]!r} twice; make it from model.named_parameters() or from "
                f"model.module.parameters(), not from both."
            )
        if kind := _named(self.optimizer, _BY_SHAPE):
            raise UsageError(
                f"{kind} steps by the shape of each weight, and compact storage has only the active values; load the "
                f"model with storage='masked', or take an optimizer that treats each value by itself, such as SGD."
            )
        if flat and (kind := _named(self.optimizer, _BY_NORM)):
            raise UsageError(
                f"{kind} steps by the norm of each weight, and model.module.parameters() has all of them in one "
                f"vector; make the optimizer from model.named_parameters()."
            )
        missing = [name for name in self.names if name not in own]
        if missing and not flat:
            raise UsageError(
                f"the values of {missing[0]!r} are not among the optimizer's parameters; make the optimizer from "
                f"model.module.parameters(), or for settings by layer from all of model.named_parameters(), after the "
                f"model was put into its storage and moved to its device."
            )
        thawed = [name for name, values in layers.items() if values.requires_grad and name not in self.names]
        if thawed:
            raise frozen_before(thawed[0])
        frozen = [name for name in own if not layers[name].requires_grad]
        if frozen:
            raise UsageError(
                f"{frozen[0]!r} was frozen after the model became compact; call model.to_storage('masked'), freeze "
                f"the layer, and then make the model compact again."
            )

    def _refuse_hidden(self) -> None:
        optimized, shapes = self.view.parameters(), {weight.shape for weight in self.owned_weights()}
        for each in self.view.all:
            others = {name: held for name, held in vars(each).items() if name not in ("state", "param_groups")}
            tensors = (leaf for leaf in tree_leaves(others) if isinstance(leaf, torch.Tensor))
            if any(tensor.shape in shapes and id(tensor) not in optimized for tensor in tensors):
                raise UsageError(
                    f"{type(each).__name__} keeps copies of weights outside its state, where they cannot follow what a "
                    f"method moves in compact storage; load the model with storage='masked'."
                )

    def _state_loaded(self, optimizer: optim.Optimizer) -> None:
        super()._state_loaded(optimizer)
        # The positions may still have to be loaded, so that a layer may have another length, but all together fit.
        lengths: dict[str, list[int]] = {}
        for parameter in self._layers.values():
            for key, vector in self._vectors_of(parameter).items():
                lengths.setdefault(key, []).append(vector.numel())
        for key, found in lengths.items():
            if sum(found) > self._store.values.numel():
                raise _unfit(key, (sum(found),), self._store.values)
        for key, vector in self._vectors_of(self._store.values).items():
            if vector.shape != self._store.values.shape:
                raise _unfit(key, tuple(vector.shape), self._store.values)

    def _check_state(self) -> None:
        for parameter in (self._store.values, *self._layers.values()):
            for key, vector in self._vectors_of(parameter).items():
                if vector.shape != parameter.shape:
                    raise _unfit(key, tuple(vector.shape), parameter)

    def _vectors_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Returns the optimizer's state of a parameter, without scalars."""
        # LBFGS keeps its history of all parameters at the first of them.
        state = {} if isinstance(self.optimizer, optim.LBFGS) else self.optimizer.state.get(parameter, {})
        return {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}

    def mask_gradients(self) -> None:
        """Does nothing: there are no gradients outside the masks."""

    def expect(self, *, update: bool) -> None:
        """Keeps gradients of inactive weights in the next backward pass if the method updates after the next step."""
        self._store.wants_gradients = self._gradients and update
        self._store.granularity = self.model.granularity
        # Gradients of the step before stay if `zero_grad` keeps their tensors.
        self._store.gradients.clear()

    def gradients(self) -> Sequence[torch.Tensor] | None:
        """Returns what the last backward pass kept, one dense vector per layer, each made on access."""
        return LargestGradients(self._store, self.names) if self._gradients else None

    @torch.no_grad()
    def move(self, dropped: Positions, grown: Positions) -> None:
        """Deactivates and activates weights; weight, gradient and optimizer state of grown ones start at zero.

        Args:
            dropped: active positions that become inactive.
            grown: inactive positions that become active.

        Raises:
            UsageError: more weights would be active than the store has room for.
        """
        store = self._store
        active = global_positions(store, store.trained, [1] * len(store.trained))
        lost = torch.searchsorted(active, dropped.flat)
        keep = torch.ones(len(active), dtype=torch.bool, device=active.device)
        keep[lost] = False
        sources = keep.nonzero().squeeze(1)
        kept = active[sources]
        total = len(kept) + len(grown.flat)
        if total > store.values.numel():
            raise UsageError(
                f"{total:,} weights would be active, and compact storage was made for {store.values.numel():,}; train "
                f"a method that raises the density in masked storage."
            )
        # Two sorted lists are merged: a grown weight's new index is its own rank plus that among the kept ones, and the
        # kept ones fill what is left, in their order. There are few grown weights, so few searches.
        entered = torch.arange(len(grown.flat), device=active.device) + torch.searchsorted(kept, grown.flat)
        stay = torch.ones(total, dtype=torch.bool, device=active.device)
        stay[entered] = False
        merged = torch.empty(total, dtype=torch.int64, device=active.device).masked_scatter_(stay, kept)
        merged[entered] = grown.flat
        for vector in self._vectors():
            moved = torch.zeros_like(vector)
            moved[:total].masked_scatter_(stay, vector.index_select(0, sources))
            vector.copy_(moved)
        sizes = [store.layers[name].size for name in store.trained]
        counts = segment_counts(merged, sizes)
        self._move_by_layer(sources, stay, [new - grew for new, grew in zip(counts, grown.counts, strict=True)], counts)
        starts = accumulate(sizes, initial=0)
        local = [(piece - start).to(torch.int32) for piece, start in zip(merged.split(counts), starts, strict=False)]
        for each in (store, *self._averages()):
            each.replace(torch.cat(local), dict(zip(store.trained, counts, strict=True)))
        self._start_state(entered, grown.counts)
        self.view.forget_curvature()

    def _start_state(self, entered: torch.Tensor, counts: Sequence[int]) -> None:
        """Sets the state of grown weights that does not start at zero.

        Args:
            entered: indices of the grown weights in the flat vector.
            counts: number of them in each layer.
        """
        for tensor, start in self.view.starts_of(self._store.values):
            tensor[entered] = start
        for name, new in zip(self._store.trained, entered.split(list(counts)), strict=True):
            for tensor, start in self.view.starts_of(self._layers[name]) if name in self._layers else ():
                tensor[new - self._store.layers[name].start] = start

    @torch.no_grad()
    def restore_masks(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Takes over the positions of an earlier run; weights are loaded after this.

        Raises:
            UsageError: a frozen layer had other positions, or more weights were active than there is room for.
        """
        store = self._store
        frozen = [name for name in masks if not store.layers[name].trained]
        if other := [name for name in frozen if not torch.equal(masks[name], store.mask(name).cpu())]:
            raise UsageError(
                f"the state has another mask for the frozen layer {other[0]!r}; start from the model that the saved "
                f"run started from, or train with storage='masked'."
            )
        sizes = [store.layers[name].size for name in store.trained]
        if not sizes:
            return
        new = torch.cat([masks[name].reshape(-1) for name in store.trained]).to(store.values.device)
        old = torch.zeros_like(new)
        old[global_positions(store, store.trained, [1] * len(sizes))] = True
        gone, come = ((one & ~other).nonzero().squeeze(1) for one, other in ((old, new), (new, old)))
        self.move(Positions.of(gone, sizes), Positions.of(come, sizes))

    def _move_by_layer(
        self, sources: torch.Tensor, stay: torch.Tensor, kept: Sequence[int], counts: Sequence[int]
    ) -> None:
        """Moves the state of layers that are parameters of their own; it gets the new length of each layer.

        Args:
            sources: indices of the kept values in the flat vector, int64 of shape (sum of kept,).
            stay: whether a value is a kept one, for each new index, shape (sum of counts,).
            kept: number of kept values of each layer.
            counts: new number of values of each layer.
        """
        # State that was loaded since the last step belongs to the positions that are restored now.
        layers = {} if self._loaded else self._layers
        pieces = zip(self._store.trained, sources.split(list(kept)), stay.split(list(counts)), strict=True)
        for name, source, stays in pieces:
            start, shape = self._store.layers[name].start, (self._store.layers[name].count,)
            for state in self.view.states_of(layers[name]) if name in layers else ():
                for key, vector in state.items():
                    if isinstance(vector, torch.Tensor) and vector.shape == shape:
                        moved = vector.new_zeros(len(stays))
                        state[key] = moved.masked_scatter_(stays, vector.index_select(0, source - start))

    @torch.no_grad()
    def write(self, active: Positions, values: torch.Tensor) -> None:
        """Writes values to all active weights; gradients and optimizer state stay as they are.

        Args:
            active: positions of the weights: all that are active.
            values: their new values, in the order of the positions.
        """
        self._store.values[: len(active.flat)] = values.to(self._store.values.dtype)

    def _averages(self) -> list[CompactStore]:
        return [average.store for average in self.model.averages if average.store is not None]

    def _vectors(self) -> Iterator[torch.Tensor]:
        """Yields values, gradient, and every state tensor that holds one number per value; values of averages too."""
        values = self._store.values
        yield values.detach()
        yield from (average.values.detach() for average in self._averages())
        if values.grad is not None:
            yield values.grad
        # State that was loaded since the last step belongs to the positions that are restored now.
        if not self._loaded:
            yield from self.view.state_of(values)

    @torch.no_grad()
    def _tidy(self) -> None:
        # What a method that lowers the density leaves behind the active values must stay zero: some optimizers divide
        # zero by zero there.
        active = self._store.active
        if active < self._store.values.numel():
            for vector in self._vectors():
                vector[active:].zero_()


def _unfit(key: str, shape: tuple[int, ...], parameter: torch.Tensor) -> UsageError:
    return UsageError(
        f"the optimizer's {key!r} has shape {shape} for {parameter.numel():,} active weights; load the state that was "
        f"saved together with this model."
    )


def _named(optimizer: optim.Optimizer, names: Sequence[str]) -> str | None:
    """Returns the name of an optimizer's class, or of one of its bases, that is among some names."""
    return next((base.__name__ for base in type(optimizer).__mro__ if base.__name__ in names), None)


class LargestGradients(Sequence[torch.Tensor]):
    """Gradients of one layer after the other as dense float32 vectors, zero wherever none was kept."""

    def __init__(self, store: CompactStore, names: Sequence[str]) -> None:
        """Reads the store when it is asked."""
        self._store, self._names = store, names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self._dense(name) for name in self._names[index]]
        return self._dense(self._names[index])

    def _dense(self, name: str) -> torch.Tensor:
        dense = torch.zeros(self._store.layers[name].size, device=self._store.values.device)
        if name in self._store.gradients:
            positions, values = self._store.gradients[name]
            dense[positions] = values
        return dense
