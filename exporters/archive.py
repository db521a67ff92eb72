"""Archives (.dsr): the exact weights, the graph, and what is needed to go back to PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import UsageError
from dsr_tool.formats.archive import ENCODINGS, Archive, encode_archive, open_archive
from dsr_tool.formats.codecs import VALUE_SUFFIXES
from dsr_tool.formats.manifest import METADATA
from dsr_tool.graph.compact.record import COMPACTED, compacted_specs, measure_savings
from dsr_tool.graph.compact.rewrite import fold_and_compact
from dsr_tool.sparsity.config import ModelConfig, installed_versions
from exporters.base import Container, Draft, ExportOptions, Head
from exporters.contents import Contents, StoredBytes, measured
from exporters.values import GRID_BITS, PALETTE, VALUES

if TYPE_CHECKING:
    from dsr_tool.graph.ir import Graph
    from dsr_tool.runtime.source import Model
    from dsr_tool.sparse.model import SparseModel
    from dsr_tool.sparsity.layers import LayerSpec
    from dsr_tool.sparsity.tensor import SparseTensor
    from exporters.checked import CheckedModel
    from exporters.verify.outputs import Run
    from exporters.verify.result import Verification

__all__ = ["Archives", "archive_runs", "draft_archive"]

_MOST_DENSE_ONNX_BYTES = (1 << 31) - (1 << 24)
"""Largest weights, in bytes, that ONNX Runtime gets as a dense file: protobuf ends at 2 GiB, less 16 MiB of graph."""


class Archives(Container):
    """The container of archives."""

    name = "archive"
    endings = (".dsr",)
    encodings = ENCODINGS
    values = VALUES
    has_graph = True
    measurable = True
    compacts = True
    preprocesses = True

    def recognises(self, head: Head) -> bool:
        """Looks for the archive's entry in the metadata of a safetensors file."""
        metadata = head.safetensors_metadata
        # A damaged header is taken for an archive's: its reader says what is wrong with it.
        return head.is_safetensors and (metadata is None or METADATA in metadata)

    def encode(self, checked: CheckedModel, options: ExportOptions) -> Draft:
        """Encodes weights, graph and description; a compacted archive also records what compaction saved.

        Raises:
            UsageError: a weight that float16 cannot hold, an encoding beside values on grids or in palettes, or a
                module that cannot be captured.
        """
        model = checked.model
        return draft_archive(checked.graph, model.tensors(), model.specs, model.config, checked.stored, options)

    def verify(self, path: Path, checked: CheckedModel, *, samples: int, seed: int) -> Verification:
        """Compares every tensor bit for bit, and the outputs of the sparse runtime and of ONNX Runtime.

        An archive of rounded weights is compared with the model rounded likewise; notes say what the rounding does to
        the outputs.
        """
        from dsr_tool.sparse.feeding import graph_form
        from exporters.verify.compare import compare_outputs
        from exporters.verify.tensors import differing_tensors

        archive = open_archive(path)
        expected = _expected(archive, checked)
        shapes = {name: entry.spec.shape for name, entry in archive.entries.items()}
        differing = differing_tensors(path, expected.model, expected.tensors, shapes, archive.tensor)
        runs, faults = archive_runs(archive)
        if not runs:
            raise UsageError(f"{str(path)!r} cannot be verified, since no runtime runs it: {'; '.join(faults)}")
        return compare_outputs(
            path,
            self.name,
            expected.model.module,
            runs=runs,
            value=archive.graph.inputs[0],
            samples=samples,
            seed=seed,
            differing=differing,
            notes=(*expected.notes, *faults),
            rounded=expected.rounded,
            exact=expected.exact.module if expected.exact else None,
            how=expected.how,
            form=graph_form,
        )

    def reader(self) -> Callable[[Path], Model]:
        """Returns `open_archive`, which needs numpy alone."""
        return open_archive

    def measure(self, path: Path) -> Contents:
        """Measures the streams of every tensor, the documents and the header."""
        archive = open_archive(path)
        stored = {name: _stored_bytes(archive, name) for name in archive.entries}
        parts = {"graph and manifest": archive.document_bytes, "container header": archive.header_bytes}
        record = archive.config.conversion.get(COMPACTED)
        return measured(archive, stored, parts, config=archive.config, record=record)


_Stored = Callable[[Mapping[str, "SparseTensor"], Mapping[str, "LayerSpec"]], dict[str, "SparseTensor"]]
"""Returns tensors of these descriptions as a file holds them."""


def draft_archive(
    graph: Graph,
    tensors: Mapping[str, SparseTensor],
    specs: Mapping[str, LayerSpec],
    config: ModelConfig,
    stored: _Stored,
    options: ExportOptions,
) -> Draft:
    """Encodes a computation with its weights; see `Archives.encode`.

    Args:
        graph: the computation.
        tensors: its weights, and possibly others.
        specs: description of each.
        config: description of the model.
        stored: rounds tensors as the options say.
        options: encoding, values, and whether to remove channels.
    """
    encode = partial(encode_archive, encoding=_encoding(options), versions=installed_versions())
    plain = encode(stored(tensors, specs), specs, graph, config)
    if not options.compact:
        return Draft(plain.save)
    before, small = fold_and_compact(graph, tensors)
    small_specs = compacted_specs(small.tensors, specs)
    rounded = stored(small.tensors, small_specs)

    def write(path: Path) -> None:
        # The record has the size of the plain archive, which is known once it is written.
        plain.save(path)
        record = measure_savings(before, small, specs, path.stat().st_size)
        noted = replace(config, conversion={**config.conversion, COMPACTED: record.to_dict()})
        encode(rounded, small_specs, small.graph, noted).save(path)

    return Draft(write)


def _encoding(options: ExportOptions) -> str:
    """Returns the encoding of the weights; grids and palettes are encodings of their own.

    Raises:
        UsageError: another one is asked for.
    """
    palette = options.values == PALETTE
    fitting = ("auto", PALETTE) if palette else ("auto",)
    if options.encoding not in fitting and (palette or options.values in GRID_BITS):
        raise UsageError(
            f"--encoding {options.encoding!r} stores floats as they are, and --values {options.values!r} does not; "
            f"leave one of them out."
        )
    return PALETTE if palette else options.encoding


@dataclass(frozen=True)
class _Expected:
    """The tensors that an archive should hold, and the model to compare it with.

    Attributes:
        model: the model to compare with.
        tensors: every tensor that the archive should have.
        notes: what rounding did, measured.
        rounded: runs a compacted model with rounded weights, which no module computes; None to compare with PyTorch.
        exact: the model before rounding, if `model` has rounded weights.
        how: how its weights are rounded; empty if they are exact.
    """

    model: SparseModel
    tensors: dict[str, SparseTensor]
    notes: tuple[str, ...] = ()
    rounded: Run | None = None
    exact: SparseModel | None = None
    how: str = ""


def _expected(archive: Archive, checked: CheckedModel) -> _Expected:
    from exporters.verify.rounding import expected_tensors, how_rounded, rounded_model, steps_note, zeros_note

    model, specs, exact = checked.model, checked.model.specs, checked.model.tensors()
    compacted = COMPACTED in archive.config.conversion
    if compacted:
        _, small = fold_and_compact(checked.graph, exact)
        exact, specs = dict(small.tensors), compacted_specs(small.tensors, specs)
    # The file itself tells how it was exported, so `verify` needs no options.
    tensors = expected_tensors(checked, exact, specs, archive.entries, archive.tensor)
    how = how_rounded(tensors, specs)
    if not how:
        return _Expected(model, tensors)
    if compacted:
        run = _run_by_onnxruntime(small.graph, tensors, "dense")
        return _Expected(model, tensors, steps_note(tensors, exact), run, how=how)
    rounded = rounded_model(model, tensors)
    notes = zeros_note(model, rounded) + steps_note(tensors, exact)
    return _Expected(rounded, tensors, notes, exact=model, how=how)


def archive_runs(archive: Archive) -> tuple[dict[str, Run], list[str]]:
    """Prepares every runtime that takes the archive; returns them by name, and why the others do not take it."""
    from dsr_tool.runtime import Session
    from dsr_tool.runtime.kernels.library import library

    # Weights that the graph does not use, as those of auxiliary heads, are compared but not run.
    tensors = {name: archive.tensor(name) for name in archive.graph.parameters}
    runs: dict[str, Run] = {}
    faults = []
    try:
        # A model that exceeds the limit of one ONNX file as dense weights still fits in compact encodings.
        dense_bytes = sum(tensor.mask.size * tensor.values.dtype.itemsize for tensor in tensors.values())
        encoding = "auto" if dense_bytes > _MOST_DENSE_ONNX_BYTES else "dense"
        runs["onnxruntime"] = _run_by_onnxruntime(archive.graph, tensors, encoding)
    except UsageError as error:
        faults.append(f"onnxruntime cannot run it: {error}")
    try:
        # Not `auto`: for nearly dense models it would run ONNX Runtime, which is compared already.
        runs["sparse"] = Session(archive, runtime="scipy" if library() is None else "native").run_all
    except UsageError as error:
        faults.append(f"the sparse runtime cannot run it: {error}")
    return runs, faults


def _run_by_onnxruntime(graph: Graph, tensors: dict[str, SparseTensor], encoding: str) -> Run:
    from exporters.onnx.session import OnnxSession
    from exporters.onnx.write import to_onnx

    return OnnxSession(to_onnx(graph, tensors, encoding=encoding).SerializeToString()).run_all


def _stored_bytes(archive: Archive, name: str) -> StoredBytes:
    """Splits the bytes of a tensor: streams of values have the suffix `values` or none, all others hold positions."""
    entry = archive.entries[name]
    suffixes = [suffix for suffix in entry.crc32 if suffix not in VALUE_SUFFIXES]
    positions = sum(archive.stored_bytes(entry.stream(suffix)) for suffix in suffixes)
    return StoredBytes(positions, archive.entry_bytes(name) - positions)
