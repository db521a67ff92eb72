"""ONNX files that are small and run everywhere: sparse weights decode once, when a runtime loads the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.core.files import new_file, refuse_existing
from dsr_tool.errors import unknown_name
from exporters.onnx_model import ONNX_ENCODINGS, to_onnx
from exporters.onnx_read import OnnxEntry, OnnxFile, densify, read_onnx

if TYPE_CHECKING:
    from dsr_tool.sparse.model import SparseModel
    from exporters.verify import Verification

__all__ = ["ONNX_ENCODINGS", "OnnxEntry", "OnnxFile", "densify", "export_onnx", "read_onnx", "to_onnx"]


def export_onnx(model: SparseModel, path: str | Path, *, encoding: str = "auto", force: bool = False) -> Verification:
    """Write a model as one ONNX file with a dynamic batch, and verify it before it takes its name.

    Args:
        model: the model; `config.input_shape` says what it takes.
        path: the new file.
        encoding: `auto`, `dense` or `delta`; see `to_onnx`.
        force: replace an existing file.

    Returns:
        What the verification measured.

    Raises:
        CheckFailed: weights and masks disagree, or the file does not compute what the model does; no file is left.
        UsageError: unknown encoding, no input shape, more than 2 GB, or a module that cannot be captured.
        FileError: the file exists without `force`, or the disk refuses it.
    """
    from exporters.verify import checked_graph, require, verify_onnx

    if encoding not in ONNX_ENCODINGS:
        raise unknown_name("ONNX encoding", encoding, ONNX_ENCODINGS)
    path = Path(path)
    refuse_existing(path, force=force)
    graph = checked_graph(model)
    content = to_onnx(graph, model.tensors(), encoding=encoding, architecture=model.config.architecture)
    with new_file(path, force=force) as part:
        part.write_bytes(content.SerializeToString(deterministic=True))
        verification = require(verify_onnx(part, model, graph=graph))
    return replace(verification, path=path)
