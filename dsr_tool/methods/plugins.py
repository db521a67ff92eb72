"""Methods that other distributions bring, found by entry points of the group `dsr_tool.methods`.

An entry point names a `Method` subclass, or any function, that is called as `maker(timing, **options)`; `timing` holds
`total_steps`, `every` (None for the method's own) and, where given, `stop` and `doubling`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import optim

from dsr_tool.errors import DsrError, UsageError, first_line
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.validation import check_moves
from dsr_tool.sparse.active import ActiveWeights
from dsr_tool.sparse.keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["GROUP", "Foreign", "foreign_names", "make_foreign"]

GROUP = "dsr_tool.methods"


def foreign_names() -> list[str]:
    """Names of all installed methods of others."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def make_foreign(name: str, timing: Mapping[str, Any], options: Mapping[str, Any]) -> Method:
    """Make the method of an entry point; everything that it does is checked.

    Args:
        name: of the entry point.
        timing: when it should work, for its schedule.
        options: its own.

    Raises:
        UsageError: it cannot be imported, refuses its options, or is no method.
    """
    point = next(point for point in entry_points(group=GROUP) if point.name == name)
    maker = _guarded(point, "cannot be loaded", point.load)
    if not callable(maker):
        raise _unfit(point, f"gives {type(maker).__name__}, where a Method class or a function is needed")
    told = " ".join(f"{option}={value}" for option, value in options.items()) or "no options"
    method = _guarded(point, f"cannot be made with {told}", lambda: maker(dict(timing), **options))
    if not isinstance(method, Method):
        raise _unfit(point, f"makes {type(method).__name__}, where a Method of dsr_tool.methods is needed")
    return Foreign(point, method)


class Foreign(Method):
    """A method of another distribution, whose every answer is checked before anything moves.

    Attributes:
        method: the method itself.
    """

    name = "foreign"

    def __init__(self, point: EntryPoint, method: Method) -> None:
        """Take its facts over.

        Args:
            point: where it came from.
            method: made already.
        """
        self.method, self._point = method, point
        # Class attributes elsewhere; here each method has its own.
        facts = {"name": point.name}
        facts |= {name: getattr(method, name) for name in ("needs_gradients", "continuous", "granularities")}
        self.__dict__.update(facts)

    def begin(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        """Ask the method."""
        self._call("begin", sizes, counts)

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,
        before_masking: Callable[[], None] | None,
    ) -> MaskKeeper:
        """Ask the method; raise `UsageError` for an answer that keeps nothing."""
        keeper = self._call("keep", model, optimizer, seed=seed, before_masking=before_masking)
        if not isinstance(keeper, MaskKeeper):
            raise _unfit(self._point, f"answered {type(keeper).__name__} in keep(), where a MaskKeeper is needed")
        return keeper

    def due(self, step: int) -> bool:
        """Ask the method."""
        return bool(self._call("due", step))

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:
        """Ask the method, and look at its answer.

        Raises:
            CheckFailed: it cannot be done.
        """
        return check_moves(self.name, weights, self._call("update", weights, step, generator))

    def state_dict(self) -> dict[str, Any]:
        """Ask the method."""
        state: dict[str, Any] = self._call("state_dict")
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Tell the method."""
        self._call("load_state_dict", state)

    def _call(self, name: str, *arguments: Any, **more: Any) -> Any:
        return _guarded(self._point, f"failed in {name}()", lambda: getattr(self.method, name)(*arguments, **more))


def _guarded(point: EntryPoint, what: str, call: Callable[[], Any]) -> Any:
    """Run code of others; whatever goes wrong becomes one sentence that says whose it is."""
    try:
        return call()
    except (DsrError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unfit(point, f"{what} ({type(error).__name__}: {first_line(error)})") from error


def _unfit(point: EntryPoint, what: str) -> UsageError:
    source = f" of {point.dist.name}" if point.dist else ""
    return UsageError(f"method {point.name!r} (entry point {point.value}{source}) {what}; mend it, or choose another.")
