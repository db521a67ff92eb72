"""Agreement: the processes of a distributed training have the same masks, or it ends before the first step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import distributed

from dsr_tool.errors import CheckFailed
from dsr_tool.sparse.model import SparseModel

__all__ = ["equal_everywhere", "require_agreement", "several_processes"]


def several_processes(group: distributed.ProcessGroup | None = None) -> bool:
    """Returns whether there are other processes in a group, by default in torch's own."""
    ready = distributed.is_available() and distributed.is_initialized()
    return ready and distributed.get_world_size(group) > 1


def require_agreement(
    model: SparseModel, facts: Mapping[str, object], group: distributed.ProcessGroup | None = None
) -> None:
    """Raises `CheckFailed` on all processes unless masks and facts are the same on all: one message of 16 bytes each.

    Args:
        model: the sparse model, with the same layers on all processes.
        facts: what else must agree, by name.
        group: the processes; None for all.
    """
    hashes = {f"the mask of {name!r}": value for name, value in _masks(model)}
    hashes |= {name: _hash(repr(value).encode()) for name, value in facts.items()}
    # As many numbers on every process, whatever its model.
    everything = _hash(repr(sorted(hashes)).encode())
    first = torch.tensor([everything, len(hashes)], device=_device(model))
    if not equal_everywhere(first, group).all():
        raise CheckFailed(
            "the processes have models with different sparse layers; build and convert the same network on each, or "
            "give attach the process_group of those that train one network together."
        )
    same = equal_everywhere(torch.tensor(list(hashes.values()), device=_device(model)), group)
    for name, equal in zip(hashes, same.tolist(), strict=True):
        if not equal:
            raise CheckFailed(
                f"{name} differs between the processes, and DistributedDataParallel sends weights, not masks; call "
                f"torch.manual_seed with one seed on all of them before the network is built and converted, or load "
                f"one model on each, and give attach one seed."
            )


def _masks(model: SparseModel) -> Iterator[tuple[str, int]]:
    for name in model.sizes:
        yield name, _hash(model.mask_of(name, model.specs[name].shape).bits.tobytes())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def equal_everywhere(numbers: torch.Tensor, group: distributed.ProcessGroup | None = None) -> torch.Tensor:
    """Returns for each number whether it is the same on all processes; one message.

    Args:
        numbers: int64 of shape (numbers,), as many on every process.
        group: the processes; None for all.
    """
    # ~x falls as x rises, so one maximum shows the least and the greatest of all.
    most = torch.cat([numbers, ~numbers])
    distributed.all_reduce(most, distributed.ReduceOp.MAX, group=group)
    greatest, least = most.chunk(2)
    return greatest == ~least


def _device(model: SparseModel) -> torch.device:
    return next((parameter.device for parameter in model.module.parameters()), torch.device("cpu"))
