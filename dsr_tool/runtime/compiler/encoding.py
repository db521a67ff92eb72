"""Ops as the array of structs that the kernels read."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dsr_tool.runtime.compiler.arena import Address
from dsr_tool.runtime.compiler.layouts import Flat, Planes, Value
from dsr_tool.runtime.compiler.op import Op
from dsr_tool.runtime.compiler.packing import Pack, Packer
from dsr_tool.runtime.kernels import ops as table
from dsr_tool.sparsity.tensor import Array

__all__ = ["Encoded", "encode"]

_ABSENT = Address(-1, 0)


@dataclass(frozen=True)
class Encoded:
    """Structs, and what they point to.

    Attributes:
        structs: one struct for each op.
        packs: packed weights, which must live as long as the structs.
        tables: biases, masks and index tables, which must too.
    """

    structs: ctypes.Array[table.Op]
    packs: list[Pack] = field(default_factory=list)
    tables: list[Array] = field(default_factory=list)


def encode(ops: Sequence[Op], addresses: Mapping[Value, Address], packer: Packer) -> Encoded:
    """Returns the structs of ops, once all halos are final.

    Args:
        ops: the ops of a segment.
        addresses: the address of each value.
        packer: packs their weights.
    """
    encoded = Encoded((table.Op * len(ops))())
    for op, struct in zip(ops, encoded.structs, strict=True):
        _fill(struct, _common_fields(op, addresses), encoded.tables)
        fields, pack = op.parameters(packer)
        if pack is not None:
            encoded.packs.append(pack)
        member = op.kind.name.lower()
        expected = table.PARAMETERS.get(member, ctypes.Structure)
        names = [name for name, *_ in getattr(expected, "_fields_", ())]
        # ctypes would leave a missing field at zero, and take a misspelt one as a new attribute.
        if sorted(names) != sorted(fields):
            raise TypeError(f"{op.kind.name} has the fields {names} in ops.def, but its op gives {sorted(fields)}")
        if fields:
            # A pack owns its arrays and counts their bytes itself.
            owned = {} if pack is None else pack.fields
            _fill(getattr(struct, member), owned, [])
            _fill(getattr(struct, member), {k: v for k, v in fields.items() if k not in owned}, encoded.tables)
    return encoded


def _common_fields(op: Op, addresses: Mapping[Value, Address]) -> dict[str, int | float | Array]:
    source, out = addresses[op.source], addresses[op.out]
    other = _ABSENT if op.other is None else addresses[op.other]
    fields: dict[str, int | float | Array] = {
        "kind": op.kind,
        "source_buffer": source.buffer,
        "source_offset": source.offset,
        "other_buffer": other.buffer,
        "other_offset": other.offset,
        "out_buffer": out.buffer,
        "out_offset": out.offset,
        "activation": op.activate.function,
        "low": op.activate.low,
        "high": op.activate.high,
        "slope": op.activate.slope,
        "shift": op.activate.shift,
        "negative_scale": op.activate.negative_scale,
        "source_stride": _stride(op.source),
        "other_stride": _stride(op.other),
        "out_stride": _stride(op.out),
    }
    if isinstance(op.out, Planes):
        fields |= {"channels": op.out.channels, "phases": op.out.phases, "length": op.out.grid.length}
        fields |= {"halo_before": op.out.halo_before, "halo_after": op.out.halo_after}
        # Lanes past the end of a row may hold anything unless an op reads them: as halo, or as part of a sum.
        if op.masks and (op.out.zero_padded or op.out.halo_before or op.out.halo_after):
            fields["mask"] = op.out.mask()
    elif isinstance(op.out, Flat):
        # All entries count as one plane, so ops on planes work on entries in order too.
        fields |= {"channels": 1, "phases": 1, "length": op.out.size // op.out.lanes}
    return fields


def _stride(value: Value | None) -> int:
    return value.stride if isinstance(value, Planes) else 0


def _fill(struct: ctypes.Structure, fields: Mapping[str, int | float | Array], tables: list[Array]) -> None:
    """Sets fields; of arrays the address, and they are appended to `tables`."""
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            tables.append(value)
            setattr(struct, name, value.ctypes.data)
        else:
            setattr(struct, name, value)
