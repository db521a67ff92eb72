"""The table of ops, `kernels/ops.def`, means the same in C++ and in Python."""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

from dsr_tool.errors import DsrError
from dsr_tool.graph.windows import Window
from dsr_tool.runtime import compiler
from dsr_tool.runtime.compiler import (
    broadcast,
    elementwise,
    gemv,
    machine,
    op,
    picking,
    pooling,
    products,
    reduce,
    relayout,
    spmm,
)
from dsr_tool.runtime.compiler.arena import Address
from dsr_tool.runtime.compiler.encoding import encode
from dsr_tool.runtime.compiler.layouts import Flat, Grid, Planes, Rows
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.op import Activate, Op
from dsr_tool.runtime.compiler.packing import Packer, Recipe, Taps
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.compiler.relayout import Copy
from dsr_tool.runtime.kernels import ops
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import (
    ENUMS,
    LAYOUT,
    PARAMETERS,
    STRUCTS,
    Activation,
    Combination,
    Kind,
    Packing,
    library_layout,
)

KERNELS = pytest.mark.skipif(library() is None, reason="no kernels were built here")
FOLDER = Path(ops.__file__).parent
SOURCES = sorted(FOLDER.glob("*.cpp"))


@KERNELS
def test_every_field_has_one_offset_and_size_on_both_sides():
    both = {row.name: row for row in library_layout(library())}
    for row in LAYOUT:
        assert both.get(row.name) == row
    assert len(both) == len(LAYOUT)


@KERNELS
def test_a_library_with_another_table_is_refused(monkeypatch):
    changed = tuple(row._replace(number=row.number + 8) if row.name == "Spmm.tile" else row for row in LAYOUT)
    monkeypatch.setattr(machine, "LAYOUT", changed)
    with pytest.raises(DsrError, match="other sources"):
        Machine(library(), 1)


def test_names_and_numbers_are_unique():
    for enum in ENUMS:
        assert sorted(enum) == list(range(len(enum.__members__)))
    assert len({row.name for row in LAYOUT}) == len(LAYOUT)


def test_every_row_of_the_table_is_read():
    """A row on two lines, or with a quote too many, would be missing on the Python side alone."""
    rows = re.findall(r"^([A-Z]+)\(", (FOLDER / "ops.def").read_text(encoding="utf-8"), re.MULTILINE)
    read = {word: len(ops._rows(word)) for word in set(rows)}
    assert read == {word: rows.count(word) for word in set(rows)}
    assert all(line[-1] for word in ("OP", "STRUCT", "FIELD", "COMMON", "LIMIT") for line in ops._rows(word))


def test_every_kind_has_an_op_class_and_parameters_of_its_name():
    for module in pkgutil.iter_modules(compiler.__path__):
        importlib.import_module(f"{compiler.__name__}.{module.name}")
    assert sorted(found.kind for found in Op.__subclasses__()) == sorted(Kind)
    assert set(PARAMETERS) <= {kind.name.lower() for kind in Kind}
    names = {struct.__name__ for struct in PARAMETERS.values()}
    assert names | {"Entry", "Block", "Part", "Recipe", "Weight", "Sizes", "Packed"} == set(STRUCTS)


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_every_kind_has_a_function(kind):
    function = next(row[2] for row in ops._rows("OP") if row[0] == kind.name)
    assert any(re.search(rf"^void {function}\(const Call& call\)", path.read_text(), re.MULTILINE) for path in SOURCES)


def test_every_parameter_is_read_by_a_kernel():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (*SOURCES, *FOLDER.glob("*.h")))
    for struct, _, field, _ in ops._rows("FIELD"):
        assert re.search(rf"[.>]{field}\b", text), f"{struct}.{field}"


@KERNELS
def test_the_columns_of_packed_weights_are_the_fields_of_their_structs(sparse):
    weight = sparse(np.random.default_rng(0), (6, 4, 1, 1), 0.5)
    recipe = Recipe(packing=Packing.SPARSE, weight=weight, taps=Taps(((0,),), 1), per_block=2)
    pack = Packer(library()).pack(recipe)
    for array, name in ((pack.entries, "Entry"), (pack.blocks, "Block"), (pack.parts, "Part")):
        struct = STRUCTS[name]
        sizes = {getattr(struct, field).size for field in ops.columns(name)}
        assert sizes == {array.itemsize}
        assert array.shape[1] == len(ops.columns(name))
    part = dict(zip(ops.columns("Part"), pack.parts[0], strict=True))
    block = dict(zip(ops.columns("Block"), pack.blocks[-1], strict=True))
    assert (part["first"], part["last"], part["dense"]) == (0, 2, 0)
    assert block["entries"] + block["count"] == len(pack.entries)
    # The second block begins at the third input channel.
    assert block["base"] == 2


@KERNELS
def test_parameters_that_the_table_does_not_have_are_refused(monkeypatch):
    source, out = Flat((1, 4), 4, 1), Flat((1, 4), 4, 1)
    monkeypatch.setattr(Copy, "parameters", lambda self, packer: op.Parameters({"floats": 4}))
    with pytest.raises(TypeError, match=r"COPY has the fields \['entries'\]"):
        encode([Copy(source=source, out=out)], {source: Address(0, 0), out: Address(0, 4)}, Packer(library()))


def ops_of_many_kinds(sparse) -> list[Op]:
    rng = np.random.default_rng(0)
    grid, rows_grid = Grid(9, 9, 1, 4), Grid(1, 5, 0, 4)
    a, b, c = (Planes((1, 4, 9, 9), grid, 1) for _ in range(3))
    rows, more_rows = Rows((1, 6, 1, 5), rows_grid, 1), Rows((1, 6, 1, 5), rows_grid, 1)
    flat, more, whole, small = (Flat((1, size), 4, 1) for size in (324, 324, 324, 16))
    vector = np.ones(6, np.float32)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    target = op.Target(4, 1, 12, 3)
    return [
        spmm.Spmm(
            source=a, out=b, weight=sparse(rng, (4, 4, 3, 3), 0.5), bias=np.ones(4, np.float32), window=window,
            groups=1, weight_name=("Conv", "w"), target=target,
        ),
        pooling.MaxPool(source=a, out=b, window=window),
        relayout.Gather(source=a, out=flat),
        elementwise.Combine(source=a, other=b, out=c, how=Combination.DIVIDE, activate=Activate(Activation.TANH)),
        elementwise.Scale(source=a, other=flat, out=b),
        reduce.Mean(source=a, out=flat),
        gemv.Gemv(source=flat, out=more, weight=sparse(rng, (6, 324), 0.1), bias=vector, threads=1, block=8192),
        relayout.FromRows(source=flat, out=rows),
        relayout.ToRows(source=rows, out=flat),
        reduce.LayerNorm(source=rows, out=more_rows, scale=vector, shift=vector, epsilon=1e-5),
        reduce.Softmax(source=flat, out=more, columns=9),
        relayout.Relayout(source=flat, out=a),
        relayout.Copy(source=flat, out=more),
        picking.Pick(source=a, out=flat, picked=Picked.of(a, a.shape).transposed((0, 2, 3, 1)), split=1),
        picking.constant_of(np.ones(324, np.float32), more),
        products.Matmul(
            source=flat, other=more, out=small, left=Picked.of(flat, (4, 81)), right=Picked.of(more, (81, 4)),
        ),
        broadcast.Broadcast(
            source=flat, other=more, out=whole, left=Picked.of(flat, (4, 81)), right=Picked.of(more, (4, 81)),
            split=0, how=Combination.ADD,
        ),
        reduce.Reduce(source=flat, out=small, columns=20, squares=True, factor=0.5),
    ]  # fmt: skip


@KERNELS
def test_encoding_an_op_twice_gives_the_same_numbers(sparse):
    """Parameters have no side effects: the plan, its cost and the values are as they were."""
    made = ops_of_many_kinds(sparse)
    values = dict.fromkeys(v for one in made for v in (one.source, one.other, one.out) if v is not None)
    addresses = {value: Address(0, 1000 * i) for i, value in enumerate(values)}
    before = [(value.shape, value.size, value.lead) for value in values]
    cost = [(one.work, one.dense_work) for one in made]
    first, second = (encode(made, addresses, Packer(library())) for _ in range(2))
    for one, two in zip(first.structs, second.structs, strict=True):
        member = Kind(one.kind).name.lower()
        for struct, other in ((one, two), (getattr(one, member, None), getattr(two, member, None))):
            for name, kind in () if struct is None else [field[:2] for field in struct._fields_]:
                if kind is not ctypes.c_void_p and not issubclass(kind, ctypes.Union):
                    assert getattr(struct, name) == getattr(other, name), (member, name)
    assert before == [(value.shape, value.size, value.lead) for value in values]
    assert cost == [(one.work, one.dense_work) for one in made]


@KERNELS
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("widest", "widest_dense"), [(14, 6), (12, 3), (4, 2)])
def test_no_tile_is_wider_than_those_of_the_library(sparse, density, widest, widest_dense):
    rng = np.random.default_rng(0)
    grid = Grid(40, 40, 1, 4)
    source, out = Planes((1, 8, 40, 40), grid, 1), Planes((1, 8, 40, 40), grid, 1)
    one = spmm.Spmm(
        source=source,
        out=out,
        weight=sparse(rng, (8, 8, 3, 3), density),
        bias=np.zeros(8, np.float32),
        window=Window((3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
        groups=1,
        weight_name=("Conv", "w"),
        target=op.Target(4, 1, widest, widest_dense),
    )
    assert one.parameters(Packer(library())).fields["tile"] <= (widest_dense if density == 1.0 else widest)


@KERNELS
def test_the_library_tells_its_widest_tiles():
    target = Machine(library(), 1).target
    # With 32 registers and with 16; NEON has 4 lanes, but 32 registers.
    assert (target.widest_tile, target.widest_dense_tile) in (((14, 6),) if target.lanes == 16 else ((12, 3), (14, 6)))
