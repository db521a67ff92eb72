"""Axes of charts: scales with round numbers, and labels that have room on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

__all__ = ["Axis", "Tick", "axis", "layer_ticks", "prefixes", "span_ticks"]

_LONGEST_LABEL = 14
_PHONE_CHARACTERS, _DESK_CHARACTERS = 40, 110
"""What fits below a plot on a phone of 360 pixels, and in a window of 960 and more."""


@dataclass(frozen=True)
class Tick:
    """A label at a place in per cent, from the left or from the top."""

    at: float
    label: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Axis:
    """A vertical scale.

    Attributes:
        low, high: values at the bottom and at the top.
        ticks: from the top.
        logarithmic: whether equal distances are equal factors.
    """

    low: float
    high: float
    ticks: tuple[Tick, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Distance from the top in per cent."""
        low, high, value = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return round(100 * (high - value) / (high - low), 2)


def axis(low: float, high: float, label: Callable[[float], str], *, logarithmic: bool = False) -> Axis:
    """A scale from `low` to `high`, widened to round numbers."""
    if logarithmic:
        values = _decades(low, high)
    else:
        if high <= low:
            high = low + (abs(low) or 1)
        step = _round_step((high - low) / 4)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        values = [step * i for i in range(first, last + 1)]
    plain = Axis(values[0], values[-1], (), logarithmic)
    every = -(-len(values) // 7)
    ticks = tuple(Tick(plain.at(value), label(value)) for value in values[::every])
    return Axis(values[0], values[-1], ticks, logarithmic)


def span_ticks(low: float, high: float) -> list[Tick]:
    """Whole numbers from `low` to `high` below a plot: the ends, and round ones between that stay clear of them."""
    if high <= low:
        return [Tick(50, f"{low:,.0f}")]
    step = max(_round_step((high - low) / 3), 1)
    between = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    clear = [x for x in between if low + step / 2 <= x <= high - step / 2 and float(x).is_integer()]
    middle = [Tick(round(100 * (x - low) / (high - low), 2), f"{x:,.0f}") for x in clear]
    return [Tick(0, f"{low:,.0f}", "start"), *middle, Tick(100, f"{high:,.0f}", "end")]


def layer_ticks(names: Sequence[str]) -> tuple[tuple[Tick, ...], tuple[Tick, ...]]:
    """Labels below columns of layers, for a phone and for a wide window; numbers where prefixes do not fit."""
    numbered = span_ticks(1, len(names))
    phone, desk = (prefixes(names, room) for room in (_PHONE_CHARACTERS, _DESK_CHARACTERS))
    return tuple(phone if _tell(phone, names) else numbered), tuple(desk if _tell(desk, names) else numbered)


def _tell(ticks: Sequence[Tick], names: Sequence[str]) -> bool:
    """Whether labels tell places apart: one alone says something of a single column only."""
    return len({tick.label for tick in ticks}) >= min(2, len(names))


def prefixes(names: Sequence[str], room: int, *, down: bool = False) -> list[Tick]:
    """Labels of runs of names that share a prefix.

    Args:
        names: dotted names in order.
        room: characters that fit beside each other along all names; or, `down` a column, lines below each other.
        down: whether the labels stand below each other: then their length does not count.
    """
    parts = [name.split(".") for name in names]
    every = [_prefixes_of(parts, depth, room, down) for depth in (1, 2, 3)]
    # A label that comes again and again, as `block` does, tells nothing.
    return max(every, key=lambda ticks: len({tick.label for tick in ticks}))


def _prefixes_of(parts: Sequence[Sequence[str]], depth: int, room: int, down: bool) -> list[Tick]:
    """Labels of runs whose first `depth` parts are the same, where they have room."""
    ticks, start = [], 0
    for prefix, members in groupby(parts, key=lambda part: part[:depth]):
        count = len(list(members))
        label = prefix[-1] if not prefix[-1].isdigit() else ".".join(prefix)
        label = label if len(label) <= _LONGEST_LABEL else "\u2026" + label[1 - _LONGEST_LABEL :]
        if count / len(parts) * room >= (1 if down else len(label) + 1):
            ticks.append(Tick(round(100 * (start + count / 2) / len(parts), 2), label))
        start += count
    return ticks


def _round_step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last at or below `low` to the first at or above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    steps = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(i for i, value in enumerate(steps) if value <= low * (1 + 1e-9))
    end = min(i for i, value in enumerate(steps) if value >= high * (1 - 1e-9) and i > start)
    return steps[start : end + 1]
