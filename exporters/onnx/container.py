"""The container of ONNX files: small on disk, and read by every runtime.

Sparse weights decode once, when a runtime loads the file and folds constants. With `--encoding native`, one operator
holds a plan for our kernels instead, and ONNX Runtime alone runs the file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import DsrError, first_line
from dsr_tool.graph.compact.record import COMPACTED, measure_savings
from dsr_tool.graph.compact.rewrite import fold_and_compact
from exporters.base import Container, Draft, ExportOptions, Head
from exporters.contents import Contents, StoredBytes, measured
from exporters.onnx import ONNX_ENCODINGS
from exporters.onnx.native_node import NATIVE, is_native, refuse_native

if TYPE_CHECKING:
    from onnx import ModelProto

    from dsr_tool.runtime.source import Model
    from dsr_tool.sparsity.tensor import SparseTensor
    from exporters.checked import CheckedModel
    from exporters.onnx.read import OnnxEntry
    from exporters.verify.result import Verification

__all__ = ["OnnxFiles"]

_FIRST_FIELD = b"\x08"
"""First byte of a model: the key of field 1, `ir_version`, which ONNX requires. Protobuf writes fields in order."""


class OnnxFiles(Container):
    """The container of ONNX files."""

    name = "onnx"
    endings = (".onnx",)
    encodings = (*ONNX_ENCODINGS, NATIVE)
    has_graph = True
    measurable = True
    compacts = True

    def recognises(self, head: Head) -> bool:
        """Looks for the first field of an ONNX model."""
        # The header of a safetensors file may have a length that begins with the same byte.
        return head.start.startswith(_FIRST_FIELD) and not head.is_safetensors

    def encode(self, checked: CheckedModel, options: ExportOptions) -> Draft:
        """Builds one ONNX model with a free batch; with rounded values, it still computes in float32.

        A file of the encoding `native` has the batch of the options.

        Raises:
            UsageError: a weight that float16 cannot hold, more than 2 GB, or a module that cannot be captured; a native
                file also for an operator without a kernel.
        """
        if options.encoding == NATIVE:
            from exporters.onnx.native import native_onnx

            return Draft(partial(_write, native_onnx(checked, options)))
        from exporters.onnx.write import to_onnx

        model, tensors = checked.model, checked.model.tensors()
        build = partial(
            to_onnx,
            encoding=options.encoding,
            values=options.values,
            specs=model.specs,
            architecture=model.config.architecture,
        )
        # Built even for a compact export, which records the size that it saves.
        content = build(checked.graph, {**tensors, **checked.rounded})
        if options.compact:
            before, small = fold_and_compact(checked.graph, tensors)
            record = measure_savings(before, small, model.specs, content.ByteSize())
            content = build(small.graph, small.tensors, notes={COMPACTED: record.to_dict()})
        return Draft(partial(_write, content))

    def verify(self, path: Path, checked: CheckedModel, *, samples: int, seed: int) -> Verification:
        """Compares weights and outputs, and checks that nothing is decoded at every inference.

        Of a native file, whose weights are packed, the outputs are compared alone.
        """
        if is_native(path):
            from exporters.onnx.native import verify_native

            return verify_native(path, checked, samples=samples, seed=seed)
        from exporters.onnx.verify import verify_onnx

        return verify_onnx(path, checked, samples=samples, seed=seed)

    def reader(self) -> Callable[[Path], Model]:
        """Imports the package onnx and returns `open_onnx`, or a function that says that the package is missing."""
        try:
            from exporters.onnx.graph import open_onnx
        except ImportError as error:
            return partial(_refuse_without_onnx, error)
        return partial(_open, open_onnx)

    def measure(self, path: Path) -> Contents:
        """Measures every weight with the operators that make it, and the rest as `nodes and names`."""
        from exporters.onnx.read import read_onnx

        refuse_native(path)
        file = read_onnx(path)
        # Decoded once here: the footprint and the split of bytes both need every weight.
        tensors = dict(file)
        stored = {name: _stored_bytes(entry, tensors[name]) for name, entry in file.entries.items()}
        parts = {"nodes and names": file.document_bytes}
        return measured(file, stored, parts, record=file.record.get(COMPACTED), tensors=tensors)


def _write(content: ModelProto, path: Path) -> None:
    path.write_bytes(content.SerializeToString(deterministic=True))


def _open(read: Callable[[Path], Model], path: Path) -> Model:
    refuse_native(path)
    return read(path)


def _refuse_without_onnx(error: ImportError, path: Path) -> Model:
    raise DsrError(
        f"{str(path)!r} is an ONNX file, and reading it takes the package onnx ({first_line(error)}); install it (pip "
        f"install onnx), or export the model as an archive, which does without (dsr-tool export MODEL_DIR -o "
        f"{path.stem}.dsr)."
    ) from error


def _stored_bytes(entry: OnnxEntry, tensor: SparseTensor) -> StoredBytes:
    """Splits the bytes of a weight: of a compact one, everything beyond its values serves positions, nodes included."""
    # The delta form may hold fillers, entries of value zero; they serve positions, and the tensor does not have them.
    values = entry.nbytes if entry.codec == "dense" else min(tensor.values.nbytes, entry.nbytes)
    return StoredBytes(entry.nbytes - values, values)
