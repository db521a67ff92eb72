"""Parts of a page beyond the footprint: kernels, compaction, a budget, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsr_tool.graph.compact.record import Savings
from dsr_tool.report.page import numbers
from dsr_tool.report.page.charts import bars
from dsr_tool.report.page.parts import Bars, Figure, Key, NoChart, Number, Section, Table, sentence
from dsr_tool.report.sources import Source

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
    budget, memory = document.get("budget"), document.get("memory")
    return [
        *([_budget(budget)] if budget else []),
        *([_memory(memory)] if memory else []),
        *([_compaction(source.saved, source.footprint.file_bytes)] if source.saved else []),
    ]


def budget_headline(document: Mapping[str, Any]) -> list[Number]:
    """Returns a headline number that says whether the budget is met; none without a budget."""
    budget = document.get("budget")
    if not budget:
        return []
    show = _FORMATS[budget["kind"]]
    note = f"{show(budget['found'])} of {show(budget['asked'])}"
    return [Number("Budget", "fits" if budget["fits"] else "does not fit", note)]


def coverage_headline(document: Mapping[str, Any]) -> list[Number]:
    """Returns a headline number of the nodes that run on compiled kernels; none if nothing was compiled."""
    fallback = document.get("fallback")
    if not fallback:
        return []
    nodes, others = fallback["nodes"], fallback["operators"]
    note = f"on the reference: {', '.join(others)}" if others else "none on the reference"
    return [Number("Nodes on compiled kernels", f"{nodes - fallback['on_reference']} of {nodes}", note)]


def _budget(budget: Mapping[str, Any]) -> Section:
    """Returns the section of a budget: the allowed amount beside the model's."""
    show = _FORMATS[budget["kind"]]
    asked, found = int(budget["asked"]), int(budget["found"])
    found_label = f"Found, {budget['measured']}"
    # The color tells whether the budget is met: the two bars may look equally long.
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


def _memory(memory: Mapping[str, Any]) -> Section:
    """Returns the section of memory: activations, running by runtime, and a training step."""
    peaks, training = memory["activations"], memory["training"]
    rows = [("operator by operator", numbers.byte_size(peaks["in_order_bytes"]), peaks["in_order_moment"])]
    alive = Table("Activations alive at once", ("way of running", "bytes", "at the peak"), rows, frozenset({0, 2}))
    figures = [_running(memory["inference"]), Figure(alive.caption, NoChart(), alive, "The input is counted.")]
    figures += _training(training) if training else []
    lead = f"For a batch of {numbers.count(memory['batch'])}, each input {numbers.dimensions(*memory['input_shape'])}, on the CPU."
    notes = [note for note in (memory["training_note"], memory["measurement_note"]) if note]
    return Section("memory", "Memory", figures, lead, [sentence(note) for note in notes])


def _running(runtimes: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns the figure of the memory of each runtime, computed and measured."""
    entries = []
    for row in runtimes:
        # Some runtimes are only measured; one that is neither computed nor measured has no bar.
        measured_alone = row["computed_bytes"] is None
        nbytes = row["measured_bytes"] if measured_alone else row["computed_bytes"]
        if nbytes is not None:
            label = f"{row['runtime']}, measured" if measured_alone else row["runtime"]
            entries.append((label, numbers.byte_size(nbytes), "values", float(nbytes)))
    rows = [
        (
            row["runtime"],
            *map(_size, (row["weights_bytes"], row["activations_bytes"], row["computed_bytes"])),
            *_measured(row),
            row["moment"] or numbers.NONE,
        )
        for row in runtimes
    ]
    headers = (
        "runtime",
        "weights",
        "activations",
        "computed",
        "measured",
        "difference",
        "loading",
        "at the peak",
    )
    table = Table("Memory of running, by runtime", headers, rows, frozenset({0, 7}))
    return Figure("Running: weights and activations", Bars(bars(entries)), table)


def _measured(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns the memory of a child process, the difference of the computed figure from it, and that of loading."""
    difference = numbers.NONE if row["difference"] is None else f"{100 * row['difference']:+.1f}{numbers.GAP}%"
    return _size(row["measured_bytes"]), difference, _size(row["load_peak_bytes"])


def _size(nbytes: int | None) -> str:
    """Returns a size, or a dash if it is not known."""
    return numbers.NONE if nbytes is None else numbers.byte_size(nbytes)


_LEDGER = {
    "weights": "values",
    "masks": "positions",
    "gradients": "rest",
    "optimizer state": "paper",
}
"""Part of a training step -> CSS class of its color; all other parts share one piece of the bar."""


def _training(training: Mapping[str, Any]) -> list[Figure]:
    """Returns the figures of a training step's memory at its peak, and of the state of other optimizers."""
    held, peak = dict(training["held_bytes"]), dict(training["at_peak_bytes"])
    held["activations"] = held.pop("saved activations", 0)
    total = training["computed_bytes"]
    shown = {name: peak.get(name, 0) for name in _LEDGER}
    entries = [
        (name, f"{numbers.byte_size(n)}, {numbers.share(n, total, 1)}", _LEDGER[name], float(n))
        for name, n in shown.items()
    ]
    # Gradients, weights and state are held all the time; what is left of the peak comes and goes within the step.
    other = total - sum(shown.values())
    entries.append(
        (
            "activations, input and scratch",
            f"{numbers.byte_size(other)}, {numbers.share(other, total, 1)}",
            "bound",
            other,
        )
    )
    pieces = bars(entries, stacked=True)
    kinds = list(dict.fromkeys([*held, *peak]))
    rows = [(kind, *(numbers.count(at.get(kind, 0)) for at in (held, peak))) for kind in kinds]
    rows.append(("in all", "", numbers.count(total)))
    measured, difference, _ = _measured(training)
    notes = ""
    if training["measured_bytes"] is not None:
        notes += f" Measured: {measured}; the computed size differs from it by {difference}."
    if own := training["method"]:
        notes += f" Method {own['name']} holds {numbers.byte_size(own['bytes'])} more."
    states = [(name, numbers.byte_size(n)) for name, n in training["optimizer_state_bytes"].items()]
    state = Table("State that each optimizer keeps", ("optimizer", "bytes"), states)
    return [
        Figure(
            f"A training step with {training['optimizer']}, at its peak",
            Bars(pieces, kind="stack"),
            Table("Bytes of a training step", ("what", "in full", "at the peak"), rows),
            f"{numbers.byte_size(total)} in all, in {training['moment']}.{notes}",
            [Key(piece.style, piece.label, piece.text) for piece in pieces],
        ),
        Figure(state.caption, NoChart(), state),
    ]
