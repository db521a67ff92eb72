"""Step of torchvision's attention in windows (Swin), which multiplies by the weights of its layers itself.

Its shapes decide what it does, so it is not traced but called. While it runs, something else stands for each sparse
weight: multiplied by rows of features it calls the kernels, and anywhere else it is the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from dsr_tool.sparse.blocked.context import Context, Run, torch_step
from dsr_tool.sparse.blocked.layers import sparse_product
from dsr_tool.sparse.blocked.plans import Geometry
from dsr_tool.sparse.blocked.trace import sparse_names
from dsr_tool.sparse.compact.marks import plain_class

__all__ = ["StandIn", "window_attention_step"]

_KINDS = ("ShiftedWindowAttention.forward", "ShiftedWindowAttentionV2.forward")
"""Names of torchvision's functions that are known to multiply rows of features by their weights, and nothing else."""


class StandIn:
    """Stands for a sparse weight in calls of torch."""

    def __init__(self, multiply: Callable[[Tensor, Tensor | None], Tensor], dense: Callable[[], Tensor]) -> None:
        """Keeps both ways to use the weight.

        Args:
            multiply: takes rows of features (..., in) and a bias (out,) or None, and returns (..., out).
            dense: makes the dense weight (out, in).
        """
        self._multiply, self._dense = multiply, dense

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Multiplies by the weight, or calls any other function of torch with the dense one."""
        if function is functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
            if isinstance(given["weight"], cls) and isinstance(given["input"], Tensor):
                return given["weight"]._multiply(given["input"], given.get("bias"))
        args, given = pytree.tree_map(lambda each: each._dense() if isinstance(each, cls) else each, (args, kwargs))
        return function(*args, **(given or {}))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dense(), name)


def window_attention_step(node: fx.Node, context: Context) -> Run | None:
    """Returns the step of torchvision's attention in windows, or None for any other module."""
    module = context.module(node)
    forward = plain_class(module).forward
    if forward.__module__ != "torchvision.models.swin_transformer" or forward.__qualname__ not in _KINDS:
        return None
    stand_ins = {
        name: _stand_in(layer, name, context)
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
        for name in sparse_names(layer).values()
    }
    otherwise, store = torch_step(node, context), context.store

    def run(registers: Any) -> None:
        with store.standing_in(stand_ins):
            otherwise(registers)

    return run


def _stand_in(layer: nn.Linear, name: str, context: Context) -> StandIn:
    geometry = Geometry(layer.out_features, layer.in_features)
    return StandIn(sparse_product(name, geometry, context), lambda: context.store.dense(name))
