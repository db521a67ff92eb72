"""The bench document as sentences and a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsr_tool.measure.latency_layers_text import layers_text
from dsr_tool.report.tables import megabytes, plain_table, render
from dsr_tool.runtime.coverage import coverage_text

if TYPE_CHECKING:
    from rich.table import Table

    from dsr_tool.measure.latency_schema import BenchDocument, Outputs

__all__ = ["bench_text"]


def bench_text(document: BenchDocument) -> str:
    """Returns the document as text, which says so if the dense model is as fast or faster."""
    size = "x".join(map(str, document["input_shape"]))
    threads = "1 thread" if document["threads"] == 1 else f"{document['threads']} threads"
    lines = [
        f"{document['architecture']}, {document['batch']} x {size}, {threads}, {document['rounds']} rounds; medians",
        render(_table(document)),
        _latency_line(document),
        _outputs_line(document["outputs"]),
    ]
    if document["fallback"]:
        lines.append(coverage_text(document["fallback"]))
    if document["runs_on"] == "onnxruntime":
        lines.append("the model is too dense for sparse kernels, so onnxruntime ran both")
    if document["load_s"] is None:
        lines.append(
            "start and memory were not measured: that needs Linux, whose /proc tells how much memory a process holds"
        )
    if document["layers"] is not None:
        lines.append(layers_text(document["layers"]))
    return "\n".join(lines)


def _table(document: BenchDocument) -> Table:
    titles = ("latency ms", "quartiles ms", "load s", "loaded MB", "peak MB")
    table = plain_table("runtime", *titles, numbers=titles)
    kernels = f" ({document['kernels']})" if document["kernels"] else ""
    latency = document["latency"]
    rows = (
        ("ours", f"{document['runtime']}{kernels}", latency["ours_s"]),
        ("dense", "onnxruntime, dense", latency["dense_s"]),
    )
    for side, name, seconds in rows:
        quartiles = f"{1e3 * seconds['low']:.2f}-{1e3 * seconds['high']:.2f}"
        table.add_row(name, f"{1e3 * seconds['median']:.2f}", quartiles, *_child_cells(document, side))
    return table


def _child_cells(document: BenchDocument, side: str) -> list[str]:
    """Returns the cells of one side's child processes; empty ones if there were none."""
    load_s, loaded, peak = document["load_s"], document["loaded_bytes"], document["peak_bytes"]
    # The three come from the same children, so they are there together or not at all.
    if load_s is None or loaded is None or peak is None:
        return ["", "", ""]
    return [f"{load_s[side]:.2f}", megabytes(loaded[side]), megabytes(peak[side])]


def _latency_line(document: BenchDocument) -> str:
    ratio, verdict = document["latency"]["ratio"], document["latency"]["verdict"]
    figures = f"dense / {document['runtime']} {ratio['median']:.2f} (quartiles {ratio['low']:.2f}-{ratio['high']:.2f})"
    # The sentence claims no more than the quartiles allow.
    if verdict == "faster":
        return f"{figures}: {document['runtime']} is {ratio['median']:.2f} times as fast as dense"
    if verdict == "slower":
        return f"{figures}: dense is faster, by {1 / ratio['median']:.2f} times; run this model with onnxruntime"
    return f"{figures}: the spread includes 1, so neither is faster"


def _outputs_line(outputs: Outputs) -> str:
    if outputs["largest_difference"] is None:
        return "outputs contain NaN or infinity and were not compared"
    return f"outputs differ by {outputs['largest_difference']:.2g} at most, the largest being {outputs['scale']:.3g}"
