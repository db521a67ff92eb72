"""DensityFile: the densities of layers from a CSV file, a line a layer, for `--distribution file:FILE.csv[:COLUMN]`.

`density_table.py` reads the cells; here they are matched with the layers of a network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from dsr_tool.errors import UsageError, closest, first_few
from dsr_tool.sparsity.apportion import apportion
from dsr_tool.sparsity.density_table import DensityTable
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["PREFIX", "DensityFile", "parse_spec", "read_densities"]

PREFIX = "file:"
"""Start of a `--distribution` that names a file."""

_SHOWN = 4
"""Largest number of layers that an error names for each kind of problem."""


@dataclass(frozen=True)
class DensityFile:
    """The densities that a file gives to the sparse layers of a network.

    Attributes:
        densities: fraction of active weights by parameter name, in the order of the network's layers, each in [0, 1].
        sizes: number of weights of each of these layers.
        note: how the file was read, in words: its column and the meaning of its values.
    """

    densities: Mapping[str, Fraction]
    sizes: tuple[int, ...]
    note: str

    @property
    def total(self) -> int:
        """Number of active weights of the file's own budget: each layer rounded, and at least one weight in each."""
        return sum(max(1, round(d * size)) for d, size in zip(self.densities.values(), self.sizes, strict=True))

    def spread(self, total: int) -> list[int]:
        """Spreads active weights over the layers, with all densities multiplied by one factor.

        A density that the factor raises above 1 becomes 1, and one weight of each layer stays active; the factor is the
        one with which the counts then sum to `total` exactly.

        Args:
            total: number of active weights of the network.

        Returns:
            Number of active weights per layer, in the order of `densities`.
        """
        shares = [float(density * size) for density, size in zip(self.densities.values(), self.sizes, strict=True)]
        return apportion(total, shares, self.sizes, [1] * len(self.sizes))


def parse_spec(text: str) -> tuple[Path, str | None]:
    """Returns path and column of `file:FILE.csv` or `file:FILE.csv:COLUMN`; the column is None if it is not named.

    Raises:
        UsageError: no file is named.
    """
    rest = text.removeprefix(PREFIX)
    if not rest:
        raise UsageError("--distribution file: names no file; write it as file:FILE.csv.")
    path, colon, column = rest.rpartition(":")
    # A path may have a colon of its own, as on Windows.
    if not colon or Path(rest).exists():
        return Path(rest), None
    return Path(path), column


def read_densities(path: Path, column: str | None, specs: Mapping[str, LayerSpec]) -> DensityFile:
    """Reads a file of densities for the layers of a network.

    Args:
        path: the CSV file.
        column: header of the column with the values, or its value in a line of totals; None if there is only one.
        specs: the layers of the network by name; the file must name exactly the sparse ones, and may name dense ones
            with density 1. A layer is named by its parameter, by its module, or all of them by number from 1.

    Raises:
        UsageError: layers are unknown, missing or repeated, densities are not in [0, 1], or it is not clear which
            column is meant. One error tells everything that is wrong with the layers.
        FileError: the file does not exist.
        FormatError: the file is not a table of text.
    """
    table = DensityTable(path)
    index = table.find(column)
    density_of, note = table.meaning(index)
    written = [(name, row[index].strip() if index < len(row) else "") for name, row in table.layers]
    names = _resolve([name for name, _ in written], specs)
    lines = [_Line(*cells, name, density_of(cells[1])) for cells, name in zip(written, names, strict=True)]
    sparse = [spec for spec in specs.values() if spec.role == "sparse"]
    if problems := {kind: found for kind, found in _problems(lines, specs).items() if found}:
        told = "; ".join(
            f"{len(found)} {kind}: {first_few(found, _SHOWN, counted=True)}" for kind, found in problems.items()
        )
        raise UsageError(
            f"--distribution file {str(path)!r} does not fit the {len(sparse)} sparse layers of this network: {told}. "
            f"Give each sparse layer one line with its name and a density from 0 to 1."
        )
    densities = {line.layer: line.density for line in lines if line.density is not None}
    return DensityFile({spec.name: densities[spec.name] for spec in sparse}, tuple(spec.size for spec in sparse), note)


class _Line(NamedTuple):
    """One layer of a file: its two cells, the parameter that is meant, and the density; None where there is none."""

    written: str
    cell: str
    layer: str | None
    density: Fraction | None

    @property
    def allowed(self) -> bool:
        """Whether the density is in [0, 1]."""
        return self.density is not None and 0 <= self.density <= 1


def _problems(lines: Sequence[_Line], specs: Mapping[str, LayerSpec]) -> dict[str, list[str]]:
    """Returns everything that is wrong with the lines, by kind of problem; the lists may be empty."""
    known = [alias for spec in specs.values() if spec.weight for alias in _aliases(spec.name)]
    unknown = {line.written: closest(line.written, known) for line in lines if line.layer is None}
    named = [line for line in lines if line.layer is not None]
    times = Counter(line.layer for line in named)
    dense = [line for line in named if line.allowed and line.density != 1 and specs[line.layer or ""].role == "dense"]
    return {
        "unknown": [f"{name!r}{f' (meant {close[0]}?)' if close else ''}" for name, close in unknown.items()],
        "missing": [repr(spec.name) for spec in specs.values() if spec.role == "sparse" and spec.name not in times],
        "repeated": [repr(name) for name, count in times.items() if count > 1],
        "with a value that gives no density in [0, 1]": [
            f"{line.written!r} ({line.cell[:20]!r})" for line in named if not line.allowed
        ],
        "kept dense by a rule (--sparsify would make them sparse)": [repr(line.written) for line in dense],
    }


def _aliases(name: str) -> tuple[str, str]:
    """Returns the two names of a layer: its parameter, and its module."""
    return name, name.rpartition(".")[0]


def _resolve(written: Sequence[str], specs: Mapping[str, LayerSpec]) -> list[str | None]:
    """Returns the parameter that each line means; None where there is none."""
    weights = [spec.name for spec in specs.values() if spec.weight]
    known = {alias: name for name in weights for alias in reversed(_aliases(name))}
    # Numbers count from 1 in the order of the network, unless they are names, as the layers of an nn.Sequential are.
    if not any(name in known for name in written):
        known = {str(number): name for number, name in enumerate(weights, start=1)}
    return [known.get(name) for name in written]
