"""Counts the nodes of a model file that the compiled kernels leave to the reference, for `dsr-tool report`."""

from __future__ import annotations

from dsr_tool.errors import DsrError
from dsr_tool.report.sources import Source
from dsr_tool.runtime import Session
from dsr_tool.runtime.coverage import CoverageDocument

__all__ = ["fallback_document"]


def fallback_document(source: Source) -> CoverageDocument | None:
    """Compiles a model file for one input and counts the nodes that no kernel computes.

    Args:
        source: anything that can be reported; folders and files of matrices have no graph to compile.

    Returns:
        The counts; None if there is no graph, no fixed input shape or no kernel library, or if the runtime does not
        support the model (`dsr-tool predict` says why).
    """
    if not source.has_graph:
        return None
    try:
        # `native`, because `auto` would hand a dense model to ONNX Runtime, which says nothing about the kernels.
        coverage = Session(source.path, runtime="native").coverage
    except DsrError:
        # A report is about bytes and weights, which are there whether or not the model can be executed.
        return None
    return coverage.to_dict() if coverage else None
