"""Packed weights: the records of a weight, their order, and the weights that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.errors import FormatError
from dsr_tool.runtime.compiler.packing import MAX_OFFSET, Pack, Taps, pack_dense, pack_sparse
from dsr_tool.runtime.kernels.ops import LIMITS
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor


def matrix_of(pack: Pack, phase: int, shape: tuple[int, int], channel: int) -> np.ndarray:
    """Returns the weights of one phase as (output channels, input vectors), read as the kernels read them."""
    result = np.zeros((shape[0] + 3, shape[1] * channel + 64), np.float64)
    for first, last, own, dense in pack.parts:
        for base, value, offset, entries, count in pack.blocks[first:last] if own == phase else ():
            values, offsets = value, offset
            for row, records in pack.entries[entries : entries + count]:
                rows = 4 if dense else 1
                block = pack.values[values : values + rows * records].reshape(records, rows)
                where = base + 32 + pack.offsets[offsets : offsets + records].astype(int)
                for r in range(rows):
                    np.add.at(result[row + r], where, block[:, r])
                values += rows * records
                offsets += 0 if dense else records
    return result[: shape[0]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 12), st.sampled_from((0.0, 0.2, 1.0)), st.integers(1, 5),
    st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_records_hold_exactly_the_active_weights(seed, rows, channels, density, per_block, split, dense):
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, channels, 1, 3)) < density
    weight = SparseTensor(Mask.from_bool(mask), rng.standard_normal(int(mask.sum())).astype(np.float32))
    phases = [Taps((-2, 0, 5), 11), Taps((-1, 3, 4), 11)]
    pack = (
        pack_dense(weight.to_dense(), phases, per_block, split)
        if dense
        else pack_sparse(weight, 1, phases, per_block, split)
    )
    for phase, taps in enumerate(phases):
        expected = np.zeros((rows, channels * 11 + 64))
        for c in range(channels):
            for tap, offset in enumerate(taps.offsets):
                expected[:, 32 + c * 11 + offset] += weight.to_dense()[:, c, 0, tap]
        np.testing.assert_array_equal(matrix_of(pack, phase, (rows, channels), 11), expected)


def test_codes_of_a_grid_are_packed_as_values_are():
    rng = np.random.default_rng(0)
    mask = rng.random((9, 12, 1, 3)) < 0.3
    codes = SparseTensor(Mask.from_bool(mask), rng.integers(-127, 128, int(mask.sum())).astype(np.int8))
    values = SparseTensor(codes.mask, codes.values.astype(np.float32))
    phases = [Taps((-2, 0, 5), 11), Taps((-1, 3, 4), 11)]
    packs = [pack_sparse(codes, 1, phases, 5, 2), pack_dense(codes.to_dense(), phases, 5, 2)]
    others = [pack_sparse(values, 1, phases, 5, 2), pack_dense(values.to_dense(), phases, 5, 2)]
    for pack, other in zip(packs, others, strict=True):
        assert (pack.coded, other.coded) == (True, False)
        spare = np.zeros(LIMITS["SPARE_CODES"])
        np.testing.assert_array_equal(pack.values, np.concatenate([other.values, spare]))
        for name in ("offsets", "entries", "blocks", "parts"):
            np.testing.assert_array_equal(pack.fields[name], other.fields[name])
        assert (pack.fields["values"], other.fields["codes"]) == (0, 0)
        assert pack.fields["codes"] is pack.values


def test_rows_of_a_block_are_sorted_by_their_number_of_records():
    rng = np.random.default_rng(0)
    mask = rng.random((64, 32, 1, 1)) < 0.3
    pack = pack_sparse(SparseTensor(Mask.from_bool(mask), np.ones(mask.sum(), np.float32)), 1, [Taps((0,), 4)], 8)
    for _, _, _, entries, count in pack.blocks:
        assert (np.diff(pack.entries[entries : entries + count, 1]) <= 0).all()


@pytest.mark.parametrize("positions", [[-1, 2], [0, 12], [3, 3], [5, 2]])
def test_invalid_positions_are_refused(positions):
    weight = SparseTensor(Mask((3, 4, 1, 1), np.array(positions)), np.ones(2, np.float32))
    with pytest.raises(FormatError, match="active positions"):
        pack_sparse(weight, 1, [Taps((0,), 4)], 4)


def test_offsets_beyond_16_bits_are_refused():
    weight = SparseTensor(Mask.full((3, 4, 1, 1)), np.ones(12, np.float32))
    with pytest.raises(FormatError, match="farther"):
        pack_sparse(weight, 1, [Taps((0,), MAX_OFFSET)], 4)
