"""The memory document as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsr_tool.report.tables import megabytes, plain_table, render

if TYPE_CHECKING:
    from rich.table import Table

    from dsr_tool.measure.memory.schema import MemoryDocument, RuntimeRow, TrainingStep

__all__ = ["memory_text"]


def memory_text(document: MemoryDocument) -> str:
    """Returns the document as text: activations, a table of runtimes, and one of a training step."""
    shape, activations = "x".join(map(str, document["input_shape"])), document["activations"]
    lines = [
        f"memory for {document['batch']} x {shape}; MB are 10^6 bytes",
        f"activations alive at once: {megabytes(activations['in_order_bytes'])} MB operator by operator (at "
        f"{activations['in_order_moment']}), the input included",
        render(_inference_table(document["inference"])),
    ]
    for storage, training, note in (
        ("masked", document["training"], document["training_note"]),
        ("compact", document["training_compact"], document["training_compact_note"]),
    ):
        if training:
            lines += _training_lines(training, storage)
        if note:
            lines.append(f"no training in {storage} storage: {note}")
    if document["measurement_note"]:
        lines.append(document["measurement_note"])
    return "\n".join(lines)


def _inference_table(rows: list[RuntimeRow]) -> Table:
    numbers = ["weights MB", "activations MB", "computed MB"]
    # Without a measurement its three columns would be empty.
    measured = any(row["measured_bytes"] is not None for row in rows)
    if measured:
        numbers += ["measured MB", "difference", "loading MB"]
    table = plain_table("inference", *numbers, numbers=numbers)
    for row in rows:
        cells = [_megabytes(row[key]) for key in ("weights_bytes", "activations_bytes", "computed_bytes")]
        table.add_row(row["runtime"], *cells, *(_measured_cells(row) if measured else []))
    return table


def _measured_cells(row: RuntimeRow) -> list[str]:
    difference = "" if row["difference"] is None else f"{row['difference']:+.1%}"
    return [_megabytes(row["measured_bytes"]), difference, _megabytes(row["load_peak_bytes"])]


def _megabytes(nbytes: int | None) -> str:
    """Returns megabytes; nothing for a figure that is not known."""
    return "" if nbytes is None else megabytes(nbytes)


def _training_lines(training: TrainingStep, storage: str) -> list[str]:
    numbers = ("in full MB", "at the peak MB")
    table = plain_table(f"training with {training['optimizer']}, {storage} storage", *numbers, numbers=numbers)
    # One row for activations: those saved for the backward pass in full, and those alive at the peak.
    held, at_peak = dict(training["held_bytes"]), training["at_peak_bytes"]
    held["activations"] = held.pop("saved activations")
    for kind in {**held, **at_peak}:
        table.add_row(kind, _megabytes(held.get(kind)), megabytes(at_peak.get(kind, 0)))
    table.add_row("in all", "", _megabytes(training["computed_bytes"]))
    states = ", ".join(f"{name} {megabytes(nbytes)}" for name, nbytes in training["optimizer_state_bytes"].items())
    lines = [
        render(table),
        f"the peak is at {training['moment']}; activations in full are those saved for the backward pass",
    ]
    if method := training["method"]:
        lines.append(f"method {method['name']} holds {megabytes(method['bytes'])} MB more, in neither column")
    if training["measured_bytes"] is not None:
        lines.append(
            f"measured {megabytes(training['measured_bytes'])} MB, computed {training['difference']:+.1%} of that"
        )
    return [*lines, f"optimizer state in MB: {states}"]
