"""Checks the state of a network before anything is written: it must be named tensors that files can hold."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.sparse.compact.change import held_state
from dsr_tool.sparse.compact.marks import VALUES
from dsr_tool.sparse.in_file import read

__all__ = ["DTYPES", "is_extra_state", "require_exportable", "require_state", "require_values"]

DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types that a model folder can hold, with their names in it."""


_STATISTICS = ("running_mean", "running_var")
"""Ends of names of buffers that norms compute with."""

_IN_EXPORTS = (
    *(torch.float16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
"""Types that exported files can hold."""


def require_state(module: nn.Module) -> None:
    """Checks that a state_dict has every parameter, and in each entry a plain tensor of a type that files can hold.

    Args:
        module: any network; its values are not read, so it may be on the meta device.

    Raises:
        UsageError: an entry is something else.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise UsageError(f"parameter {name!r} has no shape yet; run one input through the model first.")
    held = held_state(module)
    for name, entry, _ in held:
        if (fault := _fault(name, entry)) is not None:
            raise UsageError(f"entry {name!r} of the state_dict is {fault}.")
    _require_own_memory(module)
    absent = {name for name, _ in module.named_parameters()} - {name for name, *_ in held} - {VALUES}
    if absent:
        raise UsageError(
            f"parameter {min(absent)!r} is not in the state_dict under this name, as a hook of the network removes or "
            f"renames it; give the network without that hook."
        )


def _require_own_memory(module: nn.Module) -> None:
    """Checks that no two parameters share memory: a mask of one would zero the other, and steps would add up.

    Modules that share one parameter are no such case.

    Raises:
        UsageError: two of them do.
    """
    taken: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, parameter in module.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.layout != torch.strided or parameter.is_meta:
            continue
        last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
        # Interleaved views, such as columns of one matrix, may lie in one range and share nothing.
        if last + 1 != parameter.numel():
            continue
        first, nbytes = parameter.data_ptr(), parameter.numel() * parameter.element_size()
        taken.setdefault(parameter.device, []).append((first, first + nbytes, name))
    for ranges in taken.values():
        ranges.sort()
        for (_, end, name), (start, _, other) in pairwise(ranges):
            if start < end:
                raise UsageError(
                    f"parameters {name!r} and {other!r} lie in the same memory and are two parameters to PyTorch; let "
                    f"both modules have one nn.Parameter if they share it, or else give each a clone()."
                )


def _fault(name: str, entry: object) -> str | None:
    """Returns why files cannot hold an entry, and what to do; None for a plain tensor."""
    if not isinstance(entry, torch.Tensor):
        what = f"a {type(entry).__name__}, and files hold tensors alone"
        if is_extra_state(name):
            return f"{what}; let get_extra_state() return a tensor"
        return f"{what}; convert the network before it is quantised or packed"
    if type(entry).__module__.startswith("torch.distributed"):
        return "split between processes; convert the network before it is split (before fully_shard)"
    if entry.is_quantized:
        return f"quantised ({entry.dtype}); convert the network before it is quantised"
    if entry.is_nested or entry.layout != torch.strided:
        kind = "nested" if entry.is_nested else f"sparse ({entry.layout})"
        return f"a {kind} tensor; register a dense one, or keep it out of the state_dict (persistent=False)"
    return None if entry.dtype in DTYPES else f"of {entry.dtype}, which no file holds; give it another type"


def is_extra_state(name: str) -> bool:
    """Returns whether an entry of a state_dict is what `get_extra_state()` of a module returned."""
    return name.rpartition(".")[2] == "_extra_state"


def require_exportable(name: str, dtype: torch.dtype) -> None:
    """Checks the type of an entry that is about to be exported.

    Raises:
        UsageError: exported files cannot hold it.
    """
    if dtype in _IN_EXPORTS:
        return
    remedy = "call model.to(torch.float32) first" if dtype.is_floating_point else "keep it as int64"
    if dtype.is_complex:
        remedy = "keep its real and imaginary part as real numbers (torch.view_as_real)"
    raise UsageError(f"{name!r} has type {dtype}, which exported files cannot hold; {remedy}.")


@torch.no_grad()
def require_values(module: nn.Module) -> None:
    """Checks that parameters and statistics of norms are finite, and that no other buffer has a NaN.

    Buffers that mask attention hold -inf.

    Raises:
        UsageError: a tensor has such values, or none yet.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            raise UsageError(f"{name!r} has no values yet, since it is on the meta device; load the weights first.")
        if tensor.layout != torch.strided or tensor.is_nested:
            continue  # outside the state_dict
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.float()  # noqa: PLW2901 - torch has no isfinite for this type
        finite = isinstance(tensor, nn.Parameter) or name.endswith(_STATISTICS)
        values = read(tensor)
        if (~torch.isfinite(values) if finite else torch.isnan(values)).any():
            raise UsageError(f"{name!r} contains {'NaN or inf' if finite else 'NaN'}; use an earlier checkpoint.")
