"""Plans that no compiler writes, each with a right checksum: refused in one sentence, or run without harm.

`make fuzz` looks for more of them. Those that are run do harm only where a sanitizer or another compiler sees it.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from dsr_tool.errors import FormatError
from dsr_tool.runtime.deploy.format import Tables, Weights, counted, document, numbers, string
from dsr_tool.runtime.deploy.library import load
from dsr_tool.runtime.deploy.plan import PlanFile, _declared
from dsr_tool.runtime.kernels import ops as table
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

X = np.arange(64, dtype=np.float32).reshape(1, 64)


class Draft:
    """A plan of one step, whose buffer 0 is the arena, 1 the input x and 2 the output y."""

    def __init__(self, levels, arena=1024):
        self.level = next(row for row in levels if row.runs)
        self.arena, self.images, self.sizes = arena, 1, (64, 64)
        self.tables, self.weights, self.packs, self.ops = Tables(), Weights(), [], []

    def table(self, array):
        """Returns how an op names a table."""
        return self.tables.add(array) + 1

    def add(self, kind, parameters, pack=-1, **common):
        fields = {"other_buffer": -1, "channels": 1, "phases": 1, "length": 1, "low": -math.inf, "high": math.inf}
        op = table.Op(**{**fields, **common})
        op.kind = table.Kind[kind]
        for name, value in parameters.items():
            setattr(getattr(op, kind.lower()), name, value)
        self.ops.append(numbers(pack) + bytes(op))

    def encode(self):
        values = [counted([string(name) + numbers(2, 1, size)]) for name, size in zip("xy", self.sizes, strict=True)]
        head = counted([]) + b"".join(values)
        arrays = counted(numbers(size, role, 0) for role, size in enumerate(self.sizes, 1))
        pieces = counted(numbers(index, size // self.images) for index, size in enumerate(self.sizes))
        step = numbers(1, len(self.ops), self.images) + pieces + counted(self.ops)
        content = numbers(self.arena) + counted(self.packs) + arrays + step
        row = self.level
        level = string(row.name) + numbers(row.lanes, row.widest_tile, row.widest_dense_tile, len(content)) + content
        return document(numbers(len(head)) + head + self.weights.encode() + self.tables.encode() + counted([level]))


@pytest.fixture
def draft(levels):
    return Draft(levels)


def refused(draft):
    with pytest.raises(FormatError, match="the plan is damaged: .*; export it again") as caught:
        PlanFile(draft.encode())
    return str(caught.value)


def test_a_draft_without_faults_runs(draft):
    draft.add("COPY", {"entries": 64}, source_buffer=1, out_buffer=2)
    assert np.array_equal(PlanFile(draft.encode()).run(X)["y"], X)


@pytest.mark.parametrize("offset", [2**61 + 2**60, -(2**60), 2**62])
def test_the_address_of_an_input_that_is_not_read_is_checked(draft, offset):
    values = draft.table(np.zeros(draft.level.lanes, np.float32))
    draft.add("CONSTANT", {"values": values}, source_offset=offset)
    assert "the buffer of the input" in refused(draft)


def test_a_stride_of_a_second_input_that_is_not_there_is_refused(draft):
    draft.add("COMBINE", {"how": table.Combination.FIRST}, other_stride=1)
    assert "the stride" in refused(draft)


def test_a_pick_that_writes_the_same_entries_again_and_again_is_refused(draft):
    outer, inner = draft.table(np.full(2, -1, np.int64)), draft.table(np.full(2, -1, np.int32))
    sizes = {"outer_count": 2, "inner_count": 1, "phases": 2, "run": 8, "out_step": 7}
    draft.add("PICK", {"outer": outer, "inner": inner, **sizes})
    assert "the step" in refused(draft)


def test_a_step_runs_as_often_as_the_batch_asks_for(draft):
    draft.images = 8
    draft.add("COPY", {"entries": 8}, source_buffer=1, out_buffer=2)
    assert "more often than the batch" in refused(draft)


def test_phases_that_take_long_to_compare_are_refused(draft):
    """256 phases of 100 taps that differ in the last one alone, of hundreds of packs."""
    taps = np.zeros((256, 100), np.int32)
    taps[:, -1] = np.arange(256)
    weight = draft.weights.add(SparseTensor(Mask.from_bool(np.zeros(100, bool)), np.zeros(0, np.float32)))
    recipe = (weight, table.Packing.SPARSE, 1, 1, 100, 1, 256, 1, 1, draft.tables.add(taps), 1, 1)
    draft.packs = [numbers(*recipe)] * 500
    assert "more memory than a file of its size" in refused(draft)


def test_memory_may_be_copied_onto_a_part_of_itself(draft):
    draft.add("COPY", {"entries": 64}, source_buffer=1)
    draft.add("COPY", {"entries": 60}, out_offset=4)
    draft.add("COPY", {"entries": 64}, out_buffer=2)
    assert np.array_equal(PlanFile(draft.encode()).run(X)["y"][0, 4:], X[0, :60])


@pytest.mark.parametrize("packing", [table.Packing.DENSE, table.Packing.ROWS])
def test_the_bytes_of_a_plan_may_lie_anywhere(draft, packing):
    mask = np.ones((4, 8), bool)
    weight = draft.weights.add(SparseTensor(Mask.from_bool(mask), np.ones(32, np.float32)))
    spmm = packing == table.Packing.DENSE
    offsets, bias = draft.tables.add(np.zeros(1, np.int32)), draft.table(np.zeros(4, np.float32))
    draft.packs = [numbers(weight, packing, 4, 8, 1, 1, 1, 1, 8, offsets, spmm, spmm)]
    draft.sizes = (8 * draft.level.lanes, 4 * draft.level.lanes)
    if spmm:
        draft.add("SPMM", {"bias": bias}, 0, source_buffer=1, out_buffer=2, out_stride=1, channels=4)
    else:
        draft.add("GEMV", {"bias": bias, "rows": 4}, 0, source_buffer=1, out_buffer=2)
    content = draft.encode()
    dsr = _declared(load())
    for shift in range(4):
        memory = ctypes.create_string_buffer(bytes(shift) + content)
        address = ctypes.cast(ctypes.addressof(memory) + shift, ctypes.c_char_p)
        handle = ctypes.c_void_p(dsr.dsr_open_memory(address, len(content), 1))
        assert handle, dsr.dsr_last_error()
        dsr.dsr_close(ctypes.byref(handle))
