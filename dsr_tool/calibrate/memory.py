"""Estimates the memory of a calibration, compares it with what the machine has left, and gives freed memory back."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dsr_tool.calibrate.calls import rows_of_weight
from dsr_tool.calibrate.trials import TRIAL_BATCH
from dsr_tool.calibrate.views import affordable_views
from dsr_tool.calibrate.wide import moment_bytes, slices_of
from dsr_tool.errors import UsageError, first_line
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.feeding import evaluating
from dsr_tool.sparse.macs import with_macs
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["BATCH", "Need", "available_bytes", "memory_need", "release_freed", "require_memory"]

_FLOAT = 4
"""Bytes of a float32."""

_GRADIENTS, _WEIGHTS = 13, 9
"""Bytes per weight of the network, besides itself: while layer budgets are measured (two gradients, ranks, a product),
and while layers are fitted (dense values to go back to, those swapped out, masks)."""

_SUMMED, _OWN = 8, 17
"""Bytes per weight of the layer that is fitted: while batches are summed (weights, targets), and while it is solved
(weights, targets, scores, values, mask)."""

_MOMENTS, _WITH_SYSTEMS = 6, 5
"""Matrices of columns x columns that are alive while a mask is chosen: 4.2 in the solver, measured on 2,304 columns,
and the sums; and those that are alive while values are fitted, beside the rows' systems. Of a wide layer, the sums of
all slices are alive, and the rest for one slice at a time."""

_SYSTEMS = 3 << 26
"""Most bytes of the rows' own systems, which are factorised in chunks: three times 64 MiB."""

BATCH = 4
"""Pictures of one pass while layers are fitted. glibc gives freed blocks above 32 MiB back to the system, and
the values of 16 pictures are such blocks: fetching them again took MobileNetV2 as long as computing with them."""

_ALIVE = 4
"""Activations of the largest size that are alive in a pass, with the samples taken of them."""

_KEPT = 3 << 29
"""Most bytes of the values that are kept between two stages: 1 GiB, and half of that again while a stage advances."""

_INPUT, _VALUE = 4, 6
"""Bytes per float of a picture, and of a kept value: float16, dense and sparse, half of it twice. Inputs of the first
stage, pictures and views, take 6 bytes as well while they are made: float32, and float16 to keep."""


@dataclass(frozen=True)
class Need:
    """The estimated memory of a calibration.

    Attributes:
        fixed_bytes: bytes that do not depend on the number of pictures: weights, moments of the largest layer, a batch.
        pixels: floats of a picture.
        largest: floats per picture or view that live between stages at most.
        macs: multiply-adds per picture, which decide about the number of views.
    """

    fixed_bytes: int
    pixels: int
    largest: int
    macs: float

    def of(self, count: int) -> int:
        """Returns the bytes for a number of pictures, and for the views of them."""
        inputs = count * (1 + affordable_views(self.macs, count))
        # Values between stages are bounded for all inputs together, the inputs themselves are not.
        kept = max(min(inputs * _VALUE * self.largest, _KEPT), inputs * _VALUE * self.pixels)
        return self.fixed_bytes + count * _INPUT * self.pixels + kept

    def fitting(self, nbytes: int, most: int) -> int:
        """Returns the largest number of pictures below `most` that these bytes suffice for; 0 if not even one fits."""
        # Fewer pictures have more views, so nothing says where to start but the end.
        return next((count for count in range(most - 1, 0, -1) if self.of(count) <= nbytes), 0)


def require_memory(module: nn.Module, input_shape: tuple[int, ...], count: int) -> None:
    """Raises `UsageError` if calibrating a network on `count` pictures would take more memory than there is.

    Args:
        module: the network.
        input_shape: shape of one input.
        count: number of pictures.
    """
    available = available_bytes()
    need = memory_need(module, input_shape)
    if available is None or need.of(count) <= available:
        return
    fitting = need.fitting(available, count)
    remedy = f"give --calibration-images {fitting}" if fitting else "not even one fits: use a machine with more memory"
    raise UsageError(
        f"calibrating {type(module).__name__} on {count} pictures needs about {need.of(count) / 1e9:.1f} GB, and "
        f"{available / 1e9:.1f} GB of memory are available; {remedy}, or leave --calibrate out."
    )


def memory_need(module: nn.Module, input_shape: tuple[int, ...]) -> Need:
    """Estimates the memory of calibrating a network; it is run once on an input of zeros.

    Raises:
        UsageError: the module does not take such an input.
    """
    largest = _largest_activation(module, input_shape)
    weights = sum(parameter.numel() for parameter in module.parameters())
    alive = _FLOAT * _ALIVE * largest
    batch = BATCH * alive
    specs = with_macs(module, discover(module), input_shape).values()
    fitting = [_fitting(module, spec, batch) for spec in specs if spec.weight]
    fixed = max(_GRADIENTS * weights + TRIAL_BATCH * alive, _WEIGHTS * weights + max(fitting, default=batch))
    macs = sum(spec.macs_per_weight * spec.size for spec in specs)
    return Need(fixed, torch.Size(input_shape).numel(), largest, macs)


def _fitting(module: nn.Module, spec: LayerSpec, batch: int) -> int:
    """Returns the bytes that a layer takes at most, while batches are summed or while it is solved."""
    found = getattr(module.get_submodule(spec.name.rpartition(".")[0]), "groups", 1)
    # A convolution has moments for each group; whatever a module of the user's own calls groups is ignored.
    groups = found if spec.kind.startswith("Conv") and isinstance(found, int) else 1
    _, rows, columns = rows_of_weight(torch.empty(spec.shape, device="meta"), spec.kind, groups).shape
    taps = math.prod(spec.shape[2:])
    sums, slices = moment_bytes(groups, columns, taps), slices_of(groups, columns, taps)
    # The solver sees all groups of a layer together, and slices one by one.
    solved = sums if slices == 1 else sums // (groups * slices)
    systems = min(3 * _FLOAT * rows * (columns // slices) ** 2 * (groups if slices == 1 else 1), _SYSTEMS)
    solving = max((_MOMENTS - 1) * solved, (_WITH_SYSTEMS - 1) * solved + systems) + _OWN * spec.size
    return sums + max(solving, _SUMMED * spec.size + batch)


def _largest_activation(module: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Returns the floats of the largest output of a layer for one input."""
    largest = torch.Size(input_shape).numel()

    def look(_: nn.Module, __: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    hooks = [child.register_forward_hook(look) for child in module.modules()]
    try:
        with evaluating(module):
            module(torch.zeros(1, *input_shape))
    except Exception as error:  # the network may be the user's own, and raise anything
        raise UsageError(
            f"{type(module).__name__} does not take inputs of shape {list(input_shape)}: {first_line(error)}."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def available_bytes(root: Path = Path("/")) -> int | None:
    """Returns the memory that this process can still get: the machine's, or that of its control group if that is less.

    Args:
        root: folder that stands for `/`.

    Returns:
        Bytes; None where the system does not tell, which only Linux does.
    """
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"))
    limits = [int(found[1]) * 1024] if found else []
    # A line is `0::/path` in version 2 of control groups, and `4:memory:/path` in version 1.
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "-", "")
        if controllers == "":
            limits += _group_limits(root / "sys/fs/cgroup", path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            limits += _group_limits(root / "sys/fs/cgroup/memory", path, *names)
    return max(min(limits), 0) if limits else None


def release_freed() -> None:
    """Returns freed memory to the system, where the C library is glibc; elsewhere it does nothing.

    glibc keeps freed blocks of up to 32 MiB for later ones of that size, and the values of a batch are such blocks. The
    matrices of a solver are larger, so they would come on top of the gigabyte that the first stages have left.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no such function, or no library to ask
        ctypes.CDLL(None).malloc_trim(0)


def _group_limits(mount: Path, path: str, limit: str, usage: str) -> Iterator[int]:
    """Yields what is left of the limit of a control group and of every group around it."""
    group = mount / path.strip("/")
    # Inside a container, the path may be that of the host; its own group is then mounted at the top.
    for folder in [group, *group.parents]:
        allowed, used = (_read(folder / name).strip() for name in (limit, usage))
        if allowed.isdecimal() and used.isdecimal():
            # The page cache counts as used, and is given back when memory is short.
            cache = re.search(r"^(?:total_)?inactive_file (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
            yield int(allowed) - int(used) + (int(cache[1]) if cache else 0)
        if folder == mount:
            return


def _read(path: Path) -> str:
    """Returns the text of a file of the system; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
