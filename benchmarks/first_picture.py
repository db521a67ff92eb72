"""Draws bytes, latency and accuracy of a trained network, dense and as archives, from the rows of `trained_rows.py`.

    python benchmarks/first_picture.py resnet50 --rows docs/results/trained-networks.csv -o docs/images/first.svg

The picture is made from the file of rows alone, so the same rows give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from trained_rows import Row, read_rows

from dsr_tool.files import new_file

__all__ = ["picture", "rows_of"]

WIDTH, LEFT, RIGHT, BAR, STEP, GAP = 640, 128, 80, 22, 30, 46
"""Sizes in pixels: width, room of the labels and of the figures, height of a bar, and the distances from one bar to the
next and from one panel to the next. A phone shows 640 pixels at half their size, so the text has 17 and 15."""

TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" role="img">
<title>{{ title }}</title>
<style>
:root { --paper: #ffffff; --ink: #16202a; --soft: #4d5a67; --dense: #8295a6; --ours: #0b63a8 }
@media (prefers-color-scheme: dark) {
:root { --paper: #10151a; --ink: #e8edf1; --soft: #a9b5bf; --dense: #627a90; --ours: #57a5e4 }
}
text { font: 17px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: var(--ink) }
.head { font-weight: 600 }
.soft { font-size: 15px; fill: var(--soft) }
.dense { fill: var(--dense) }
.ours { fill: var(--ours) }
</style>
<rect width="{{ width }}" height="{{ height }}" rx="8" style="fill: var(--paper)"/>
{% for panel in panels %}
<text class="head" x="16" y="{{ panel.y }}">{{ panel.title }}</text>
{% for bar in panel.bars %}
<text x="16" y="{{ bar.y + 16 }}">{{ bar.label }}</text>
<rect class="{{ bar.style }}" x="{{ left }}" y="{{ bar.y }}" width="{{ bar.length }}" height="{{ thick }}" rx="2"/>
<text x="{{ left + bar.length + 8 }}" y="{{ bar.y + 16 }}">{{ bar.figure }}</text>
{% endfor %}
{% endfor %}
{% for line in notes %}
<text class="soft" x="16" y="{{ line.y }}">{{ line.text }}</text>
{% endfor %}
</svg>
"""


@dataclass(frozen=True)
class Bar:
    """A bar: its label, its class of color, its length and its top in pixels, and its figure as text."""

    label: str
    style: str
    length: float
    y: int
    figure: str


@dataclass(frozen=True)
class Panel:
    """A quantity: its title, where that stands, and a bar for the dense network and for each archive."""

    title: str
    y: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Note:
    """A line below the panels, and where it stands."""

    text: str
    y: int


def main() -> None:
    """Draws the rows of one network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", help="network whose rows are drawn, as in the file")
    parser.add_argument("--values", default="int8", help="rows with these values; default: %(default)s")
    parser.add_argument("--pictures", default="0", help="rows of calibrations with so many pictures; default: none")
    parser.add_argument("--rows", type=Path, required=True, help="file of rows that trained_rows.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the SVG file to write")
    options = parser.parse_args()
    rows = rows_of(options.rows, options.network, options.values, options.pictures)
    if not rows:
        raise SystemExit(f"{str(options.rows)!r} has no such row; measure it with benchmarks/trained_rows.py.")
    with new_file(options.output, force=True) as part:
        part.write_text(picture(rows), encoding="utf-8")


def rows_of(path: Path, network: str, values: str, pictures: str) -> list[Row]:
    """Returns the rows of a network with the same values, converted by the same number of pictures."""
    wanted = (network, values, pictures)
    return [row for row in read_rows(path) if (row["network"], row["values"], row["pictures"]) == wanted]


def picture(rows: Sequence[Row]) -> str:
    """Returns the picture as SVG.

    Args:
        rows: rows of one network with the same values, at least one.
    """
    rows = sorted(rows, key=lambda row: float(row["sparsity"]))
    first = rows[0]
    labels = ["dense", *(f"{100 * float(row['sparsity']):.3g} % zeros" for row in rows)]
    kinds = (
        ("File, MB", *_column(rows, "bytes", "dense_bytes", 1e-6), 1),
        ("Time of one picture, % of the dense network's", 100.0, [100 / float(row["time_ratio"]) for row in rows], 0),
        (f"Right, % of {first['samples']} pictures", *_column(rows, "top1", "dense_top1", 100), 0),
        (
            f"Same answer as the dense network, % of {first['others']} pictures",
            100.0,
            [100 * float(row["agreement"]) for row in rows],
            1,
        ),
    )
    panels, y = [], 34
    for title, dense, ours, decimals in kinds:
        panels.append(_panel(title, labels, [dense, *ours], decimals, y))
        y += STEP * len(labels) + GAP
    # The sparsest one says which kernels ran, since ONNX Runtime may run the others.
    notes = [Note(text, y + 22 * index - 10) for index, text in enumerate(_notes(rows[-1]))]
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        title=f"{first['network']}: dense, and converted by dsr-tool",
        width=WIDTH,
        height=notes[-1].y + 20,
        left=LEFT,
        thick=BAR,
        panels=panels,
        notes=notes,
    )


def _column(rows: Sequence[Row], ours: str, dense: str, factor: float) -> tuple[float, list[float]]:
    """Returns a figure of the dense network and that of each row, times a factor."""
    return factor * float(rows[0][dense]), [factor * float(row[ours]) for row in rows]


def _panel(title: str, labels: Sequence[str], values: Sequence[float], decimals: int, y: int) -> Panel:
    """Returns a panel whose longest bar fills its width."""
    scale = (WIDTH - LEFT - RIGHT) / max(values)
    bars = [
        Bar(
            label, "ours" if index else "dense", round(scale * value, 1), y + 12 + STEP * index, f"{value:.{decimals}f}"
        )
        for index, (label, value) in enumerate(zip(labels, values, strict=True))
    ]
    return Panel(title, y, tuple(bars))


def _notes(row: Row) -> list[str]:
    """Returns what was measured, on what."""
    threads = "one thread" if row["threads"] == "1" else f"{row['threads']} threads"
    by = f"by {row['pictures']} unlabelled photographs" if row["pictures"] != "0" else "from the weights alone"
    return [
        f"{row['network']}: fp32 in ONNX Runtime {row['onnxruntime']}, and archives with {row['values']} values,",
        f"converted {by}. One input, {threads},",
        f"{row['kernels'].upper()}: {row['processor']}, {row['date']}.",
    ]


if __name__ == "__main__":
    main()
