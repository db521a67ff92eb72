"""A process joins the others that torchrun started, and ends with one sentence when one of them is lost.

A process that is lost closes its connections, which gloo reports to its neighbours at once. They end, and so do their
neighbours. torchrun sends SIGTERM to whoever is left on its machine (`dsr_tool.cli.ending`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from dsr_tool.errors import DsrError, first_line
from dsr_tool.train.ranks import Ranks

__all__ = ["joined"]

_LOST = (
    "another process of this run has ended; see its own message for the reason, and give --resume to go on after the "
    "last complete epoch."
)


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
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield Ranks.current()
    except RuntimeError as error:
        if known := _explained(error):
            raise known from error
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _explained(error: RuntimeError) -> DsrError | None:
    """Returns the error of a lost process as a sentence, or None for any other error."""
    # gloo has no type of error, only these words: its file that speaks TCP.
    if "gloo/transport" in str(error):
        return DsrError(_LOST)
    if isinstance(error, distributed.DistError):
        return DsrError(f"the processes of this run lost each other ({first_line(error)}); {_LOST}")
    return None
