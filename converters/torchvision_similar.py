"""Names the architecture of torchvision that a file of weights was made for, when it is not the one that was given."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from converters.state_dicts import fitting
from converters.torchvision_builders import architectures, structure

__all__ = ["similar_architecture"]

_HEAD_ENTRIES = 4
"""Largest number of entries that differ for another number of classes: weight and bias, also of an auxiliary head."""


def similar_architecture(name: str, state: Mapping[str, torch.Tensor], optional: tuple[str, ...]) -> str | None:
    """Returns an architecture of the same family whose names and shapes a state_dict has.

    Args:
        name: the architecture that it does not fit; its family are those whose names have the same first letters.
        state: the state_dict, which may have prefixes.
        optional: starts of names that may be missing, or there without need.

    Returns:
        The architecture that fits best, but for its head; None if none does.
    """
    # Only one family is built: building all of them takes half a minute.
    family = re.match("[a-z]*", name.replace("wide_resnet", "resnet").replace("resnext", "resnet"))
    letters = family[0][:6] if family else name
    others = [other for other in architectures("classification") if letters in other and other != name]
    problems = {other: fitting(state, structure(other), optional).problems for other in others}
    best = min(problems, key=problems.__getitem__, default=None)
    return best if best is not None and problems[best] <= _HEAD_ENTRIES else None
