"""Linear layers with sparse weights over rows of features, on the kernels of convolutions."""

from __future__ import annotations

from torch import Tensor

from dsr_tool.sparse.blocked.convolution import convolve
from dsr_tool.sparse.blocked.layout import block, unblock
from dsr_tool.sparse.blocked.plans import Geometry, Plans

__all__ = ["linear"]

_LANES = 16


def linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    out_features: int,
    plans: Plans,
    name: str,
    version: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns x times a sparse weight, transposed, plus a bias.

    Args:
        x: (..., in_features) float32: rows of features.
        values: (nnz,) float32: the non-zeros.
        positions: (nnz,) int32: their flat indices in the dense weight (out_features, in_features), ascending.
        out_features: features of a row of the result.
        plans: cache of plans.
        name: name of the layer in the cache.
        version: number that changes whenever `positions` does.
        bias: (out_features,) float32, or None.

    Returns:
        (..., out_features).
    """
    rows = x.reshape(-1, x.shape[-1])
    geometry = Geometry(out_features, x.shape[-1])
    out = convolve(block(rows, _LANES), values, positions, geometry, plans, name, version, bias)
    return unblock(out, rows.shape[0]).reshape(*x.shape[:-1], out_features)
