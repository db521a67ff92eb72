"""What a page is made of: headline numbers, sections, figures and the tables behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsr_tool.graph.compact.record import COMPACTED
from dsr_tool.report.page.axes import Tick
from dsr_tool.report.page.charts import Bar, Columns, Lines
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
    "Words",
    "kind_of_file",
    "sentence",
    "setup_section",
]


@dataclass(frozen=True)
class Number:
    """A headline number: what it is, how much, and a line below."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Exact numbers.

    Attributes:
        caption: what they are.
        headers: of the columns; the first column names the row.
        rows: texts.
        words: columns that hold words; all others are set flush right.
    """

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Key:
    """An entry of a legend: the CSS class of its colour, `line` for a line, and what it stands for."""

    style: str
    label: str
    text: str = ""


@dataclass(frozen=True)
class Bars:
    """Bars one below the other, or one stacked bar with its legend."""

    bars: Sequence[Bar]
    kind: str = "bars"


@dataclass(frozen=True)
class Heat:
    """A picture with labels beside and below, and the scale of its colours."""

    address: str
    rows: Sequence[Tick]
    ticks: Sequence[Tick]
    scale: tuple[str, str, str]
    kind: str = "heat"


@dataclass(frozen=True)
class MaskEntry:
    """A mask to choose: its name, place among the columns, picture, density of the darkest block, and a sentence."""

    name: str
    layer: int
    picture: MaskPicture
    darkest: str
    sentence: str


@dataclass(frozen=True)
class Masks:
    """Masks to choose from, and which comes first."""

    masks: Sequence[MaskEntry]
    first: int
    kind: str = "masks"


@dataclass(frozen=True)
class Words:
    """No chart: a table alone, in full view."""

    kind: str = "words"


@dataclass(frozen=True)
class Figure:
    """A chart, what it shows in words, its legend, and its table."""

    title: str
    chart: Columns | Lines | Plot | Bars | Heat | Masks | Words
    table: Table | None
    finding: str = ""
    legend: Sequence[Key] = ()
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading of its own."""

    name: str
    title: str
    figures: Sequence[Figure]
    lead: str = ""
    notes: Sequence[str] = ()
    layout: str = ""


def setup_section(config: ModelConfig | None, log: RunLog | None) -> list[Section]:
    """How the model was made and trained, for the record."""
    documents: dict[str, Any] = {}
    if config:
        plain = config.to_dict()
        named = ("source", "architecture", "width", "num_classes", "input_shape")
        documents["model"] = {key: plain[key] for key in named}
        documents["conversion"] = {key: value for key, value in plain["conversion"].items() if key != COMPACTED}
        documents["preprocessing"] = plain["preprocessing"]
    if log:
        nested = {key: value for key, value in log.start.items() if isinstance(value, Mapping)}
        documents["training"] = {key: value for key, value in log.start.items() if key not in nested and key != "kind"}
        documents |= nested
    tables = [table for key, value in documents.items() if value for table in _tables(_title(key), value)]
    figures = [Figure(table.caption, Words(), table) for table in tables]
    return [Section("setup", "Model and settings", figures, layout="settings")] if figures else []


_UNITS = ("_bytes", "_macs", "_s")
_KINDS = {"archive": "archive (.dsr)", "onnx": "ONNX file", "csr": "CSR file (.npz)"}


def kind_of_file(kind: str) -> str:
    """The kind of a source as words."""
    return _KINDS.get(kind, kind)


def sentence(text: str) -> str:
    """The text with a capital letter at its start."""
    return text[:1].upper() + text[1:]


def _words(key: str) -> str:
    """The name of a field as words, without the unit that its value shows."""
    unit = next((unit for unit in _UNITS if key.endswith(unit)), "")
    return key.removesuffix(unit).replace("_", " ")


def _title(key: str) -> str:
    return sentence(_words(key))


def _tables(title: str, document: Mapping[str, Any]) -> list[Table]:
    """A document as a table, and one for each object in it; empty ones are left out."""
    rows = [(_words(key), named_value(key, value)) for key, value in document.items() if not isinstance(value, Mapping)]
    inner = [(f"{title}: {_words(key)}", value) for key, value in document.items() if isinstance(value, Mapping)]
    below = [table for name, value in inner for table in _tables(name, value)]
    return [*([Table(title, ("name", "value"), rows, frozenset({0, 1}))] if rows else []), *below]
