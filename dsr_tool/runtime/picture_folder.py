"""Finds the pictures and arrays in a folder and its sub-folders, always in the same order.

Hidden files and folders (a name that begins with a dot) are never looked at: editors and systems leave copies of
pictures in them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

from dsr_tool.errors import FileError

__all__ = ["class_folders", "input_files"]

_ENDINGS = frozenset(
    (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".npy", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""Endings of files that count as inputs. A file that is called so and cannot be read is damaged; a README is not."""

_LAYOUT = "give a ROOT with train/CLASS/ and val/CLASS/ folders of pictures"


def input_files(folder: Path, what: str) -> list[Path]:
    """Returns the pictures and `.npy` files in a folder, recursively, sorted by path.

    Files of other kinds are ignored. A link to a folder is followed, unless that folder was visited already.

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


def class_folders(root: Path, what: str) -> dict[str, list[Path]]:
    """Returns the pictures of each class folder by its name; both in the order of torchvision's `ImageFolder`.

    That takes hidden folders as classes and hidden files as pictures, and leaves out .gif, .jp2 and .pbm.

    Args:
        root: the folder of the class folders.
        what: what it is, for messages.

    Raises:
        FileError: there is no such folder, it cannot be read, or has no class folders, or one of them has no pictures.
    """
    if not root.is_dir():
        fault = "is a file" if root.exists() else "does not exist"
        raise FileError(f"{what} {str(root)!r} {fault}; {_LAYOUT}.")
    try:
        names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        _refuse(error)
    if not names:
        raise FileError(f"{what} {str(root)!r} has no class folders; {_LAYOUT}.")
    found = {
        name: sorted(
            (path for path in _visible_files(root / name) if path.suffix.lower() in _ENDINGS - {".npy"}),
            key=lambda path: (str(path.parent), path.name),
        )
        for name in names
    }
    if empty := [name for name in names if not found[name]]:
        raise FileError(
            f"{what} {str(root)!r} has a folder {empty[0]!r} without pictures, so it cannot be a class; remove it, or "
            f"add pictures ({', '.join(sorted(_ENDINGS - {'.npy'}))})."
        )
    return found


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


def _refuse(error: OSError) -> NoReturn:
    """Raises `FileError` for a folder that cannot be listed, whose pictures would otherwise be missing silently."""
    raise FileError(f"folder {error.filename!r} cannot be read: {error.strerror or error}; check its permissions.")
