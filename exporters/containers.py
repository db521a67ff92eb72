"""The table of containers, and the one place that tells which of them a file belongs to.

Nothing here imports torch, onnx or scipy: `dsr_tool/runtime/source.py` loads this module by name to open any file
(`docs/decisions/0008-sessions-of-onnx-files.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import FormatError
from dsr_tool.files import require_file
from exporters.archive import Archives
from exporters.base import Container, Head
from exporters.csr import CsrFiles
from exporters.onnx.container import OnnxFiles
from exporters.state_dict import SafetensorsFiles, StateDicts

if TYPE_CHECKING:
    from dsr_tool.runtime.source import Model

__all__ = ["CONTAINERS", "container_of", "reader_of"]

# Each recognises its own files and no others, so the order is that of messages alone.
_ROWS: tuple[Container, ...] = (
    Archives(),
    OnnxFiles(),
    CsrFiles(),
    SafetensorsFiles(),
    StateDicts(),
)
CONTAINERS: dict[str, Container] = {container.name: container for container in _ROWS}
"""Every container by name; a new one is a new row above."""


def container_of(path: Path, what: str = "file") -> Container:
    """Recognises the container of a file by its content.

    Args:
        path: the file; its name does not count.
        what: the parameter that it was given as, for messages.

    Raises:
        FileError: there is no such file, or it cannot be read.
        FormatError: no container recognises the file.
    """
    require_file(path, what)
    head = Head(path)
    for container in CONTAINERS.values():
        if container.recognises(head):
            return container
    known = ", ".join(f"{one.name} ({one.endings[0]})" for one in CONTAINERS.values())
    fault = "starts like no file that this dsr-tool reads" if head.start else "is empty"
    raise FormatError(f"{what} {str(path)!r} {fault}; give one of these kinds, undamaged: {known}.")


def reader_of(path: Path) -> Callable[[Path], Model]:
    """Returns the function that opens a file for the runtime; packages that it needs are imported now.

    Raises:
        FileError: there is no such file, or it cannot be read.
        FormatError: no container recognises the file.
    """
    return container_of(path).reader()
