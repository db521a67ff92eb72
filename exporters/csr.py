"""CSR for scipy: one .npz with an int32 matrix for each sparse weight and arrays for the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsr_tool.errors import unknown_name
from dsr_tool.files import new_file, refuse_existing
from dsr_tool.formats.csr_file import load_csr, write_csr
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.config import installed_versions
from exporters.state_dict import verify_tensors
from exporters.values import stored_as
from exporters.verify.tensors import Verification, check_exportable, require

__all__ = ["CSR_ENCODINGS", "export_csr", "verify_csr"]

CSR_ENCODINGS = ("auto", "csr")


def export_csr(
    model: SparseModel, path: str | Path, *, encoding: str = "auto", values: str = "fp32", force: bool = False
) -> Verification:
    """Write a model as one .npz that scipy multiplies with, and verify it before it takes its name.

    Args:
        model: the model; `config.input_shape` says what it takes.
        path: the new file.
        encoding: `auto` or `csr`, which are the same.
        values: `fp32` as they are, or weights as `fp16`.
        force: replace an existing file.

    Returns:
        What the verification measured.

    Raises:
        CheckFailed: weights and masks disagree, or the file does not hold what the model does; no file is left.
        UsageError: unknown encoding or type of values, no input shape, or a model that such a file cannot hold.
        FileError: the file exists without `force`, or the disk refuses it.
    """
    if encoding not in CSR_ENCODINGS:
        raise unknown_name("CSR encoding", encoding, CSR_ENCODINGS)
    path = Path(path)
    refuse_existing(path, force=force)
    check_exportable(model)
    tensors = stored_as(model.tensors(), model.specs, values)
    with new_file(path, force=force) as part:
        write_csr(part, tensors, model.specs, model.config, versions=installed_versions())
        verification = require(verify_csr(part, model))
    return replace(verification, path=path)


def verify_csr(path: Path, model: SparseModel, *, samples: int = 3, seed: int = 0) -> Verification:
    """`verify` for a .npz of CSR matrices: every tensor bit for bit, and PyTorch with the tensors of the file."""
    file = load_csr(path)
    shapes = {name: entry.spec.shape for name, entry in file.entries.items()}
    halves = any(entry.spec.weight and entry.dtype == "float16" for entry in file.entries.values())
    return verify_tensors(path, "csr", model, shapes, file.tensor, halves=halves, samples=samples, seed=seed)
