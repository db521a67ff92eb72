"""Several processes that train one model, each on its share of every batch; torchrun starts them.

Gradients are averaged while they are still dense, so that every rank takes the same steps; a method's generator is
seeded alike everywhere, so that every rank moves the same weights. Statistics of batch normalisation are those of a
rank's own share; after each epoch all go on with those of rank 0, which also writes the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import distributed, nn

from dsr_tool.errors import CheckFailed, DsrError, UsageError
from dsr_tool.train.records import Observer
from dsr_tool.train.resume import find_stopped

__all__ = ["Follower", "Ranks", "joined"]


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is; all methods do nothing where it is alone.

    Attributes:
        rank: its number; rank 0 is told, and writes.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """What torch's default process group says."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def part(self, batch_size: int) -> int:
        """This rank's images of a batch.

        Raises:
            UsageError: the batch cannot be shared out evenly, or leaves a rank a single image.
        """
        if self.count > 1 and (batch_size % self.count or batch_size < 2 * self.count):
            raise UsageError(
                f"a batch of {batch_size} images cannot be shared by {self.count} processes; give a --batch-size that "
                f"is a multiple of {self.count} and leaves each 2 or more."
            )
        return batch_size // self.count

    def share(self, order: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, int]:
        """This rank's part of every batch, and how many images that is.

        Args:
            order: what batches are cut from, shape (batches * batch_size,), or shorter for a single batch.
            batch_size: images of all ranks per step.

        Raises:
            UsageError: as `part` says.
        """
        if self.count == 1:
            return order, batch_size
        part = self.part(min(batch_size, len(order)))
        return order.reshape(-1, self.count, part)[:, self.rank].reshape(-1), part

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace all gradients by their mean over the ranks, bit for bit the same on each."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.count == 1 or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        pieces = flat.div_(self.count).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view(g.shape) for p, g in zip(pieces, gradients, strict=True)])

    def wait(self) -> None:
        """Go on when all ranks are here."""
        if self.count > 1:
            distributed.barrier()

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks."""
        if self.count > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor)
        return tensor

    def follow_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take on the values that tensors have on rank 0, in place."""
        for tensor in tensors if self.count > 1 else ():
            distributed.broadcast(tensor, 0)

    def first_says(self, answer: bool, device: torch.device) -> bool:
        """What rank 0 answers, for questions that clocks decide."""
        told = torch.tensor(int(answer), device=device)
        self.follow_first([told])
        return bool(told)

    @torch.no_grad()
    def require_equal(self, module: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        """Raise `CheckFailed` when weights or masks are not the same on all ranks."""
        if self.count == 1:
            return
        bits = [value.view(torch.uint8).sum(dtype=torch.int64) for value in map(_row_major, module.parameters())]
        places = [mask.reshape(-1).nonzero().square().sum() for mask in masks.values()]
        sums = torch.stack([*bits, *places])
        least, most = sums.clone(), sums.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise CheckFailed(
                "weights or masks are no longer the same on all processes; does the model draw random numbers of its "
                "own, or do the machines differ?"
            )


def _row_major(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().reshape(-1)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the other processes where torchrun started this one; rank i uses GPU i of its machine.

    Raises:
        DsrError: one of the others ended too early.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks.current()
    except RuntimeError as error:
        if "closed by peer" not in str(error) and "reset by peer" not in str(error):
            raise
        raise DsrError("another process of this run has ended; what it said itself tells why.") from error
    finally:
        distributed.destroy_process_group()


@dataclass
class Follower(Observer):
    """Stands where rank 0 has its `RunFolder`: reads what is resumed, and writes nothing."""

    path: str | Path
    resume: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stopped = find_stopped(Path(self.path)) if self.resume else None

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was begun that needs an end."""
