"""Choosing a form for each weight of an ONNX file, and writing it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import numpy as np

from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.onnx.forms import COMPACT_FORMS, FLOATS, SHARED, Parts, dense_form, expression
from exporters.onnx.nodes import NodeWriter, initializer_bytes

__all__ = ["add_weight", "choose"]

_PENALTY = 1 << 50
"""Bytes added to the size of a form that is chosen only if no other can be: more than any file has."""


def choose(tensors: Mapping[str, SparseTensor], encoding: str, dtype: str) -> dict[str, str]:
    """Chooses a form for each weight so that all of them together take the fewest bytes.

    The tables of a form stand in a file once, so every set of forms is compared as a whole: with three compact forms
    there are eight sets.

    Args:
        tensors: sparse weights without active zeros; their values have the type that is stored.
        encoding: `auto` for any form, `dense` for that one, `delta` or `bitmask` for those wherever they are possible.
        dtype: type that the weights are computed in.

    Returns:
        A form for `add_weight` for each weight.
    """
    forms = ["dense", *(form for form in COMPACT_FORMS if encoding == "auto" or form.startswith(encoding))]
    # Exact sizes, by encoding every weight in every form: nodes and names weigh as much as a small weight's values.
    sizes = np.array([[_own_bytes(name, tensor, form, dtype) for form in forms] for name, tensor in tensors.items()])
    if not len(sizes):
        return {}
    if encoding not in ("auto", "dense"):
        sizes[:, 0] += _PENALTY
    best: tuple[int, ...] = (0,)
    total = sizes[:, 0].sum()
    for columns in _subsets(len(forms)):
        nbytes = _shared_bytes([forms[i] for i in columns], dtype) + sizes[:, columns].min(axis=1).sum()
        if nbytes < total:
            best, total = columns, nbytes
    picks = sizes[:, best].argmin(axis=1)
    return {name: forms[best[pick]] for name, pick in zip(tensors, picks, strict=True)}


def add_weight(writer: NodeWriter, name: str, tensor: SparseTensor, form: str, dtype: str) -> None:
    """Writes a weight as the value `name`, of type `dtype`; as a dense one if the `form` cannot hold it."""
    parts = _parts(tensor, form)
    if parts is not None:
        _add_parts(writer, name, parts, dtype)
    elif tensor.values.dtype.kind != "f" or tensor.values.dtype.name == dtype:
        writer.initializer(tensor.to_dense(), name)
    else:
        writer.add((FLOATS[dtype], "values"), {"values": tensor.to_dense()}, {}, name)


def _add_parts(writer: NodeWriter, name: str, parts: Parts, dtype: str) -> None:
    stored = parts.own["values"].dtype.name
    shared: dict[str, Array] = {**SHARED, **parts.form.tables, "zero": np.zeros(1, dtype)}
    writer.add(expression(parts.form, dtype, stored), parts.own, shared, name)


def _parts(tensor: SparseTensor, form: str) -> Parts | None:
    """Returns a weight in a form; None if the form cannot hold it, or is that of a plain initializer."""
    if form in COMPACT_FORMS:
        return COMPACT_FORMS[form](tensor)
    return dense_form(tensor) if isinstance(tensor, GridTensor) else None


def _subsets(count: int) -> list[tuple[int, ...]]:
    """Returns column 0 with every set of the other columns, small sets first."""
    sets = (itertools.combinations(range(1, count), size) for size in range(count))
    return [(0, *chosen) for chosen in itertools.chain.from_iterable(sets)]


def _own_bytes(name: str, tensor: SparseTensor, form: str, dtype: str) -> int:
    """Counts the bytes that a weight adds to a file which has the tables of its form already."""
    parts = _parts(tensor, form)
    if parts is None:
        return 2 * _PENALTY if form in COMPACT_FORMS else _dense_bytes(name, tensor, dtype)
    writer = NodeWriter()
    _add_parts(writer, name, parts, dtype)
    return writer.nbytes - writer.shared_bytes


def _dense_bytes(name: str, tensor: SparseTensor, dtype: str) -> int:
    writer, stored = NodeWriter(), tensor.values.dtype
    source = name if stored.kind != "f" or stored.name == dtype else writer.cast(FLOATS[dtype], name)
    return writer.nbytes + initializer_bytes(source, tensor.mask.shape, stored)


def _shared_bytes(forms: Collection[str], dtype: str) -> int:
    """Counts the bytes of the tables and constants of some forms."""
    example = SparseTensor(Mask((8,), np.array([3])), np.ones(1, dtype))
    writer = NodeWriter()
    for form in forms:
        add_weight(writer, "", example, form, dtype)
    return writer.shared_bytes
