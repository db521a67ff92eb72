"""Coverage of a graph by compiled kernels: how many nodes they run, and why the others run on the reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import TypedDict

from dsr_tool.errors import first_line

__all__ = ["Coverage", "CoverageDocument", "Fallback", "coverage_text", "describe_failure"]


@dataclass(frozen=True)
class Fallback:
    """A node that runs on the reference because no kernel computes it.

    Attributes:
        operator: ONNX operator of the node (`Tile`).
        output: name of its first output.
        reason: `no kernel`, `declined` (the operator has a lowering rule, which does not support this form of it), or
            `failed: ...` with the exception that the rule raised.
    """

    operator: str
    output: str
    reason: str

    @property
    def failed(self) -> bool:
        """True if the lowering rule raised: the node is invalid, or the rule has a bug."""
        return self.reason.startswith("failed")


def describe_failure(error: Exception) -> str:
    """Returns the reason of a fallback whose lowering rule raised: type, message and line of the exception."""
    # A reference to the exception would keep the compiler's frames alive as long as the plan; text is enough.
    place = extract_tb(error.__traceback__)[-1]
    return f"failed: {type(error).__name__}: {first_line(error)} ({Path(place.filename).name}:{place.lineno})"


@dataclass(frozen=True)
class Coverage:
    """The share of a plan that compiled kernels compute.

    Nodes are counted after folding and fusing: a norm that was folded into a convolution, or a shape that is known, is
    not there any more.

    Attributes:
        nodes: number of nodes that run for each input.
        fallbacks: the ones that run on the reference, in order.
    """

    nodes: int
    fallbacks: tuple[Fallback, ...] = ()

    def to_dict(self) -> CoverageDocument:
        """Returns what the JSON documents of `bench`, `predict` and `report` say under the key `fallback`."""
        operators = dict.fromkeys(fallback.operator for fallback in self.fallbacks)
        return {"nodes": self.nodes, "on_reference": len(self.fallbacks), "operators": list(operators)}


class CoverageDocument(TypedDict):
    """A coverage as JSON.

    Attributes:
        nodes: number of nodes that run for each input.
        on_reference: number of those that run on the reference.
        operators: operators that run on the reference, each once, in the order of the graph.
    """

    nodes: int
    on_reference: int
    operators: list[str]


def coverage_text(document: CoverageDocument) -> str:
    """Returns one sentence, such as `2 of 124 nodes run on the reference: Tile, GridSample`."""
    if not document["on_reference"]:
        return f"all {document['nodes']} nodes run on compiled kernels"
    share = f"{document['on_reference']} of {document['nodes']} nodes run on the reference"
    return f"{share}: {', '.join(document['operators'])}"
