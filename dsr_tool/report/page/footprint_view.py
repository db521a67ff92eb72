"""Sections of a footprint: headline numbers, bytes by part, formats side by side, and the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsr_tool.formats.codecs import size_columns
from dsr_tool.report.page import numbers
from dsr_tool.report.page.charts import bars
from dsr_tool.report.page.layer_view import (
    Layer,
    bytes_by_layer,
    density_by_layer,
    largest_layers,
    layers_of,
    masks_of_layers,
    sparse_of,
    work_by_layer,
)
from dsr_tool.report.page.parts import Bars, Figure, Key, Number, Section, Table, kind_of_file
from dsr_tool.report.sources import Source
from dsr_tool.report.values import value_text

__all__ = ["footprint_sections", "headline"]


def headline(source: Source) -> list[Number]:
    """Returns the headline numbers, with both denominators of sparsity."""
    measured = source.footprint
    model, prunable, whole = measured.model, measured.prunable, measured.everything
    # Buffers count too, because a file holds them.
    share = measured.file_bytes / whole.dense_bytes if whole.dense_bytes else 0
    # Without multiply-adds there is no share to name.
    macs_share = f"{numbers.percent(model.sparse_macs / model.dense_macs)} of " if model.dense_macs else "of "
    return [
        Number(
            "Sparsity of the prunable weights",
            numbers.percent(measured.sparsity),
            f"{numbers.count(prunable.active)} of {numbers.count(prunable.parameters)} active",
        ),
        Number(
            "Sparsity of the whole model",
            numbers.percent(measured.model_sparsity),
            f"{numbers.count(model.active)} of {numbers.count(model.parameters)} active",
        ),
        Number("Parameters", numbers.short_count(model.parameters), f"{numbers.short_count(model.active)} active"),
        Number("Size on disk", numbers.byte_size(measured.file_bytes), f"{numbers.count(measured.file_bytes)} bytes"),
        Number(
            "Dense size",
            numbers.byte_size(whole.dense_bytes),
            f"this {kind_of_file(source.kind)} takes {numbers.percent(share)} of it",
        ),
        Number(
            "Work for one input",
            numbers.macs(model.sparse_macs),
            f"{macs_share}{numbers.macs(model.dense_macs)} with every weight",
        ),
    ]


def footprint_sections(source: Source, document: Mapping[str, Any]) -> list[Section]:
    """Returns all sections of the footprint; those without content are omitted.

    Args:
        source: what is reported.
        document: the report as plain values, for the bits of values.
    """
    # Sums are over all weights, charts over the largest, which keeps the page below a megabyte.
    every = layers_of(source)
    layers, note = largest_layers(every)
    notes = [note] if note else []
    of_bytes = [*value_text(document.get("values")), *notes]
    return [
        Section("bytes", "Where the bytes go", [_parts(source, every), bytes_by_layer(source, layers)], notes=of_bytes),
        Section("formats", "Formats side by side", [_formats(source)]),
        *([Section("density", "Density by layer", [density_by_layer(source, layers)], notes=notes)] if layers else []),
        *([Section("work", "Work by layer", [work_by_layer(source, layers)], notes=notes)] if layers else []),
        *(
            [Section("masks", "Mask of a layer", [masks_of_layers(source, layers)], notes=notes)]
            if sparse_of(layers)
            else []
        ),
    ]


def _parts(source: Source, every: Sequence[Layer]) -> Figure:
    """Returns the figure of the whole file by part, beside the entropy bound."""
    sparse = sparse_of(every)
    total = source.footprint.file_bytes
    positions = sum(layer.stored.positions for layer in sparse)
    values = sum(layer.stored.values for layer in sparse)
    names = {layer.name for layer in sparse}
    rest = sum(layer.stored_bytes or 0 for layer in source.footprint.layers if layer.spec.name not in names)
    # Everything else in the file belongs to no tensor: the graph, names and headers.
    parts = [
        ("Values of sparse weights", "values", values),
        ("Positions of sparse weights", "positions", positions),
        ("Dense rest: weights kept dense, norms, biases, buffers", "rest", rest),
        ("Graph, description, names and headers", "paper", total - positions - values - rest),
    ]
    entries = [
        (label, f"{numbers.byte_size(n)}, {numbers.share(n, total, 1)}", style, float(n)) for label, style, n in parts
    ]
    bound = source.footprint.everything.bound_bytes
    rows = [(label, numbers.count(n), numbers.share(n, total, 1)) for label, _, n in parts]
    rows += [
        (f"As the file counts: {name}", numbers.count(n), numbers.share(n, total, 1))
        for name, n in source.footprint.parts.items()
    ]
    # Both kinds of parts add up to the whole file, so a reader can check one against the other.
    ends = [("Whole file", total), ("Entropy bound of the masks, and raw values", bound)]
    rows += [(label, numbers.count(n), numbers.share(n, total, 1)) for label, n in ends]
    pieces = bars(entries, stacked=True)
    times = numbers.significant(total / bound, 3) if bound else numbers.NONE
    return Figure(
        "The whole file by part",
        Bars(pieces, kind="stack"),
        Table("Bytes of the whole file by part", ("part", "bytes", "of the file"), rows),
        # Below 1 it is possible: the archive's codec compresses values too.
        f"{numbers.byte_size(total)} in all, {times} times the entropy bound of {numbers.byte_size(bound)}, which "
        f"counts values without compression.",
        [Key(piece.style, piece.label, piece.text) for piece in pieces],
    )


def _formats(source: Source) -> Figure:
    """Returns the figure of the model's bytes in each format, beside the file itself."""
    measured = source.footprint
    sums = [measured.everything, measured.prunable, measured.model]
    bytes_by_label = {
        "Dense": [sizes.dense_bytes for sizes in sums],
        **{column.label: [sizes.codec_bytes[codec] for sizes in sums] for codec, column in size_columns().items()},
        "Bound: mask entropy, raw values": [sizes.bound_bytes for sizes in sums],
    }
    whole = [(label, everything) for label, (everything, _, _) in bytes_by_label.items()]
    # The bound is no format, so it is drawn in a color of its own.
    entries = [
        (label, numbers.byte_size(n), "bound" if i == len(whole) - 1 else "rest", float(n))
        for i, (label, n) in enumerate(whole)
    ]
    here = (
        f"This {kind_of_file(source.kind)}",
        numbers.byte_size(measured.file_bytes),
        "values",
        float(measured.file_bytes),
    )
    rows = [
        (label, numbers.count(prunable), numbers.count(model), numbers.count(everything))
        for label, (everything, prunable, model) in bytes_by_label.items()
    ]
    # The file itself counts once, with everything in it, so two of its cells are empty.
    rows.append((here[0], "", "", numbers.count(measured.file_bytes)))
    headers = ("format", "prunable weights", "whole model", "with buffers")
    others = f"{'its graph, ' if source.has_graph else ''}a description, names and headers"
    return Figure(
        "Parameters and buffers in each format",
        Bars(bars([*entries, here])),
        Table("Bytes of the model in each format", headers, rows),
        f"Formats count parameters and buffers alone; this {kind_of_file(source.kind)} also holds {others}.",
    )
