"""The table of containers, and the one place that tells which of them a file belongs to.

Nothing here imports torch, onnx or scipy: `dsr_tool/runtime/source.py` loads this module by name to open any file
(`docs/decisions/0008-sessions-of-onnx-files.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.files import require_file
from exporters.archive import Archives
from exporters.base import Container, Head
from exporters.csr import CsrFiles
from exporters.onnx.container import OnnxFiles
from exporters.plan import PlanFiles
from exporters.state_dict import SafetensorsFiles, StateDicts

if TYPE_CHECKING:
    from dsr_tool.runtime.source import Model
    from exporters.contents import Contents

__all__ = ["CONTAINERS", "contents_of", "container_of", "listed", "reader_of"]

# Each recognises its own files and no others, so the order is that of messages alone.
_ROWS: tuple[Container, ...] = (
    Archives(),
    OnnxFiles(),
    PlanFiles(),
    CsrFiles(),
    SafetensorsFiles(),
    StateDicts(),
)
CONTAINERS: dict[str, Container] = {container.name: container for container in _ROWS}
"""Every container by name; a new one is a new row above."""


def listed(chosen: Callable[[Container], bool] = lambda _: True) -> str:
    """Lists containers for messages and help: `archive (.dsr), onnx (.onnx)`.

    Args:
        chosen: tells whether a container is listed; all are by default.
    """
    return ", ".join(f"{one.name} ({one.endings[0]})" for one in CONTAINERS.values() if chosen(one))


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
    fault = "starts like no file that this dsr-tool reads" if head.start else "is empty"
    raise FormatError(f"{what} {str(path)!r} {fault}; give one of these kinds, undamaged: {listed()}.")


def reader_of(path: Path) -> Callable[[Path], Model]:
    """Returns the function that opens a file for the runtime; packages that it needs are imported now.

    Raises:
        FileError: there is no such file, or it cannot be read.
        FormatError: no container recognises the file, or it holds weights alone.
    """
    container = container_of(path)
    if not container.has_graph:
        raise FormatError(
            f"{str(path)!r} is a {container.name} file, which holds {container.holds}; give the model in a "
            f"file that has its graph: {listed(lambda one: one.has_graph)}."
        )
    return container.reader()


def contents_of(path: Path, what: str = "file") -> tuple[Container, Contents]:
    """Decodes a file and counts the bytes of each part.

    Args:
        path: the file; its name does not count.
        what: the parameter that it was given as, for messages.

    Returns:
        The container of the file, and its contents.

    Raises:
        FileError: there is no such file, or it cannot be read.
        FormatError: no container recognises the file, or it is damaged.
        UsageError: such files do not say which weights are sparse.
    """
    container = container_of(path, what)
    if not container.measurable:
        raise UsageError(
            f"{what} {str(path)!r} is a {container.name} file, which holds {container.holds}, and does not say what is "
            f"sparse; give the model folder that it was exported from, or one of these files of the model: "
            f"{listed(lambda one: one.measurable)}."
        )
    return container, container.measure(path)
