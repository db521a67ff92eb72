"""Which channels must stay: what outputs need, what that needs, and so on until nothing is added."""

from __future__ import annotations

import numpy as np

from dsr_tool.graph.compact.channels import Bools, Channels
from dsr_tool.graph.compact.survey import Survey

__all__ = ["kept_units"]


def kept_units(survey: Survey) -> Bools:
    """For each unit of a survey whether it stays: the fewest such that every output is what it was.

    Every value keeps a channel, and the groups of a convolution stay of one size.
    """
    return _Needs(survey).grown()


class _Needs:
    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._roots = survey.units.roots()
        self._kept = np.zeros(len(self._roots), np.bool_)
        self._changed = False
        for units in survey.pinned:
            self._kept[self._roots[units]] = True

    def grown(self) -> Bools:
        """Add what is needed until nothing changes."""
        steps = (self._inputs, self._nothing_empty, self._equal_groups)
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

    def _inputs(self) -> None:
        # Backwards, so that one pass does most of it.
        for product in reversed(self._survey.products):
            self._keep(product.source, product.needed(self._stays(product.result)))

    def _nothing_empty(self) -> None:
        for channels in self._survey.values.values():
            if not self._stays(channels).any():
                # One that is constant needs nothing before it.
                first = int(np.argmin(np.isnan(channels.constant)))
                self._keep(channels, np.arange(channels.count) == first)
                return  # what this one needs may fill others

    def _equal_groups(self) -> None:
        for product in self._survey.products:
            if product.groups > 1 and not product.channelwise:
                for channels in (product.source, product.result):
                    self._keep(channels, _filled(self._stays(channels).reshape(product.groups, -1)))


def _filled(stays: Bools) -> Bools:
    """Channels of each group (groups, channels): the first ones added until all groups have as many."""
    missing = stays.sum(axis=1).max() - stays.sum(axis=1, keepdims=True)
    added: Bools = stays | (~stays & (np.cumsum(~stays, axis=1) <= missing))
    return added.reshape(-1)
