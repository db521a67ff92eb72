"""The table of ops, `ops.def`, as enums and ctypes structures.

Everything here is made from the lines of the table at import, so it cannot differ from what the C++ sources include.
`library_layout` returns what a built library says about the same table, and `LAYOUT` is what it has to say.
"""

from __future__ import annotations

import ctypes
import functools
import re
from enum import EnumMeta, IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

__all__ = [
    "ABI",
    "ENUMS",
    "LAYOUT",
    "LIMITS",
    "PARAMETERS",
    "STRUCTS",
    "Activation",
    "Combination",
    "Fault",
    "Kind",
    "LayoutRow",
    "Op",
    "Packing",
    "columns",
    "library_layout",
]

# One row on each line, so that two expressions read the table; a test counts the rows that they miss.
_ROW = re.compile(r"^([A-Z]+)\((.*)\)$")
_ARGUMENT = re.compile(r'"[^"]*"|[^,\s][^,]*')
_CTYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
}
"""The ctypes of the table's scalar types; every type that ends in `*` is a pointer."""

_E = TypeVar("_E")


@functools.cache
def _rows(word: str) -> tuple[tuple[str, ...], ...]:
    """Returns the arguments of every row of `ops.def` that begins with a word, in order."""
    lines = (Path(__file__).parent / "ops.def").read_text(encoding="utf-8").splitlines()
    matches = [match for line in lines if (match := _ROW.match(line)) and match[1] == word]
    return tuple(tuple(part.strip().strip('"') for part in _ARGUMENT.findall(match[2])) for match in matches)


class _FromTable(EnumMeta):
    """Lets a type checker, which does not read the table, look members up by attribute."""

    if TYPE_CHECKING:

        def __getattr__(cls: type[_E], name: str) -> _E: ...


class _Numbers(IntEnum, metaclass=_FromTable):
    """An enum whose members are rows of the table: name and number."""


# mypy cannot read the table, so it gets classes without members, whose metaclass answers for any name.
if TYPE_CHECKING:

    class Kind(_Numbers):
        """Kinds of ops."""

    class Activation(_Numbers):
        """Functions of one entry, applied to a result; CLIP with infinite limits is the identity."""

    class Combination(_Numbers):
        """Functions of two entries."""

    class Packing(_Numbers):
        """Ways of packing weights."""

    class Fault(_Numbers):
        """Reasons why a weight cannot be packed."""

else:
    Kind = _Numbers("Kind", {name: int(number) for name, number, *_ in _rows("OP")})
    Activation = _Numbers("Activation", {name: int(number) for name, number, _ in _rows("ACTIVATION")})
    Combination = _Numbers("Combination", {name: int(number) for name, number, _ in _rows("COMBINATION")})
    Packing = _Numbers("Packing", {name: int(number) for name, number, _ in _rows("PACKING")})
    Fault = _Numbers("Fault", {name: int(number) for name, number, _ in _rows("FAULT")})

ENUMS = (Kind, Activation, Combination, Packing, Fault)
"""The enums of the table."""

LIMITS = {name: int(value) for name, value, _ in _rows("LIMIT")}
"""Numbers that the kernels and the compiler must both know."""

ABI = int(_rows("ABI")[0][0])
"""Number that a library must return from `dsr_kernels_abi`."""


def _struct(name: str) -> type[ctypes.Structure]:
    fields = [(field, _ctype(kind)) for struct, kind, field, _ in _rows("FIELD") if struct == name]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _ctype(name: str) -> type[Any]:
    return ctypes.c_void_p if name.endswith("*") else _CTYPES[name]


STRUCTS: dict[str, type[ctypes.Structure]] = {name: _struct(name) for name, _ in _rows("STRUCT")}
"""The structs of the table by name."""

PARAMETERS: dict[str, type[ctypes.Structure]] = {member: STRUCTS[name] for name, member in _rows("PARAMETERS")}
"""The struct of named parameters of each kind that has any, by its member of `Op`."""


class _Parameters(ctypes.Union):
    _fields_ = tuple(PARAMETERS.items())


class Op(ctypes.Structure):
    """One entry of a plan: the fields that every op has, and the parameters of its kind.

    Fields that end in `*` in the table are addresses of arrays, which whoever runs the op keeps alive.
    """

    _anonymous_ = ("_parameters",)
    _fields_ = (*((field, _ctype(kind)) for kind, field, _ in _rows("COMMON")), ("_parameters", _Parameters))


def columns(struct: str) -> tuple[str, ...]:
    """Returns the fields of a struct in order; arrays of integers that stand for structs have these columns."""
    return tuple(field for name, _, field, _ in _rows("FIELD") if name == struct)


class LayoutRow(NamedTuple):
    """One row of the layout that both sides must agree on.

    Attributes:
        name: `Limit.MAX_BUFFERS`, `Kind.SPMM`, `Spmm` or `Spmm.values`.
        number: a limit, number of an enum's member, offset of a field in bytes, 0 for a struct.
        nbytes: size of a struct or field, otherwise 0.
    """

    name: str
    number: int
    nbytes: int


def _layout() -> tuple[LayoutRow, ...]:
    enums = [LayoutRow(f"{enum.__name__}.{m.name}", m, 0) for enum in ENUMS for m in enum]
    # These rows must be those of LAYOUT in kernels/layout.h; sorted, since C++ lists them in the order of the table.
    limits = [LayoutRow(f"Limit.{name}", value, 0) for name, value in LIMITS.items()]
    structs = [LayoutRow(name, 0, ctypes.sizeof(struct)) for name, struct in STRUCTS.items()]
    members = [(name, struct, field) for name, struct in STRUCTS.items() for field in columns(name)]
    members += [("Op", Op, field) for _, field, _ in _rows("COMMON")]
    members += [("Op", Op, field) for field in PARAMETERS]
    fields = [
        LayoutRow(f"{name}.{field}", getattr(struct, field).offset, getattr(struct, field).size)
        for name, struct, field in members
    ]
    return tuple(sorted([*limits, *enums, *structs, LayoutRow("Op", 0, ctypes.sizeof(Op)), *fields]))


LAYOUT = _layout()
"""The layout of this package, sorted by name."""


class _Row(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("number", ctypes.c_int64), ("nbytes", ctypes.c_int64))


def library_layout(library: ctypes.CDLL) -> tuple[LayoutRow, ...]:
    """Returns the layout that a library was compiled with, sorted by name."""
    library.dsr_layout.restype = ctypes.POINTER(_Row)
    rows, found = library.dsr_layout(), list[LayoutRow]()
    # A pointer has no end of its own.
    for row in rows:
        if row.name is None:
            break
        found.append(LayoutRow(row.name.decode(), row.number, row.nbytes))
    return tuple(sorted(found))
