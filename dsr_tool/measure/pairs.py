"""Timing of two functions in pairs, and what may be claimed from it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypedDict

__all__ = ["Spread", "paired", "spread", "verdict"]

_WARM_UP_ROUNDS = 2
"""Rounds that are not counted, in which memory is allocated; each side begins one of them."""


class Spread(TypedDict):
    """The median and the quartiles of a series."""

    median: float
    low: float
    high: float


def paired(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """Times two functions that take turns.

    Args:
        one: the first function.
        other: the second function.
        rounds: number of pairs.

    Returns:
        Seconds of `one` and `other` in each round.
    """
    pairs = []
    for index in range(rounds + _WARM_UP_ROUNDS):
        seconds = {}
        # The side that begins alternates, so neither always runs in the state that the other one leaves.
        for function in (one, other) if index % 2 else (other, one):
            function()  # brings its own weights back into the caches
            start = time.perf_counter()
            function()
            seconds[function] = time.perf_counter() - start
        pairs.append((seconds[one], seconds[other]))
    return pairs[_WARM_UP_ROUNDS:]


def spread(values: Sequence[float]) -> Spread:
    """Returns the median and the quartiles."""
    # Inclusive: the runs are the whole population, not a sample of one.
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def verdict(ratio: Spread) -> str:
    """Returns `faster` or `slower` if both quartiles agree on it, else `even`."""
    if ratio["low"] > 1:
        return "faster"
    return "slower" if ratio["high"] < 1 else "even"
