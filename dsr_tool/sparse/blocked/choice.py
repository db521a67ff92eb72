"""Which layers run on sparse kernels, and which multiply by a dense weight that is made for the moment."""

from __future__ import annotations

from dsr_tool.sparse.blocked.plans import Geometry

__all__ = ["prefers_dense"]

_DENSEST = 0.5
"""Density above which a layer of many channels multiplies by a dense weight."""


def prefers_dense(geometry: Geometry, density: float, plane: int) -> bool:
    """Returns whether a layer is faster with its weight scattered into a dense one.

    Args:
        geometry: the convolution; a linear layer is one of a single tap.
        density: share of its weights that are active.
        plane: number of pixels of its input.
    """
    del plane
    if geometry.groups > 1:
        return False
    return density > _DENSEST
