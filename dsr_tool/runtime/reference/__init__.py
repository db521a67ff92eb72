"""The reference: every operator as one numpy or scipy function, and an interpreter that runs a graph with them.

It says what a graph computes: the compiled kernels are tested against it, and it computes the operators that have no
kernel. Each module but `call`, `interpreter` and `matrices` ends with a table `FUNCTIONS` of its operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from dsr_tool.sparsity.tensor import Array

__all__ = ["NumpyFunction"]

NumpyFunction: TypeAlias = Callable[..., Array | tuple[Array, ...]]
"""An operator: its inputs are the positional arguments, None where one is left out, and its ONNX attributes are the
keyword arguments. It returns the first output, or a tuple of all outputs."""
