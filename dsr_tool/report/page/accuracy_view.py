"""The section of a page about accuracy on a folder of pictures, and about agreement with another network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsr_tool.report.page import numbers
from dsr_tool.report.page.charts import Bar
from dsr_tool.report.page.parts import Bars, Figure, Number, Section, Table, sentence

__all__ = ["accuracy_headline", "accuracy_section"]

_ROWS = (("Top-1", "top1"), ("Top-5", "top5"))
"""Name of a row -> beginning of its keys in the document."""


def accuracy_section(accuracy: Mapping[str, Any]) -> Section:
    """Returns the section of accuracy: one bar for each fraction, and a table with the intervals.

    Args:
        accuracy: the part `accuracy` of the report's JSON. The room `measure` describes its keys; it stands above this
            one, so its types cannot be imported here.
    """
    sides = [("this", "values", accuracy["this"])]
    if accuracy["against"]:
        sides.append(("against", "bound", accuracy["against"]))
    fractions = [
        (f"{name}, {side}" if len(sides) > 1 else name, style, network[f"{key}_fraction"], network[f"{key}_interval"])
        for name, key in _ROWS
        for side, style, network in sides
        if network[f"{key}_fraction"] is not None
    ]
    if accuracy["agreement_fraction"] is not None:
        fractions.append(("Agreement", "positions", accuracy["agreement_fraction"], accuracy["agreement_interval"]))
    pictures = numbers.count(accuracy["pictures"])
    # In percent of the whole plot, which stands for all pictures; `charts.bars` would stretch the longest to its width.
    shares = [
        Bar(f"{name} ({_ends(interval)})", numbers.percent(value, 1), style, 0.0, 100 * value)
        for name, style, value, interval in fractions
    ]
    rows = [
        (name, numbers.percent(value, 1), f"{numbers.percent(low, 1)} to {numbers.percent(high, 1)}", pictures)
        for name, _, value, (low, high) in fractions
    ]
    table = Table("Accuracy and its 95 % interval", ("what", "fraction", "95 % interval", "n"), rows, frozenset({0}))
    figure = Figure("Fractions of the pictures", Bars(shares), table, _finding(accuracy))
    lead = f"{pictures} pictures in {accuracy['data']}; their classes: {accuracy['labels']}."
    notes = [
        f"{sentence(side)}: {network['path']} ({network['kind']}, {network['runtime']})." for side, _, network in sides
    ]
    return Section("accuracy", "Accuracy", [figure], lead, [*notes, *(f"{note}." for note in accuracy["notes"])])


def accuracy_headline(document: Mapping[str, Any]) -> list[Number]:
    """Returns a headline number: top-1, or agreement where no classes are known; none without a measurement."""
    accuracy = document.get("accuracy")
    if not accuracy:
        return []
    this, other = accuracy["this"], accuracy["against"]
    known = this["top1_fraction"] is not None
    value, interval = (
        (this["top1_fraction"], this["top1_interval"])
        if known
        else (accuracy["agreement_fraction"], accuracy["agreement_interval"])
    )
    beside = f"; against: {numbers.percent(other['top1_fraction'], 1)}" if known and other else ""
    note = f"95{numbers.GAP}% interval {_ends(interval)}, n = {numbers.count(accuracy['pictures'])}{beside}"
    return [Number("Top-1" if known else "Agreement", numbers.percent(value, 1), note)]


def _ends(interval: Sequence[float]) -> str:
    """Returns an interval in percent; it stands beside every bar, so that no fraction is read without it."""
    low, high = (f"{100 * end:.1f}" for end in interval)
    return f"{low} to {high}"


def _finding(accuracy: Mapping[str, Any]) -> str:
    """Says how far another sample may lie from these fractions, and the divergence from the other network."""
    text = (
        "On other pictures of the same kind, the fraction lies in the interval with 95 % confidence (Wilson); two "
        "networks whose intervals overlap may be equally good."
    )
    if accuracy["kl_divergence_nats"] is None:
        return text
    return (
        f"{text} Agreement counts pictures with the same first answer; the mean KL divergence (against || this) is "
        f"{accuracy['kl_divergence_nats']:.4g} nats."
    )
