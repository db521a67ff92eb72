"""A model that passed the checks of every export, with its graph captured once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Graph, Value
from dsr_tool.sparse.feeding import INPUT, require_floats
from dsr_tool.sparse.macs import run_once
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.values import stored_as

__all__ = ["CheckedModel"]


class CheckedModel:
    """A model whose weights and masks agree, in float32, with a known input shape.

    Attributes:
        model: the model.
        values: how its export stores weights, one of `exporters.values.VALUES`; None outside an export.
        rounded: weights that are rounded already, by name, in place of rounding each value by itself.
    """

    def __init__(
        self,
        model: SparseModel,
        values: str | None = None,
        rounded: Mapping[str, GridTensor] | None = None,
        graph: Graph | None = None,
    ) -> None:
        """Checks a model.

        Args:
            model: the model.
            values: how its export stores weights; None outside an export.
            rounded: see the attribute; None for none.
            graph: the computation of the model; None to capture it when it is asked for.

        Raises:
            CheckFailed: weights and masks disagree.
            UsageError: weights of another type than float32, an unknown input shape, outputs without real numbers, or
                a graph with parameters of another network.
        """
        # Loading a dense state_dict into a sparse model undoes its sparsity silently; this finds it.
        (model.check if values is None else model.check_writable)()
        # Graphs and kernels compute in the type of the input, which is float32 for every export.
        # Whole numbers are stored as they are; complex ones were refused by the check.
        real = (p.dtype for p in model.module.parameters() if p.is_floating_point())
        other = next((dtype for dtype in real if dtype != torch.float32), None)
        if other is not None:
            raise UsageError(f"weights of {other} cannot be exported; call model.to(torch.float32) first.")
        if not model.config.input_shape:
            raise UsageError(
                f"{model.config.architecture} has no input shape, which an export needs; give an input size when you "
                f"convert it."
            )
        # Before anything is encoded. Compact storage holds values that no meta device stands for; its outputs are
        # looked at when they are compared.
        if model.store is None:
            require_floats(run_once(model.module, model.config.input_shape), type(model.module).__name__)
        self.model = model
        self.values = values
        self.rounded = dict(rounded or {})
        if graph is not None:
            foreign = [name for name in graph.parameters if name not in model.specs]
            if foreign:
                raise UsageError(
                    f"graph has a parameter {foreign[0]!r} that the model lacks; give the model's own graph."
                )
            self.graph = graph

    @property
    def input(self) -> Value:
        """Name, shape and type of the model's input; the batch is free."""
        return Value(INPUT, (None, *self.model.config.input_shape), "float32")

    def stored(self, tensors: Mapping[str, SparseTensor], specs: Mapping[str, LayerSpec]) -> dict[str, SparseTensor]:
        """Returns tensors as the file of this export holds them.

        Args:
            tensors: those of the model, or of its graph after compaction.
            specs: description of each.

        Raises:
            UsageError: a weight that float16 cannot hold.
        """
        left = {name: spec for name, spec in specs.items() if name not in self.rounded}
        found = stored_as(tensors, left, self.values or "fp32")
        return {name: self.rounded.get(name, tensor) for name, tensor in found.items()}

    @cached_property
    def graph(self) -> Graph:
        """The computation of the model.

        Capturing takes a second for a small model and more for a large one; export and verification share the result.

        Raises:
            UsageError: the module cannot be captured.
        """
        return trace(self.model.module, self.model.config.input_shape)
