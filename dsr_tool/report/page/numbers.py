"""Formats numbers: four significant digits and a unit for text, exact counts for tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "GAP",
    "NONE",
    "byte_size",
    "count",
    "dimensions",
    "in_unit",
    "macs",
    "named_value",
    "percent",
    "round_percent",
    "scaled",
    "share",
    "short_count",
    "significant",
]

_MAX_NUMBER = 1e30
"""Largest magnitude that is formatted; a larger one is a mistake in a file, and shown as the file has it."""
_BYTES, _COUNTS = ("B", "kB", "MB", "GB", "TB"), ("", "k", "M", "G", "T")
"""Units of bytes and of counts; each is 1000 times the last, and the foot of the page says so."""
NONE = "\u2013"
"""A dash, in place of a number that does not exist."""
GAP = "\u00a0"
"""No-break space, between a number and its unit."""


def significant(value: float, digits: int = 4) -> str:
    """Formats a number with significant digits; without an exponent from 1e-5 to 1e15."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    # Rounding comes first because it can add a digit: 999.96 becomes 1,000, which has no decimals.
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = math.floor(math.log10(abs(rounded)))
    if not -5 <= magnitude <= 15:
        return f"{value:.{digits - 1}e}"
    return f"{rounded:,.{max(digits - 1 - magnitude, 0)}f}"


def scaled(value: float, units: Sequence[str]) -> tuple[float, str]:
    """Returns the factor and the name of the unit in which `value` is below 1000; each unit is 1000 times the last."""
    factor = 1.0
    for unit in units[:-1]:
        # 999.95 would be rounded to 1,000, so it belongs to the next unit.
        if abs(value) / factor < 999.95:
            return factor, unit
        factor *= 1000
    return factor, units[-1]


def in_unit(value: float, unit: tuple[float, str]) -> str:
    """Formats a round number of an axis in a unit from `scaled`."""
    # Without a unit the number would end in a gap; a bare 0 needs no unit.
    return f"{value / unit[0]:g}{GAP}{unit[1]}".rstrip() if value else "0"


def byte_size(nbytes: int) -> str:
    """Formats bytes in kB, MB or GB, which are 10^3, 10^6 and 10^9 bytes."""
    factor, unit = scaled(nbytes, _BYTES)
    return f"{nbytes:,}{GAP}B" if factor == 1 else f"{significant(nbytes / factor)}{GAP}{unit}"


def short_count(number: float) -> str:
    """Formats a large count, rounded: `11.18 M`."""
    factor, unit = scaled(number, _COUNTS)
    return f"{number:,.0f}" if number < 10**4 else f"{significant(number / factor)}{GAP}{unit}"


def macs(number: int) -> str:
    """Formats multiply-adds, rounded: `1.814 GMACs`."""
    factor, unit = scaled(number, _COUNTS)
    return f"{number:,}{GAP}MACs" if factor == 1 else f"{significant(number / factor)}{GAP}{unit}MACs"


def count(number: int) -> str:
    """Formats an exact count."""
    return f"{number:,}"


def percent(fraction: float, decimals: int = 2) -> str:
    """Formats a fraction in percent."""
    return f"{100 * fraction:.{decimals}f}{GAP}%"


def round_percent(fraction: float) -> str:
    """Formats a fraction in percent for an axis, without decimals if it is a whole number."""
    return percent(fraction, 0 if abs(100 * fraction - round(100 * fraction)) < 1e-6 else 1)


def share(part: float, whole: float, decimals: int = 2) -> str:
    """Formats one number in percent of another; a dash if that is zero."""
    return percent(part / whole, decimals) if whole else NONE


def dimensions(*sizes: int) -> str:
    """Formats the sizes of a shape or block: `64 \u00d7 3 \u00d7 3`."""
    return " \u00d7 ".join(map(str, sizes))


def named_value(name: str, value: object) -> str:
    """Formats a plain value of a document, with the unit that its name ends in."""
    if value is None:
        return NONE
    # Before numbers, because True is an int to Python.
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(named_value(name, one) for one in value) or NONE
    if not isinstance(value, (int, float)) or not abs(value) < _MAX_NUMBER:
        return str(value)
    # Keys of the JSON documents end in their unit.
    if name.endswith("_bytes"):
        return f"{byte_size(round(value))} ({value:,.0f})" if abs(value) >= 1000 else f"{value:,.0f}{GAP}B"
    if name.endswith("_macs"):
        return f"{macs(round(value))} ({value:,.0f})"
    if name.startswith(("sparsity", "density")):
        return percent(value, 4)
    return (f"{value:,}" if isinstance(value, int) else f"{value:.6g}") + (f"{GAP}s" if name.endswith("_s") else "")
