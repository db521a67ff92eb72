"""Places: where a network has its sparse weights now. A module may get another parameter at any time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dsr_tool.sparse.aliases import later_names
from dsr_tool.sparse.model import SparseModel

__all__ = ["Places"]

_Place = tuple[nn.Module, str]
"""A module, and its attribute for a weight."""


class Places:
    """The modules that have each sparse weight of a model in masked storage; several if it is tied."""

    def __init__(self, model: SparseModel) -> None:
        """Notes the modules."""
        modules = dict(model.module.named_modules(remove_duplicate=False))

        def place(name: str) -> _Place:
            path, _, attribute = name.rpartition(".")
            return modules[path], attribute

        self._places: dict[str, list[_Place]] = {name: [place(name)] for name in model.masks}
        for name, first in later_names(model.module).items():
            if first in self._places:
                self._places[first].append(place(name))

    def __iter__(self) -> Iterator[str]:
        """Yields the names of the weights, in the order of the masks."""
        return iter(self._places)

    def weight(self, name: str) -> nn.Parameter | None:
        """Returns the parameter of a weight; None if there is none, or if the modules that shared one have several."""
        found = [owner._parameters.get(attribute) for owner, attribute in self._places[name]]
        return found[0] if all(each is found[0] for each in found) else None
