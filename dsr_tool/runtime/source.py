"""What a session runs: an archive, or a file of another kind whose reader stands on a floor above."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from dsr_tool.errors import DsrError, UsageError, first_line
from dsr_tool.files import require_file
from dsr_tool.formats.archive import open_archive
from dsr_tool.graph.ir import Graph
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["Model", "open_model", "reader_of"]

_READERS = {".onnx": "exporters.onnx.graph"}
"""By the ending of a file, which module has the function `open_onnx` for it, imported when one is opened: that module
needs packages that this floor does without (`docs/decisions/0008-sessions-of-onnx-files.md`)."""


class Model(Protocol):
    """A computation and its weights, as an archive has them."""

    @property
    def path(self) -> Path:
        """Where the file lies."""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""

    @property
    def graph(self) -> Graph:
        """Its computation."""

    def tensor(self, name: str) -> SparseTensor:
        """One of the graph's parameters, decoded."""


def open_model(source: Model | str | Path) -> Model:
    """An archive or an ONNX file, opened and checked; weights are decoded when asked for.

    Args:
        source: the path of a file, an ONNX file if it ends in `.onnx`; or a model that is open already.

    Raises:
        DsrError: the file needs a package that is not installed.
        FileError: there is no such file, or it cannot be read.
        FormatError: it is not of its kind, damaged, or has values of a type that archives do not have.
        UsageError: it has several inputs.
    """
    model = reader_of(Path(source))(Path(source)) if isinstance(source, (str, Path)) else source
    if len(model.graph.inputs) != 1:
        raise UsageError(
            f"{str(model.path)!r} takes {len(model.graph.inputs)} inputs; the sparse runtime runs models with one."
        )
    return model


def reader_of(path: Path) -> Callable[[Path], Model]:
    """What opens a file, by its ending; whatever that needs is imported now.

    Raises:
        DsrError: the file needs a package that is not installed.
        FileError: there is no such file.
    """
    module = _READERS.get(path.suffix.lower())
    if module is None:
        return open_archive
    require_file(path, "ONNX file")
    try:
        reader: Callable[[Path], Model] = importlib.import_module(module).open_onnx
    except ImportError as error:
        raise DsrError(
            f"{str(path)!r} is an ONNX file, and reading it takes the package onnx ({first_line(error)}); install it "
            f"(pip install onnx), or take the model as an archive, which does without (dsr-tool export MODEL_DIR -o "
            f"{path.stem}.dsr)."
        ) from error
    return reader
