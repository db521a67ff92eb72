"""What a page is made of: headline numbers, sections, figures and the tables behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsr_tool.core.config import ModelConfig
from dsr_tool.report.page.axes import Tick
from dsr_tool.report.page.charts import Bar, Columns, Lines
from dsr_tool.report.page.mask_pictures import MaskPicture
from dsr_tool.report.page.numbers import named_value
from dsr_tool.report.runlog import RunLog

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
    "generic_section",
    "kind_of_file",
    "setup_section",
    "words",
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
    """A mask to choose: its name, place among the columns, picture and the sentence below."""

    name: str
    layer: int
    picture: MaskPicture
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
    chart: Columns | Lines | Bars | Heat | Masks | Words
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
        documents["model"] = {key: plain[key] for key in ("source", "architecture", "num_classes", "input_shape")}
        documents |= {key: plain[key] for key in ("conversion", "preprocessing")}
    if log:
        nested = {key: value for key, value in log.start.items() if _nested(value)}
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


def words(key: str) -> str:
    """The name of a field as words, without the unit that its value shows."""
    return key.removesuffix(_unit(key)).replace("_", " ")


def generic_section(name: str, document: Any) -> Section:
    """Any plain document as tables, one for each level: for parts of a report that have no chart of their own.

    Its field `line`, if it has one, says all in a sentence and comes first.
    """
    document = _known(document)
    lead = document.pop("line", "") if isinstance(document, dict) else ""
    figures = [Figure(table.caption, Words(), table) for table in _tables(_title(name), document)]
    return Section(f"x-{name}", _title(name), figures, str(lead))


def _title(key: str) -> str:
    text = words(key)
    return text[:1].upper() + text[1:]


def _tables(title: str, document: Any, unit: str = "") -> list[Table]:
    """A document as tables; `unit` is the ending of the name that it stands under, for what has none of its own."""
    if isinstance(document, Mapping):
        plain = {str(key): value for key, value in document.items() if not _nested(value)}
        rows = [(words(key), named_value(key if _unit(key) else key + unit, value)) for key, value in plain.items()]
        nested = [(str(key), value) for key, value in document.items() if _nested(value)]
        below = [table for key, value in nested for table in _tables(f"{title}: {words(key)}", value, _unit(key))]
        return [*([Table(title, ("name", "value"), rows, frozenset({0, 1}))] if rows or not below else []), *below]
    if _nested(document):
        keys = list(dict.fromkeys(key for row in document for key in row))
        cells = [[named_value(str(key), row.get(key)) for key in keys] for row in document]
        text = {i for i, key in enumerate(keys) if any(isinstance(row.get(key), str) for row in document)}
        return [Table(title, [words(str(key)) for key in keys], cells, frozenset({0, *text}))]
    return [Table(title, ("name", "value"), [(title, named_value(title, document))], frozenset({0, 1}))]


def _known(document: Any) -> Any:
    """A document without the fields that hold nothing."""
    if isinstance(document, Mapping):
        return {str(key): _known(value) for key, value in document.items() if value is not None}
    return [_known(one) for one in document] if isinstance(document, (list, tuple)) else document


def _unit(key: str) -> str:
    return next((unit for unit in _UNITS if key.endswith(unit)), "")


def _nested(value: Any) -> bool:
    """Whether a value takes a table of its own: an object, or a list of objects."""
    rows = isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(row, Mapping) for row in value)
    return isinstance(value, Mapping) or rows
