"""The choice between the sparse kernels and a dense weight that is made for the moment."""

from __future__ import annotations

from dsr_tool.sparse.blocked.plans import Geometry

__all__ = ["prefers_dense"]

_DENSEST = 0.85
"""Density above which a layer multiplies by a dense weight.

Forward and backward pass together, on one thread of an EPYC with AVX-512, took the dense product 1.02 to 2.5 times as
long at density .8, in all of 12 convolutions (16 to 2048 channels, 4 to 32 pixels wide) and 5 linear layers.
"""


def prefers_dense(geometry: Geometry, density: float) -> bool:
    """Returns whether a layer is faster with its weight scattered into a dense one.

    Layers of groups, which torch is slow at, never are.

    Args:
        geometry: the convolution; a linear layer is one of a single tap.
        density: share of its weights that are active.
    """
    return geometry.groups == 1 and density > _DENSEST
