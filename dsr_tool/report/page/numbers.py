"""Numbers for people: four significant digits, one unit, thousands apart; and exact counts for tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = [
    "GAP",
    "NONE",
    "by",
    "byte_size",
    "count",
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

_LARGEST = 1e30  # more is a mistake in a file, and shown as it stands there
_BYTES = ("B", "kB", "MB", "GB", "TB")
NONE = "\u2013"
"""What stands where there is no number."""
GAP = "\u00a0"
"""Between a number and its unit, which stay on one line."""
_COUNTS = ("", "k", "M", "G", "T")


def significant(value: float, digits: int = 4) -> str:
    """A number with so many significant digits and no exponent, unless it is tiny or huge."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    # Rounded first: 999.96 has its four digits in front of the point.
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = math.floor(math.log10(abs(rounded)))
    if not -5 <= magnitude <= 15:
        return f"{value:.{digits - 1}e}"
    return f"{rounded:,.{max(digits - 1 - magnitude, 0)}f}"


def scaled(value: float, units: Sequence[str]) -> tuple[float, str]:
    """The factor and the name of the unit, each 1000 times the one before, in which `value` lies below 1000."""
    factor = 1.0
    for unit in units[:-1]:
        # What would be rounded to 1,000 belongs to the next unit.
        if abs(value) / factor < 999.95:
            return factor, unit
        factor *= 1000
    return factor, units[-1]


def in_unit(value: float, unit: tuple[float, str]) -> str:
    """A round number for an axis, in the unit that `scaled` gave for the largest."""
    return f"{value / unit[0]:g}{GAP}{unit[1]}".rstrip() if value else "0"


def byte_size(nbytes: int) -> str:
    """Bytes in kB, MB or GB of 10^3, 10^6 and 10^9 bytes."""
    factor, unit = scaled(nbytes, _BYTES)
    return f"{nbytes:,}{GAP}B" if factor == 1 else f"{significant(nbytes / factor)}{GAP}{unit}"


def short_count(number: float) -> str:
    """A large count, rounded: `11.18 M`."""
    factor, unit = scaled(number, _COUNTS)
    return f"{number:,.0f}" if number < 10**4 else f"{significant(number / factor)}{GAP}{unit}"


def macs(number: int) -> str:
    """Multiply-adds, rounded: `1.814 GMACs`."""
    factor, unit = scaled(number, _COUNTS)
    return f"{number:,}{GAP}MACs" if factor == 1 else f"{significant(number / factor)}{GAP}{unit}MACs"


def count(number: int) -> str:
    """An exact count."""
    return f"{number:,}"


def percent(fraction: float, decimals: int = 2) -> str:
    """A fraction in per cent."""
    return f"{100 * fraction:.{decimals}f}{GAP}%"


def round_percent(fraction: float) -> str:
    """A fraction in per cent for an axis, without decimals where it has none."""
    return percent(fraction, 0 if abs(100 * fraction - round(100 * fraction)) < 1e-6 else 1)


def share(part: float, whole: float, decimals: int = 2) -> str:
    """One number in per cent of another, where that is one."""
    return percent(part / whole, decimals) if whole else NONE


def by(*sizes: int) -> str:
    """Sizes of a shape or block: `64 \u00d7 3 \u00d7 3`."""
    return " \u00d7 ".join(map(str, sizes))


def named_value(name: str, value: Any) -> str:
    """A plain value of a document, with the unit that its name ends in."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NONE}[value]
    if isinstance(value, (list, tuple)):
        return ", ".join(named_value(name, one) for one in value) or NONE
    if not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        return str(value)
    if name.endswith("_bytes"):
        return f"{byte_size(round(value))} ({value:,.0f})" if abs(value) >= 1000 else f"{value:,.0f}{GAP}B"
    if name.endswith("_macs"):
        return f"{macs(round(value))} ({value:,.0f})"
    if name.startswith(("sparsity", "density")):
        return percent(value, 4)
    return (f"{value:,}" if isinstance(value, int) else f"{value:.6g}") + (f"{GAP}s" if name.endswith("_s") else "")
