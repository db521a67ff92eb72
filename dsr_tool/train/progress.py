"""Progress: a bar on a terminal, a line per epoch elsewhere, both on stderr."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.pace import Pace, clock_text
from dsr_tool.train.records import EpochRecord, Observer, Start
from dsr_tool.train.storage import kernels_line

__all__ = ["Progress", "summary"]

_BAR_WIDTH = 16
"""Characters of the bar; with it, a line fits a terminal of 80 until an epoch has 100,000 steps."""


class Progress(Observer):
    """Shows the progress of a training. Use it as a context manager, so that the terminal is restored at the end."""

    def __init__(
        self, epochs: int, images: int, *, done: int = 0, quiet: bool = False, console: Console | None = None
    ) -> None:
        """Prepares the bar; nothing is shown before the training starts.

        Args:
            epochs: epochs of the whole training.
            images: images of a step, of all processes together.
            done: epochs that an earlier call completed.
            quiet: show nothing at all.
            console: console to write to; None for stderr.
        """
        self._epochs, self._images, self._done = epochs, images, min(done, epochs)
        self._steps = 0
        self._pace: Pace | None = None
        self._console = console or Console(
            stderr=True, quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(_BAR_WIDTH),
            MofNCompleteColumn(),
            _PaceColumn(self),
            console=self._console,
            transient=True,
        )
        # In a log file, every update of the bar would be a line of its own.
        self._shown = self._console.is_terminal and not quiet
        self._task = self._bar.add_task(self._name(), start=False)

    def __enter__(self) -> Progress:
        if self._shown:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._bar.stop()

    def _name(self) -> str:
        return f"epoch {min(self._done + 1, self._epochs)}/{self._epochs}"

    def pace_text(self) -> str:
        """Returns images a second, and the times left; empty before the training starts."""
        pace = self._pace
        if pace is None:
            return ""
        speed = "-" if pace.images_per_s is None else f"{pace.images_per_s:,.{0 if pace.images_per_s >= 10 else 1}f}"
        return f"{speed} images/s, left: epoch {clock_text(pace.epoch_left_s)}, run {clock_text(pace.run_left_s)}"

    def note(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line)

    def on_evaluated_start(self, start: Start) -> None:
        """Prints the line of epoch 0, and the warning if there is one."""
        width = len(str(self._epochs))
        self.note(
            f"epoch {0:>{width}}/{self._epochs}  accuracy {start.test_accuracy:.4f}  test loss {start.test_loss:.4f}, "
            f"before the training"
        )
        if start.doubt:
            self.note(start.doubt)

    def on_start(self, model: SparseModel, total_steps: int) -> None:
        """Prints what ran on kernels in the evaluation before, and starts the clock."""
        if line := kernels_line(model):
            self.note(line)
        self._steps = total_steps // self._epochs
        self._pace = Pace(self._epochs, self._steps, self._images, done=self._done)
        self._bar.start_task(self._task)
        self._bar.update(self._task, total=self._steps)

    def on_step(self, step: int) -> None:
        """Advances the bar, which is that of the epoch."""
        if self._pace is not None:
            self._pace.on_step(step - self._done * self._steps)
            self._bar.update(self._task, completed=self._pace.step)

    def on_epoch(self, model: SparseModel, record: EpochRecord) -> None:  # noqa: ARG002
        """Prints the epoch's line above the bar."""
        self._console.print(summary(record, self._epochs))
        self._done = record.epoch
        if self._pace is not None:
            self._pace.on_epoch()
        self._bar.update(self._task, description=self._name(), completed=0)


class _PaceColumn(ProgressColumn):
    """The pace of a training, in one column that is cut off in a narrow terminal."""

    max_refresh = 0.5  # seconds; numbers that change ten times a second cannot be read

    def __init__(self, progress: Progress) -> None:
        super().__init__(Column(no_wrap=True))
        self._progress = progress

    def render(self, task: Task) -> Text:  # noqa: ARG002 - rich's signature
        """Returns the text of the column."""
        return Text(self._progress.pace_text())


def summary(record: EpochRecord, epochs: int) -> str:
    """Returns one line: accuracy, losses, seconds, and the layers whose number of weights changed most."""
    line = (
        f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  accuracy {record.test_accuracy:.4f}  "
        f"loss {record.train_loss:.4f} (test {record.test_loss:.4f})  {record.time_s:.1f} s"
    )
    moved = sum(record.dropped.values())
    if not moved:
        return line
    share = record.facts.get("share")
    last = "" if share is None else f" ({share:.1%} in the last update)"
    return f"{line}  moved {moved:,}{last}{_largest_changes(record)}"


def _largest_changes(record: EpochRecord, most: int = 3) -> str:
    """Returns the layers that gained and lost most weights, as `: +layer1.conv 1,200 -fc 800`."""
    net = {name: grown - record.dropped[name] for name, grown in record.grown.items()}
    ranked = sorted(net, key=net.__getitem__)
    gained = [name for name in ranked[::-1][:most] if net[name] > 0]
    lost = [name for name in ranked[:most] if net[name] < 0]
    parts = [
        f"{'+' if net[name] > 0 else '-'}{name.removesuffix('.weight')} {abs(net[name]):,}" for name in gained + lost
    ]
    return f": {' '.join(parts)}" if parts else ""
