"""Finds the pictures of a folder and the class of each: by `labels.csv` or by class folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsr_tool.errors import UsageError
from dsr_tool.measure.accuracy.class_names import ClassNames, is_number, shown
from dsr_tool.measure.accuracy.label_table import LABELS, read_table
from dsr_tool.runtime.picture_folder import input_files
from dsr_tool.sparsity.config import ModelConfig

__all__ = ["Labelled", "read_labels"]

_UNLABELLED = "none"


@dataclass(frozen=True)
class Labelled:
    """The pictures of a folder.

    Attributes:
        files: paths of the pictures and arrays.
        classes: class number of each; None if the folder has no labels.
        rule: how the classes were found, in words.
        notes: remarks for the user, such as which pictures were left out.
    """

    files: Sequence[Path]
    classes: Sequence[int] | None
    rule: str
    notes: tuple[str, ...] = ()


def read_labels(folder: Path, config: ModelConfig, *, required: bool) -> Labelled:
    """Finds pictures and their classes, by the first of these rules that applies.

    1. A `labels.csv` in the folder lists path and class, as a number from 0 or as a name.
    2. All class folders have names of the model's classes.
    3. All class folders have numbers from 0 to classes - 1 as names.
    4. There are as many class folders as classes, and no name is a number or one of the model's classes: in sorted
       order, they are classes 0, 1, 2 and so on, as in torchvision's `ImageFolder`.

    Args:
        folder: the folder, as `--accuracy` names it.
        config: number and names of the classes.
        required: whether pictures without classes are an error; otherwise they are returned, and a note says why.

    Raises:
        FileError: there is no such folder, or it holds no pictures.
        FormatError: `labels.csv` is wrong.
        UsageError: classes are required, and no rule applies.
    """
    found = input_files(folder, "--accuracy")
    names = ClassNames(config)
    if (folder / LABELS).is_file():
        files, classes, column = read_table(folder, names)
        left_out = len(set(found) - set(files))
        notes = [f"{left_out} pictures of the folder are not in {LABELS} and were left out"] if left_out else []
        return Labelled(files, classes, f"{LABELS}, column {column}", tuple(notes))
    try:
        return _by_folders(folder, found, names)
    except UsageError as error:
        if required:
            raise
        return Labelled(found, None, _UNLABELLED, (str(error),))


def _by_folders(folder: Path, files: Sequence[Path], names: ClassNames) -> Labelled:
    """Returns the pictures in class folders; those beside the folders are left out."""
    parts = [path.relative_to(folder).parts for path in files]
    folders = sorted({own[0] for own in parts if len(own) > 1})
    if not folders:
        raise UsageError(
            f"--accuracy {str(folder)!r} has neither class folders nor a {LABELS}, so that no classes are known; add "
            f"them, or compare with another network alone by --against."
        )
    rule, classes = _classes(folder, folders, names)
    inside = [(path, classes[own[0]]) for path, own in zip(files, parts, strict=True) if len(own) > 1]
    beside = len(files) - len(inside)
    notes = [f"{beside} pictures beside the class folders were left out"] if beside else []
    return Labelled([path for path, _ in inside], [index for _, index in inside], rule, tuple(notes))


def _classes(folder: Path, folders: Sequence[str], names: ClassNames) -> tuple[str, dict[str, int]]:
    """Returns the rule by which class folders are classes, in words, and the class of each folder.

    Raises:
        UsageError: no rule applies.
    """
    for rule, find in (("class folders by name", names.by_name), ("class folders by number", names.by_number)):
        found = {name: index for name in folders if (index := find(name)) is not None}
        if len(found) == len(folders):
            return rule, found
    # One known name, or a number that is no class, says that the order is not meant.
    telling = [name for name in folders if names.by_name(name) is not None or is_number(name)]
    if len(folders) == names.count and not telling:
        return "class folders in sorted order", {name: index for index, name in enumerate(folders)}
    unknown = [name for name in folders if names.by_name(name) is None]
    raise UsageError(
        f"--accuracy {str(folder)!r} has {len(folders)} class folders, and the model has {names.sentence()}: "
        f"{shown(unknown)} cannot be assigned. Give one folder for each class in sorted order, or name folders by the "
        f"model's classes or by number from 0, or add a {LABELS} with columns path and class."
    )
