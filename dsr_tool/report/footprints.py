"""The public function that measures a footprint: of a path of any kind, or of a model in memory."""

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
    """Measures parameters, active weights, bytes by codec and multiply-adds, per layer and in all.

    Args:
        source: a model folder, run folder or file that `dsr-tool report` reads, or a model in memory.

    Returns:
        Counts in entries, bytes and multiply-adds for one input; `file_bytes` is 0 for a model in memory.

    Raises:
        FileError: there is nothing at the path.
        FormatError: it is damaged, or no container recognises the file.
        UsageError: a file of plain weights, which does not say what is sparse.
    """
    # A model in memory is measured as it is, trained or not; nothing is written to learn its sizes.
    if isinstance(source, (str, Path)):
        return read(source).footprint
    # No file, so no bytes of a file: codecs give exact sizes of every tensor all the same.
    return measure(source.tensors(), source.specs)
