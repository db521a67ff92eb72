"""export: one call for every container."""

from __future__ import annotations

from pathlib import Path

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparse.model import SparseModel
from exporters.archive import export_archive
from exporters.onnx import export_onnx
from exporters.verification import Verification

__all__ = ["EXPORTERS", "export"]

_SUFFIXES = {".dsr": "archive", ".onnx": "onnx"}
_OTHERS = (".npy", ".npz", ".pt", ".pth", ".safetensors")

EXPORTERS = {"archive": export_archive, "onnx": export_onnx}


def export(
    model: SparseModel, path: str | Path, *, to: str | None = None, encoding: str = "auto", force: bool = False
) -> Verification:
    """Write a model into one file and verify it by running it before it takes its name.

    Args:
        model: the model; its weights and masks must agree.
        path: the new file.
        to: `archive` or `onnx`; by the ending of `path` when absent, `.onnx` for ONNX and an archive otherwise.
        encoding: `auto` for the smallest per layer, or one by name.
        force: replace an existing file.

    Returns:
        What the verification measured.

    Raises:
        UsageError: unknown container or encoding, or an ending that means another kind of file.
        CheckFailed: the file does not hold the model; none is left.
        FileError: the file exists without `force`, or the disk refuses it.
    """
    suffix = Path(path).suffix.lower()
    to = to or _SUFFIXES.get(suffix, "archive")
    if to not in EXPORTERS:
        raise unknown_name("--to", to, EXPORTERS)
    if suffix in _OTHERS or _SUFFIXES.get(suffix, to) != to:
        raise UsageError(
            f"output {str(path)!r} would hold an {to} file, which readers of {suffix} files do not understand; call it "
            f"{Path(path).stem}{'.onnx' if to == 'onnx' else '.dsr'}."
        )
    return EXPORTERS[to](model, path, encoding=encoding, force=force)
