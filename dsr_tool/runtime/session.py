"""Running an archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dsr_tool.core.archive import Archive, open_archive
from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.folding import fold_norms
from dsr_tool.core.graph import Array, Value
from dsr_tool.errors import UsageError
from dsr_tool.runtime.plan import Plan

__all__ = ["Session"]


class Session:
    """A model that is ready to predict, with numpy and scipy alone.

    Weights stored as float16 are computed with in the type of the input. Of a model with several outputs, the first
    is computed. A session keeps no state between runs, so threads may share one.

    Attributes:
        config: what the model is.
        input: name, shape and type of what `run` takes; None in the shape where any size goes.
        output: the same of what it returns.
    """

    def __init__(self, source: Archive | str | Path) -> None:
        """Decode the weights, fold norms into convolutions, prepare every operator.

        Args:
            source: an open archive, or the path of one.

        Raises:
            FileError: there is no such file.
            FormatError: the archive is damaged.
            UsageError: it holds an operator that this runtime does not know.
        """
        archive = source if isinstance(source, Archive) else open_archive(source)
        graph = archive.graph
        if len(graph.inputs) != 1:
            raise UsageError(
                f"{str(archive.path)!r} takes {len(graph.inputs)} inputs; the sparse runtime runs models with one."
            )
        self.config = archive.config
        self.input: Value = graph.inputs[0]
        self.output: Value = graph.outputs[0]
        tensors = {name: _as_type(archive.tensor(name), self.input.dtype) for name in graph.parameters}
        self._plan = Plan(*fold_norms(graph, tensors))

    def run(self, x: Array) -> Array:
        """Predict.

        Args:
            x: a batch, of the shape and type that `input` says; usually float32 (batch, channels, height, width).

        Returns:
            The first output of the model, the batch first.

        Raises:
            UsageError: `x` has another rank, size or type.
        """
        x, shape = np.asarray(x), self.input.shape
        fits = len(x.shape) == len(shape) and all(
            wanted in (None, given) for given, wanted in zip(x.shape, shape, strict=True)
        )
        if not fits or 0 in x.shape:
            wanted = ", ".join("batch" if n is None else str(n) for n in shape)
            raise UsageError(f"input of shape {x.shape} does not fit; the model takes ({wanted}).")
        if x.dtype != np.dtype(self.input.dtype):
            raise UsageError(
                f"input of type {x.dtype} does not fit; the model takes {self.input.dtype}, so convert it with astype."
            )
        return self._plan.run(x)


def _as_type(tensor: SparseTensor, dtype: str) -> SparseTensor:
    if not np.issubdtype(tensor.values.dtype, np.floating):
        return tensor
    return SparseTensor(tensor.mask, tensor.values.astype(dtype, copy=False))
