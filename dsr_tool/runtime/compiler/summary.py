"""A line about each op of a plan, for whoever measures it: what it computes, and how the work is cut."""

from __future__ import annotations

import ctypes
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.layouts import Planes, Value
from dsr_tool.runtime.kernels import ops as table

if TYPE_CHECKING:
    from dsr_tool.runtime.compiler.op import Op

__all__ = ["OpSummary", "OpTime", "Origin", "summary_of"]


class Origin(NamedTuple):
    """The node that an op was made for.

    Attributes:
        operator: ONNX operator of the node (`Conv`).
        node: name of its first output.
        layer: module whose weights it reads (`layer1.0.conv1`); empty if it reads none.
    """

    operator: str
    node: str
    layer: str

    @classmethod
    def of(cls, node: Node, constants: Container[str]) -> Origin:
        """Returns the origin of a node, whose weights are named as in a state_dict.

        Args:
            node: the node.
            constants: names of the values that are known.
        """
        weights = (name.rpartition(".")[0] for name in node.inputs if name in constants)
        return cls(node.op, node.outputs[0], next(filter(None, weights), ""))


@dataclass(frozen=True)
class OpSummary:
    """One op, or one node that the reference computes.

    Attributes:
        kind: the row of ops.def; `reference` for a node on the reference.
        origin: the node.
        shape: shape of the result, without the batch.
        layout: layout of the result in words; empty if it has none.
        multiply_adds: multiply-adds of active weights with pixels that exist, for the whole batch.
        tile: output vectors that are held in registers; 0 for kinds without tiles.
        block: input channels that are kept in the cache together; 0 for kinds without blocks.
        blocks: number of blocks.
        density: density of its weight; None if it has none.
        with_zeros: True if inactive weights are multiplied too.
        on_reference: True if no kernel computes it.
    """

    kind: str
    origin: Origin
    shape: tuple[int, ...]
    layout: str = ""
    multiply_adds: int = 0
    tile: int = 0
    block: int = 0
    blocks: int = 0
    density: float | None = None
    with_zeros: bool = False
    on_reference: bool = False


class OpTime(NamedTuple):
    """An op and the nanoseconds that it took in one run, over all inputs of the batch."""

    op: OpSummary
    nanoseconds: int


def summary_of(op: Op, struct: table.Op, origin: Origin | None, batch: int) -> OpSummary:
    """Summarizes an op.

    Args:
        op: the op; all halos must be final.
        struct: what the kernels read for it.
        origin: its node; None for an op that only moves a value.
        batch: number of times that it runs for one input of the plan.
    """
    parameters = getattr(struct, op.kind.name.lower(), None)
    tile, block, blocks, with_zeros = 0, 0, 0, False
    if parameters is not None and getattr(parameters, "parts", None):
        part = ctypes.cast(parameters.parts, ctypes.POINTER(table.STRUCTS["Part"])).contents
        blocks, with_zeros = part.last - part.first, bool(part.dense)
        tile = getattr(parameters, "tile", 0)
        channels = op.source.channels if isinstance(op.source, Planes) else op.source.size
        block = -(-channels // blocks)
    return OpSummary(
        op.kind.name,
        origin or Origin("", "", ""),
        op.out.shape[1:],
        _layout(op.out),
        op.multiply_adds * batch,
        tile,
        block,
        blocks,
        op.density,
        with_zeros,
    )


def _layout(value: Value) -> str:
    """Returns words such as `4 x 402 + 59 vectors`: phases, vectors of a plane, and of its halo."""
    if not isinstance(value, Planes):
        return "entries"
    phases = f"{value.phases} x " if value.phases > 1 else ""
    halo = value.halo_before + value.halo_after
    return f"{phases}{value.grid.length}{f' + {halo}' if halo else ''} vectors"
