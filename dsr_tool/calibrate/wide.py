"""Fits layers in slices where the second moments of all their inputs would not fit into memory.

The first linear layer of VGG-16 has 25,088 columns, so one matrix of moments has 2.5 GB, and a solver holds a dozen of
them. A slice is some of the input channels with all their taps, solved as if the inputs of other slices did not vary
with its own. How many weights each slice keeps is decided for all of them together, by Wanda's score (Sun et al., ICLR
2024): |w| times the root mean square of the input.
"""

from __future__ import annotations

import torch

from dsr_tool.calibrate.solver import Problem, Solution, largest_mask, solve, values

__all__ = ["join_slices", "moment_bytes", "slices_of", "solve_slices", "split_slices"]

_FLOAT = 4
"""Bytes of a float32."""

_MOST_BYTES = 1 << 27
"""Most bytes of the moments of a layer that is fitted as a whole: 5,792 columns, for which a solver needs 1.6 GB. Of
torchvision's convolutions only the heads of segmentation, Wide ResNets and the largest RegNets are above."""

_MOST_COLUMNS = 576
"""Most columns of a slice: 64 channels of a 3x3 convolution. Time grows in proportion; at 512 VGG-16's layer takes 12
tera floating-point operations. An eighth of its rows, at 896, took 2 minutes of one core."""


def slices_of(blocks: int, columns: int, taps: int) -> int:
    """Returns into how many equal slices the columns of a layer are split; 1 for most layers.

    Args:
        blocks: groups or parts of the layer.
        columns: columns of each.
        taps: entries of a kernel, which are not split.
    """
    if _FLOAT * blocks * columns**2 <= _MOST_BYTES:
        return 1
    channels = columns // taps
    fitting = (n for n in range(2, channels + 1) if channels % n == 0 and columns // n <= _MOST_COLUMNS)
    return next(fitting, channels)  # single channels, if even those are wider


def moment_bytes(blocks: int, columns: int, taps: int) -> int:
    """Returns the bytes of the second moments of a layer, in slices where it is wide."""
    return _FLOAT * blocks * columns**2 // slices_of(blocks, columns, taps)


def split_slices(matrices: torch.Tensor, slices: int, taps: int) -> torch.Tensor:
    """Returns matrices (blocks, rows, columns) in slices, shape (blocks * slices, rows, columns / slices).

    Columns are ordered by tap, then by channel, before and after.
    """
    if slices == 1:
        return matrices
    blocks, rows, columns = matrices.shape
    by_slice = matrices.reshape(blocks, rows, taps, slices, -1).movedim(3, 1)
    return by_slice.reshape(blocks * slices, rows, columns // slices).contiguous()


def join_slices(matrices: torch.Tensor, slices: int, taps: int) -> torch.Tensor:
    """Returns the matrices that `split_slices` split."""
    if slices == 1:
        return matrices
    blocks, rows, columns = matrices.shape
    by_slice = matrices.reshape(blocks // slices, slices, rows, taps, -1)
    return by_slice.movedim(1, 3).reshape(blocks // slices, rows, columns * slices)


def solve_slices(problem: Problem, count: int, slices: int, taps: int) -> Solution:
    """Returns mask and values of a layer whose blocks are slices; one after another, so that one solver is in memory.

    Args:
        problem: the layer, a block for each slice.
        count: active weights of the layer, over all slices.
        slices: number of slices of a block of the layer.
        taps: entries of a kernel, as for `split_slices`.
    """
    scores = problem.weight.square()
    scores *= problem.moments.diagonal(dim1=-2, dim2=-1)[:, None]
    scores *= problem.importance[..., None]
    if problem.group:
        # Groups may lie in two slices, so the score decides, and each slice is left to find its values.
        whole = join_slices(scores, slices, taps)
        mask = split_slices(largest_mask(whole, count, 1, problem.group), slices, taps)
        found = [values(problem.block(number), mask[number : number + 1]) for number in range(len(mask))]
        return Solution(mask, torch.cat(found))
    mask = largest_mask(scores, count, problem.taps)
    weight = scores.zero_()
    for number, share in enumerate(mask.sum((1, 2)).tolist()):
        if share:
            solved = solve(problem.block(number), share)
            mask[number], weight[number] = solved.mask[0], solved.weight[0]
    return Solution(mask, weight)
