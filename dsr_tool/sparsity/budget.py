"""Budget: the sparsity, parameters, bytes or multiply-adds that a user allows a model."""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from dsr_tool.errors import UsageError

__all__ = ["FORMS", "Budget"]

FORMS = "5.1Mparams, 12MB, 12MiB, 300kB or 0.8GMACs"
"""Examples of budgets, for messages."""

_PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# Field of a budget and factor, for each unit: `Mparams` is 10^6 parameters, `MiB` 2^20 bytes.
_UNITS = {
    **{f"{prefix}params": ("parameters", factor) for prefix, factor in _PREFIXES.items()},
    **{f"{prefix}B": ("bytes", factor) for prefix, factor in (_PREFIXES | _BINARY).items()},
    **{f"{prefix}MACs": ("macs", factor) for prefix, factor in _PREFIXES.items()},
}
_BUDGET = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([A-Za-z]+)")
_SHOWN_DIGITS = 4
"""Significant digits of an amount in messages."""


@dataclass(frozen=True)
class Budget:
    """Limit on the size of a model. Exactly one of the first four fields is set.

    Attributes:
        sparsity: fraction of zeros among the prunable weights, in [0, 1).
        parameters: number of non-zero parameters of the whole model, dense ones included.
        bytes: size of the exported archive in bytes, with the smallest encodings and exact fp32 values.
        macs: multiply-adds of the whole model for one input, dense layers included.
        unit: unit in which the user gave the number (`MB`, `Mparams`), for messages; empty for the unit 1.
    """

    sparsity: Fraction | None = None
    parameters: int | None = None
    bytes: int | None = None
    macs: int | None = None
    unit: str = ""

    @classmethod
    def of_sparsity(cls, sparsity: float | str) -> Budget:
        """Returns the budget of a fraction of zeros. Decimal digits count as written: 0.9 is exactly 9/10.

        Raises:
            UsageError: `sparsity` is not a number in [0, 1).
        """
        # By way of the text: the float 0.9 is not 9/10, and a rounded product would be off by one weight.
        try:
            value = Fraction(str(sparsity))
        except (ValueError, ZeroDivisionError):
            raise UsageError(
                f"sparsity {str(sparsity)[:80]!r} is not a number in [0, 1); give the fraction of zeros, e.g. 0.9."
            ) from None
        if not 0 <= value < 1:
            raise UsageError(f"sparsity {sparsity} is not in [0, 1); give the fraction of zeros, e.g. 0.9.")
        return cls(sparsity=value)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parses a budget of the command line. A fraction of a byte, parameter or multiply-add is cut off.

        Raises:
            UsageError: the text is not a number above 0 with one of the units.
        """
        match = _BUDGET.fullmatch(text.strip())
        unit = match[2] if match else ""
        unit = f"{unit}s" if unit.endswith("MAC") else unit  # 1GMAC is as good as 1GMACs
        if match is None or unit not in _UNITS:
            # mb may mean MB or Mb, so a unit in another case is suggested, not accepted.
            near = [name for name in _UNITS if name.lower() in (unit.lower(), f"{unit}s".lower())]
            if match and near:
                raise UsageError(f"budget {text[:80]!r} has no known unit; did you mean {match[1]}{near[0]}?")
            raise UsageError(f"budget {text[:80]!r} is not a number with a unit; write it like {FORMS}.")
        kind, factor = _UNITS[unit]
        amounts = {kind: math.floor(Fraction(match[1]) * factor)}
        if not amounts[kind]:
            raise UsageError(f"budget {text[:80]!r} allows nothing; write a larger number, like {FORMS}.")
        return cls(None, amounts.get("parameters"), amounts.get("bytes"), amounts.get("macs"), unit)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Budget | None:
        """Returns the budget of a `to_record`, if it was one in bytes; None for anything else."""
        nbytes, unit = record.get("budget_bytes"), record.get("budget_unit")
        # The record comes from a file, which may hold anything.
        if type(nbytes) is not int or nbytes < 0 or not isinstance(unit, str) or _UNITS.get(unit, [""])[0] != "bytes":
            return None
        return cls(bytes=nbytes, unit=unit)

    def to_record(self) -> dict[str, float | int | str]:
        """Returns plain values for the description of a model."""
        if self.sparsity is not None:
            return {"sparsity": float(self.sparsity)}
        return {f"budget_{self.kind}": self.amount, "budget_unit": self.unit}

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(name for name in ("sparsity", "parameters", "bytes", "macs") if getattr(self, name) is not None)

    @property
    def amount(self) -> int:
        """Number of parameters, bytes or multiply-adds, whichever is limited; 0 for a sparsity."""
        return self.parameters or self.bytes or self.macs or 0

    def show(self, amount: int | None = None, rounding: str = decimal.ROUND_HALF_EVEN) -> str:
        """Formats an amount in the budget's unit with at least four digits, such as `11.84 MB`.

        Args:
            amount: number of parameters, bytes or multiply-adds; default: the budget itself.
            rounding: a rounding mode of `decimal`.
        """
        amount = self.amount if amount is None else amount
        unit = self.unit or {"parameters": "params", "bytes": "B", "macs": "MACs"}[self.kind]
        factor = _UNITS[unit][1]
        if factor == 1:
            return f"{amount:,} {unit}"
        whole = len(str(amount // factor))
        context = decimal.Context(prec=max(_SHOWN_DIGITS, whole), rounding=rounding)
        number = context.divide(decimal.Decimal(amount), decimal.Decimal(factor))
        places = max(-int(number.as_tuple().exponent), _SHOWN_DIGITS - whole, 0)
        return f"{number:,.{places}f} {unit}"

    def out_of_reach(self, least: int, most: int) -> UsageError:
        """Returns the error for a model that cannot meet the budget.

        Args:
            least: smallest amount that the model can have.
            most: largest one. The message rounds the range inwards, so every budget that it names can be met.
        """
        low, high = self._legible(least, decimal.ROUND_CEILING), self._legible(most, decimal.ROUND_FLOOR)
        if least >= most:
            return UsageError(
                f"budget {self.show()} cannot be met: no layer of this model is left to be sparse, so it always "
                f"has {self._legible(most)}; keep fewer layers dense."
            )
        if self.amount > most:
            return UsageError(
                f"budget {self.show()} is more than this model can fill, which has {high} with all its weights; give "
                f"one from {low} to {high}, or --sparsity 0 for all weights."
            )
        return UsageError(
            f"budget {self.show()} cannot be met: this model can have from {low} to {high}; give a budget in that "
            f"range, or keep fewer layers dense."
        )

    def _legible(self, amount: int, rounding: str = decimal.ROUND_HALF_EVEN) -> str:
        """Formats an amount in the largest unit of the budget's kind that leaves digits before the point."""
        binary = "i" in self.unit
        units = {name: factor for name, (kind, factor) in _UNITS.items() if kind == self.kind}
        family = [name for name, factor in units.items() if factor == 1 or ("i" in name) == binary]
        fitting = [name for name in family if units[name] <= amount]
        unit = max(fitting, key=units.__getitem__, default=self.unit)
        return replace(self, unit=unit).show(amount, rounding)

    def active_weights(self, prunable: int, other: int, layers: int) -> int:
        """Returns the exact number of active weights for a sparsity or a number of parameters.

        Args:
            prunable: number of prunable weights.
            other: number of parameters that stay dense.
            layers: number of sparse layers; each keeps at least one weight.

        Returns:
            Number of active weights. If the sparsity asks for a fraction of a weight, it is rounded half to even.

        Raises:
            UsageError: no assignment of zeros meets the budget, or the budget is in bytes or multiply-adds.
        """
        if self.sparsity is not None:
            count = round(prunable * (1 - self.sparsity))
            if count < layers:
                raise UsageError(
                    f"sparsity {float(self.sparsity):.12g} cannot be reached: each of the {layers} sparse layers keeps "
                    f"at least one of the {prunable:,} prunable weights; the highest reachable sparsity is "
                    f"{_rounded_down(1 - Fraction(layers, prunable)) if prunable else 0:.9g}."
                )
            return count
        if self.parameters is None:
            raise UsageError("a budget in bytes or multiply-adds depends on the model; convert() solves for it.")
        least, most = other + layers, other + prunable
        if not least <= self.parameters <= most:
            raise UsageError(
                f"budget {self.parameters:,} parameters cannot be met: with {other:,} parameters kept dense, this "
                f"model has from {least:,} (sparsity {_rounded_down(1 - Fraction(layers, max(prunable, 1))):.9g}) "
                f"to {most:,}; give a number in that range, or keep fewer layers dense."
            )
        return self.parameters - other


def _rounded_down(value: Fraction) -> float:
    """Returns `value` cut after nine digits. Rounding up would print a sparsity that cannot be reached."""
    return math.floor(value * 10**9) / 10**9
