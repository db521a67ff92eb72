"""The archive as an export: the exact weights, the graph, and what is needed to go back to PyTorch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from dsr_tool.errors import unknown_name
from dsr_tool.files import new_file, refuse_existing
from dsr_tool.formats.archive import ENCODINGS, encode_archive
from dsr_tool.graph.compact.record import COMPACTED, compacted_specs, saved
from dsr_tool.graph.compact.rewrite import folded_and_compacted
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.config import installed_versions
from exporters.values import stored_as
from exporters.verify.tensors import Verification, checked_graph, require, verify_archive

__all__ = ["export_archive"]


def export_archive(
    model: SparseModel,
    path: str | Path,
    *,
    encoding: str = "auto",
    values: str = "fp32",
    compact: bool = False,
    force: bool = False,
) -> Verification:
    """Write a model as a `.dsr` archive, and verify it before it takes its name.

    Args:
        model: the model; `config.input_shape` says what it takes.
        path: the new file.
        encoding: `auto` for the smallest codec per layer, or the name of one.
        values: `fp32` as they are, or weights as `fp16`.
        compact: fold normalisation and remove channels that no active weight reaches. Such a file is for inference: it
            does not go back into the module.
        force: replace an existing file.

    Returns:
        What the verification measured.

    Raises:
        CheckFailed: weights and masks disagree, or the file does not hold what the model does; no file is left.
        UsageError: unknown encoding or type of values, a weight that float16 cannot hold, no input shape, or a module
            that cannot be captured.
        FileError: the file exists without `force`, or the disk refuses it.
    """
    if encoding not in ENCODINGS:
        raise unknown_name("encoding", encoding, ENCODINGS)
    path = Path(path)
    refuse_existing(path, force=force)
    tensors, specs, config = stored_as(model.tensors(), model.specs, values), model.specs, model.config
    graph = checked_graph(model)
    encode = partial(encode_archive, encoding=encoding, versions=installed_versions())
    with new_file(path, force=force) as part:
        encode(tensors, specs, graph, config).save(part)
        if compact:
            before, small = folded_and_compacted(graph, model.tensors())
            record = saved(before, small, specs, part.stat().st_size)
            specs = compacted_specs(small.tensors, specs)
            config = replace(config, conversion={**config.conversion, COMPACTED: record.to_dict()})
            encode(stored_as(small.tensors, specs, values), specs, small.graph, config).save(part)
        verification = require(verify_archive(part, model))
    return replace(verification, path=path)
