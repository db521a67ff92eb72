"""The memory of running and of training as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsr_tool.report.tables import megabytes, plain_table, render

__all__ = ["memory_text"]


def memory_text(document: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    shape, activations = "x".join(map(str, document["input_shape"])), document["activations"]
    lines = [
        f"memory for {document['batch']} x {shape}; MB are 10^6 bytes",
        f"activations alive at once: {megabytes(activations['in_order_bytes'])} MB operator by operator (at "
        f"{activations['in_order_moment']}), {megabytes(activations['fused_bytes'])} MB fused and in place (at "
        f"{activations['fused_moment']}), the input included",
        render(_inference_table(document["inference"])),
    ]
    if training := document["training"]:
        lines += _training_lines(training)
    notes = [f"no training: {document['training_note']}" if document["training_note"] else None]
    lines += [note for note in (*notes, document["measurement_note"]) if note]
    return "\n".join(lines)


def _inference_table(rows: list[dict[str, Any]]) -> Any:
    numbers = ["weights MB", "activations MB", "computed MB"]
    if any(row["measured_bytes"] is not None for row in rows):
        numbers += ["measured MB", "difference", "loading MB"]
    table = plain_table("inference", *numbers, numbers=numbers)
    for row in rows:
        cells = [row["weights_bytes"], row["activations_bytes"], row["computed_bytes"]]
        table.add_row(row["runtime"], *map(megabytes, cells), *(_measured_cells(row) if len(numbers) > 3 else []))
    return table


def _measured_cells(row: Mapping[str, Any]) -> list[str]:
    if row["measured_bytes"] is None:
        return ["", "", ""]
    return [megabytes(row["measured_bytes"]), f"{row['difference']:+.1%}", megabytes(row["load_peak_bytes"])]


def _training_lines(training: Mapping[str, Any]) -> list[str]:
    numbers = ("in full MB", "at the peak MB")
    table = plain_table(f"training with {training['optimizer']}", *numbers, numbers=numbers)
    held, at_peak = dict(training["held_bytes"]), dict(training["at_peak_bytes"])
    held["activations"] = held.pop("saved activations")
    for kind in {**held, **at_peak}:
        full = megabytes(held[kind]) if kind in held else ""
        table.add_row(kind, full, megabytes(at_peak.get(kind, 0)))
    table.add_row("in all", "", megabytes(training["computed_bytes"]))
    states = ", ".join(f"{name} {megabytes(nbytes)}" for name, nbytes in training["optimizer_state_bytes"].items())
    lines = [
        render(table),
        f"the peak is at {training['moment']}; activations in full are those saved for the backward pass",
    ]
    if own := training["method"]:
        lines.append(f"method {own['name']} holds {megabytes(own['bytes'])} MB more, in neither column")
    if training["measured_bytes"] is not None:
        lines.append(
            f"measured {megabytes(training['measured_bytes'])} MB, computed {training['difference']:+.1%} of that"
        )
    return [*lines, f"optimizer state in MB: {states}"]
