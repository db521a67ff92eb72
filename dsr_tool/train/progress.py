"""Progress: a bar on a terminal, a line per epoch elsewhere, both on stderr."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.records import EpochRecord, Observer, Start
from dsr_tool.train.storage import kernels_line

__all__ = ["Progress", "summary"]


class Progress(Observer):
    """Shows the progress of a training. Use it as a context manager, so that the terminal is restored at the end."""

    def __init__(self, epochs: int, *, done: int = 0, quiet: bool = False, console: Console | None = None) -> None:
        """Prepares the bar; nothing is shown before the training starts.

        Args:
            epochs: epochs of the whole training.
            done: epochs that an earlier call completed.
            quiet: show nothing at all.
            console: console to write to; None for stderr.
        """
        self._epochs = epochs
        self._console = console or Console(
            stderr=True, quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        # In a log file, every update of the bar would be a line of its own.
        self._shown = self._console.is_terminal and not quiet
        self._task = self._bar.add_task(f"epoch {min(done + 1, epochs)}", start=False)

    def __enter__(self) -> Progress:
        if self._shown:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._bar.stop()

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
        """Prints what ran on kernels in the evaluation before, and starts the bar's clock."""
        if line := kernels_line(model):
            self.note(line)
        self._bar.start_task(self._task)
        self._bar.update(self._task, total=total_steps)

    def on_step(self, step: int) -> None:
        """Advances the bar."""
        self._bar.update(self._task, completed=step)

    def on_epoch(self, model: SparseModel, record: EpochRecord) -> None:  # noqa: ARG002
        """Prints the epoch's line above the bar."""
        self._console.print(summary(record, self._epochs))
        self._bar.update(self._task, description=f"epoch {min(record.epoch + 1, self._epochs)}")


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
