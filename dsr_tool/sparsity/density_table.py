"""DensityTable: the cells of a CSV file with a density or a sparsity for each layer of a network.

Two kinds of file are read. A plain one has a name and a value a line. A published one has a column for each of several
budgets, such as those of STR (Kusupati et al., ICML 2020): its layers are lines `Layer 2 - layer1.0.conv1`, and its
other lines are totals, by whose values a column can be named.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from dsr_tool.errors import FormatError, UsageError, join_words
from dsr_tool.files import require_file

__all__ = ["DensityTable", "Value"]

_LONGEST = 1 << 22
"""Largest file in bytes: a line of 40 bytes for each of 100,000 layers, which no network has."""
_NUMBERED = re.compile(r"Layer \d+ - (.+)")
_PER_CENT = re.compile(r"%|per ?cent", re.IGNORECASE)


@dataclass(frozen=True)
class Value:
    """How a value becomes a density: by what it is a fraction of, and whether it counts zeros."""

    sparsity: bool
    whole: int

    def __call__(self, cell: str) -> Fraction | None:
        """Returns the density that a cell means, in [0, 1] if the cell is allowed; None if it is no number."""
        value = _number(cell)
        if value is None:
            return None
        return 1 - value / self.whole if self.sparsity else value / self.whole


class DensityTable:
    """A CSV file of densities or sparsities.

    Attributes:
        layers: name and cells of each line that is a layer.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            UsageError: it has no lines with a name and a value.
            FileError: it does not exist.
            FormatError: it is not a table of text.
        """
        self._path = path
        rows = _read_rows(path)
        # A line of titles has no number beside the name; a table of layers may begin without one.
        self._header = (
            rows.pop(0) if rows and not any(re.match(r"[-+.\d]", cell.strip()) for cell in rows[0][1:]) else []
        )
        numbered = [(match[1].strip(), row) for row in rows if (match := _NUMBERED.fullmatch(row[0].strip()))]
        # Published tables have totals of the network among their lines; only in those are layers numbered.
        self._totals = [row for row in rows if not _NUMBERED.fullmatch(row[0].strip())] if numbered else []
        self.layers = numbered or [(row[0].strip(), row) for row in rows]
        self._width = max(map(len, rows), default=0)
        if not self.layers or self._width < 2:
            raise UsageError(
                f"--distribution file {str(path)!r} has no lines with a name and a value; write one a layer, such as "
                f"conv1,0.5."
            )

    def find(self, column: str | None) -> int:
        """Returns the index of the column that is meant; see `read_densities`.

        Raises:
            UsageError: no column, or more than one, may be meant.
        """
        indices = range(1, self._width)
        if column is not None:
            found = [i for i in indices if _folded(column) in map(_folded, self._labels(i))]
        else:
            # Of several columns, the one that says that it is a density or a sparsity.
            found = [i for i in indices if self._width == 2 or re.search("dens|spars", self._title(i), re.IGNORECASE)]
        if len(found) == 1:
            return found[0]
        known = [labels[-1] for i in indices if (labels := self._labels(i)) and self._holds_densities(i)]
        raise UsageError(
            f"--distribution file {str(self._path)!r} has {len(found) or 'no'} column{'s' * (len(found) > 1)} "
            f"{'of densities' if column is None else repr(column)}; name one after the file, as in "
            f"FILE.csv:{known[0] if known else 'density'}. It has {join_words(known[:30], 'and') or 'no other'}."
        )

    def meaning(self, index: int) -> tuple[Value, str]:
        """Returns how values of a column become densities, and the words for it."""
        cells = [row[index] for _, row in self.layers if index < len(row)]
        title = self._title(index)
        per_cent = bool(_PER_CENT.search(title)) or any("%" in cell for cell in cells)
        # Tables of pruned networks in per cent are of zeros, so a title that says neither is read so.
        sparsity = "spars" in title.lower() or (per_cent and "dens" not in title.lower())
        label = (self._labels(index) or ["2"])[-1]
        note = f"read column {label!r} as {'sparsity' if sparsity else 'density'}{' in per cent' if per_cent else ''}"
        return Value(sparsity, 100 if per_cent else 1), note

    def _holds_densities(self, index: int) -> bool:
        """Returns whether every value of a column gives a density, unlike numbers of parameters."""
        density_of, _ = self.meaning(index)
        found = [density_of(row[index]) for _, row in self.layers if index < len(row)]
        return all(density is not None and 0 <= density <= 1 for density in found)

    def _title(self, index: int) -> str:
        """Returns the title of a column; that of a group of columns stands over its first one."""
        return next((cell for cell in reversed(self._header[1 : index + 1]) if cell.strip()), "")

    def _labels(self, index: int) -> list[str]:
        """Returns the texts by which a column can be named: its title, and its values in lines of totals."""
        cells = [row[index].strip() for row in [self._header, *self._totals[:1]] if index < len(row)]
        return [cell for cell in cells if cell]


def _folded(label: str) -> str:
    return label.strip().rstrip("%").lower()


def _number(cell: str) -> Fraction | None:
    """Returns a decimal number exactly, with or without a per cent sign; None for anything else."""
    text = cell.strip().removesuffix("%").strip().replace(",", ".")
    # Fraction alone would read 1/3 and, for a huge exponent, a number that fills the memory.
    return Fraction(text) if re.fullmatch(r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,2})?", text) else None


def _read_rows(path: Path) -> list[list[str]]:
    """Returns the lines of a file as cells, without empty lines."""
    require_file(path, "--distribution file")
    try:
        if path.stat().st_size > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
        # Spreadsheets write semicolons where the comma is the decimal sign.
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        rows = [_stripped(row) for row in csv.reader(text.splitlines(), delimiter=delimiter)]
    except (OSError, ValueError, csv.Error) as error:
        raise FormatError(f"--distribution file {str(path)!r} cannot be read as CSV ({error}).") from error
    return [row for row in rows if row]


def _stripped(row: list[str]) -> list[str]:
    """Returns a line without the empty cells at its end, which spreadsheets add."""
    last = max((i for i, cell in enumerate(row) if cell.strip()), default=-1)
    return row[: last + 1]
