"""Writes files and folders atomically: under a temporary name beside the target, which is renamed when complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dsr_tool.errors import DsrError, FileError, FormatError

__all__ = [
    "disk_is_full",
    "new_file",
    "new_folder",
    "refuse_existing",
    "require_file",
    "share",
    "temporary_folder",
    "writing",
]

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""Numbers of the system's errors for a full disk and an exhausted quota; Windows has no name for the second."""
_BLOCK = 4096
"""Free bytes below which a disk takes no further file."""


class _FullDiskError(FileError):
    """A full disk; `folder` is the one on it that was written to."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


def refuse_existing(path: Path, *, force: bool, marker: str = "") -> None:
    """Checks before a long computation that an output can be written.

    Args:
        path: path of the output.
        force: whether an existing output may be replaced.
        marker: for a folder, the name of the JSON file in it whose `schema` shows that dsr-tool wrote the folder.
            Folders without it are never replaced, unless they are empty.

    Raises:
        FileError: the output exists and must not be replaced, is a device, or its parent is not a folder.
    """
    # A rename would put a file in place of a device such as /dev/null, for every process of the machine.
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileError(f"output {str(path)!r} is a device or a pipe, which no output replaces; give another path.")
    # An empty folder is as good as none: users make one with mkdir, and tempfile does.
    holds_something = path.exists() and not (marker and path.is_dir() and not any(path.iterdir()))
    if holds_something and not force:
        raise FileError(f"output {str(path)!r} exists already; give another path, or --force to replace it.")
    if holds_something and marker and path.is_dir() and not _is_ours(path / marker):
        raise FileError(
            f"output {str(path)!r} is a folder of something else (it has no {marker} of dsr-tool), which --force does "
            f"not replace; give another path."
        )
    parent = path.absolute().parent
    # Parents are created later, so look at the first one that exists.
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir():
        raise FileError(f"output {str(path)!r} cannot be created: {str(existing)!r} is not a folder.")


def _is_ours(marker: Path) -> bool:
    """Returns whether a file is JSON with one of dsr-tool's schemas."""
    try:
        document = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # missing, not JSON, or nested without end
        return False
    return isinstance(document, dict) and str(document.get("schema", "")).startswith("dsr-tool/")


def require_file(path: Path, what: str) -> None:
    """Raises `FileError` unless `path` is a file; the message calls it `what`."""
    if not path.exists():
        raise FileError(f"{what} {str(path)!r} does not exist; check the path.")
    if not path.is_file():
        raise FileError(f"{what} {str(path)!r} is not a file; give the path of a file.")


@contextlib.contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`. On success it is renamed to `path`, otherwise removed.

    Args:
        path: path of the new file.
        force: whether to replace an existing file.

    Raises:
        FileError: `path` exists and may not be replaced, or writing fails.
    """
    refuse_existing(path, force=force)
    if path.is_dir():
        raise FileError(f"output {str(path)!r} is a folder; give the path of a file.")
    with writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, because a rename is atomic only within one file system.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent)
        os.close(handle)
    part = Path(name)
    try:
        with writing(path):  # ends before the part is removed, since a full disk shows only while that fills it
            yield part
            share(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`. On success it replaces `path`, otherwise it is removed.

    Args:
        path: path of the new folder.
        marker: see `refuse_existing`.
        force: whether to replace an existing folder that dsr-tool wrote.

    Raises:
        FileError: `path` exists and may not be replaced, or writing fails.
    """
    refuse_existing(path, force=force, marker=marker)
    if path.exists() and not path.is_dir():
        raise FileError(f"output {str(path)!r} is a file; give the path of a folder.")
    with writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent))
    try:
        with writing(path):  # as in `new_file`
            yield part
            part.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can open
            _swap(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def share(path: Path) -> None:
    """Gives a file the permissions of a new one: only the owner can read temporary files and those of safetensors."""
    path.chmod(0o666 & ~_umask())


def _swap(part: Path, path: Path) -> None:
    """Renames folder `part` to `path`. An old folder is moved aside first, and moved back if that fails."""
    if not path.exists():
        part.replace(path)
        return
    # A folder with content cannot be replaced by a rename, so for a moment there is none at `path`.
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.absolute().parent))
    path.replace(old / path.name)
    try:
        part.replace(path)
    except BaseException:  # also Ctrl-C
        (old / path.name).replace(path)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields a new folder for files that nobody keeps, where the system puts such folders; it is removed at the end.

    Raises:
        FileError: there is no place for such a folder, or what is written within, also by another library, does not
            fit on its disk.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="dsr-tool-"))
    except OSError as error:
        # The error lists the places that were tried, if none of them can be written.
        raise FileError(
            f"no temporary folder can be made: {error.strerror or error}; set TMPDIR to a folder that can be written."
        ) from error
    try:
        yield folder
    except Exception as error:
        if not disk_is_full(error, folder):
            raise
        place = _full_folder(error)
        if place is None or place.is_relative_to(folder):
            raise FileError(
                f"the temporary folder {str(folder.parent)!r} is full; free some space there, or set TMPDIR to a "
                f"folder on a disk with more."
            ) from error
        if isinstance(error, FileError):  # it names the output on the other disk
            raise
        raise FileError(f"the folder {str(place)!r} is full; free some space there.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path, left: str = "nothing was left") -> Iterator[None]:
    """Turns errors of the system, and of libraries on a full disk, into a `FileError`.

    Args:
        path: the output that is written within.
        left: end of the message, the state of the output after the error.
    """
    try:
        yield
    except FileError:
        raise
    except Exception as error:
        folder = path.absolute() if path.is_dir() else path.absolute().parent
        if not isinstance(error, DsrError) and disk_is_full(error, folder):
            raise _FullDiskError(
                f"output {str(path)!r} could not be written: the folder {str(folder)!r} is full; free some space "
                f"there, or give a path on a disk with more; {left}.",
                folder,
            ) from error
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        # safetensors wraps the system's error and has no strerror.
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"output {str(path)!r} could not be written: {reason}; {left}.") from error


def disk_is_full(error: BaseException, folder: Path) -> bool:
    """Returns whether an error comes from a full disk or an exhausted quota, by what it says or by what is free.

    torch raises an error of its own from the system's, safetensors only quotes that, and numpy and ONNX Runtime say
    nothing of the reason, but leave the part that they wrote.
    """
    for cause in _chain(error):
        if getattr(cause, "errno", None) in _FULL or any(f"(os error {number})" in str(cause) for number in _FULL):
            return True
    # Our own errors know their reason, but what ONNX Runtime says became a FormatError, which blames the model.
    if isinstance(error, DsrError) and not isinstance(error, FormatError):
        return False
    try:
        usage = shutil.disk_usage(folder)
        return usage.total > 0 and usage.free < _BLOCK  # folders that the system makes up, such as /proc, have no size
    except OSError:
        return False


def _full_folder(error: BaseException) -> Path | None:
    """Returns the folder on the full disk that an error is about; None if no error in its chain names a path."""
    for cause in _chain(error):
        if isinstance(cause, _FullDiskError):
            return cause.folder
        name = cause.filename if isinstance(cause, OSError) and cause.errno in _FULL else None
        if isinstance(name, str | os.PathLike):  # not the number of an open file
            return Path(name).absolute().parent
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, then those that it was raised for."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _umask() -> int:
    """Returns the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
