"""What an operator is: a function of arrays, whose keyword parameters are the ONNX attributes by name."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Kernel", "Table", "takes"]

Kernel = Callable[..., Any]
Table = dict[str, Kernel]


@functools.cache
def takes(kernel: Kernel) -> tuple[int, float]:
    """How many inputs a kernel needs, and how many it takes at most."""
    if isinstance(kernel, np.ufunc):
        # Called with more, it would write into them.
        return kernel.nin, kernel.nin
    parameters = inspect.signature(kernel).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    any_number = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    needed = sum(parameter.default is parameter.empty for parameter in positional)
    return needed, math.inf if any_number else len(positional)
