"""Weights as work records, in the order in which the kernels read them; the library packs them (kernels/pack.h)."""

from __future__ import annotations

import ctypes
import math
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError
from dsr_tool.graph.limits import claim
from dsr_tool.runtime.kernels.ops import LIMITS, STRUCTS, Fault, Packing, columns
from dsr_tool.sparsity.at_rest import BitMask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["MAX_OFFSET", "Pack", "Packer", "Recipe", "Taps"]

_Int = npt.NDArray[np.int64]

MAX_OFFSET = LIMITS["MAX_OFFSET"]
"""Largest offset within a block, in vectors: it is held in 16 bits."""


@dataclass(frozen=True)
class Taps:
    """The entries of a kernel in each output phase.

    Attributes:
        offsets: for each phase, vectors from an output to the input of each kernel entry in the first input channel.
        channel: vectors from one input channel to the next.
    """

    offsets: tuple[tuple[int, ...], ...]
    channel: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Recipe:
    """Says how a weight is packed. Equal recipes give equal bytes.

    Attributes:
        packing: SPARSE for a record for each active weight; DENSE for four output channels at once, zeros included;
            ROWS for dense GEMV.
        weight: shape (out channels, channels / groups, *kernel); float32 values, or int8 codes of a grid.
        taps: the kernel entries of each output phase; ROWS does not use them.
        per_block: input channels in a block; ROWS has one block.
        groups: number of groups of channels; an output channel sees the input channels of its group alone. 1 unless
            the packing is SPARSE.
        split: number of parts that the output channels of ungrouped weights are cut into, of about equal work; it
            depends on the number of threads. ROWS has one part.
    """

    packing: Packing
    weight: SparseTensor
    taps: Taps
    per_block: int
    groups: int = 1
    split: int = 1

    @property
    def key(self) -> tuple[object, ...]:
        """All but the weight's entries."""
        return (self.packing, self.weight.mask.shape, self.taps, self.per_block, self.groups, self.split)

    def struct(self) -> tuple[ctypes.Structure, npt.NDArray[np.int32]]:
        """Returns the struct Recipe of ops.def, and the array of taps that it points to."""
        taps = np.array(self.taps.offsets, np.int32)
        rows, inner, *kernel = self.weight.mask.shape
        struct = STRUCTS["Recipe"](
            packing=self.packing,
            rows=rows,
            inner=inner,
            kernel=math.prod(kernel),
            groups=self.groups,
            phases=len(taps),
            channel=self.taps.channel,
            per_block=self.per_block,
            split=self.split,
            taps=taps.size,
            offsets=taps.ctypes.data,
        )
        return struct, taps


@dataclass(frozen=True, eq=False)
class Pack:
    """The packed weight of one op. The columns of the integer arrays are the fields of structs in ops.def, in order.

    Attributes:
        values: weights in the order of use: float32, or int8 for codes of a grid.
        offsets: offset of each record in vectors, uint16, and spare ones that kernels may read.
        entries: rows of the struct Entry in ops.def, int32 (entries, 2).
        blocks: rows of the struct Block, int64 (blocks, 5).
        parts: rows of the struct Part, int64 (parts, 4).
        recipe: how it was packed; None unless the packer keeps recipes.
    """

    values: npt.NDArray[np.float32] | npt.NDArray[np.int8]
    offsets: npt.NDArray[np.uint16]
    entries: npt.NDArray[np.int32]
    blocks: _Int
    parts: _Int
    recipe: Recipe | None = None

    @property
    def coded(self) -> bool:
        """True if the weights are codes of a grid."""
        return self.values.dtype == np.int8

    @property
    def fields(self) -> dict[str, int | npt.NDArray[Any]]:
        """All arrays by name, and a null pointer; the structs of ops.def that use a pack have fields of these names."""
        name, absent = ("codes", "values") if self.coded else ("values", "codes")
        fields: dict[str, int | npt.NDArray[Any]] = {name: self.values, absent: 0}
        return fields | {"offsets": self.offsets, "entries": self.entries, "blocks": self.blocks, "parts": self.parts}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (self.values, self.offsets, self.entries, self.blocks, self.parts))


class Packer:
    """Packs weights, and keeps those that some plan uses, so that the plans of a session share them."""

    def __init__(self, library: ctypes.CDLL, *, keep_recipes: bool = False) -> None:
        """Makes a packer without packs.

        Args:
            library: the kernels.
            keep_recipes: whether packs have recipes, which keep the weights in memory, as whoever writes a plan needs.
        """
        self._library, self._keep_recipes = library, keep_recipes
        # Weak, since a packed weight is needed as long as a plan uses it.
        self._packs: weakref.WeakValueDictionary[tuple[object, ...], Pack] = weakref.WeakValueDictionary()
        number = ctypes.c_int64
        library.dsr_share.argtypes = (number, number, number, ctypes.POINTER(number))
        library.dsr_share.restype = number

    def pack(self, recipe: Recipe, name: tuple[str, ...] | None = None) -> Pack:
        """Returns a packed weight.

        Args:
            recipe: how to pack it.
            name: name of the weight, under which plans share the pack; None to pack it for one op alone.

        Raises:
            FormatError: active positions are out of range or not ascending, or a tap is out of the range of offsets.
            MemoryError: the library finds no memory.
        """
        if name is None:
            return self._packed(recipe)
        # Strides are part of the taps, so plans for other input sizes share a pack only if their layouts agree.
        key = (name, recipe.key)
        pack = self._packs.get(key)
        if pack is None:
            pack = self._packs[key] = self._packed(recipe)
        return pack

    def clear(self) -> None:
        """Forgets all packs."""
        self._packs.clear()

    def share(self, threads: int, length: int, tile: int, phases: int) -> tuple[int, int]:
        """Returns the vectors of a tile and the parts of the output channels that give threads equal shares.

        Args:
            threads: number of threads.
            length: vectors of a plane.
            tile: vectors of a tile for one thread.
            phases: phases of the output.
        """
        shared = ctypes.c_int64(tile)
        parts = self._library.dsr_share(threads, length, phases, ctypes.byref(shared))
        return shared.value, parts

    def _packed(self, recipe: Recipe) -> Pack:
        mask = recipe.weight.mask
        values = np.ascontiguousarray(recipe.weight.values)
        if values.dtype not in (np.float32, np.int8):
            raise TypeError(f"weights are packed as float32 or int8, not as {values.dtype}")
        if len(values) != mask.active:
            raise FormatError(
                f"a weight of shape {mask.shape} has {mask.active} active positions and {len(values)} values; the file "
                f"is damaged."
            )
        entries = _entries(recipe.weight)
        arrays = {name: 0 if array is None else array.ctypes.data for name, array in entries.items()}
        asked, _taps = recipe.struct()  # the array lives as long as its address is used
        weight = STRUCTS["Weight"](
            size=mask.size, active=mask.active, width=values.itemsize, values=values.ctypes.data, **arrays
        )
        sizes = STRUCTS["Sizes"]()
        structs = [ctypes.byref(struct) for struct in (asked, weight, sizes)]
        self._check(self._library.dsr_pack_measure(*structs), recipe, sizes)
        # A weight of few values may have many output channels and blocks.
        claim((sizes.scratch,), np.uint8)
        whole = recipe.packing == Packing.ROWS and mask.active == mask.size
        pack = Pack(
            values if whole else np.empty(sizes.values, values.dtype),
            np.empty(sizes.offsets, np.uint16),
            np.empty((sizes.entries, len(columns("Entry"))), np.int32),
            np.empty((sizes.blocks, len(columns("Block"))), np.int64),
            np.empty((sizes.parts, len(columns("Part"))), np.int64),
            recipe if self._keep_recipes else None,
        )
        names = ("values", "offsets", "entries", "blocks", "parts")
        packed = STRUCTS["Packed"](**{name: getattr(pack, name).ctypes.data for name in names})
        self._check(self._library.dsr_pack_fill(*structs, ctypes.byref(packed)), recipe, sizes)
        return pack

    @staticmethod
    def _check(fault: int, recipe: Recipe, sizes: Any) -> None:
        """Raises an error unless the library could pack a weight."""
        shape = recipe.weight.mask.shape
        if fault == Fault.REACH:
            raise FormatError(
                f"a convolution reaches {sizes.reach:,} vectors, farther than the {MAX_OFFSET:,} of an offset; use "
                f"runtime 'scipy'."
            )
        if fault == Fault.POSITIONS:
            raise FormatError(
                f"the active positions of a weight are not ascending within its shape {shape}; the file is damaged."
            )
        if fault == Fault.SIZES:
            raise FormatError(
                f"a weight of shape {shape} cannot be packed in {recipe.groups} groups and blocks of "
                f"{recipe.per_block} channels; use runtime 'scipy'."
            )
        if fault == Fault.MEMORY:
            raise MemoryError


def _entries(weight: SparseTensor) -> dict[str, npt.NDArray[Any] | None]:
    """Returns the arrays that say which entries of a weight are active, by their fields in the struct Weight."""
    if isinstance(weight.mask, BitMask):
        # Positions would be 8 bytes for each value.
        return {"bits": weight.mask.bits, "positions": None}
    stored = weight.mask.stored
    return {"bits": None, "positions": None if stored is None else np.ascontiguousarray(stored, np.int64)}
