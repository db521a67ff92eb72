"""Terminals alone show these, on stderr: a progress bar with the time left, and pictures of results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["progress_bar", "show_on_terminal"]


@contextlib.contextmanager
def progress_bar(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar while the context is entered, and gives the function that moves it.

    Args:
        label: what is going on, in a few words.
        quiet: show nothing.

    Yields:
        A function of the steps that are done, and of all.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        # In a log file, every update would be a line of its own.
        disable=quiet or not console.is_terminal,
    )
    task = bar.add_task(label, total=None)
    with bar:
        yield lambda done, steps: bar.update(task, completed=done, total=steps)


def show_on_terminal(table: Table, *, quiet: bool) -> None:
    """Prints a table to stderr if that is a terminal, cut to its width; elsewhere nothing: it is only a picture."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)
    if console.is_terminal:
        console.print(table)
