"""Density by layer as bars: where the active weights of a model are, at a glance. The numbers are in `report`."""

from __future__ import annotations

from collections.abc import Mapping

from rich.progress_bar import ProgressBar
from rich.table import Table

from dsr_tool.report.tables import plain_table

__all__ = ["density_bars", "groups"]

_ROWS = 20
"""Rows that fit a terminal of 24 lines together with the header and the result."""
_WIDTH = 16
"""Characters of a full bar."""


def density_bars(active: Mapping[str, int], sizes: Mapping[str, int]) -> Table:
    """Returns a table with a bar for each sparse layer, or for each block of a long network.

    Args:
        active: number of active weights by layer, in the order of the network.
        sizes: number of weights by layer.
    """
    table = plain_table("layer", "", "density", "active", "of", numbers=("density", "active", "of"))
    # The names alone give way in a narrow terminal: rich shortens columns that it may wrap before all others.
    table.columns[0].no_wrap = False
    table.columns[0].overflow = "ellipsis"
    for name, members in groups(list(active), _ROWS).items():
        held, all_of_them = (sum(counts[member] for member in members) for counts in (active, sizes))
        label = name if len(members) == 1 else f"{name}\u00a0({len(members)})"
        share = held / all_of_them
        bar = ProgressBar(total=1, completed=share, width=_WIDTH)
        table.add_row(label, bar, f"{share:.2%}", f"{held:,}", f"{all_of_them:,}")
    return table


def groups(names: list[str], most: int) -> dict[str, list[str]]:
    """Returns layers by what a row calls them, in at most `most` groups.

    A long network is shown by its blocks, which share the beginnings of their names, as deep as the rows allow. If
    there are too many of the outermost blocks, the middle of the network is one row.

    Args:
        names: names of parameters, in the order of the network.
        most: largest number of rows, 3 or more.
    """
    short = {name: name.removesuffix(".weight") for name in names}
    for depth in range(max((text.count(".") for text in short.values()), default=0) + 1, 0, -1):
        found: dict[str, list[str]] = {}
        for name, text in short.items():
            found.setdefault(".".join(text.split(".")[:depth]), []).append(name)
        if len(found) <= most:
            return found
    labels, before = list(found), most // 2
    after = len(labels) - (most - before - 1)
    middle = labels[before:after]
    return {
        **{label: found[label] for label in labels[:before]},
        f"{middle[0]} ... {middle[-1]}": [member for label in middle for member in found[label]],
        **{label: found[label] for label in labels[after:]},
    }
