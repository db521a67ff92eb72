"""Names files that are no checkpoints of PyTorch for what they are, with the line that makes one that can be read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dsr_tool.formats.manifest import METADATA
from dsr_tool.formats.tensor_file import is_safetensors

__all__ = ["foreign_kind"]

_HEAD_BYTES = 512
"""Bytes of a file that are read to recognise it."""
_ARRAYS = "torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, OTHER)"
_HEADS = (
    (b"\x89HDF\r\n\x1a\n", f"is an HDF5 file, as Keras writes; read its arrays where it was made: {_ARRAYS}"),
    (b"\x93NUMPY", "is one array of numpy; a checkpoint holds a tensor for each name"),
    (b"GGUF", "is a GGUF file, whose weights are quantised; give the checkpoint that it was made from"),
    (b"version https://git-lfs", "is a pointer of Git LFS and not the file itself; fetch that with git lfs pull"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"BZh", "is compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ", "is compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with Zstandard; unpack it first"),
    (b"\x08", "is an ONNX file; give the PyTorch checkpoint that it was exported from"),
)
"""First bytes of files, and what such files are."""


def foreign_kind(path: Path) -> str | None:
    """Returns what a file is, and what to do, as in "is compressed with gzip; unpack it first".

    Args:
        path: an existing file, which need not be readable.

    Returns:
        None for a file that may be a checkpoint, damaged or not.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return None
    if not head:
        return "is empty; write or download it again"
    if is_safetensors(head):
        return _archive(path)
    if head.lstrip()[:1] == b"<":
        return "is a web page or XML, as a failed download leaves; download the file itself"
    if head.lstrip()[:1] == b"{":
        return _json(path)
    return next((kind for start, kind in _HEADS if head.startswith(start)), None) or _zip(path)


def _archive(path: Path) -> str | None:
    """Recognises an archive of dsr-tool, which is a safetensors file of streams."""
    try:
        with safe_open(path, framework="np") as file:
            if METADATA not in (file.metadata() or {}):
                return None
    except (SafetensorError, OSError, ValueError):
        return None
    return "is an archive of dsr-tool; its weights are those of dsr_tool.load(FILE).module.state_dict()"


def _json(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and "weight_map" in content:
        return (
            "is the index of a checkpoint in several files; join them: torch.save({name: tensor for part in PARTS for "
            "name, tensor in safetensors.torch.load_file(part).items()}, OTHER)"
        )
    return "is JSON and holds no tensors; give the file of the weights"


def _zip(path: Path) -> str | None:
    """Recognises what is in a zip file by the names of its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # noqa: BLE001 - a damaged zip may claim any version, and raise anything in its reader
        return None
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "is a TorchScript archive, which holds code; save its weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
        )
    if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
        return (
            "is a program of torch.export; save its weights alone: "
            "torch.save(dict(torch.export.load(FILE).state_dict), OTHER)"
        )
    if names and all(name.endswith(".npy") for name in names):
        return f"holds arrays of numpy; save them as tensors, with arrays = numpy.load(FILE): {_ARRAYS}"
    if not any(name.endswith("data.pkl") for name in names):
        return "is a zip archive that torch.save did not write; unpack it, and give the file of the weights"
    return None
