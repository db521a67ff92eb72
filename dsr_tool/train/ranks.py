"""Several processes, started by torchrun, train one model, each on its share of every batch.

Gradients are averaged while they are still dense, so every rank takes the same steps. A method's generator has the
same seed on every rank, so every rank prunes and grows the same weights. Batch normalisation uses the statistics of a
rank's own share; after each epoch all ranks take those of rank 0, which also writes the files.
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
    """This process among those of the run. Alone, all methods do nothing.

    Attributes:
        rank: number of this process; rank 0 notifies observers and writes files.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Returns the rank in torch's default process group."""
        if distributed.is_available() and distributed.is_initialized():
            return cls(distributed.get_rank(), distributed.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """True on the rank that notifies observers and writes files."""
        return self.rank == 0

    def part(self, batch_size: int) -> int:
        """Returns the number of images of a batch that this rank gets.

        Raises:
            UsageError: the batch cannot be divided evenly, or leaves a rank a single image, from which batch
                normalisation learns nothing.
        """
        if self.count > 1 and (batch_size % self.count or batch_size < 2 * self.count):
            raise UsageError(
                f"a batch of {batch_size} images cannot be divided among {self.count} processes; give a --batch-size "
                f"that is a multiple of {self.count} and at least {2 * self.count}."
            )
        return batch_size // self.count

    def share(self, order: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, int]:
        """Returns this rank's part of every batch, and its number of images per batch.

        Args:
            order: image numbers of all batches, shape (batches * batch_size,), or shorter for a single batch.
            batch_size: images of all ranks per step.

        Raises:
            UsageError: see `part`.
        """
        if self.count == 1:
            return order, batch_size
        part = self.part(min(batch_size, len(order)))
        return order.reshape(-1, self.count, part)[:, self.rank].reshape(-1), part

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces all gradients by their mean over the ranks, the same on each to the last bit."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.count == 1 or not gradients:
            return
        # One message for all: a small network has many gradients of few values.
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        pieces = flat.div_(self.count).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [p.view(g.shape) for p, g in zip(pieces, gradients, strict=True)])

    def wait(self) -> None:
        """Waits until all ranks have called it."""
        if self.count > 1:
            distributed.barrier()

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum of a tensor over the ranks."""
        if self.count > 1:
            tensor = tensor.clone()
            distributed.all_reduce(tensor)
        return tensor

    def follow_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrites tensors with their values on rank 0, in place."""
        for tensor in tensors if self.count > 1 else ():
            distributed.broadcast(tensor, 0)

    def first_says(self, answer: bool, device: torch.device) -> bool:
        """Returns the answer of rank 0, for questions that its clock decides."""
        shared = torch.tensor(int(answer), device=device)
        self.follow_first([shared])
        return bool(shared)

    @torch.no_grad()
    def require_equal(self, module: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        """Raises `CheckFailed` if weights or masks differ between ranks."""
        if self.count == 1:
            return
        # One checksum per tensor: two small messages instead of all weights.
        bits = [value.view(torch.uint8).sum(dtype=torch.int64) for value in map(_flat, module.parameters())]
        positions = [mask.reshape(-1).nonzero().square().sum() for mask in masks.values()]
        sums = torch.stack([*bits, *positions])
        least, most = sums.clone(), sums.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise CheckFailed(
                "weights or masks differ between the processes; check that the model uses torch's random numbers only, "
                "and that all machines have the same software."
            )


def _flat(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().reshape(-1)


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Joins the other processes if torchrun started this one. Local rank i uses GPU i of its machine.

    Raises:
        DsrError: another process ended too early.
    """
    # Set by torchrun in each process that it starts.
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks.current()
    except RuntimeError as error:
        # gloo has no type of error for a lost process, only these words.
        if "closed by peer" not in str(error) and "reset by peer" not in str(error):
            raise
        raise DsrError("another process of this run has ended; see its own message for the reason.") from error
    finally:
        distributed.destroy_process_group()


@dataclass
class Follower(Observer):
    """The counterpart of `RunFolder` on ranks other than 0: reads the run to resume, and writes nothing.

    Attributes:
        path: path of the run folder.
        resume: resume the run in it.
        facts: as in `RunFolder`; ignored.
        files: as in `RunFolder`; ignored.
        stopped: the run to resume; None for a training from the start.
    """

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
        """Does nothing: rank 0 alone writes."""
