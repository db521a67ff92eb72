"""CSR files for scipy: one .npz with an int32 matrix for each sparse weight and arrays for the rest."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.sparsity.config import installed_versions
from exporters.base import Container, Draft, ExportOptions, Head
from exporters.contents import Contents, StoredBytes, measured

if TYPE_CHECKING:
    from dsr_tool.formats.csr_file import CsrFile
    from exporters.checked import CheckedModel
    from exporters.verify.result import Verification

__all__ = ["CsrFiles"]


class CsrFiles(Container):
    """The container of CSR matrices; it holds no computation."""

    name = "csr"
    endings = (".npz",)
    encodings = ("auto", "csr")
    values = ("fp32", "fp16")
    measurable = True

    def recognises(self, head: Head) -> bool:
        """Looks for an array as the first member of a zip archive."""
        return head.zip_member.endswith(b".npy")

    def encode(self, checked: CheckedModel, options: ExportOptions) -> Draft:  # noqa: ARG002
        """Rounds the weights if asked for; the matrices are built while they are written.

        Raises:
            UsageError: a weight that float16 cannot hold.
        """
        from dsr_tool.formats.csr_file import write_csr

        # Rounding comes first, since it may refuse a weight, and nothing is written by then.
        model = checked.model
        tensors = checked.stored(model.tensors(), model.specs)
        return Draft(
            partial(write_csr, tensors=tensors, specs=model.specs, config=model.config, versions=installed_versions())
        )

    def verify(self, path: Path, checked: CheckedModel, *, samples: int, seed: int) -> Verification:
        """Compares every tensor bit for bit, and the outputs of the module with the tensors of the file."""
        from dsr_tool.formats.csr_file import load_csr
        from exporters.verify.tensors import verify_tensors

        file = load_csr(path)
        shapes = {name: entry.spec.shape for name, entry in file.entries.items()}
        return verify_tensors(path, self.name, checked, shapes, file.tensor, samples=samples, seed=seed)

    def measure(self, path: Path) -> Contents:
        """Measures the arrays of every tensor, the description and the zip container."""
        from dsr_tool.formats.csr_file import load_csr

        file = load_csr(path)
        stored = {name: _stored_bytes(file, name) for name in file.entries}
        parts = {"description": file.description_bytes, "zip container": file.container_bytes}
        return measured(file, stored, parts, config=file.config)


def _stored_bytes(file: CsrFile, name: str) -> StoredBytes:
    """Splits the bytes of a tensor: a plain array and the `data` of a matrix are values, all others positions."""
    values = sum(nbytes for array, nbytes in file.stored[name].items() if array in (name, f"{name}:data"))
    return StoredBytes(file.entry_bytes(name) - values, values)
