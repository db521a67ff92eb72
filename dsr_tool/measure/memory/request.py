"""The settings of a memory report, as the command line gives them."""

from __future__ import annotations

from dataclasses import dataclass

from dsr_tool.errors import UsageError
from dsr_tool.measure.memory.process import can_measure
from dsr_tool.report.sources import Source
from exporters.containers import listed

__all__ = ["MemoryRequest", "memory_request"]

_MAX_BATCH = 100_000
"""Largest batch; more is a typing error rather than a plan."""


@dataclass(frozen=True)
class MemoryRequest:
    """The settings of a memory report.

    Attributes:
        batch: inputs at once.
        input_size: side in pixels of a square input that replaces the model's own; for model folders.
        optimizer: optimizer of the training step, one of `ledger.OPTIMIZERS`; None for the default.
        measured: also measure each figure in a child process.
        maker: `module:callable` that builds the network of a folder with a network of the user's own.
    """

    batch: int = 1
    input_size: int | None = None
    optimizer: str | None = None
    measured: bool = False
    maker: str | None = None

    @property
    def optimizer_or_default(self) -> str:
        """The optimizer of the training step: SGD with momentum by default, as `dsr-tool train` has it."""
        return self.optimizer or "sgd"

    @property
    def measures(self) -> bool:
        """True if measurements were asked for and this system allows them."""
        return self.measured and can_measure()

    def check(self, source: Source) -> None:
        """Raises `UsageError` for a value that is not allowed, or does not fit the source."""
        if not 1 <= self.batch <= _MAX_BATCH:
            raise UsageError(f"--batch {self.batch} is not in 1 to {_MAX_BATCH:,}; give the number of inputs at once.")
        if self.input_size is not None and self.input_size < 1:
            raise UsageError(f"--input-size {self.input_size} is not 1 or more; give the side of the input in pixels.")
        if not (source.is_folder or source.has_graph):
            raise UsageError(
                f"--memory needs a computation, but {str(source.path)!r} ({source.kind}) holds weights alone; give a "
                f"model folder, or a file of one of these kinds: {listed(lambda one: one.has_graph)}."
            )
        # A file is made for one input size and holds no training state.
        if self.optimizer is not None and not source.is_folder:
            raise UsageError(
                f"--optimizer {self.optimizer} needs a model folder, but {str(source.path)!r} is a file for inference; "
                f"leave it out."
            )
        if self.input_size is not None and not source.is_folder:
            raise UsageError(
                f"--input-size {self.input_size} needs a model folder, but the input size of {str(source.path)!r} is "
                f"fixed; leave it out."
            )


def memory_request(
    enabled: bool,
    *,
    batch: int | None,
    input_size: int | None,
    optimizer: str | None,
    measured: bool,
    maker: str | None = None,
) -> MemoryRequest | None:
    """Returns the request of a command line; None without `--memory`.

    Raises:
        UsageError: an option that needs `--memory` is given without it.
    """
    if enabled:
        return MemoryRequest(1 if batch is None else batch, input_size, optimizer, measured, maker)
    # Ignored silently, they would seem to have had an effect.
    if measured or any(value is not None for value in (batch, input_size, optimizer)):
        raise UsageError("--batch, --input-size, --optimizer and --measure need --memory; add it.")
    return None
