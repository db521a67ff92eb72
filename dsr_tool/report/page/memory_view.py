"""The section of a page about memory: of running the model by runtime, and of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsr_tool.report.page import numbers
from dsr_tool.report.page.charts import bars
from dsr_tool.report.page.parts import Bars, Figure, Key, NoChart, Section, Table, sentence

__all__ = ["memory_section"]

_STEP_STYLES = {
    "weights": "values",
    "masks": "positions",
    "positions": "positions",
    "gradients": "rest",
    "optimizer state": "paper",
}
"""Part of a training step -> CSS class of its color; all other parts share one piece of the bar."""


def memory_section(memory: Mapping[str, Any]) -> Section:
    """Returns the section of memory: activations, running by runtime, and a training step.

    Args:
        memory: the part `memory` of the report's JSON. The room `measure` describes its keys; it stands above this one,
            so its types cannot be imported here.
    """
    peaks = memory["activations"]
    rows = [("operator by operator", numbers.byte_size(peaks["in_order_bytes"]), peaks["in_order_moment"])]
    alive = Table("Activations alive at once", ("execution", "bytes", "at the peak"), rows, frozenset({0, 2}))
    figures = [
        _running(memory["inference"]),
        Figure(alive.caption, NoChart(), alive, "The input counts as an activation."),
    ]
    for storage, key in (("masked", "training"), ("compact", "training_compact")):
        # Documents from before compact storage lack its keys.
        if training := memory.get(key):
            figures += _training(training, storage)
    shape = numbers.dimensions(*memory["input_shape"])
    lead = f"For a batch of {numbers.count(memory['batch'])}, each input {shape}, on the CPU."
    keys = ("training_note", "training_compact_note", "measurement_note")
    notes = [note for note in dict.fromkeys(map(memory.get, keys)) if note]
    # Some notes are error messages, which end with a period, and some are not.
    return Section("memory", "Memory", figures, lead, [f"{sentence(note).rstrip('.')}." for note in notes])


def _running(runtimes: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns the figure of the memory of each runtime, computed and measured."""
    entries = []
    for row in runtimes:
        # ONNX Runtime is only measured, since its allocator decides; a runtime without any figure has no bar.
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


def _training(training: Mapping[str, Any], storage: str) -> list[Figure]:
    """Returns the figures of a training step's memory at its peak, and of the state of other optimizers."""
    held, peak = dict(training["held_bytes"]), dict(training["at_peak_bytes"])
    # Activations saved for the backward pass are part of the activations at the peak: one row for both.
    held["activations"] = held.pop("saved activations", 0)
    total = training["computed_bytes"]
    # Masks are masked storage's, positions and plans compact storage's.
    shown = {name: peak.get(name, 0) for name in _STEP_STYLES if name in held or name in peak}
    rest = "activations, input, plans and scratch" if "plans" in peak else "activations, input and scratch"
    entries = [
        (name, f"{numbers.byte_size(n)}, {numbers.share(n, total, 1)}", _STEP_STYLES[name], float(n))
        for name, n in shown.items()
    ]
    # Those are held all the time; but for plans, what is left of the peak comes and goes within the step.
    other = total - sum(shown.values())
    entries.append(
        (
            rest,
            f"{numbers.byte_size(other)}, {numbers.share(other, total, 1)}",
            "bound",
            other,
        )
    )
    pieces = bars(entries, stacked=True)
    kinds = list(dict.fromkeys([*held, *peak]))
    rows = [(kind, *(numbers.count(at.get(kind, 0)) for at in (held, peak))) for kind in kinds]
    # No total in full: not all kinds are at their largest at once.
    rows.append(("in all", "", numbers.count(total)))
    measured, difference, _ = _measured(training)
    notes = ""
    if training["measured_bytes"] is not None:
        notes += f" Measured: {measured}; the computed size differs from it by {difference}."
    if own := training["method"]:
        notes += f" Method {own['name']} holds {numbers.byte_size(own['bytes'])} more."
    states = [(name, numbers.byte_size(n)) for name, n in training["optimizer_state_bytes"].items()]
    state = Table(f"State that each optimizer keeps, {storage} storage", ("optimizer", "bytes"), states)
    return [
        Figure(
            f"A training step with {training['optimizer']} in {storage} storage, at its peak",
            Bars(pieces, kind="stack"),
            Table("Bytes of a training step", ("what", "in full", "at the peak"), rows),
            f"{numbers.byte_size(total)} in all, reached in {training['moment']}.{notes}",
            [Key(piece.style, piece.label, piece.text) for piece in pieces],
        ),
        Figure(state.caption, NoChart(), state),
    ]
