"""Schedules: after which optimizer steps a method updates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from dsr_tool.errors import UsageError

__all__ = ["ReallocationSchedule", "Timing"]


class _Length(TypedDict):
    total_steps: int
    every: int | None


class Timing(_Length, total=False):
    """The length of a training, and what the user set of its schedule.

    Attributes:
        total_steps: number of optimizer steps of the whole training.
        every: steps between updates at first; None for the method's default.
        stop: fraction of the training after which nothing is pruned or grown; absent for the method's default.
        doubling: fractions of the training at which `every` doubles; absent for the method's default.
    """

    stop: float
    doubling: Sequence[float]


@dataclass(frozen=True)
class ReallocationSchedule:
    """An update every few steps, with a period that may change during the training, up to a last step.

    Attributes:
        periods: (first step, steps between updates) pairs with rising first steps; the first starts at 0.
        stop: last step that may be due.
    """

    periods: tuple[tuple[int, int], ...]
    stop: int

    def __post_init__(self) -> None:
        """Raises `UsageError` for periods that do not start at 0, do not rise, or are not positive."""
        starts = [start for start, _ in self.periods]
        rising = bool(starts) and starts[0] == 0 and starts == sorted(set(starts))
        if not rising or any(every < 1 for _, every in self.periods):
            raise UsageError(
                f"reallocation periods {self.periods} are not allowed; give (first step, every) pairs whose first "
                f"steps rise from 0 and whose periods are at least 1."
            )

    @classmethod
    def spread(
        cls,
        total_steps: int,
        *,
        every: int | None = None,
        stop: float = 0.95,
        doubling: Sequence[float] = (0.125, 0.4, 0.7),
    ) -> ReallocationSchedule:
        """Returns the schedule of Mostafa & Wang (2019, appendix) for CIFAR-10, scaled to a number of steps.

        The period doubles after 12.5 %, 40 % and 70 % of the training, and updates stop after 95 %.

        Args:
            total_steps: number of optimizer steps of the whole training.
            every: steps between updates at first; by default a thousandth of the training, but at least 10 steps, or
                a twentieth of a training of fewer than 200 steps.
            stop: fraction of the training after which nothing is pruned or grown.
            doubling: fractions of the training at which the period doubles.

        Raises:
            UsageError: a value is not allowed.
        """
        _require_valid(total_steps, stop)
        every = _default_period(total_steps, updates=1000) if every is None else every
        return cls(_doubled(total_steps, every, doubling), round(total_steps * stop))

    @classmethod
    def steady(
        cls,
        total_steps: int,
        *,
        every: int | None = None,
        stop: float = 0.75,
        doubling: Sequence[float] = (),
        updates: int = 320,
    ) -> ReallocationSchedule:
        """Returns a schedule with one period, as in RigL.

        Evci et al. (2020, section 4) update every 100 of 32,000 steps, until step 25,000.

        Args:
            total_steps: number of optimizer steps of the whole training.
            every: steps between updates; by default the training divided by `updates`, but at least 10 steps, or a
                twentieth of a training of fewer than 200 steps.
            stop: fraction of the training after which nothing is pruned or grown.
            doubling: fractions of the training at which the period doubles, if any.
            updates: number of updates in the whole training, if `every` is not given and nothing stops or doubles.

        Raises:
            UsageError: a value is not allowed.
        """
        _require_valid(total_steps, stop)
        every = _default_period(total_steps, updates) if every is None else every
        return cls(_doubled(total_steps, every, doubling), round(total_steps * stop))

    @classmethod
    def throughout(
        cls, total_steps: int, *, every: int | None = None, stop: float = 1.0, doubling: Sequence[float] = ()
    ) -> ReallocationSchedule:
        """Returns 100 updates at equal distances until the end of the training; arguments as for `steady`.

        Sparse momentum has one in each of 100 epochs on MNIST (Dettmers & Zettlemoyer 2019), GraNet 62 on CIFAR-10 and
        125 on ImageNet (Liu et al. 2021), each with a cosine that ends with the training.
        """
        return cls.steady(total_steps, every=every, stop=stop, doubling=doubling, updates=100)

    @classmethod
    def times(
        cls,
        count: int,
        total_steps: int,
        *,
        every: int | None = None,
        stop: float = 0.75,
        doubling: Sequence[float] = (),
    ) -> ReallocationSchedule:
        """Returns a schedule of `count` updates at equal distances, the last of them near `stop`.

        Args:
            count: number of updates.
            total_steps: number of optimizer steps of the whole training.
            every: steps between updates; overrides `count`.
            stop: fraction of the training at which the last update comes.
            doubling: must be empty, because the distances are equal.

        Raises:
            UsageError: a value is not allowed.
        """
        _require_valid(total_steps, stop)
        if doubling:
            raise UsageError(
                f"doubling {list(doubling)} is not allowed for a method that updates at equal distances; leave it out."
            )
        end = round(total_steps * stop)
        every = max(end // count, 1) if every is None else every
        # Rounded down to a multiple of the period, so that `stop` is the step of the last update.
        return cls(((0, every),), end // every * every)

    @property
    def last(self) -> int:
        """The last step that is due; 0 if none is."""
        # The last period may be too short for an update, so periods are searched from the end.
        ends = [start for start, _ in self.periods[1:]] + [self.stop]
        for (start, every), end in zip(reversed(self.periods), reversed(ends), strict=True):
            steps = (min(end, self.stop) - start) // every
            if steps > 0:
                return start + steps * every
        return 0

    def due(self, step: int) -> bool:
        """Returns whether to update after optimizer step `step`, counted from 1."""
        if not 0 < step <= self.stop:
            return False
        starts = [start for start, _ in self.periods]
        # A period that starts at step s counts from s, so its own first update is due at s + every.
        start, every = self.periods[bisect_right(starts, step - 1) - 1]
        return (step - start) % every == 0


def _default_period(total_steps: int, updates: int) -> int:
    """Returns the period for about `updates` updates; short trainings get 20 updates, or one each 10 steps."""
    return max(total_steps // updates, min(10, max(total_steps // 20, 1)))


def _doubled(total_steps: int, every: int, doubling: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Returns periods that begin with `every` and double at these fractions of the training."""
    starts = [round(total_steps * part) for part in (0, *doubling)]
    # A dict, because in a short training several starts round to one step; the longest period wins.
    return tuple(sorted({start: every * 2**i for i, start in enumerate(starts)}.items()))


def _require_valid(total_steps: int, stop: float) -> None:
    if total_steps < 1:
        raise UsageError(f"total_steps {total_steps} is not allowed; give the optimizer steps of the whole training.")
    if not 0 <= stop <= 1:
        raise UsageError(f"reallocation stop {stop} is not allowed; give a fraction of the training in [0, 1].")
