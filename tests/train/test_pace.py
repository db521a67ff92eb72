"""The pace in the progress bar: measured by a clock of the test's own, and right after a resume."""

from io import StringIO

import pytest
from rich.console import Console

from dsr_tool.train.pace import Pace, clock_text
from dsr_tool.train.progress import Progress


class Clock:
    """Seconds that the test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def run(self, pace, steps, seconds, *, after=0.0, first=None):
        """Goes on to a step of the epoch, some seconds each, the first perhaps slower, then evaluates."""
        for step in range(pace.step + 1, steps + 1):
            self.now += seconds if first is None or step > 1 else first
            pace.on_step(step)
        self.now += after


def test_nothing_is_guessed_before_the_first_step():
    pace = Pace(3, 10, 64, now=Clock())
    assert (pace.images_per_s, pace.epoch_left_s, pace.run_left_s) == (None, None, None)


def test_times_left_are_those_of_the_steps_and_of_what_comes_after_them():
    clock = Clock()
    pace = Pace(3, 10, 64, now=clock)
    clock.run(pace, 4, 0.5, first=20.0)
    assert pace.images_per_s == pytest.approx(128)  # the slow first step, which plans kernels, is left out
    assert pace.epoch_left_s == pytest.approx(3.0) and pace.run_left_s == pytest.approx(3.0 + 2 * 5.0)
    clock = Clock()
    pace = Pace(3, 10, 64, now=clock)
    clock.run(pace, 10, 0.5, after=2.0)
    pace.on_epoch()
    clock.run(pace, 5, 0.5)
    assert pace.epoch_left_s == pytest.approx(2.5 + 2.0) and pace.run_left_s == pytest.approx(4.5 + 7.0)
    clock.run(pace, 10, 0.5, after=1.5)
    assert pace.epoch_left_s == pytest.approx(0.5) and pace.run_left_s == pytest.approx(0.5 + 7.0)
    clock.now += 9
    assert pace.epoch_left_s == 0.0  # an evaluation that takes longer than the last is not over before it began


def test_the_speed_follows_the_machine():
    clock = Clock()
    pace = Pace(1, 1000, 10, now=clock)
    clock.run(pace, 100, 0.1)
    for step in range(101, 201):
        clock.now += 1.0
        pace.on_step(step)
    assert pace.images_per_s == pytest.approx(10)


@pytest.mark.parametrize("done", [0, 7])
def test_epochs_of_an_earlier_call_are_not_counted_as_fast(done):
    clock = Clock()
    pace = Pace(10, 20, 32, done=done, now=clock)
    clock.run(pace, 10, 0.25)
    assert pace.images_per_s == pytest.approx(128)
    assert pace.run_left_s == pytest.approx(2.5 + (9 - done) * 5.0)


def test_epochs_of_a_single_step_have_a_pace():
    clock = Clock()
    pace = Pace(4, 1, 50, now=clock)
    clock.run(pace, 1, 0.5, after=1.0)
    pace.on_epoch()
    assert pace.images_per_s == pytest.approx(100) and pace.run_left_s == pytest.approx(3 * 1.5)


def test_times_are_written_as_clocks():
    assert [clock_text(s) for s in (None, 0, 59.6, 61, 3661)] == ["-:--", "0:00", "1:00", "1:01", "1:01:01"]


def shown(tiny, *, terminal, done=0, width=120, quiet=False):
    text = StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, highlight=False, quiet=quiet, color_system=None)
    with Progress(5, 40, done=done, console=console, quiet=quiet) as progress:
        progress.on_start(tiny.model(), 50)
        for step in range(done * 10 + 1, done * 10 + 5):
            progress.on_step(step)
        progress._bar.refresh()
    return text.getvalue(), progress


@pytest.mark.parametrize("done", [0, 3])
def test_the_bar_shows_epoch_speed_and_both_times(tiny, done):
    text, progress = shown(tiny, terminal=True, done=done)
    assert f"epoch {done + 1}/5" in text and "4/10" in text
    assert "images/s, left: epoch 0:00, run 0:00" in text and progress._bar.tasks[0].completed == 4
    text, _ = shown(tiny, terminal=True, width=30)
    assert all(len(line) <= 30 for line in text.replace("\r", "\n").splitlines() if "\x1b" not in line)


def test_elsewhere_there_is_no_bar(tiny):
    assert shown(tiny, terminal=False)[0] == ""
    assert shown(tiny, terminal=True, quiet=True)[0] == ""
