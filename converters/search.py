"""Search for a number whose size is close to a limit from below, with few evaluations of the size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CLOSE", "Bracket", "search"]

CLOSE = 0.999
"""Fraction of a limit at which a search stops if nothing asks for less."""


@dataclass
class Bracket:
    """The two numbers that a search ended between.

    Attributes:
        below: (number, size) with a size of at most the limit; None if even the least number exceeds it.
        above: (number, size) with a size above the limit; None if there is none.
    """

    below: tuple[int, int] | None
    above: tuple[int, int] | None


def search(size: Callable[[int], int], least: int, most: int, guess: int, enough: int, limit: int) -> Bracket:
    """Searches for a number in [least, most] with `enough` <= size <= `limit`, for sizes that rise with numbers.

    Sizes are expensive (an archive is encoded for each), so the next number is where a line through the two nearest
    sizes meets the middle of the wanted range. Every third time it is the midpoint instead, so that a bent curve cannot
    slow the search down. The size of `below` never exceeds the limit, even if sizes do not rise everywhere.

    Args:
        size: returns the size of a number.
        least: smallest number.
        most: largest number.
        guess: first number to try after `least`.
        enough: smallest size at which the search stops.
        limit: largest allowed size.
    """
    below, above = (least, size(least)), None
    if below[1] > limit:
        return Bracket(None, below)
    # The invariant of the loop: below fits the limit, above does not, and the wanted number lies between.
    start, aim, tries = below, (enough + limit) // 2, 0
    while below[1] < enough and below[0] < (most if above is None else above[0] - 1):
        # Strictly between the two, so that every try makes the interval smaller.
        number = min(max(guess, below[0] + 1), most if above is None else above[0] - 1)
        tried = (number, size(number))
        if tried[1] > limit:
            above = tried
        else:
            below = tried
        tries += 1
        # A secant alone can approach from one side in ever smaller steps; a bisection in between bounds the tries.
        if above is not None and tries % 3 == 0:
            guess = (below[0] + above[0]) // 2
        else:
            guess = _on_line(*((start, below) if above is None else (below, above)), aim)
    return Bracket(below, above)


def _on_line(one: tuple[int, int], other: tuple[int, int], size: int) -> int:
    """Returns the number at which a line through two points has a size; a distant one if the line does not rise."""
    rise = other[1] - one[1]
    return one[0] + (other[0] - one[0]) * (size - one[1]) // rise if rise > 0 else 2 * other[0]
