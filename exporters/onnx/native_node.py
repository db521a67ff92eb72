"""The operator of ONNX files that hold a plan for our kernels: its name, and how such files are recognised.

Nothing here imports onnx, since the table of containers asks before that package is known to be installed.
"""

from __future__ import annotations

from pathlib import Path

from dsr_tool.errors import FileError, UsageError

__all__ = ["DOMAIN", "NATIVE", "OPERATOR", "THREADS", "is_native", "refuse_native"]

NATIVE = "native"
"""Value of `--encoding`."""
DOMAIN, OPERATOR = "dsr_tool", "SparsePlan"
"""Domain and name of the operator, as `runtime/deploy/onnxruntime.cpp` registers them."""
THREADS = "dsr_tool.threads"
"""Entry of a session's configuration: number of threads that share the work of one run."""

_HEAD_BYTES = 1 << 13
"""Bytes of a file that are searched. Protobuf writes fields in order, so that the node precedes the plan."""
# Fields 4 and 7 of a NodeProto: key, length, text.
_FIELDS = tuple(bytes((key, len(text))) + text.encode() for key, text in ((0x22, OPERATOR), (0x3A, DOMAIN)))


def is_native(path: Path) -> bool:
    """Tells whether an ONNX file begins with the operator.

    Raises:
        FileError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    return all(field in head for field in _FIELDS)


def refuse_native(path: Path) -> None:
    """Raises `UsageError` for a file that only ONNX Runtime runs, since its weights are packed into a plan."""
    if is_native(path):
        raise UsageError(
            f"{str(path)!r} holds a plan for ONNX Runtime (--encoding {NATIVE}), which shows no weights and runs there "
            f"alone: open it with dsr_tool.onnx_session, or give the model folder or an archive of the model."
        )
