"""OptimizerView: what a keeper reads of an optimizer, whoever wrote it.

An optimizer may call others (sharpness-aware minimisation, Lookahead, wrappers of training frameworks), compute its
gradients inside its step, leave a step out, or keep state that fits no weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn, optim

from dsr_tool.errors import UsageError

__all__ = ["OptimizerView", "closure_of", "with_closure"]

_ZERO_STAYS_ZERO = (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop)
"""Optimizers that keep weight and state at zero if gradient, weight and state are zero and eps is not."""

_STARTS = ((optim.Rprop, "step_size", "lr"), (optim.Adagrad, "sum", "initial_accumulator_value"))
"""State per weight that does not start at zero: the optimizer, its state, and the setting with the first value."""

_STEPS_OF_TORCH = frozenset(name for name in dir(optim.Optimizer) if "step" in name)
"""Methods that every optimizer has and whose name says `step`; one with more of them steps in parts."""


class OptimizerView:
    """An optimizer together with those that it calls.

    Attributes:
        optimizer: the optimizer that has the hooks; inside a wrapper without hooks, the one that it wraps.
        all: the optimizer, then those inside it.
    """

    def __init__(self, optimizer: object) -> None:
        """Looks for the optimizers inside.

        Raises:
            UsageError: this is no torch optimizer, or one that masks cannot be kept with.
        """
        self.optimizer = _with_hooks(optimizer)
        self.all = [self.optimizer]
        for outer in self.all:  # grows while it is read
            self.all += [inner for inner in _inside(outer) if all(inner is not known for known in self.all)]
        if any(isinstance(each, optim.SparseAdam) for each in self.all):
            raise UsageError(
                "SparseAdam takes sparse gradients only, which cannot be masked; take Adam, and create the embedding "
                "with sparse=False."
            )

    @property
    def in_parts(self) -> bool:
        """True if weights change in several parts of a step, with a backward pass between them."""
        own = [name for name in dir(type(self.optimizer)) if "step" in name and not name.startswith("_")]
        return len(self.all) > 1 or any(name not in _STEPS_OF_TORCH for name in own)

    @property
    def keeps_zeros(self) -> bool:
        """Whether weights and state that are zero stay zero without a gradient."""
        if len(self.all) > 1 or type(self.optimizer) not in _ZERO_STAYS_ZERO:
            return False
        # With eps = 0, Adam divides 0 by 0.
        return all(_positive(group.get("eps", 1)) for group in self.optimizer.param_groups)

    @property
    def left_out(self) -> bool:
        """Whether GradScaler found an overflow, after which a fused step changes nothing."""
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """The factor that GradScaler leaves in the gradients for a fused step to take out; None for none."""
        return getattr(self.optimizer, "grad_scale", None)

    def parameters(self) -> set[int]:
        """Returns the ids of all parameters."""
        return {id(parameter) for each in self.all for group in each.param_groups for parameter in group["params"]}

    def state_of(self, parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        """Yields every state tensor that holds one value per entry of a parameter."""
        for state in self.states_of(parameter):
            for value in state.values():
                # Step counters are scalars, Adafactor keeps rows and columns, and quantised state codes a zero in
                # another way: none of these has one value per entry.
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    yield value

    def starts_of(self, parameter: nn.Parameter) -> Iterator[tuple[torch.Tensor, float]]:
        """Yields state tensors whose entries do not start at zero, each with the value that they start at."""
        for each, (kind, key, setting) in itertools.product(self.all, _STARTS):
            value = each.state.get(parameter, {}).get(key) if isinstance(each, kind) else None
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                yield value, float(_group_of(each, parameter)[setting])

    def forget_curvature(self) -> None:
        """Starts LBFGS anew: what it learned is about other active weights. Others keep their state."""
        for each in self.all:
            if isinstance(each, optim.LBFGS):
                for state in each.state.values():
                    state.clear()

    def states_of(self, parameter: torch.Tensor) -> Iterator[dict[str, Any]]:
        """Yields the state that each optimizer has of a parameter."""
        seen: list[dict[str, Any]] = []
        for each in self.all:
            state = each.state.get(parameter, {})
            if all(state is not known for known in seen):  # wrappers may share the dict of what they wrap
                seen.append(state)
                yield state


def closure_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any] | None:
    """Returns the closure of a call `step(self, *args, **kwargs)`, or None."""
    candidates = (*args[1:], kwargs.get("closure"))
    return next((each for each in candidates if callable(each)), None)


def with_closure(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], closure: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with another closure in place of its own."""
    old = closure_of(args, kwargs)
    changed = {name: closure if value is old else value for name, value in kwargs.items()}
    return tuple(closure if each is old else each for each in args), changed


def _with_hooks(optimizer: object) -> optim.Optimizer:
    """Returns the optimizer itself, or the one inside a wrapper that has no hooks or shares them."""
    hooks = vars(optimizer).get("_optimizer_step_pre_hooks") if hasattr(optimizer, "__dict__") else None
    inside = _inside(optimizer)
    if isinstance(optimizer, optim.Optimizer) and hooks is not None:
        shared = [each for each in inside if each._optimizer_step_pre_hooks is hooks]
        return shared[0] if shared else optimizer
    if len(inside) == 1:
        return _with_hooks(inside[0])
    remedy = "; attach to each optimizer inside it, and each keeps its own weights" if inside else ""
    raise UsageError(f"{type(optimizer).__name__} is no torch optimizer, whose step could drive a method{remedy}.")


def _inside(optimizer: object) -> list[optim.Optimizer]:
    """Returns the optimizers that an object holds in its attributes, alone or in lists and dicts."""
    found: dict[int, optim.Optimizer] = {}
    for value in list(vars(optimizer).values()) if hasattr(optimizer, "__dict__") else []:
        several = list(value.values()) if isinstance(value, dict) else value
        for each in several if isinstance(several, list | tuple) else [several]:
            if isinstance(each, optim.Optimizer) and each is not optimizer:
                found[id(each)] = each
    return list(found.values())


def _group_of(optimizer: optim.Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    groups = optimizer.param_groups
    group: Mapping[str, Any] = next(g for g in groups if any(each is parameter for each in g["params"]))
    return group


def _positive(eps: object) -> bool:
    return isinstance(eps, int | float) and eps > 0
