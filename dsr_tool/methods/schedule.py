"""When a method reallocates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dsr_tool.errors import UsageError

__all__ = ["ReallocationSchedule"]


@dataclass(frozen=True)
class ReallocationSchedule:
    """Reallocation every so many steps, with periods that change over time, up to a last step.

    Attributes:
        periods: (first step, steps between reallocations) pairs, rising; the first starts at 0.
        stop: no reallocation after this step.
    """

    periods: tuple[tuple[int, int], ...]
    stop: int

    def __post_init__(self) -> None:
        """Raise `UsageError` for periods that do not start at 0, do not rise, or are not positive."""
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
        """The paper's schedule for CIFAR-10 (Mostafa & Wang 2019, appendix), scaled to a number of steps.

        The period doubles after 12.5 %, 40 % and 70 % of the training, and reallocation stops after 95 %.

        Args:
            total_steps: optimizer steps of the whole training.
            every: steps between reallocations at first; a thousandth of the training when absent, but at least 10,
                or a twentieth of a short training.
            stop: fraction of the training after which nothing moves any more.
            doubling: fractions of the training after which the period doubles.
        """
        _check(total_steps, stop)
        every = max(total_steps // 1000, min(10, max(total_steps // 20, 1))) if every is None else every
        return cls(_doubled(total_steps, every, doubling), round(total_steps * stop))

    @classmethod
    def steady(
        cls, total_steps: int, *, every: int | None = None, stop: float = 0.75, doubling: Sequence[float] = ()
    ) -> ReallocationSchedule:
        """One period throughout, as in RigL (Evci et al. 2020, section 4: every 100 of 32,000 steps, until 25,000).

        Args:
            total_steps: optimizer steps of the whole training.
            every: steps between updates; in proportion to the above when absent, but at least 10, or a twentieth of a
                short training.
            stop: fraction of the training after which nothing moves any more.
            doubling: fractions of the training after which the period doubles, if any.
        """
        _check(total_steps, stop)
        every = max(total_steps // 320, min(10, max(total_steps // 20, 1))) if every is None else every
        return cls(_doubled(total_steps, every, doubling), round(total_steps * stop))

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
        """So many updates at equal distances, the last of them at `stop`.

        Args:
            count: how many.
            total_steps: optimizer steps of the whole training.
            every: steps between them instead, as often as they fit.
            stop: fraction of the training at which the last one comes.
            doubling: none; the distances are equal.

        Raises:
            UsageError: a distance that doubles.
        """
        _check(total_steps, stop)
        if doubling:
            raise UsageError("updates at equal distances have no doubling; leave it out for this method.")
        end = round(total_steps * stop)
        every = max(end // count, 1) if every is None else every
        return cls(((0, every),), end // every * every)

    @property
    def last(self) -> int:
        """The last step that is due; 0 when none is."""
        ends = [start for start, _ in self.periods[1:]] + [self.stop]
        for (start, every), end in zip(reversed(self.periods), reversed(ends), strict=True):
            steps = (min(end, self.stop) - start) // every
            if steps > 0:
                return start + steps * every
        return 0

    def due(self, step: int) -> bool:
        """Whether to reallocate after optimizer step number `step`, the first being 1."""
        if not 0 < step <= self.stop:
            return False
        starts = [start for start, _ in self.periods]
        start, every = self.periods[bisect_right(starts, step - 1) - 1]
        return (step - start) % every == 0


def _doubled(total_steps: int, every: int, doubling: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """Periods that begin with `every` and double after these fractions of the training."""
    starts = [round(total_steps * part) for part in (0, *doubling)]
    return tuple(sorted({start: every * 2**i for i, start in enumerate(starts)}.items()))


def _check(total_steps: int, stop: float) -> None:
    if total_steps < 1:
        raise UsageError(f"total_steps {total_steps} is not allowed; give the optimizer steps of the whole training.")
    if not 0 <= stop <= 1:
        raise UsageError(f"reallocation stop {stop} is not allowed; give a fraction of the training in [0, 1].")
