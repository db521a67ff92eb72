"""Which form each weight of an ONNX file takes, and the writing of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from functools import partial

import numpy as np

from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.onnx.forms import FLOATS, SHARED, STEP_BITS, Parts, bitmask_form, delta_form, expression, tables
from exporters.onnx.nodes import NodeWriter, initializer_bytes

__all__ = ["add_weight", "choose"]

_COMPACT: dict[str, Callable[[SparseTensor], Parts | None]] = {
    "bitmask": bitmask_form,
    **{f"delta {bits}": partial(delta_form, bits=bits) for bits in STEP_BITS},
}
_ALLOWED = {
    "auto": tuple(_COMPACT),
    "delta": tuple(form for form in _COMPACT if form.startswith("delta")),
    "bitmask": ("bitmask",),
    "dense": (),
}
_LAST_RESORT = 1 << 50  # bytes; for a form that is taken only where no other can be


def choose(tensors: Mapping[str, SparseTensor], encoding: str, dtype: str) -> dict[str, str]:
    """A form for each weight, so that all together take the fewest bytes.

    A form comes with tables that stand in a file once; so all sets of forms are compared, each with its tables.

    Args:
        tensors: sparse weights without active zeros; their values have the type that is stored.
        encoding: `auto` for any form, `dense` for that one, `delta` or `bitmask` for those wherever they can be.
        dtype: type that the weights are computed with.

    Returns:
        Names for `add_weight`, by weight.
    """
    compact = _ALLOWED[encoding]
    forms = ("dense", *compact)
    sizes = np.array([[_own_bytes(name, tensor, form, dtype) for form in forms] for name, tensor in tensors.items()])
    if not len(sizes):
        return {}
    if encoding not in ("auto", "dense"):
        sizes[:, 0] += _LAST_RESORT
    best: tuple[int, ...] = (0,)
    total = sizes[:, 0].sum()
    for columns in _subsets(len(forms)):
        nbytes = _shared_bytes([forms[i] for i in columns], dtype) + sizes[:, columns].min(axis=1).sum()
        if nbytes < total:
            best, total = columns, nbytes
    picks = sizes[:, best].argmin(axis=1)
    return {name: forms[best[pick]] for name, pick in zip(tensors, picks, strict=True)}


def add_weight(writer: NodeWriter, name: str, tensor: SparseTensor, form: str, dtype: str) -> None:
    """Write a weight as the value `name`, of type `dtype`; dense where the `form` cannot hold it."""
    parts = _COMPACT[form](tensor) if form in _COMPACT else None
    if parts is not None:
        _add_parts(writer, name, parts, dtype)
    elif tensor.values.dtype.kind != "f" or tensor.values.dtype.name == dtype:
        writer.initializer(tensor.to_dense(), name)
    else:
        writer.add((FLOATS[dtype], "values"), {"values": tensor.to_dense()}, {}, name)


def _add_parts(writer: NodeWriter, name: str, parts: Parts, dtype: str) -> None:
    stored = parts.own["values"].dtype.name
    shared: dict[str, Array] = {**SHARED, **tables(parts.form), "zero": np.zeros(1, dtype)}
    writer.add(expression(parts.form, dtype, stored), parts.own, shared, name)


def _subsets(count: int) -> list[tuple[int, ...]]:
    """Column 0 with every set of the others, small sets first."""
    sets = (itertools.combinations(range(1, count), size) for size in range(count))
    return [(0, *chosen) for chosen in itertools.chain.from_iterable(sets)]


def _own_bytes(name: str, tensor: SparseTensor, form: str, dtype: str) -> int:
    """Bytes that a weight adds to a file which has the tables of its form already."""
    if form not in _COMPACT:
        return _dense_bytes(name, tensor, dtype)
    parts = _COMPACT[form](tensor)
    if parts is None:
        return 2 * _LAST_RESORT
    writer = NodeWriter()
    _add_parts(writer, name, parts, dtype)
    first = writer.nbytes
    _add_parts(writer, name, parts, dtype)
    return writer.nbytes - first


def _dense_bytes(name: str, tensor: SparseTensor, dtype: str) -> int:
    writer, stored = NodeWriter(), tensor.values.dtype
    source = name if stored.kind != "f" or stored.name == dtype else writer.cast(FLOATS[dtype], name)
    return writer.nbytes + initializer_bytes(source, tensor.mask.shape, stored)


def _shared_bytes(forms: Collection[str], dtype: str) -> int:
    """Bytes of the tables and constants of some forms."""
    example = SparseTensor(Mask((8,), np.array([3])), np.ones(1, dtype))
    writer = NodeWriter()
    for form in forms:
        add_weight(writer, "", example, form, dtype)
    first = writer.nbytes
    for form in forms:
        add_weight(writer, "", example, form, dtype)
    # The second round added everything but what is shared.
    return 2 * first - writer.nbytes
