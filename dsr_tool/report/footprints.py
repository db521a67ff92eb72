"""The footprint of anything that has one: a path of any kind, or a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.formats.footprint import Footprint
from dsr_tool.formats.footprint import footprint as measure
from dsr_tool.report.sources import read

if TYPE_CHECKING:
    from dsr_tool.sparse.model import SparseModel

__all__ = ["footprint"]


def footprint(source: str | Path | SparseModel) -> Footprint:
    """Parameters, active weights, bytes by codec and multiply-adds, per layer and in all.

    Args:
        source: a model folder, run folder or file that `dsr-tool report` reads, or a model; of a model, nothing is
            on disk, so that `file_bytes` is 0.

    Raises:
        FileError: nothing there.
        FormatError: damaged, or no known file.
    """
    if isinstance(source, (str, Path)):
        return read(source).footprint
    return measure(source.tensors(), source.specs)
