"""ONNX files that are small and run everywhere: sparse weights decode once, when a runtime loads the file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import unknown_name
from dsr_tool.files import new_file, refuse_existing
from dsr_tool.graph.compact.record import COMPACTED, saved
from dsr_tool.graph.compact.rewrite import folded_and_compacted
from exporters.onnx.densify import densify, densify_file
from exporters.onnx.read import OnnxEntry, OnnxFile, read_onnx
from exporters.onnx.session import onnx_session
from exporters.onnx.write import ONNX_ENCODINGS, to_onnx
from exporters.values import VALUES

if TYPE_CHECKING:
    from dsr_tool.sparse.model import SparseModel
    from exporters.verify.tensors import Verification

__all__ = [
    "ONNX_ENCODINGS",
    "OnnxEntry",
    "OnnxFile",
    "densify",
    "densify_file",
    "export_onnx",
    "onnx_session",
    "read_onnx",
    "to_onnx",
]


def export_onnx(
    model: SparseModel,
    path: str | Path,
    *,
    encoding: str = "auto",
    values: str = "fp32",
    compact: bool = False,
    force: bool = False,
) -> Verification:
    """Write a model as one ONNX file with a dynamic batch, and verify it before it takes its name.

    Args:
        model: the model; `config.input_shape` says what it takes.
        path: the new file.
        encoding: `auto`, `delta`, `bitmask`, `coo` or `dense`; see `to_onnx`.
        values: `fp32` as they are, or weights as `fp16`; the file computes with float32 either way.
        compact: remove channels that no active weight reaches.
        force: replace an existing file.

    Returns:
        What the verification measured.

    Raises:
        CheckFailed: weights and masks disagree, or the file does not compute what the model does; no file is left.
        UsageError: unknown encoding or type of values, a weight that float16 cannot hold, no input shape, more than
            2 GB, or a module that cannot be captured.
        FileError: the file exists without `force`, or the disk refuses it.
    """
    from exporters.onnx.check import verify_onnx
    from exporters.verify.tensors import checked_graph, require

    if encoding not in ONNX_ENCODINGS:
        raise unknown_name("ONNX encoding", encoding, ONNX_ENCODINGS)
    if values not in VALUES:
        raise unknown_name("--values", values, VALUES)
    path = Path(path)
    refuse_existing(path, force=force)
    graph = checked_graph(model)
    write = partial(
        to_onnx, encoding=encoding, values=values, specs=model.specs, architecture=model.config.architecture
    )
    content = write(graph, model.tensors())
    if compact:
        before, small = folded_and_compacted(graph, model.tensors())
        record = saved(before, small, model.specs, content.ByteSize())
        content = write(small.graph, small.tensors, notes={COMPACTED: record.to_dict()})
    with new_file(path, force=force) as part:
        part.write_bytes(content.SerializeToString(deterministic=True))
        verification = require(verify_onnx(part, model, graph=graph))
    return replace(verification, path=path)
