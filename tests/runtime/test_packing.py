"""Packed weights: the records of a weight, their order, and the weights that are refused."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsr_tool.errors import FormatError
from dsr_tool.runtime.compiler.packing import MAX_OFFSET, Pack, Packer, Recipe, Taps
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import LIMITS, STRUCTS, Fault, Packing
from dsr_tool.sparsity.at_rest import BitMask
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

ARRAYS = ("values", "offsets", "entries", "blocks", "parts")
TAPS = Taps(((-2, 0, 5), (-1, 3, 4)), 11)
SHIFTED = Taps(((-2, 0, 5), (4, 6, 11), (-1, 3, 4)), 11)
"""The first two phases differ by a shift."""
EXTREMES = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1)


def pack(packing: Packing, weight: SparseTensor, taps: Taps, per_block: int, groups: int = 1, split: int = 1) -> Pack:
    recipe = Recipe(packing=packing, weight=weight, taps=taps, per_block=per_block, groups=groups, split=split)
    return Packer(library()).pack(recipe)


def weight_of(seed: int, shape: tuple[int, ...], density: float, coded: bool = False) -> SparseTensor:
    rng = np.random.default_rng(seed)
    mask = Mask.from_bool(rng.random(shape) < density)
    codes = rng.integers(-127, 128, mask.active).astype(np.int8)
    return SparseTensor(mask, codes if coded else rng.standard_normal(mask.active).astype(np.float32))


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


def expected(weight: SparseTensor, taps: Taps, phase: int, groups: int) -> np.ndarray:
    """Returns the same matrix from the dense weight."""
    array = weight.to_dense()
    rows, inner = array.shape[:2]
    result = np.zeros((rows, inner * groups * taps.channel + 64))
    for row, c in itertools.product(range(rows), range(inner)):
        channel = row // (rows // groups) * inner + c
        for tap, offset in enumerate(taps.offsets[phase]):
            result[row, 32 + channel * taps.channel + offset] += array[row, c].ravel()[tap]
    return result


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 12), st.sampled_from((0.0, 0.2, 1.0)), st.integers(1, 14),
    st.integers(1, 5), st.integers(1, 3), st.sampled_from((TAPS, SHIFTED)), st.booleans(), st.booleans(),
)  # fmt: skip
def test_records_hold_exactly_the_active_weights(
    seed, rows, channels, density, per_block, split, groups, taps, dense, bits
):
    groups = 1 if dense else groups
    weight = weight_of(seed, (rows * groups, channels, 1, 3), density)
    if bits and weight.mask.stored is not None:
        weight = SparseTensor(BitMask(weight.mask), weight.values)
    made = pack(Packing.DENSE if dense else Packing.SPARSE, weight, taps, per_block, groups, split)
    for phase in range(len(taps.offsets)):
        found = matrix_of(made, phase, (rows * groups, channels * groups), taps.channel)
        np.testing.assert_array_equal(found, expected(weight, taps, phase, groups))
    # A part without output channels would be an item without work for some thread.
    assert (made.blocks[:, 4] > 0).all()
    assert len(made.offsets) < 3 + len(taps.offsets) * max(weight.mask.active, channels * 3)
    if taps is SHIFTED and not dense:
        assert len(made.offsets) == 2 * weight.mask.active + 2


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_rows_are_all_weights_in_order(density):
    weight = weight_of(0, (5, 7), density)
    made = pack(Packing.ROWS, weight, Taps(((0,),), 1), 3)
    np.testing.assert_array_equal(made.values.reshape(5, 7), weight.to_dense())
    assert made.entries.tolist() == [[row, 7] for row in range(5)]
    assert made.blocks.tolist(), made.parts.tolist() == ([[0, 0, 0, 0, 5]], [[0, 1, 0, 1]])
    # A weight without zeros lies as the kernel wants it.
    assert np.shares_memory(made.values, weight.values) == (density == 1)


@pytest.mark.parametrize("packing", [Packing.SPARSE, Packing.DENSE])
def test_codes_of_a_grid_are_packed_as_values_are(packing):
    codes = weight_of(0, (9, 12, 1, 3), 0.3, coded=True)
    values = SparseTensor(codes.mask, codes.values.astype(np.float32))
    made, other = pack(packing, codes, TAPS, 5, split=2), pack(packing, values, TAPS, 5, split=2)
    assert (made.coded, other.coded) == (True, False)
    spare = np.zeros(LIMITS["SPARE_CODES"])
    np.testing.assert_array_equal(made.values, np.concatenate([other.values, spare]))
    for name in ARRAYS[1:]:
        np.testing.assert_array_equal(getattr(made, name), getattr(other, name))
    assert (made.fields["values"], other.fields["codes"]) == (0, 0)
    assert made.fields["codes"] is made.values


def test_rows_of_a_block_are_sorted_by_their_number_of_records():
    made = pack(Packing.SPARSE, weight_of(0, (64, 32, 1, 1), 0.3), Taps(((0,),), 4), 8)
    for _, _, _, entries, count in made.blocks:
        rows, records = made.entries[entries : entries + count].T
        assert (np.diff(records) <= 0).all()
        # Those with as many stay in order, so that sums do not depend on the way of sorting.
        assert (np.diff(rows)[np.diff(records) == 0] > 0).all()


def test_parts_have_about_equal_work():
    weight = weight_of(0, (100, 50, 1, 1), 0.3)
    made = pack(Packing.SPARSE, weight, Taps(((0,),), 4), 50, split=4)
    work = [made.entries[made.blocks[first, 3] :][: made.blocks[first, 4], 1].sum() for first in made.parts[:, 0]]
    assert len(work) == 4
    assert max(work) - min(work) < 50


@pytest.mark.parametrize("positions", [[-1, 2], [0, 12], [3, 3], [5, 2], [2, -(2**63)], [2**63 - 1, 3]])
@pytest.mark.parametrize("packing", list(Packing))
def test_invalid_positions_are_refused(packing, positions):
    weight = SparseTensor(Mask((3, 4, 1, 1), np.array(positions)), np.ones(2, np.float32))
    with pytest.raises(FormatError, match="active positions"):
        pack(packing, weight, Taps(((0,),), 4), 4)


def test_offsets_beyond_16_bits_are_refused():
    weight = SparseTensor(Mask.full((3, 4, 1, 1)), np.ones(12, np.float32))
    with pytest.raises(FormatError, match="reaches 196,605 vectors, farther than the 65,535"):
        pack(Packing.SPARSE, weight, Taps(((0,),), MAX_OFFSET), 4)


@pytest.mark.parametrize("values", [1, 3])
def test_a_number_of_values_that_is_not_that_of_positions_is_refused(values):
    weight = SparseTensor(Mask((3, 4, 1, 1), np.array([2, 5])), np.ones(values, np.float32))
    with pytest.raises(FormatError, match="active positions"):
        pack(Packing.SPARSE, weight, Taps(((0,),), 4), 4)


def test_plans_share_a_pack_only_where_weight_and_recipe_are_the_same():
    packer, weight = Packer(library(), keep_recipes=True), weight_of(0, (6, 5, 1, 3), 0.4)
    recipes = [Recipe(packing=Packing.SPARSE, weight=weight, taps=TAPS, per_block=n) for n in (2, 2, 3)]
    first, second, third = (packer.pack(recipe, ("Conv", "w")) for recipe in recipes)
    assert first is second
    assert first is not third
    assert first.recipe is recipes[0]
    assert packer.pack(recipes[0]) is not first
    assert Packer(library()).pack(recipes[0]).recipe is None


numbers = st.one_of(st.integers(-2, 12), st.sampled_from(EXTREMES), st.integers(-(2**63), 2**63 - 1))
GUARD = 64
"""Bytes before and after each array that must not change."""


@settings(max_examples=500, deadline=None)
@example({"rows": 2**31 - 1, "inner": 1, "kernel": 1}, {"size": 2**31 - 1}, "positions", [])
@example({"rows": 2**32, "inner": 2**32, "kernel": 1}, {"size": 0}, "bits", [])
@given(
    st.dictionaries(st.sampled_from([name for name, _ in STRUCTS["Recipe"]._fields_[:-1]]), numbers, max_size=4),
    st.dictionaries(st.sampled_from(("size", "active", "width")), numbers, max_size=2),
    st.sampled_from(("all", "bits", "positions", "both")),
    st.lists(st.one_of(st.sampled_from(EXTREMES), st.integers(0, 40)), max_size=12),
)
def test_no_recipe_reads_or_writes_outside_of_its_arrays(recipe, weight, how, positions):
    """Numbers that a file may hold: either they are refused, or exactly the arrays that were asked for are written."""
    offsets = np.array([0, 2, -1, 5, 7, 2**31 - 1, -(2**31), 9, 1, 1, 1, 1], np.int32)
    fields = {"packing": 0, "rows": 2, "inner": 3, "kernel": 2, "groups": 1, "phases": 1, "channel": 5, "per_block": 2}
    fields |= {"split": 1, **recipe, "offsets": offsets.ctypes.data}
    size = fields["rows"] * fields["inner"] * fields["kernel"]
    # As a reader of files would, the arrays have the sizes that the struct says, if they fit in memory at all.
    own = {"size": size, "active": len(positions), "width": 4, **weight}
    fields = {"taps": fields["phases"] * fields["kernel"], **fields}
    if any(abs(value) >= 2**63 for value in (*fields.values(), *own.values())):
        return
    if fields["taps"] > len(offsets) or own["active"] > 12 or not own["size"] < 2**31:
        return
    values = np.arange(12, dtype=np.float32)
    where = np.array([*positions, *[0] * 12], np.int64)
    if how in ("bits", "both") and own["size"] > 96:
        return
    bits = np.packbits(np.isin(np.arange(96), where))
    own |= {"values": values.ctypes.data}
    own |= {"bits": bits.ctypes.data} if how in ("bits", "both") else {}
    own |= {"positions": where.ctypes.data} if how in ("positions", "both") else {}
    asked, made, sizes = STRUCTS["Recipe"](**fields), STRUCTS["Weight"](**own), STRUCTS["Sizes"]()
    structs = [ctypes.byref(struct) for struct in (asked, made, sizes)]
    # It declares the functions.
    Packer(library())
    fault = library().dsr_pack_measure(*structs)
    nbytes = dict(zip(ARRAYS, (own["width"], 2, 8, 40, 32), strict=True))
    counts = {name: getattr(sizes, name) for name in ARRAYS}
    assert all(0 <= count < 2**50 for count in counts.values())
    if fault == Fault.SIZES or sum(counts[name] * nbytes[name] for name in ARRAYS) + sizes.scratch > 1 << 24:
        return
    # Also after REACH and POSITIONS, which `fill` has to find itself or to survive.
    memory = {name: np.full(counts[name] * nbytes[name] + 2 * GUARD, 0xA5, np.uint8) for name in ARRAYS}
    packed = STRUCTS["Packed"](**{name: array.ctypes.data + GUARD for name, array in memory.items()})
    filled = library().dsr_pack_fill(*structs, ctypes.byref(packed))
    assert fault == Fault.POSITIONS or filled == fault
    for array in memory.values():
        assert (array[:GUARD] == 0xA5).all()
        assert (array[len(array) - GUARD :] == 0xA5).all()
    if fault == Fault.NONE:
        entries = memory["entries"][GUARD:-GUARD].view(np.int32).reshape(-1, 2)
        assert ((entries[:, 0] >= 0) & (entries[:, 0] < fields["rows"])).all()
        used = memory["offsets"][GUARD:-GUARD].view(np.uint16)
        assert (used.astype(int) <= sizes.reach).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", 2**31),
        ("phases", 257),
        ("split", 2**16 + 1),
        ("taps", 2),
        ("groups", 2),
        ("channel", 0),
        ("packing", 3),
    ],
)
def test_numbers_out_of_range_are_refused(field, value):
    numbers = {"packing": 0, "rows": 3, "inner": 1, "kernel": 1, "groups": 1, "phases": 1, "channel": 1, "per_block": 1}
    numbers |= {"split": 1, "taps": 1, field: value}
    # Everything else agrees with the number in question.
    numbers |= {"taps": value} if field == "phases" else {}
    offsets = np.zeros(257, np.int32)
    recipe = STRUCTS["Recipe"](**numbers, offsets=offsets.ctypes.data)
    weight, sizes = STRUCTS["Weight"](size=numbers["rows"], width=4), STRUCTS["Sizes"]()
    Packer(library())
    structs = [ctypes.byref(struct) for struct in (recipe, weight, sizes)]
    assert library().dsr_pack_measure(*structs) == Fault.SIZES
    setattr(recipe, field, {"rows": 3, "packing": 2}.get(field, 1))
    recipe.taps, weight.size = 1, 3
    assert library().dsr_pack_measure(*structs) == Fault.NONE


def test_records_that_the_kernel_cannot_count_are_refused():
    """Four dense channels of 2^29 records each, in one block."""
    offsets = np.zeros(2**13, np.int32)
    recipe = STRUCTS["Recipe"](1, 1, 2**16, 2**13, 1, 1, 1, 2**16, 1, 2**13, offsets.ctypes.data)
    weight, sizes = STRUCTS["Weight"](2**29, 0, 1), STRUCTS["Sizes"]()
    Packer(library())
    structs = [ctypes.byref(struct) for struct in (recipe, weight, sizes)]
    assert library().dsr_pack_measure(*structs) == Fault.SIZES
    recipe.per_block = 2**16 - 1
    assert library().dsr_pack_measure(*structs) == Fault.NONE


def test_sizes_of_another_recipe_are_refused():
    """Arrays of other sizes than those of the recipe are not written."""
    offsets, values = np.zeros(1, np.int32), np.ones(6, np.float32)
    recipe = STRUCTS["Recipe"](0, 2, 3, 1, 1, 1, 1, 2, 1, 1, offsets.ctypes.data)
    weight = STRUCTS["Weight"](6, 6, 4, values.ctypes.data)
    sizes, packed = STRUCTS["Sizes"](), STRUCTS["Packed"]()
    structs = [ctypes.byref(struct) for struct in (recipe, weight, sizes)]
    Packer(library())
    assert library().dsr_pack_measure(*structs) == Fault.NONE
    sizes.values -= 1
    assert library().dsr_pack_fill(*structs, ctypes.byref(packed)) == Fault.SIZES


@pytest.mark.parametrize(
    ("arguments", "shared"),
    [
        ((1, 100, 12, 1), (12, 1)),
        ((3, 36, 12, 1), (12, 1)),  # as many tiles for each thread
        ((2, 30, 12, 1), (8, 1)),  # four tiles of eight instead of three
        ((4, 5, 12, 1), (12, 4)),  # one tile: threads share the output channels
        ((3, 40, 12, 1), (7, 1)),
        ((7, 150, 5, 1), (5, 1)),  # narrower tiles would be too narrow, and there are many
        ((7, 40, 5, 1), (5, 7)),
    ],
)
def test_threads_share_tiles_or_output_channels(arguments, shared):
    assert Packer(library()).share(*arguments) == shared


@given(st.tuples(numbers, numbers, numbers, numbers))
def test_no_numbers_break_the_shares(arguments):
    tile, parts = Packer(library()).share(*arguments)
    assert min(arguments) < 1 or 1 <= tile <= arguments[2]
    assert 1 <= parts <= max(arguments[0], 1)
