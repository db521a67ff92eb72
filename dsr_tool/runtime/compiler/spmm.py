"""SPMM: sparse or dense weights times planes, and how the work is cut into tiles, blocks and shares of threads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsr_tool.graph.windows import Window
from dsr_tool.runtime.compiler.constants import entries_of
from dsr_tool.runtime.compiler.layouts import Planes
from dsr_tool.runtime.compiler.op import Op, Parameters, Target
from dsr_tool.runtime.compiler.packing import MAX_OFFSET, Pack, Packer, Recipe, Taps
from dsr_tool.runtime.compiler.taps import offsets_of
from dsr_tool.runtime.kernels.ops import LIMITS, Kind, Packing
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["Spmm"]

# The numbers below were measured with benchmarks/inference.py on Zen 3 and Zen 5.
MIN_DENSE = 0.7
"""Density from which four output channels at a time, zeros included, are faster than one channel without them."""
SPARSE_COST = 1.6
"""Time of a multiply-add in a sparse product, in units of one in a dense product."""

MEASURED_L1 = 48 << 10
"""First-level cache in bytes of the processor on which the fewest records of a block were measured first."""
CACHE_SHARE = 5 / 6
"""Input bytes per block where inputs are read often, as a share of the first-level cache: they must fit in it next to
the weights. 24 to 40 KiB were within 3 % of each other with a cache of 48 KiB (Zen 5). With 32 KiB, networks took
.91 to 1.00 of the time with 26 KiB instead of 40, the denser the less, and 20 KiB were as fast as 26 (Zen 3)."""
FAR_BYTES = 100 << 10
"""Input bytes per block where inputs are read seldom: fewer blocks save more than a warm cache gives. 64 and 100 KiB
are as fast with a second-level cache of 512 KiB."""
OFTEN = 0.12
"""Mean records per pair of output and input channel above which inputs count as read often."""
MIN_RECORDS = 20
"""Fewest records of an output channel in a block that are worth loading and storing its sums once more, with a cache of
48 KiB; with a smaller one, as large a block costs more, and fewer records are worth it. With 32 KiB, 12 instead of 20
took .97 to 1.00 of the time on networks of sparsity .9 to .98 (Zen 3)."""
DENSE_BYTES = 3584
"""Input bytes per block of a dense part, per vector of the widest dense tile: 21 KiB with 32 registers, 10.5 with 16,
where 12 KiB was 5 % faster than 21 on a ResNet-18 of density 0.8 (AVX2, 40 pairs)."""

POINT_SHARE = 3 / 4
"""Input bytes per block of a 1 x 1 kernel, as a share of the first-level cache: 36 KiB of 48 and 24 of 32. 18 KiB of 32
were within 2 %."""
POINT_DENSITY = 0.25
"""Mean records per pair of channels from which the tiles of a 1 x 1 kernel are as wide as they can be."""
POINT_RECORDS = 13
"""Fewest records of an output channel in a block of a 1 x 1 kernel; with 32 KiB, 9 instead of 13 took .98 to 1.00 of
the time."""

NARROW_TILE = 11
"""Vectors of a tile where inputs are read seldom: a narrow tile leaves more of the cache to other channels."""
CONVERTED = 10
"""Vectors of a plane per block from which codes become values in memory before all tiles, where registers do not suit:
scaling the weights of a row in a block costs about as much as scaling 10 to 14 of its sums (Zen 4)."""
SHORT_ROW = 8
"""Mean records of an output channel in a block from which codes become values in registers, in each tile again. With 2
to 6, MobileNetV2 at .90 took 1.02 to 1.06 of the time with floats that way, and 1.00 to 1.03 by memory; with 9 it took
.92 to 1.02 and 1.01 to 1.05 (Zen 3, AVX2)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Spmm(Op):
    """A convolution or a linear layer on several rows.

    Attributes:
        weight: shape (out channels, channels / groups, height, width).
        bias: shape (out channels,).
        window: the window that slides over the source.
        groups: number of groups of channels.
        weight_name: operator and name of the weight, under which the packed weight is shared between plans.
        target: the kernels.
    """

    source: Planes
    out: Planes
    weight: SparseTensor
    bias: Array
    window: Window
    groups: int
    weight_name: tuple[str, str]
    target: Target

    kind: ClassVar[Kind] = Kind.SPMM
    fuses: ClassVar[bool] = True

    @property
    def computes_zeros(self) -> bool:
        """True if the weight is so dense that it is multiplied with its zeros."""
        return self.groups == 1 and self.weight.mask.density >= MIN_DENSE

    @property
    def work(self) -> float:
        """Its multiply-adds, unused lanes included, as many as a dense kernel would do in the same time."""
        mask = self.weight.mask
        positions = self.out.grid.length * self.target.lanes * self.out.phases
        return positions * (mask.size if self.computes_zeros else mask.active * SPARSE_COST)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of its active weights with pixels that exist, for one image."""
        return math.prod(self.out.shape[2:]) * self.weight.mask.active

    @property
    def density(self) -> float:
        """Density of the weight."""
        return self.weight.mask.density

    @property
    def dense_work(self) -> float:
        """Multiply-adds of a dense kernel for the same op."""
        return math.prod(self.out.shape[2:]) * self.weight.mask.size

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the packed weight, the width of tiles and the bias."""
        offsets = offsets_of(self.window, self.source, self.out)
        taps = Taps(tuple(offsets), self.source.phases * self.source.stride)
        tile, per_block = self._tiling(taps)
        tile, split = packer.share(self.target.threads, self.out.grid.length, tile, len(offsets))
        entries, scales = entries_of(self.weight)
        recipe = Recipe(
            packing=Packing.DENSE if self.computes_zeros else Packing.SPARSE,
            weight=entries,
            taps=taps,
            per_block=per_block,
            groups=self.groups,
            split=split,
        )
        pack = packer.pack(recipe, self.weight_name)
        return Parameters(
            {
                **pack.fields,
                "scales": 0 if scales is None else scales,
                "convert": int(self._converts(pack)),
                "part_count": len(pack.parts),
                "tile": tile,
                "bias": np.ascontiguousarray(self.bias, np.float32),
            },
            pack,
        )

    def _converts(self, pack: Pack) -> bool:
        """Returns whether codes become values in memory before all tiles."""
        first, last = pack.parts[0, :2]
        # All that this depends on is the same for any number of threads, since sums of codes round differently.
        few = len(pack.values) <= LIMITS["MAX_CONVERTED"]
        short = self.computes_zeros or len(pack.values) < SHORT_ROW * len(pack.entries)
        return pack.coded and few and short and self.out.grid.length >= CONVERTED * (last - first)

    def _tiling(self, taps: Taps) -> tuple[int, int]:
        """Returns the vectors of a tile, and the input channels of a block.

        A block keeps the inputs that it reads in the first-level cache, but it costs a load and a store of every
        output vector. Where an input is read by few records, blocks are large and tiles small.
        """
        mask, length = self.weight.mask, self.source.grid.length
        records = mask.active / max(mask.shape[0] * mask.shape[1], 1)
        often, point = records >= OFTEN, max(self.window.kernel) == 1
        widest, narrow = self.target.widest_tile, min(NARROW_TILE, self.target.widest_tile)
        sparse_tile = widest if records >= (POINT_DENSITY if point else OFTEN) else narrow
        tile = min(length, self.target.widest_dense_tile if self.computes_zeros else sparse_tile)
        # All tiles of a plane are about equally wide.
        width = -(-length // -(-length // tile))
        vectors = max(_touched(offsets, width) for offsets in taps.offsets)
        if point:
            nbytes, least = POINT_SHARE * self.target.l1_bytes, float(POINT_RECORDS)
        else:
            nbytes, least = CACHE_SHARE * self.target.l1_bytes if often else FAR_BYTES, float(MIN_RECORDS)
        if self.computes_zeros:
            nbytes = float(DENSE_BYTES * self.target.widest_dense_tile)
        # As many channels as fit in the cache, but no fewer than give each sum enough records to be worth its store.
        least *= min(self.target.l1_bytes / MEASURED_L1, 1)
        channels = max(nbytes / (vectors * 4 * self.target.lanes), least / max(records, 1e-9))
        if self.groups == self.source.channels:
            # Output channels share no inputs, so all tiles of a plane are computed while it is in the cache.
            channels = CACHE_SHARE * self.target.l1_bytes / (taps.channel * 4 * self.target.lanes)
        # A block of a grouped convolution holds whole groups, so all channels of the source are counted.
        inner = self.source.channels
        # Blocks of equal size: a small last one would cost as much for its sums as a full one.
        blocks = max(round(inner / max(channels, 1)), 1)
        reach = max(max(offsets) - min(offsets) for offsets in taps.offsets)
        most = (MAX_OFFSET - reach) // taps.channel
        return tile, max(min(-(-inner // blocks), most), 1)


def _touched(offsets: Sequence[int], width: int) -> int:
    """Returns the vectors of one channel that a tile of `width` vectors reads."""
    ordered = sorted(set(offsets))
    return width + sum(min(width, after - before) for before, after in itertools.pairwise(ordered))
