"""What `dsr-tool bench` measured, as sentences and a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsr_tool.report.tables import megabytes, plain_table, render

__all__ = ["bench_text"]


def bench_text(document: Mapping[str, Any]) -> str:
    """The same for a terminal; says plainly when the dense model is as fast or faster."""
    size = "x".join(map(str, document["input_shape"]))
    threads = "1 thread" if document["threads"] == 1 else f"{document['threads']} threads"
    lines = [
        f"{document['architecture']}, {document['batch']} x {size}, {threads}, {document['rounds']} rounds; medians",
        render(_table(document)),
        _latency(document),
        _outputs(document["outputs"]),
    ]
    if document["runs_on"] == "onnxruntime":
        lines.append("the model is too dense for sparse kernels, so onnxruntime ran both")
    if document["load_s"] is None:
        lines.append("start and memory were not measured: that needs Linux, whose /proc says what a process holds")
    return "\n".join(lines)


def _table(document: Mapping[str, Any]) -> Any:
    titles = ("latency ms", "quartiles ms", "load s", "loaded MB", "peak MB")
    table = plain_table("runtime", *titles, numbers=titles)
    kernels = f" ({document['kernels']})" if document["kernels"] else ""
    for key, name in (("ours", f"{document['runtime']}{kernels}"), ("dense", "onnxruntime, dense")):
        seconds = document["latency"][f"{key}_s"]
        quartiles = f"{1e3 * seconds['low']:.2f}-{1e3 * seconds['high']:.2f}"
        table.add_row(name, f"{1e3 * seconds['median']:.2f}", quartiles, *_child(document, key))
    return table


def _child(document: Mapping[str, Any], key: str) -> list[str]:
    if document["load_s"] is None:
        return ["", "", ""]
    sizes = [megabytes(document[name][key]) for name in ("loaded_bytes", "peak_bytes")]
    return [f"{document['load_s'][key]:.2f}", *sizes]


def _latency(document: Mapping[str, Any]) -> str:
    ratio, verdict = document["latency"]["ratio"], document["latency"]["verdict"]
    figures = f"dense / {document['runtime']} {ratio['median']:.2f} (quartiles {ratio['low']:.2f}-{ratio['high']:.2f})"
    if verdict == "faster":
        return f"{figures}: {document['runtime']} is {ratio['median']:.2f} times as fast as dense"
    if verdict == "slower":
        return f"{figures}: dense is faster, by {1 / ratio['median']:.2f} times; run this model with onnxruntime"
    return f"{figures}: the spread includes 1, so that neither is faster"


def _outputs(outputs: Mapping[str, Any]) -> str:
    if outputs["largest_difference"] is None:
        return "outputs are not finite, and were not compared"
    return f"outputs differ by {outputs['largest_difference']:.2g} at most, the largest being {outputs['scale']:.3g}"
