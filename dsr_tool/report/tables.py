"""Footprints as JSON documents and as tables for a terminal."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Container, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dsr_tool.formats.codecs import size_columns
from dsr_tool.formats.footprint import Footprint, Sizes
from dsr_tool.report.runlog import RunSummary
from dsr_tool.report.sources import Source
from dsr_tool.report.values import value_bits, value_document, value_text

__all__ = ["megabytes", "plain_table", "render", "report_document", "report_text"]

_CONSOLE_WIDTH = 400
"""Characters per line; wider than any table, because a truncated number would be a wrong one."""
_COLUMNS = (
    "parameters",
    "active",
    "density",
    "dense MB",
    *(f"{column.name} MB" for column in size_columns().values()),
    "bound MB",
    "MMACs",
    "of",
)


def report_document(source: Source) -> dict[str, Any]:
    """Returns the report as plain values, schema `dsr-tool/report/1`."""
    return {
        "schema": "dsr-tool/report/1",
        "path": str(source.path),
        "kind": source.kind,
        "config": source.config.to_dict() if source.config else None,
        "training": source.training,
        "compaction": source.saved.to_dict() if source.saved else None,
        "values": value_document(value_bits(source)),
        **source.footprint.to_dict(),
    }


def report_text(source: Source, document: Mapping[str, Any] | None = None) -> str:
    """Returns the report as tables: each weight, all other parameters by reason, the whole model, and the file.

    Args:
        source: what is reported.
        document: the result of `report_document`, if it was made already.
    """
    values = (document or report_document(source))["values"]
    measured = source.footprint
    name = f"{source.config.architecture}, " if source.config else ""
    lines = [f"{source.path}: {name}{source.kind}, {measured.file_bytes:,} bytes"]
    if source.training:
        lines.append(_training_line(source.training))
    # Tables first: in a terminal, the sums at the end stay in sight.
    lines += [render(_layers(measured)), render(_totals(measured)), *_compaction(source), *_closing(source, values)]
    return "\n".join(lines)


def plain_table(*headers: str, numbers: Container[str]) -> Table:
    """Returns an empty table; columns in `numbers` are aligned right."""
    # Names are never wrapped, so that a row stays a line for grep and awk.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in numbers else "left", no_wrap=True)
    return table


def render(table: Table) -> str:
    """Returns a table as text, each line as long as it needs to be."""
    # Rich pads every row to the width of the table; the spaces at the ends would wrap in a narrow terminal.
    text = io.StringIO()
    Console(file=text, width=_CONSOLE_WIDTH, markup=False, emoji=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def megabytes(nbytes: int) -> str:
    """Formats bytes in MB, which are 10^6 bytes, with two or three decimals."""
    # Three decimals are kB, which small layers need; from 10 MB on they would be noise.
    return f"{nbytes / 1e6:,.3f}" if nbytes < 10**7 else f"{nbytes / 1e6:,.2f}"


def _layers(measured: Footprint) -> Table:
    """Returns a row for each weight, and one for all other parameters of the same role and reason."""
    table = plain_table("layer", "role", *_COLUMNS, "why", numbers=_COLUMNS)
    for layer in measured.layers:
        if layer.spec.weight:
            table.add_row(layer.spec.name, layer.spec.role, *_numbers(layer.sizes), layer.spec.reason)
    # A model has hundreds of norms and biases, which share a few reasons.
    rest: dict[tuple[str, str], list[Sizes]] = {}
    for layer in measured.layers:
        if not layer.spec.weight:
            rest.setdefault((layer.spec.role, layer.spec.reason), []).append(layer.sizes)
    # `Sizes()` starts the sum: sizes add up like numbers, but not to 0.
    for (role, reason), sizes in rest.items():
        table.add_row(f"{len(sizes)} more", role, *_numbers(sum(sizes, Sizes())), reason)
    return table


def _numbers(sizes: Sizes) -> list[str]:
    """Returns the cells of `_COLUMNS`."""
    # Biases and norms multiply nothing; a zero there would look like saved work.
    macs = [f"{macs / 1e6:,.2f}" if sizes.dense_macs else "" for macs in (sizes.sparse_macs, sizes.dense_macs)]
    sized = (sizes.dense_bytes, *(sizes.codec_bytes[codec] for codec in size_columns()), sizes.bound_bytes)
    counts = [f"{sizes.parameters:,}", f"{sizes.active:,}", f"{sizes.density:.4f}"]
    return [*counts, *(megabytes(nbytes) for nbytes in sized), *macs]


def _totals(measured: Footprint) -> Table:
    """Returns a row for each set of tensors over which sums are taken."""
    table = plain_table("in all", *_COLUMNS, numbers=_COLUMNS)
    table.add_row("prunable weights", *_numbers(measured.prunable))
    table.add_row("whole model", *_numbers(measured.model))
    table.add_row("with buffers", *_numbers(measured.everything))
    return table


def _compaction(source: Source) -> list[str]:
    """Returns what compaction removed from each layer and in all; nothing for a file that was not compacted."""
    saved = source.saved
    if saved is None:
        return []
    columns = ("filters", "of", "input channels", "of ")  # the space makes the two column names differ
    table = plain_table("compacted", *columns, numbers=columns)
    for layer in saved.layers:
        (filters, kept), (inputs, used) = layer.filters, layer.inputs
        table.add_row(layer.weight, f"{kept:,}", f"{filters:,}", f"{used:,}", f"{inputs:,}")
    # All other tables describe the compacted model, so the counts before it stand only here.
    pairs = (saved.weights, saved.active, saved.dense_macs, saved.sparse_macs)
    weights, active, dense, sparse = (f"{before:,} -> {after:,}" for before, after in pairs)
    return [
        *([render(table)] if saved.layers else []),
        f"compaction removed {saved.filters:,} filters and {saved.inputs:,} input channels in {len(saved.layers)} "
        f"layers: weights {weights}, active {active}; multiply-adds {dense}, with active weights {sparse}; the file "
        f"takes {source.footprint.file_bytes:,} bytes, {saved.plain_bytes:,} without compaction",
    ]


def _closing(source: Source, values: Mapping[str, Any] | None) -> list[str]:
    """Returns the sparsities, the parts of the file, its size, and the units of the tables."""
    measured = source.footprint
    parts = ", ".join(f"{name} {nbytes:,}" for name, nbytes in measured.parts.items())
    # One is the size in the file system, the other the sum of all parts that were found: a difference means that the
    # report missed or double counted bytes, not that the file is damaged.
    agree = "agrees" if measured.computed_bytes == measured.file_bytes else "DOES NOT AGREE"
    size = "x".join(map(str, source.config.input_shape)) if source.config else "the file's size"
    size = size or "any size, as far as their number is known,"
    folded = ["an ONNX file has no masks: active weights are those that are not zero, and norms are folded into them"]
    return [
        *(folded if source.kind == "onnx" else []),
        f"sparsity: {measured.sparsity:.4%} of the prunable weights, {measured.model_sparsity:.4%} of the whole model",
        *_patterns(measured),
        f"bytes: {parts}",
        *value_text(values),
        f"size on disk {measured.file_bytes:,}, computed {measured.computed_bytes:,}: {agree}; "
        f"{_dense(measured)} {measured.everything.dense_bytes:,}, entropy bound {measured.everything.bound_bytes:,}",
        f"MB are 10^6 bytes; MMACs are millions of multiply-adds for one input of {size}, with active weights and with "
        "all; coded: run lengths or groups N:M, and byte planes, Huffman-coded; bound: log2 C(parameters, active) bits "
        "(of N:M, log2 C(M, N) for each group) and raw values, or the entropy of codes",
    ]


def _patterns(measured: Footprint) -> list[str]:
    """Returns the patterns that masks have, and how many have each; nothing if none has one."""
    sparse = [layer.pattern for layer in measured.layers if layer.spec.role == "sparse"]
    counts = Counter(pattern for pattern in sparse if pattern)
    found = ", ".join(f"{pattern} in {number:,}" for pattern, number in counts.most_common())
    return [f"pattern of the masks: {found} of {len(sparse):,} sparse weights"] if counts else []


def _dense(measured: Footprint) -> str:
    """Returns the name of the dense size: `dense fp32`, or with the other types that the weights have."""
    # Norms and biases stay in fp32 in an fp16 file, so the name of the type then says that it is the weights'.
    bits = {8 * layer.sizes.dense_bytes // layer.sizes.parameters for layer in measured.layers if layer.spec.weight}
    return f"dense {' and '.join(f'fp{n}' for n in sorted(bits))}".rstrip() + (" (weights)" if bits - {32} else "")


def _training_line(training: RunSummary) -> str:
    """Returns the summary of a run's log as one line."""
    # A run that ended before its first epoch has no accuracy.
    best, last = training["best_test_accuracy"], training["last_test_accuracy"]
    accuracy = ""
    if last is not None and best is not None:
        accuracy = f"test accuracy {last:.4f} (best {best:.4f} in epoch {training['best_epoch']})"
    status = "" if training["status"] == "complete" else f" (NOT COMPLETE: {training['status']})"
    return (
        f"trained{status} with {training['method']} on {training['data']}, {training['epochs']} epochs: {accuracy}; "
        f"{training['reallocations']} reallocations dropped {training['weights_moved']:,} weights"
    )
