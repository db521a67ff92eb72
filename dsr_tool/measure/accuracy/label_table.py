"""Reads `labels.csv`: a line for each picture, with its path and its class."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsr_tool.errors import FormatError, first_line
from dsr_tool.measure.accuracy.class_names import ClassNames, is_number, shown

__all__ = ["LABELS", "read_table"]

LABELS = "labels.csv"
"""Name of the table in a folder of pictures."""

_PATHS = ("path", "file", "filename", "file_name", "image", "picture")
_CLASSES = (
    *("imagenet_class_index", "class_index", "class_idx", "index", "class", "label", "target"),
    *("class_name", "category", "torchvision_category"),
)
"""Headers of the column of paths and of the column of classes; the first of them that the table has is used."""


def read_table(folder: Path, names: ClassNames) -> tuple[list[Path], list[int], str]:
    """Reads the table of a folder.

    Classes are numbers from 0 if every cell of the column is one, and names of the model's classes otherwise.

    Args:
        folder: the folder; paths in the table are relative to it.
        names: the classes of the model.

    Returns:
        The pictures, the class of each, and the name of the column that classes were read from.

    Raises:
        FormatError: the table is no CSV with these columns; or some files are missing, paths repeated, or classes
            unknown, which one message says all at once.
    """
    headers, rows = _rows(folder / LABELS)
    path_column, class_column = (_column(headers, known) for known in (_PATHS, _CLASSES))
    if path_column is None or class_column is None:
        raise FormatError(
            f"{str(folder / LABELS)!r} has columns {shown(headers)}; the first line needs one of "
            f"{', '.join(_PATHS)}, and one of {', '.join(_CLASSES)}."
        )
    paths = [row[path_column].strip() for row in rows]
    cells = [row[class_column].strip() for row in rows]
    find = names.by_number if all(map(is_number, cells)) else names.by_name
    classes = [find(cell) for cell in cells]
    faults = [
        *_faults(
            "incomplete lines", [str(i) for i, pair in enumerate(zip(paths, cells, strict=True), 2) if "" in pair]
        ),
        *_faults("missing files", [path for path in dict.fromkeys(paths) if path and not (folder / path).is_file()]),
        *_faults("repeated paths", [path for path, times in Counter(paths).items() if path and times > 1]),
        *_faults(
            "unknown classes", [c for c, found in dict(zip(cells, classes, strict=True)).items() if c and found is None]
        ),
    ]
    if faults:
        raise FormatError(
            f"{str(folder / LABELS)!r} has {'; '.join(faults)}. The model has {names.sentence()}; correct the table."
        )
    return [folder / path for path in paths], [found for found in classes if found is not None], class_column


def _rows(path: Path) -> tuple[list[str], list[Mapping[str, str]]]:
    """Returns the headers and the lines of a CSV file by header; cells that a line lacks are empty."""
    try:
        # utf-8-sig, because spreadsheets begin a file with a byte order mark, which would be part of the first header.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            rows: list[Mapping[str, str]] = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{str(path)!r} cannot be read as a CSV file in UTF-8 ({first_line(error)}).") from error
    if not rows:
        raise FormatError(f"{str(path)!r} has no lines below its header; give one for each picture.")
    return list(reader.fieldnames or ()), rows


def _column(headers: Sequence[str], known: Sequence[str]) -> str | None:
    """Returns the header that comes first among the known ones; None if the table has none of them."""
    own = {header.strip().lower(): header for header in reversed(headers)}
    return next((own[name] for name in known if name in own), None)


def _faults(kind: str, found: Sequence[str]) -> list[str]:
    """Returns the number of faults of a kind and the first of them; nothing if there are none."""
    return [f"{len(found)} {kind} ({shown(found)})"] if found else []
