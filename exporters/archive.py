"""The archive as an export: the exact weights, the graph, and what is needed to go back to PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsr_tool.core.archive import ENCODINGS, encode_archive
from dsr_tool.core.config import installed_versions
from dsr_tool.core.files import new_file, refuse_existing
from dsr_tool.errors import unknown_name
from dsr_tool.sparse.model import SparseModel
from exporters.verify import Verification, checked_graph, require, verify_archive

__all__ = ["export_archive"]


def export_archive(
    model: SparseModel, path: str | Path, *, encoding: str = "auto", force: bool = False
) -> Verification:
    """Write a model as a `.dsr` archive, and verify it before it takes its name.

    Args:
        model: the model; `config.input_shape` says what it takes.
        path: the new file.
        encoding: `auto` for the smallest codec per layer, or the name of one.
        force: replace an existing file.

    Returns:
        What the verification measured.

    Raises:
        CheckFailed: weights and masks disagree, or the file does not hold what the model does; no file is left.
        UsageError: unknown encoding, no input shape, or a module that cannot be captured.
        FileError: the file exists without `force`, or the disk refuses it.
    """
    if encoding not in ENCODINGS:
        raise unknown_name("encoding", encoding, ENCODINGS)
    path = Path(path)
    refuse_existing(path, force=force)
    graph = checked_graph(model)
    encoded = encode_archive(
        model.tensors(), model.specs, graph, model.config, encoding=encoding, versions=installed_versions()
    )
    with new_file(path, force=force) as part:
        encoded.save(part)
        verification = require(verify_archive(part, model))
    return replace(verification, path=path)
