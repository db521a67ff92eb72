"""Writing without leaving half a file: beside the target first, then renamed over it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dsr_tool.errors import FileError

__all__ = ["new_file", "new_folder", "refuse_existing", "require_file"]


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise `FileError` when `path` exists and `force` is not set, or when its parent cannot hold it."""
    if path.exists() and not force:
        raise FileError(f"output {str(path)!r} exists already; give another path, or --force to replace it.")
    parent = path.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir():
        raise FileError(f"output {str(path)!r} cannot be created: {str(existing)!r} is not a folder.")


def require_file(path: Path, what: str) -> None:
    """Raise `FileError` unless `path` is a readable file; `what` says what it should have been."""
    if not path.exists():
        raise FileError(f"{what} {str(path)!r} does not exist; check the path.")
    if not path.is_file():
        raise FileError(f"{what} {str(path)!r} is not a file; give the path of a file.")


@contextlib.contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success rename it to `path`, else remove it.

    Raises:
        FileError: `path` exists without `force`, or the disk refuses the write.
    """
    refuse_existing(path, force=force)
    if path.is_dir():
        raise FileError(f"output {str(path)!r} is a folder; give the path of a file.")
    with _writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            part.chmod(0o666 & ~_umask())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, else it is removed.

    Raises:
        FileError: `path` exists without `force`, or the disk refuses the write.
    """
    refuse_existing(path, force=force)
    if path.exists() and not path.is_dir():
        raise FileError(f"output {str(path)!r} is a file; give the path of a folder.")
    with _writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent))
        try:
            yield part
            part.chmod(0o777 & ~_umask())
            _swap(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _swap(part: Path, path: Path) -> None:
    """Put `part` in the place of `path`, which keeps its old content until the new one stands."""
    if not path.exists():
        part.replace(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.absolute().parent))
    path.replace(old / path.name)
    part.replace(path)
    shutil.rmtree(old)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the system's errors while writing `path` into one sentence."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"output {str(path)!r} could not be written: {reason}; nothing was left.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
