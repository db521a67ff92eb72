"""The time of each op as a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsr_tool.report.tables import plain_table, render

if TYPE_CHECKING:
    from dsr_tool.measure.latency_schema import LayerRow, Layers

__all__ = ["layers_text"]


def layers_text(layers: Layers) -> str:
    """Returns a table of all ops, in the order in which they run, and two sentences about the whole."""
    numbers = ("ms", "share", "GFLOP/s", "of peak", "density", "tile", "block")
    table = plain_table("op", "layer or node", "shape", "layout", *numbers, numbers=numbers)
    for row in layers["ops"]:
        table.add_row(*_cells(row))
    gflops, best = layers["gflops"], layers["peak_gflops"]
    lines = [
        render(table),
        f"all ops {1e3 * layers['ops_s']:.2f} ms of {1e3 * layers['whole_s']:.2f} ms for a run; medians",
        f"{gflops:.1f} GFLOP/s with active weights, {gflops / best:.0%} of the {best:.0f} that multiply-adds in "
        f"registers reach here",
    ]
    if layers["reference_s"]:
        number = sum(row["on_reference"] for row in layers["ops"])
        nodes = "1 node" if number == 1 else f"{number} nodes"
        lines.append(f"{nodes} on the reference took {1e3 * layers['reference_s']:.2f} ms")
    return "\n".join(lines)


def _cells(row: LayerRow) -> list[str]:
    gflops, peak_share, density = row["gflops"], row["peak_share"], row["density"]
    blocks = f"{row['block']} x {row['blocks']}" if row["blocks"] else ""
    return [
        f"reference {row['operator']}" if row["on_reference"] else row["kind"],
        row["layer"] or row["node"],
        "x".join(map(str, row["shape"])),
        row["layout"],
        f"{1e3 * row['seconds']:.3f}",
        f"{row['share']:.1%}",
        "" if gflops is None else f"{gflops:.1f}",
        "" if peak_share is None else f"{peak_share:.0%}",
        "" if density is None else f"{density:.3f}{' with zeros' if row['with_zeros'] else ''}",
        str(row["tile"] or ""),
        blocks,
    ]
