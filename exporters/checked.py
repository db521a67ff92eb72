"""A model that passed the checks of every export, with its graph captured once."""

from __future__ import annotations

from functools import cached_property

import torch

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Graph, Value
from dsr_tool.sparse.capture import INPUT
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.trace import trace

__all__ = ["CheckedModel"]


class CheckedModel:
    """A model whose weights and masks agree, in float32, with a known input shape.

    Attributes:
        model: the model.
    """

    def __init__(self, model: SparseModel) -> None:
        """Checks a model.

        Raises:
            CheckFailed: weights and masks disagree.
            UsageError: weights of another type than float32, or an unknown input shape.
        """
        # Loading a dense state_dict into a sparse model undoes its sparsity silently; this finds it.
        model.check()
        # Graphs and kernels compute in the type of the input, which is float32 for every export.
        other = next((p.dtype for p in model.module.parameters() if p.dtype != torch.float32), None)
        if other is not None:
            raise UsageError(f"weights of {other} cannot be exported; call model.to(torch.float32) first.")
        if not model.config.input_shape:
            raise UsageError(
                f"{model.config.architecture} has no input shape, which an export needs; give an input size when you "
                f"convert it."
            )
        self.model = model

    @property
    def input(self) -> Value:
        """Name, shape and type of the model's input; the batch is free."""
        return Value(INPUT, (None, *self.model.config.input_shape), "float32")

    @cached_property
    def graph(self) -> Graph:
        """The computation of the model.

        Capturing takes a second for a small model and more for a large one; export and verification share the result.

        Raises:
            UsageError: the module cannot be captured.
        """
        return trace(self.model.module, self.model.config.input_shape)
