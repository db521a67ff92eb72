"""Writing without leaving half a file: beside the target first, then renamed over it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from dsr_tool.errors import FileError

__all__ = ["new_file", "new_folder", "refuse_existing", "require_file", "share", "writing"]


def refuse_existing(path: Path, *, force: bool, marker: str = "") -> None:
    """Raise `FileError` when `path` must not be replaced, or when its parent cannot hold it.

    Args:
        path: the output.
        force: whether an existing one may be replaced.
        marker: for a folder, the JSON file whose `schema` says it is one of ours: no other folder is replaced, unless
            it is empty.
    """
    holds_something = path.exists() and not (marker and path.is_dir() and not any(path.iterdir()))
    if holds_something and not force:
        raise FileError(f"output {str(path)!r} exists already; give another path, or --force to replace it.")
    if holds_something and marker and path.is_dir() and not _is_ours(path / marker):
        raise FileError(
            f"output {str(path)!r} is a folder of something else (it has no {marker} of ours), which --force does not "
            f"replace; give another path."
        )
    parent = path.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir():
        raise FileError(f"output {str(path)!r} cannot be created: {str(existing)!r} is not a folder.")


def _is_ours(marker: Path) -> bool:
    try:
        document = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("schema", "")).startswith("dsr-tool/")


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
    with writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            share(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, else it is removed.

    Raises:
        FileError: `path` exists without `force` or is none of ours, or the disk refuses the write.
    """
    refuse_existing(path, force=force, marker=marker)
    if path.exists() and not path.is_dir():
        raise FileError(f"output {str(path)!r} is a file; give the path of a folder.")
    with writing(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent))
        try:
            yield part
            part.chmod(0o777 & ~_umask())
            _swap(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def share(path: Path) -> None:
    """Give a file the permissions of a new one: temporary files and safetensors' are for their owner alone."""
    path.chmod(0o666 & ~_umask())


def _swap(part: Path, path: Path) -> None:
    """Put `part` in the place of `path`, which keeps its old content until the new one stands."""
    if not path.exists():
        part.replace(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.absolute().parent))
    path.replace(old / path.name)
    try:
        part.replace(path)
    except BaseException:
        (old / path.name).replace(path)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path, left: str = "nothing was left") -> Iterator[None]:
    """Turn the system's errors while writing `path` into one sentence that ends with what is `left`."""
    try:
        yield
    except FileError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"output {str(path)!r} could not be written: {reason}; {left}.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
