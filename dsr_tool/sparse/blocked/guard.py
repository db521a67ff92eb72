"""Guard: what a network must still have when tracing it is over."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsr_tool.sparse.compact.marks import plain_class

__all__ = ["Guard"]


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


@dataclass
class Guard:
    """A copy of what tracing a module may not change.

    Attributes:
        attributes: of each module, the dictionaries that hold its attributes, and copies of them.
        random: the states of torch's, Python's and numpy's generators.
    """

    attributes: dict[nn.Module, list[tuple[dict[str, Any], dict[str, Any]]]]
    random: tuple[Any, ...] = field(default_factory=_random_state)

    @classmethod
    def of(cls, module: nn.Module) -> Guard:
        """Copies the attributes of a module and of all below it."""
        return cls(
            {
                each: [(held, dict(held)) for held in (each.__dict__, each._parameters, each._buffers, each._modules)]
                for each in module.modules()
            }
        )

    def restore(self, module: nn.Module) -> str:
        """Undoes changes. Returns what changed, or an empty text."""
        changed = ""
        for each, dictionaries in self.attributes.items():
            for held, before in dictionaries:
                if held.keys() != before.keys() or any(held[key] is not value for key, value in before.items()):
                    changed = f"{plain_class(each).__name__} sets attributes of itself in forward"
                    held.clear()
                    held.update(before)
        now = _random_state()
        if not all(map(_same, now, self.random)):
            torch.set_rng_state(self.random[0])
            random.setstate(self.random[1])
            np.random.set_state(self.random[2])
            changed = f"{plain_class(module).__name__} draws random numbers outside of torch's layers"
        return changed


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
