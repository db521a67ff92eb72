"""Axes of charts: scales with round numbers, and labels that fit on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

__all__ = ["VIEW_BOX", "Axis", "Tick", "axis", "layer_ticks", "prefixes", "span_ticks", "view_x"]

VIEW_BOX = 1000
"""Width and height of the view box of a line, and height of that of a column; finer than the pixels of a screen."""

_MAX_LABEL = 14
"""Longest label in characters; longer ones keep their end."""
_PHONE_CHARACTERS, _DESK_CHARACTERS = 40, 110
"""Characters that fit below a plot, on a phone 360 pixels wide and in a window of 960 pixels or more."""


@dataclass(frozen=True)
class Tick:
    """A label of an axis.

    Attributes:
        at: distance in percent from the left or from the top.
        label: text.
        anchor: `start`, `middle` or `end`, the part of the text that lies at that distance.
    """

    at: float
    label: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Axis:
    """A vertical scale.

    Attributes:
        low: value at the bottom.
        high: value at the top.
        ticks: labels of round values.
        logarithmic: whether equal distances are equal factors.
    """

    low: float
    high: float
    ticks: tuple[Tick, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Returns the distance of a value from the top in percent."""
        # Two decimals of a percent are 0.02 pixels in a plot 192 pixels high, and keep the page small.
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return round(100 * (high - value) / (high - low), 2)

    def view_y(self, value: float) -> int:
        """Returns the distance of a value from the top in the view box."""
        return round(VIEW_BOX * self.at(value) / 100)


def view_x(place: float, low: float, high: float) -> int:
    """Returns the distance of a place from the left in the view box, on an x-axis from `low` to `high`."""
    # A single place has no scale, so it lies in the middle.
    return round(VIEW_BOX * (place - low) / (high - low)) if high > low else VIEW_BOX // 2


def axis(low: float, high: float, label: Callable[[float], str], *, logarithmic: bool = False) -> Axis:
    """Returns a scale that contains `low` and `high` and ends at round numbers.

    Args:
        low: smallest value.
        high: largest value.
        label: function from a value to its text.
        logarithmic: whether equal distances are equal factors; both values must be positive then.
    """
    if logarithmic:
        values = _decades(low, high)
    else:
        if high <= low:
            # All values are equal, so any range that contains them will do.
            high = low + (abs(low) or 1)
        step = _round_step((high - low) / 4)
        # The tolerance keeps rounding errors from adding a step beyond a value that is a multiple of one.
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        values = [step * i for i in range(first, last + 1)]
    plain = Axis(values[0], values[-1], (), logarithmic)
    every = -(-len(values) // 7)  # more than seven labels would crowd a small plot
    ticks = tuple(Tick(plain.at(value), label(value)) for value in values[::every])
    return Axis(values[0], values[-1], ticks, logarithmic)


def span_ticks(low: float, high: float) -> list[Tick]:
    """Returns labels below a plot: both ends, and round whole numbers between that do not touch them."""
    if high <= low:
        return [Tick(50, f"{low:,.0f}")]
    step = max(_round_step((high - low) / 3), 1)
    between = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    clear = [x for x in between if low + step / 2 <= x <= high - step / 2 and float(x).is_integer()]
    middle = [Tick(round(100 * (x - low) / (high - low), 2), f"{x:,.0f}") for x in clear]
    return [Tick(0, f"{low:,.0f}", "start"), *middle, Tick(100, f"{high:,.0f}", "end")]


def layer_ticks(names: Sequence[str]) -> tuple[tuple[Tick, ...], tuple[Tick, ...]]:
    """Returns labels below columns of layers, for a phone and for a wide window; numbers if prefixes do not fit."""
    numbered = span_ticks(1, len(names))
    phone, desk = (prefixes(names, room) for room in (_PHONE_CHARACTERS, _DESK_CHARACTERS))
    return tuple(phone if _distinct(phone, names) else numbered), tuple(desk if _distinct(desk, names) else numbered)


def _distinct(ticks: Sequence[Tick], names: Sequence[str]) -> bool:
    """Returns whether labels tell columns apart; a single label does so for a single column only."""
    return len({tick.label for tick in ticks}) >= min(2, len(names))


def prefixes(names: Sequence[str], room: int, *, down: bool = False) -> list[Tick]:
    """Returns labels for runs of names that share a prefix.

    Args:
        names: dotted names in order.
        room: number of characters that fit along all names; if `down`, number of lines.
        down: whether the labels stand below each other, so that their length does not matter.
    """
    parts = [name.split(".") for name in names]
    every = [_prefixes_of(parts, depth, room, down) for depth in (1, 2, 3)]
    # Labels that repeat, such as `block`, do not help, so the depth with the most different labels is taken.
    return max(every, key=lambda ticks: len({tick.label for tick in ticks}))


def _prefixes_of(parts: Sequence[Sequence[str]], depth: int, room: int, down: bool) -> list[Tick]:
    """Returns labels for runs of names with the same first `depth` parts, if they fit."""
    ticks, start = [], 0
    for prefix, members in groupby(parts, key=lambda part: part[:depth]):
        count = len(list(members))
        # A number alone says nothing without the name before it.
        label = prefix[-1] if not prefix[-1].isdigit() else ".".join(prefix)
        label = label if len(label) <= _MAX_LABEL else "\u2026" + label[1 - _MAX_LABEL :]
        if count / len(parts) * room >= (1 if down else len(label) + 1):
            ticks.append(Tick(round(100 * (start + count / 2) / len(parts), 2), label))
        start += count
    return ticks


def _round_step(rough: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, near `rough` or above."""
    power = 10.0 ** math.floor(math.log10(rough))
    # A step that is slightly too small gives five labels instead of four, which is better than two.
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)


def _decades(low: float, high: float) -> list[float]:
    """Returns 1, 2 and 5 times powers of ten, from the last at or below `low` to the first at or above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    steps = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(i for i, value in enumerate(steps) if value <= low * (1 + 1e-9))
    end = min(i for i, value in enumerate(steps) if value >= high * (1 - 1e-9) and i > start)
    return steps[start : end + 1]
