"""Parts of a page that only some reports have: kernels, a budget and compaction.

`accuracy_view` has accuracy, `memory_view` memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsr_tool.graph.compact.record import Savings
from dsr_tool.report.budget import BudgetDocument
from dsr_tool.report.page import numbers
from dsr_tool.report.page.accuracy_view import accuracy_section
from dsr_tool.report.page.charts import bars
from dsr_tool.report.page.memory_view import memory_section
from dsr_tool.report.page.parts import Bars, Figure, NoChart, Number, Section, Table, sentence
from dsr_tool.report.sources import Source
from dsr_tool.runtime.coverage import CoverageDocument

__all__ = ["budget_headline", "coverage_headline", "extra_sections"]

_MAX_ROWS = 350
"""Most layers in a table; no network of torchvision has as many."""
_FORMATS = {"bytes": numbers.byte_size, "macs": numbers.macs, "parameters": numbers.short_count}
"""Kind of budget -> function that formats its amounts."""


def extra_sections(source: Source, document: Mapping[str, Any]) -> list[Section]:
    """Returns a section for each of these parts that the report has.

    Args:
        source: the measured file or folder.
        document: the document of `dsr-tool report --json`.
    """
    budget: BudgetDocument | None = document.get("budget")
    memory, accuracy = document.get("memory"), document.get("accuracy")
    return [
        *([accuracy_section(accuracy)] if accuracy else []),
        *([_budget(budget)] if budget else []),
        *([memory_section(memory)] if memory else []),
        *([_compaction(source.saved, source.footprint.file_bytes)] if source.saved else []),
    ]


def budget_headline(document: Mapping[str, Any]) -> list[Number]:
    """Returns a headline number that says whether the budget is met; none without a budget."""
    budget: BudgetDocument | None = document.get("budget")
    if not budget:
        return []
    show = _FORMATS[budget["kind"]]
    note = f"{show(budget['found'])} of {show(budget['asked'])}"
    return [Number("Budget", "fits" if budget["fits"] else "does not fit", note)]


def coverage_headline(document: Mapping[str, Any]) -> list[Number]:
    """Returns a headline number of the nodes that run on compiled kernels; none if nothing was compiled."""
    fallback: CoverageDocument | None = document.get("fallback")
    if not fallback:
        return []
    nodes, others = fallback["nodes"], fallback["operators"]
    note = f"on the reference: {', '.join(others)}" if others else "none on the reference"
    return [Number("Nodes on compiled kernels", f"{nodes - fallback['on_reference']} of {nodes}", note)]


def _budget(budget: BudgetDocument) -> Section:
    """Returns the section of a budget: the allowed amount beside the model's."""
    show = _FORMATS[budget["kind"]]
    asked, found = budget["asked"], budget["found"]
    found_label = f"Found, {budget['measured']}"
    # The color tells whether the budget is met: one byte too many cannot be seen from the length of the bars.
    entries = [
        ("Budget", show(asked), "bound", float(asked)),
        (found_label, show(found), "values" if budget["fits"] else "positions", float(found)),
    ]
    rows = [(name, numbers.count(n), numbers.share(n, asked)) for name, n in (("Budget", asked), (found_label, found))]
    unit = budget["kind"].replace("macs", "multiply-adds")
    table = Table(f"Budget in {unit}", ("what", unit, "of the budget"), rows)
    return Section("budget", "Budget", [Figure("Budget", Bars(bars(entries)), table, f"{sentence(budget['line'])}.")])


def _compaction(saved: Savings, size: int) -> Section:
    """Returns the section of what compaction removed, in all and from each layer.

    Args:
        saved: record of the compaction.
        size: bytes of the compacted file.
    """
    # Both rows are one model, without and with compaction; the record holds the plain size, measured at export.
    pairs = (
        ("Weights", *saved.weights),
        ("Active weights", *saved.active),
        ("Multiply-adds with every weight", *saved.dense_macs),
        ("Multiply-adds with active weights", *saved.sparse_macs),
        ("Bytes of the file", saved.plain_bytes, size),
    )
    rows = [(name, *map(numbers.count, pair), numbers.share(pair[0] - pair[1], pair[0])) for name, *pair in pairs]
    whole = Table("What compaction saved", ("what", "without", "compacted", "saved"), rows)
    removed = [
        (layer.weight, *map(numbers.count, (filters - kept, filters, inputs - used, inputs)))
        for layer in saved.layers[:_MAX_ROWS]
        for (filters, kept), (inputs, used) in [(layer.filters, layer.inputs)]
    ]
    # A removed filter is an input channel that the next layer loses, so both columns are shown.
    headers = ("weight", "filters removed", "of", "input channels removed", "of")
    others = f": the first {_MAX_ROWS}" if len(saved.layers) > _MAX_ROWS else ""
    by_layer = Table(f"Filters and input channels removed, by layer{others}", headers, removed)
    figures = [Figure(table.caption, NoChart(), table) for table in (whole, by_layer) if table.rows]
    lead = (
        f"Removed filters that had no effect: {numbers.count(saved.filters)}; input channels: "
        f"{numbers.count(saved.inputs)}; layers that lost any: {numbers.count(len(saved.layers))}. All other "
        f"figures on this page describe the model without them."
    )
    return Section("compaction", "Compaction", figures, lead)
