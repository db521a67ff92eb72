"""Several processes, started by torchrun, train one model, each on its share of every batch.

torch's `DistributedDataParallel` averages the gradients during the backward pass, before any hook of the optimizer
sees them, so every rank takes the same steps. A method's generator has the same seed on every rank, so every rank
prunes and grows the same weights. Batch normalisation uses the statistics of a rank's own share; after each epoch all
ranks take the running ones of rank 0, which also writes the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import distributed

from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.sparse.agreement import equal_everywhere
from dsr_tool.train.checksums import checksums
from dsr_tool.train.records import Observer
from dsr_tool.train.resume import find_stopped

__all__ = ["Follower", "Ranks"]


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

    def part(self, batch_size: int, accumulate: int = 1) -> int:
        """Returns the number of images of a batch that this rank gets.

        Args:
            batch_size: images of all ranks per step.
            accumulate: number of parts that each rank computes one after the other.

        Raises:
            UsageError: the batch cannot be divided evenly, or leaves a part of a single image, from which batch
                normalisation learns nothing.
        """
        parts = self.count * accumulate
        if parts > 1 and (batch_size % parts or batch_size < 2 * parts):
            among = f"among {self.count} processes" if self.count > 1 else "into parts"
            by = f" with --accumulate {accumulate}" if accumulate > 1 else ""
            raise UsageError(
                f"a batch of {batch_size} images cannot be divided {among}{by}; give a --batch-size that is a multiple "
                f"of {parts} and at least {2 * parts}, and data with at least as many training images."
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

    def agree(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Returns whether all ranks have the same bits: one message with a number per tensor."""
        return self.count == 1 or bool(equal_everywhere(checksums(tensors)).all())

    def require_equal(self, tensors: Iterable[torch.Tensor]) -> None:
        """Raises `CheckFailed` unless all ranks have the same bits: one message with a number per tensor.

        Args:
            tensors: weights, and the masks or positions of the active ones, on one device; as many on every rank.
        """
        if not self.agree(tensors):
            raise CheckFailed(
                "weights or masks differ between the processes; check that all started with the same model, that the "
                "model uses torch's random numbers only, and that all machines have the same software."
            )


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
