"""The parts of a page: headline numbers, sections, figures and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsr_tool.graph.compact.record import COMPACTED
from dsr_tool.report.page.axes import Tick
from dsr_tool.report.page.charts import Bar, Columns
from dsr_tool.report.page.lines import Lines
from dsr_tool.report.page.mask_pictures import MaskPicture
from dsr_tool.report.page.numbers import named_value
from dsr_tool.report.page.plots import Plot
from dsr_tool.report.runlog import RunLog
from dsr_tool.sparsity.config import ModelConfig

__all__ = [
    "Bars",
    "Figure",
    "Heat",
    "Key",
    "MaskEntry",
    "Masks",
    "Number",
    "Section",
    "Table",
    "NoChart",
    "kind_of_file",
    "sentence",
    "setup_section",
]


@dataclass(frozen=True)
class Number:
    """A headline number.

    Attributes:
        name: name of the quantity.
        value: the number as text.
        note: line below the number.
    """

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Exact numbers behind a chart.

    Attributes:
        caption: title of the table.
        headers: titles of the columns; the first column names the row.
        rows: cells as text.
        text_columns: indices of the columns that hold text; all others are aligned right.
    """

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    Attributes:
        style: CSS class of its color, or `line` for a line.
        label: name of the series.
        text: amount of the series, if the legend shows it.
    """

    style: str
    label: str
    text: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars below each other (kind `bars`), or one stacked bar with its legend (kind `stack`)."""

    bars: Sequence[Bar]
    kind: str = "bars"


@dataclass(frozen=True)
class Heat:
    """A heat map.

    Attributes:
        address: the picture as a data URL.
        rows: labels beside the picture.
        ticks: labels below the picture.
        scale: texts at the light end, the middle and the dark end of the color scale.
        kind: name of the template that draws it.
    """

    address: str
    rows: Sequence[Tick]
    ticks: Sequence[Tick]
    scale: tuple[str, str, str]
    kind: str = "heat"


@dataclass(frozen=True)
class MaskEntry:
    """The picture of one layer's mask.

    Attributes:
        name: name of the weight.
        layer: index of the layer among the columns of the other charts.
        picture: the mask, one pixel for each block or weight.
        darkest: density of the darkest block, as text.
        sentence: shape, counts and block size in words.
    """

    name: str
    layer: int
    picture: MaskPicture
    darkest: str
    sentence: str


@dataclass(frozen=True)
class Masks:
    """Masks that the reader chooses from; `first` is the index of the one shown at the start."""

    masks: Sequence[MaskEntry]
    first: int
    kind: str = "masks"


@dataclass(frozen=True)
class NoChart:
    """A figure without a chart, whose table is always visible."""

    kind: str = "none"


@dataclass(frozen=True)
class Figure:
    """A chart with its table.

    Attributes:
        title: title of the figure.
        chart: geometry of the chart.
        table: exact numbers; None if the chart has none.
        finding: what the chart shows, in words.
        legend: entries of the legend.
        wide: whether the figure takes the whole width of the page.
    """

    title: str
    chart: Columns | Lines | Plot | Bars | Heat | Masks | NoChart
    table: Table | None
    finding: str = ""
    legend: Sequence[Key] = ()
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        name: identifier of the section, for links.
        title: heading.
        figures: charts and tables, in order.
        lead: sentence below the heading.
        notes: sentences below the figures.
        layout: CSS class that arranges the figures; empty for one below the other.
    """

    name: str
    title: str
    figures: Sequence[Figure]
    lead: str = ""
    notes: Sequence[str] = ()
    layout: str = ""


def setup_section(config: ModelConfig | None, log: RunLog | None) -> list[Section]:
    """Returns the section of all settings that the model was converted and trained with; none without settings."""
    documents: dict[str, Any] = {}
    if config:
        # A choice, because the description also holds one label for each class, up to thousands.
        plain = config.to_dict()
        named = ("source", "architecture", "width", "num_classes", "input_shape")
        documents["model"] = {key: plain[key] for key in named}
        # The compaction has a section of its own.
        documents["conversion"] = {key: value for key, value in plain["conversion"].items() if key != COMPACTED}
        documents["preprocessing"] = plain["preprocessing"]
    if log:
        # Objects inside the first line of the log, such as the settings, become tables of their own.
        nested = {key: value for key, value in log.start.items() if isinstance(value, Mapping)}
        documents["training"] = {key: value for key, value in log.start.items() if key not in nested and key != "kind"}
        documents |= nested
    # `layout`: several narrow tables stand side by side on a wide screen.
    tables = [table for key, value in documents.items() if value for table in _tables(_title(key), value)]
    figures = [Figure(table.caption, NoChart(), table) for table in tables]
    return [Section("setup", "Model and settings", figures, layout="settings")] if figures else []


_UNITS = ("_bytes", "_macs", "_s")
"""Endings of keys that name a unit; the value is shown with it."""
_KINDS = {"archive": "archive (.dsr)", "onnx": "ONNX file", "csr": "CSR file (.npz)"}
"""Name of a container -> name of such a file on a page; the kinds of folders are words already."""


def kind_of_file(kind: str) -> str:
    """Returns the kind of a source in words."""
    return _KINDS.get(kind, kind)


def sentence(text: str) -> str:
    """Returns the text with a capital letter at its start."""
    return text[:1].upper() + text[1:]


def _field_name(key: str) -> str:
    """Returns the name of a field as words, without the unit that is shown with its value."""
    unit = next((unit for unit in _UNITS if key.endswith(unit)), "")
    return key.removesuffix(unit).replace("_", " ")


def _title(key: str) -> str:
    """Returns the name of a field as the title of a table."""
    return sentence(_field_name(key))


def _tables(title: str, document: Mapping[str, Any]) -> list[Table]:
    """Returns a document as a table, and one table for each object in it; empty ones are omitted."""
    rows = [
        (_field_name(key), named_value(key, value)) for key, value in document.items() if not isinstance(value, Mapping)
    ]
    inner = [(f"{title}: {_field_name(key)}", value) for key, value in document.items() if isinstance(value, Mapping)]
    below = [table for name, value in inner for table in _tables(name, value)]
    return [*([Table(title, ("name", "value"), rows, frozenset({0, 1}))] if rows else []), *below]
