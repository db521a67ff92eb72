"""The channels that must stay: those that outputs need, those that these need, and so on to a fixed point."""

from __future__ import annotations

import numpy as np

from dsr_tool.graph.compact.channels import Bools, Channels
from dsr_tool.graph.compact.survey import Survey

__all__ = ["kept_units"]


def kept_units(survey: Survey) -> Bools:
    """Returns for each unit of a survey whether it stays: the fewest such that no output changes.

    Every value keeps at least one channel, and the groups of a convolution keep one size.
    """
    return _FixedPoint(survey).solve()


class _FixedPoint:
    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._roots = survey.units.roots()
        self._kept = np.zeros(len(self._roots), np.bool_)
        self._changed = False
        for units in survey.pinned:
            self._kept[self._roots[units]] = True

    def solve(self) -> Bools:
        """Adds units until nothing changes."""
        # Needed inputs come first: a channel added to an empty value must not be one that nothing needs.
        steps = (self._keep_needed_inputs, self._fill_one_empty_value, self._equalise_groups)
        self._changed = True
        while self._changed:
            self._changed = False
            for step in steps:
                if not self._changed:
                    step()
        return self._kept[self._roots]

    def _stays(self, channels: Channels) -> Bools:
        return self._kept[self._roots[channels.units]]

    def _keep(self, channels: Channels, which: Bools) -> None:
        roots = self._roots[channels.units[which]]
        self._changed |= not self._kept[roots].all()
        self._kept[roots] = True

    def _keep_needed_inputs(self) -> None:
        # Backwards, so that one pass does most of the work: readers come before what they read.
        for product in reversed(self._survey.products):
            self._keep(product.source, product.needed(self._stays(product.result)))

    def _fill_one_empty_value(self) -> None:
        for channels in self._survey.values.values():
            if not self._stays(channels).any():
                # A constant channel, if there is one: it needs nothing before it.
                first = int(np.argmin(np.isnan(channels.constant)))
                self._keep(channels, np.arange(channels.count) == first)
                return  # the inputs that this channel needs may fill other values

    def _equalise_groups(self) -> None:
        for product in self._survey.products:
            if product.groups > 1 and not product.depthwise:
                for channels in (product.source, product.result):
                    self._keep(channels, _equal_groups(self._stays(channels).reshape(product.groups, -1)))


def _equal_groups(stays: Bools) -> Bools:
    """Returns the channels that stay, shape (channels,), with the first others added until groups are of one size.

    Args:
        stays: shape (groups, channels per group).
    """
    missing = stays.sum(axis=1).max() - stays.sum(axis=1, keepdims=True)
    added: Bools = stays | (~stays & (np.cumsum(~stays, axis=1) <= missing))
    return added.reshape(-1)
