"""A plan file that predicts as sessions do: any number of inputs, and a description of the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.graph.ir import Value
from dsr_tool.runtime.deploy.plan import PlanFile
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.tensor import Array

__all__ = ["PlanSession", "in_batches"]

_Run = Callable[[Array], Mapping[str, Array]]


class PlanSession:
    """A plan that is ready to predict.

    A pickle holds the path of the file and the number of threads, and opens that file again.

    Attributes:
        path: the file.
        threads: number of threads that share the work of one run.
        config: architecture, input shape, preprocessing and labels of the model.
        outputs: names, shapes and types of the arrays that `run_all` returns; the batch is free.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        """Opens a plan.

        Args:
            path: the file.
            threads: number of threads that share the work of one run.

        Raises:
            FileError: there is no such file.
            FormatError: the plan is damaged, or for another processor or version.
            UsageError: the library was not built, or the plan takes several inputs.
        """
        plan = PlanFile(path, threads)
        if len(plan.inputs) != 1:
            raise UsageError(f"{str(path)!r} takes {len(plan.inputs)} inputs; predictions are made from one.")
        try:
            self.config = ModelConfig.from_dict(json.loads(plan.text("config") or ""))
        except (TypeError, ValueError) as error:
            raise FormatError(f"{str(path)!r} does not describe its model ({error}); export it again.") from error
        self.path, self.threads = Path(path), threads
        self.outputs = tuple(Value(value.name, (None, *value.shape[1:])) for value in plan.outputs)
        self._expected = plan.inputs[0].shape
        self._run = in_batches(plan.run, self._expected[0])

    def __reduce__(self) -> tuple[type[PlanSession], tuple[Path, int]]:
        return PlanSession, (self.path.absolute(), self.threads)

    def run(self, x: Array) -> Array:
        """Predicts as `run_all` does, and returns the first output."""
        return self.run_all(x)[self.outputs[0].name]

    def run_all(self, x: Array) -> Mapping[str, Array]:
        """Predicts any number of inputs; the plan runs as often as its batch size asks for.

        Args:
            x: float32 of shape (any, *shape of one input).

        Raises:
            UsageError: the type or the shape of `x` is not that of the plan's input.
        """
        if x.shape[1:] != self._expected[1:] or not len(x):
            expected = ", ".join(map(str, self._expected[1:]))
            raise UsageError(f"input of shape {x.shape} does not fit; the model expects (batch, {expected}).")
        return self._run(x)


def in_batches(run: _Run, batch: int) -> _Run:
    """Returns a function that runs any number of inputs, a batch at a time; the last one is filled up with zeros."""

    def run_all(x: Array) -> dict[str, Array]:
        padded = np.concatenate([x, np.zeros((-len(x) % batch, *x.shape[1:]), x.dtype)])
        found = [run(padded[i : i + batch]) for i in range(0, len(padded), batch)]
        return {name: np.concatenate([one[name] for one in found])[: len(x)] for name in found[0]}

    return run_all
