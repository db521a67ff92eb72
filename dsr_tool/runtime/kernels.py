"""What an operator is: a function of arrays, whose keyword parameters are the ONNX attributes by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Kernel", "Table"]

Kernel = Callable[..., Any]
Table = dict[str, Kernel]
