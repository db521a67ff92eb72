"""Opening the source of a session: a model in any container that holds a computation."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Graph
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["Model", "ModelInMemory", "open_model"]

_TABLE = "exporters.containers"
"""Module with the table of containers, imported by name when a file is opened: it stands on a floor above this one, and
the row of ONNX files needs the package onnx (`docs/decisions/0008-sessions-of-onnx-files.md`)."""


class Model(Protocol):
    """A computation and its weights: an open archive or ONNX file."""

    @property
    def path(self) -> Path:
        """Path of the file."""

    @property
    def config(self) -> ModelConfig:
        """Description of the model."""

    @property
    def graph(self) -> Graph:
        """The computation."""

    def tensor(self, name: str) -> SparseTensor:
        """Decodes one of the graph's parameters."""


@dataclass(frozen=True)
class ModelInMemory:
    """A computation and its weights without a file; sessions and plan files are made of it as of an archive.

    Attributes:
        path: path of the model that it was made from; nothing is read from it.
        config: description of the model.
        graph: the computation.
        tensors: every parameter of the graph by name.
    """

    path: Path
    config: ModelConfig
    graph: Graph
    tensors: Mapping[str, SparseTensor]

    def tensor(self, name: str) -> SparseTensor:
        """Returns one of the parameters."""
        return self.tensors[name]


def open_model(source: Model | str | Path) -> Model:
    """Opens and checks a file; weights are decoded when they are asked for.

    Args:
        source: path of an archive or an ONNX file, recognised by its content; or a model that is open already.

    Raises:
        DsrError: the file needs a package that is not installed.
        FileError: there is no such file, or it cannot be read.
        FormatError: no container recognises the file, or it holds no computation, is damaged, or has values of a type
            that archives do not have.
        UsageError: the model has several inputs.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        model: Model = importlib.import_module(_TABLE).reader_of(path)(path)
    else:
        model = source
    if len(model.graph.inputs) != 1:
        raise UsageError(
            f"{str(model.path)!r} takes {len(model.graph.inputs)} inputs; the sparse runtime runs models with one."
        )
    return model
