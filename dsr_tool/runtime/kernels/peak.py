"""The most multiply-adds that this processor can do, as the kernels measure it."""

from __future__ import annotations

import ctypes

from dsr_tool.errors import UsageError
from dsr_tool.runtime.kernels.library import library

__all__ = ["peak"]


def peak() -> float:
    """Returns the GFLOP/s of one thread whose multiply-adds stay in registers; measures for about 10 ms.

    Raises:
        UsageError: there are no kernels here.
    """
    kernels = library()
    if kernels is None:
        raise UsageError("the peak is measured by the kernels, and there are none here; `dsr-tool doctor` says why.")
    kernels.dsr_peak.restype = ctypes.c_double
    return float(kernels.dsr_peak())
