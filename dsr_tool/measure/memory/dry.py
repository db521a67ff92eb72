"""A compact network's forward and backward pass without computing anything: kernels are skipped, plans are counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from dsr_tool.measure.memory.hollow import HollowModel
from dsr_tool.runtime.kernels import train_planes
from dsr_tool.runtime.kernels.training import ConvPlan, available
from dsr_tool.sparse.blocked import convolution
from dsr_tool.sparse.blocked.plans import Geometry, Plans
from dsr_tool.sparse.blocked.program import Program
from dsr_tool.sparse.blocked.trace import NotTraceableError, trace
from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["CountedPlans", "dry_kernels", "program_of"]


class CountedPlans(Plans):
    """Plans that are made to learn their size, one at a time, and never run."""

    def __init__(self, store: CompactStore) -> None:
        """Reads positions from the store, because those that are passed while steps run dry have no contents."""
        super().__init__()
        self._store = store

    def make(
        self, name: str, positions: Tensor, geometry: Geometry, size: tuple[int, int, int, int], *, gradient: bool
    ) -> ConvPlan:
        """Makes a plan that does nothing, of the size of the real one."""
        with _disable_current_modes():
            known = name in self._store.layers
            every = self._store.positions_of(name) if known else torch.arange(len(positions), dtype=torch.int32)
            real = super().make(name, every, geometry, size, gradient=gradient)
        return cast(ConvPlan, _Unused(real.bytes))


class _Unused:
    def __init__(self, nbytes: int) -> None:
        self.bytes = nbytes

    def gather(self, *_: object) -> None:
        """Does nothing."""

    def weights(self, *_: object) -> None:
        """Does nothing."""


def program_of(hollow: HollowModel, store: CompactStore, plans: Plans, inputs: Tensor) -> Program | None:
    """Returns the steps of a network on the kernels; None where it would rebuild dense weights instead."""
    if not available() or not store.kernels or store.values.dtype is not torch.float32:
        return None
    arguments = torch.utils._pytree.tree_flatten(((inputs,), {}))
    try:
        return Program(hollow.module, store, plans, trace(hollow.module, store, *arguments))
    except NotTraceableError:
        return None


@contextmanager
def dry_kernels(plans: CountedPlans) -> Iterator[None]:
    """Skips every kernel for training inside, in this whole process.

    Args:
        plans: takes the place of the plans that dense layers of all networks share.
    """
    with ExitStack() as undo:
        for owner, name, other in (
            (train_planes, "run", _nothing),
            (convolution, "channel_sums", _nothing),
            (convolution, "_DENSE", plans),
            # The real one remembers its results, and these have no contents.
            (convolution, "_every", lambda count: torch.arange(count, dtype=torch.int32)),
        ):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, other)
        FakeTensor.data_ptr = _no_address  # type: ignore[method-assign, assignment]
        undo.callback(delattr, FakeTensor, "data_ptr")
        yield


def _nothing(*_: Any) -> None:
    return None


def _no_address(_: Tensor) -> int:
    return 0
