"""Names of folders or cells of a table as classes of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dsr_tool.sparsity.config import ModelConfig

__all__ = ["NAMED", "ClassNames", "shown"]

NAMED = 3
"""Largest number of names that a message lists of one kind."""


class ClassNames:
    """The classes of a model by name; upper and lower case, `_` and `-` are ignored.

    Attributes:
        count: number of classes.
        labels: names of the classes in order; empty if the model has none.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Takes number and names of the classes from a description."""
        self.count = config.num_classes
        self.labels = config.labels
        folded = [_fold(label) for label in config.labels[: self.count]]
        # ImageNet has two classes called crane and two called maillot, so such a name says nothing.
        unique = {name for name, times in Counter(folded).items() if times == 1}
        self._indices = {name: index for index, name in enumerate(folded) if name in unique}

    def by_name(self, name: str) -> int | None:
        """Returns the class of a name; None if the model has none of this name, or several."""
        return self._indices.get(_fold(name))

    def by_number(self, text: str) -> int | None:
        """Returns the class of a number from 0 to `count` - 1; None for any other text."""
        return int(text) if is_number(text) and int(text) < self.count else None

    def sentence(self) -> str:
        """Says which classes the model has."""
        if not self.labels:
            return f"{self.count} classes and no names for them"
        return f"{self.count} classes, {shown(self.labels)}"


def is_number(text: str) -> bool:
    """Returns whether a text is a class number, of at most 9 digits."""
    return text.isascii() and text.isdecimal() and len(text) < 10


def shown(names: Iterable[str]) -> str:
    """Returns the first names in quotes, with `...` if there are more."""
    every = list(names)
    return ", ".join([*(repr(name[:80]) for name in every[:NAMED]), *(["..."] if len(every) > NAMED else [])])


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
