"""Finds the pictures and arrays in a folder and its sub-folders, always in the same order."""

from __future__ import annotations

import os
from pathlib import Path

from dsr_tool.errors import FileError

__all__ = ["input_files"]

_ENDINGS = frozenset(
    (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".npy", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""Endings of files that count as inputs. A file that is called so and cannot be read is damaged; a README is not."""


def input_files(folder: Path, what: str) -> list[Path]:
    """Returns the pictures and `.npy` files in a folder, recursively, sorted by path.

    Hidden files and folders (a name that begins with a dot) and files of other kinds are ignored. A link to a folder is
    followed, unless that folder was visited already.

    Args:
        folder: the folder.
        what: the parameter that it was given as, for messages.

    Raises:
        FileError: there is no such folder, it cannot be read, or it holds no such files.
    """
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "does not exist"
        raise FileError(f"{what} {str(folder)!r} {fault}; give a folder of pictures.")
    files = sorted(_visible_files(folder))
    inputs = [path for path in files if path.suffix.lower() in _ENDINGS]
    if not inputs:
        found = f"only {len(files)} files of other kinds, such as {files[0].name!r}" if files else "no visible files"
        raise FileError(
            f"{what} {str(folder)!r} holds no pictures: there are {found}; give a folder of pictures "
            f"({', '.join(sorted(_ENDINGS))}), in class folders or not."
        )
    return inputs


def _visible_files(folder: Path) -> list[Path]:
    """Returns every file that is not hidden; each folder is visited once, whatever links lead to it."""
    found: list[Path] = []
    visited = {folder.resolve()}
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        here = Path(place)
        # os.walk goes on to what is left in this list. Sorted first: of two links to a folder, always the same counts.
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and _is_new(here / name, visited)]
        found += [here / name for name in files if not name.startswith(".")]
    return found


def _is_new(folder: Path, visited: set[Path]) -> bool:
    """Returns whether a folder was not visited yet, and counts it as visited."""
    target = folder.resolve()
    new = target not in visited
    visited.add(target)
    return new


def _refuse(error: OSError) -> None:
    """Raises `FileError` for a folder that cannot be listed, whose pictures would otherwise be missing silently."""
    raise FileError(f"folder {error.filename!r} cannot be read: {error.strerror or error}; check its permissions.")
