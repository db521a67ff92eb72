"""The pace of a training: images a second, and the time that is left of the epoch and of the run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

__all__ = ["Pace", "clock_text"]

_WINDOW_S = 30.0
"""Seconds of steps that the speed is the mean of: long enough for a calm number, short enough to follow the machine."""


class Pace:
    """Measures the steps of this call alone, so that epochs of an earlier call are neither counted as fast nor as slow.

    The first step of an epoch is left out if there are more: it plans kernels and starts workers. What comes after the
    steps of an epoch, evaluation and saving, is taken to last as long as it did last time.

    Attributes:
        step: steps done in the current epoch.
    """

    def __init__(
        self,
        epochs: int,
        steps: int,
        images: int,
        *,
        done: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the clock of the first epoch.

        Args:
            epochs: epochs of the whole training.
            steps: steps of an epoch.
            images: images of a step, of all processes together.
            done: epochs that an earlier call completed.
            now: clock in seconds.
        """
        self._epochs, self._steps, self._images = epochs - done, steps, images
        self._now = now
        self._step_s: float | None = None
        self._after_s = 0.0
        self._begin()

    def _begin(self) -> None:
        self.step = 0
        self._samples = deque([(self._now(), 0)])

    def on_step(self, step: int) -> None:
        """Notes that the current epoch has done `step` steps."""
        self.step = step
        now = self._now()
        if step > 1 and self._samples[0][1] == 0:
            self._samples.popleft()
        self._samples.append((now, step))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW_S:
            self._samples.popleft()
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        if last > first:
            self._step_s = (end - start) / (last - first)

    def on_epoch(self) -> None:
        """Notes that the current epoch is complete, evaluated and saved."""
        self._after_s = self._now() - self._samples[-1][0]
        self._epochs -= 1
        self._begin()

    @property
    def images_per_s(self) -> float | None:
        """Images a second while the model trains; None before that is known."""
        return self._images / self._step_s if self._step_s else None

    @property
    def epoch_left_s(self) -> float | None:
        """Seconds until the current epoch is complete; None before that is known."""
        if self._step_s is None or not self._epochs:
            return None
        after = self._after_s
        if self.step == self._steps:
            after = max(0.0, after - (self._now() - self._samples[-1][0]))
        return (self._steps - self.step) * self._step_s + after

    @property
    def run_left_s(self) -> float | None:
        """Seconds until the last epoch is complete; None before that is known."""
        left = self.epoch_left_s
        if left is None or self._step_s is None:
            return None
        return left + (self._epochs - 1) * (self._steps * self._step_s + self._after_s)


def clock_text(seconds: float | None) -> str:
    """Returns seconds as 1:02:03 or 2:03; a placeholder of the same kind for None."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
