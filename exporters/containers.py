"""Which container a file is, by its first bytes, whatever it is called."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from dsr_tool.files import require_file
from dsr_tool.formats.manifest import METADATA

__all__ = ["kind_of"]

_ZIP, _ZIP_HEADER_BYTES = b"PK\x03\x04", 30
_LONGEST_NAME = 1 << 16


def kind_of(path: Path, what: str = "file") -> str:
    """`archive`, `safetensors`, `csr`, `state-dict` or `onnx`; the last one for all that is nothing else.

    Args:
        path: the file.
        what: the parameter that it was given as, for the message.

    Raises:
        FileError: there is no such file.
    """
    require_file(path, what)
    with path.open("rb") as file:
        start = file.read(_ZIP_HEADER_BYTES + _LONGEST_NAME)
    if start.startswith(_ZIP):
        # The first member of a .npz is an array, and that of a file of torch.save is its pickle.
        name = start[_ZIP_HEADER_BYTES:][: int.from_bytes(start[26:28], "little")]
        return "csr" if name.endswith(b".npy") else "state-dict"
    # A safetensors file starts with the length of its header, eight bytes, and the header is a JSON object.
    if start[8:9] != b"{":
        return "onnx"
    return "archive" if _is_archive(path) else "safetensors"


def _is_archive(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            return METADATA in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        # Damaged: the reader of archives says so.
        return True
