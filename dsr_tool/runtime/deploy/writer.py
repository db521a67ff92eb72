"""Makes the bytes of a plan file: a plan for each level, compiled on any processor, and one copy of the weights."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dsr_tool.errors import UsageError, join_words
from dsr_tool.graph.ir import Graph, Value
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.op import Target, level_l1
from dsr_tool.runtime.compiler.packing import Pack
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.compiler.program import KernelStep
from dsr_tool.runtime.deploy.format import Tables, Weights, counted, document, numbers, string
from dsr_tool.runtime.deploy.library import LevelRow, level_rows
from dsr_tool.runtime.kernels import ops as table
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.session import decode
from dsr_tool.runtime.source import Model
from dsr_tool.sparsity.config import ModelConfig

__all__ = ["chosen_levels", "plan_bytes"]

_STRUCTS: dict[str, type[ctypes.Structure]] = {**table.PARAMETERS, "": table.Op}
_POINTERS = {
    name: tuple(field for field, kind, *_ in struct._fields_ if kind is ctypes.c_void_p)
    for name, struct in _STRUCTS.items()
}
"""Fields that hold addresses, by member of `Op`; those of all ops under the empty name."""


def chosen_levels(names: Sequence[str]) -> list[LevelRow]:
    """Returns levels by name, fastest first; all that the library holds for no names.

    Raises:
        UsageError: the library holds no level of that name, or was not built.
    """
    rows = level_rows()
    unknown = next((name for name in names if name not in [row.name for row in rows]), None)
    if unknown is not None:
        raise UsageError(f"--level {unknown!r} is not in {join_words([row.name for row in rows])}; give some of these.")
    return [row for row in rows if not names or row.name in names]


def plan_bytes(
    model: Model, batch: int, levels: Sequence[LevelRow], more_texts: Mapping[str, str] | None = None
) -> bytes:
    """Returns the bytes of a plan file.

    Args:
        model: a model with a computation, such as an open archive.
        batch: number of inputs that a run of the plan takes.
        levels: levels to compile for.
        more_texts: texts that `dsr_text` returns besides those that describe the model, by name.

    Raises:
        UsageError: an operator that no kernel computes, an input that is not float32 or has free sizes besides the
            batch, or a machine without kernels.
        FormatError: the weights do not fit the graph, or values take too much memory.
    """
    shape = _input_shape(model, batch)
    kernels = library()
    if kernels is None:
        raise UsageError(
            "plan files are made with compiled kernels, and there are none here; `dsr-tool doctor` says why."
        )
    graph, tensors = decode(model)
    weights, tables = Weights(), Tables()
    # Levels first, since they collect the weights and tables that precede them in the file.
    written = []
    values: tuple[bytes, bytes] = (b"", b"")
    for level in levels:
        l1 = level_l1(level.name, runs=level.runs)
        target = Target(level.lanes, 1, level.widest_tile, level.widest_dense_tile, l1)
        machine = Machine(kernels, 1, target=target)
        plan = Plan(graph, tensors, shape, machine)
        values = (_values([(graph.inputs[0], shape)]), _values(_outputs(graph, plan)))
        content = _level(plan, weights, tables)
        head = numbers(level.lanes, level.widest_tile, level.widest_dense_tile, len(content))
        written.append(string(level.name) + head + content)
    texts = counted(string(name) + string(text) for name, text in (*_texts(model.config), *(more_texts or {}).items()))
    head = texts + values[0] + values[1]
    return document(numbers(len(head)) + head + weights.encode() + tables.encode() + counted(written))


def _input_shape(model: Model, batch: int) -> tuple[int, ...]:
    value = model.graph.inputs[0]
    if value.dtype != "float32" or not value.shape or value.shape[0] not in (None, batch):
        raise UsageError(
            f"{str(model.path)!r} takes {value.dtype} of shape {value.shape}, and a plan takes float32 with the batch "
            f"{batch} first; give the --batch of the model, or export the model in another container."
        )
    sizes = [size for size in value.shape[1:] if size is not None]
    if len(sizes) < len(value.shape) - 1:
        raise UsageError(
            f"{str(model.path)!r} takes inputs of shape {value.shape}, and a plan is made for one size; give a model "
            f"with a fixed input size."
        )
    return (batch, *sizes)


def _texts(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yields the texts that `dsr_text` returns, with their names."""
    yield "architecture", config.architecture
    yield "config", json.dumps(config.to_dict())
    for name in ("mean", "std"):
        yield name, " ".join(map(repr, getattr(config.preprocessing, name)))
    for name in ("resize", "crop"):
        yield name, str(getattr(config.preprocessing, name))
    for index, label in enumerate(config.labels):
        yield f"label/{index}", label


def _values(values: Iterable[tuple[Value, tuple[int, ...]]]) -> bytes:
    return counted(string(value.name) + numbers(len(shape), *shape) for value, shape in values)


def _outputs(graph: Graph, plan: Plan) -> list[tuple[Value, tuple[int, ...]]]:
    """Returns the outputs with their shapes.

    Raises:
        UsageError: an output that does not depend on the input, or is the input itself.
    """
    shapes = {
        name: shape for step in plan.steps if isinstance(step, KernelStep) for name, shape in step.outputs.items()
    }
    missing = next((value.name for value in graph.outputs if value.name not in shapes), None)
    if missing is not None:
        raise UsageError(f"output {missing!r} is not computed from the input by any kernel, so a plan cannot hold it.")
    return [(value, shapes[value.name]) for value in graph.outputs]


def _level(plan: Plan, weights: Weights, tables: Tables) -> bytes:
    """Returns the plan of one level."""
    steps = [step for step in plan.steps if isinstance(step, KernelStep)]
    packs: dict[bytes, int] = {}
    arrays = _Exchanged(plan)
    encoded = [_step(step, arrays, packs, weights, tables) for step in steps]
    floats = max((step.arena_bytes // 4 for step in steps), default=0)
    return (
        numbers(floats)
        + counted(packs)
        + arrays.encode()
        + numbers(len(encoded), sum(len(step.ops) for step in steps))
        + b"".join(encoded)
    )


class _Exchanged:
    """The arrays that steps exchange, by name."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._numbers: dict[str, int] = {}
        self._rows: list[bytes] = []

    def add(self, name: str, entries: int) -> int:
        """Returns the number of an array."""
        if name not in self._numbers:
            self._numbers[name] = len(self._rows)
            # The rows of `Exchanged` in plan_file.h: 0 is an array of the plan itself, 1 an input, 2 an output.
            role, index = 0, 0
            if name == self._plan.input:
                role = 1
            elif name in self._plan.outputs:
                role, index = 2, self._plan.outputs.index(name)
            self._rows.append(numbers(entries, role, index))
        return self._numbers[name]

    def encode(self) -> bytes:
        """Returns the bytes of all arrays."""
        return counted(self._rows)


def _step(step: KernelStep, arrays: _Exchanged, packs: dict[bytes, int], weights: Weights, tables: Tables) -> bytes:
    """Returns a segment: its arrays and its ops."""
    rows = [numbers(arrays.add(name, entries * step.images), entries) for name, entries in step.arrays.items()]
    # One array for each address, so that ops which share a table name it once.
    by_address = {array.ctypes.data: array for array in step.tables}
    ids: dict[int, int] = {}

    def table_of(address: int) -> int:
        if address not in ids:
            ids[address] = tables.add(by_address[address])
        return ids[address]

    own = iter(step.packs)
    encoded = []
    for op in step.ops:
        copied = table.Op.from_buffer_copy(op)
        member = table.Kind(op.kind).name.lower()
        number = -1
        holders: list[tuple[Any, str]] = [(copied, ""), (getattr(copied, member, None), member)]
        for holder, name in holders:
            weighs = name in ("spmm", "gemv")
            for field in _POINTERS.get(name, ()):
                address = getattr(holder, field)
                packed = weighs and field in _PACKED
                setattr(holder, field, table_of(address) + 1 if address and not packed else None)
            if weighs:
                pack = next(own)
                content = _pack(pack, copied, weights, tables)
                number = packs.setdefault(content, len(packs))
                holder.part_count = 0
        encoded.append(numbers(number) + bytes(copied))
    return numbers(step.images) + counted(rows) + counted(encoded)


_PACKED = ("values", "codes", "offsets", "entries", "blocks", "parts")
"""Fields that point into a packed weight, which the library makes anew."""


def _pack(pack: Pack, op: table.Op, weights: Weights, tables: Tables) -> bytes:
    """Returns how a weight is packed: what the struct Recipe in ops.def says, and how threads share the op."""
    recipe = pack.recipe
    if recipe is None:
        raise TypeError("a plan is written from packs that keep their recipes")
    asked, offsets = recipe.struct()
    spmm = op.kind == table.Kind.SPMM
    return numbers(
        weights.add(recipe.weight),
        asked.packing,
        asked.rows,
        asked.inner,
        asked.kernel,
        asked.groups,
        asked.phases,
        asked.channel,
        asked.per_block,
        tables.add(offsets),
        op.length if spmm else 0,
        op.spmm.tile if spmm else 0,
    )
