"""Verifying an export of an ONNX file: its weights, and its outputs beside those of the file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from dsr_tool.errors import DsrError, FormatError, UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.graph.compact.record import COMPACTED, compacted_specs
from dsr_tool.graph.compact.rewrite import fold_and_compact
from dsr_tool.graph.ir import Graph
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.archive import archive_runs
from exporters.containers import container_of
from exporters.onnx.forms import nonzero
from exporters.onnx.read import read_onnx
from exporters.onnx.session import OnnxSession
from exporters.onnx.source import OnnxSource, graph_in
from exporters.onnx.source_inputs import references
from exporters.onnx.verify import under
from exporters.onnx.write import folded, to_onnx
from exporters.values import stored_like
from exporters.verify.compare import compare_each, output_faults
from exporters.verify.outputs import Outputs, Run, largest_difference, largest_output, mean_difference, rounding_note
from exporters.verify.result import Verification
from exporters.verify.rounding import how_rounded

__all__ = ["in_double", "verify_source"]

_MOST_ROUNDING = 1e-4
"""Largest rounding error that is believed, as a share of the largest output. Two runs of ONNX Runtime differed by up to
8.9e-5 in the networks that were tried, and two of the reference by up to 6.4e-5."""
_SIGMOID_ERROR = 2e-7
"""Absolute error of ONNX Runtime's sigmoid, which counts where all outputs are small; measured on outputs of 1e-5."""


def verify_source(path: Path, source: OnnxSource, *, seed: int = 0) -> Verification:
    """Compares a file with the ONNX file that it was exported from.

    Outputs may differ by 1e-5 of the largest one; for networks that round more than that, by four times the rounding
    error in float32 on top. ONNX Runtime's shows in a second run of it that computes every node by itself, the
    reference's in double precision.

    Args:
        path: an archive or an ONNX file.
        source: the ONNX file.
        seed: seed of the random inputs.

    Raises:
        FormatError: the file is damaged, or the source does not run.
        UsageError: the file is of another kind, or no runtime runs it.
    """
    kind = container_of(path).name
    held = _Held(path, kind, source)
    inputs, theirs, notes = references(source, seed)
    how = how_rounded(held.rounded(source.tensors), source.specs)
    reference, lost = theirs, cast("tuple[str, ...]", ())
    if how:
        dense = to_onnx(held.graph, _as_floats(held.expected), encoding="dense").SerializeToString()
        reference = _outputs(OnnxSession(dense).run_all, inputs)
        lost = (rounding_note(how, theirs, reference),)
    found = {name: _outputs(run, inputs) for name, run in held.runs.items()}
    compared = compare_each(reference, found)
    if not compared.agree and not how:
        compared = compare_each(reference, found, _with_rounding(source, inputs, reference))
    masks, values = held.differing()
    # A file of another tool may name its outputs at any length.
    named = replace(compared, name=compared.name[:80])
    problems = [
        *(f"the zeros of {name!r} differ" for name in masks[:1]),
        *(f"the values of {name!r} differ" for name in values[:1]),
        *output_faults(named, "the ONNX file", "the ONNX file", several=len(reference[0]) > 1),
    ]
    dead = () if largest_output(reference) else ("every output is zero, so that only the weights were compared",)
    compared_with = f"compared with {source.path.name} in onnxruntime, on inputs of {_sizes(inputs)}"
    return Verification(
        path,
        kind,
        path.stat().st_size,
        compared.runtimes,
        compared.scale,
        compared.tolerance,
        masks_equal=not masks,
        weights_equal=not (masks or values),
        problems=tuple(problems),
        notes=(*lost, compared_with, *notes, *held.notes, *dead),
        rounding_largest=largest_difference(theirs, reference) if how else None,
        rounding_mean=mean_difference(theirs, reference) if how else None,
    )


class _Held:
    """What a file holds, and what it should hold.

    Attributes:
        expected: the weights that it should have.
        graph: the computation that they belong to.
        runs: the file in every runtime that takes it.
        notes: why others do not.
    """

    def __init__(self, path: Path, kind: str, source: OnnxSource) -> None:
        exact, specs, self.graph = source.tensors, source.specs, source.graph
        self.notes: tuple[str, ...] = ()
        self.runs: Mapping[str, Run]
        if kind == "archive":
            archive = open_archive(path)
            compacted, names, self._read = COMPACTED in archive.config.conversion, set(archive.entries), archive.tensor
            self.runs, faults = archive_runs(archive)
            if not self.runs:
                raise UsageError(f"{str(path)!r} cannot be verified, since no runtime runs it: {'; '.join(faults)}")
            self.notes = tuple(faults)
        elif kind == "onnx":
            file = read_onnx(path)
            compacted, names = COMPACTED in file.record, set(file.entries)
            self.runs = {"onnxruntime": OnnxSession(path).run_all}
        else:
            raise UsageError(f"{str(path)!r} is a {kind} file; an ONNX file is compared with archives and ONNX files.")
        if compacted:
            small = fold_and_compact(self.graph, exact)[1]
            exact, specs, self.graph = dict(small.tensors), compacted_specs(small.tensors, specs), small.graph
        if kind == "onnx":
            self.graph, exact = folded(self.graph, exact)
            # Such a file has no active zeros, and weights of floating point alone.
            exact = {name: nonzero(tensor) for name, tensor in exact.items() if tensor.values.dtype.kind == "f"}
            self._read = partial(under, file, exact)
        self.missing = sorted(names.symmetric_difference(exact))
        # The file itself tells how it was exported, so `verify` needs no options.
        self.expected = {
            name: stored_like(self._read(name), tensor, specs[name]) if name in names and name in specs else tensor
            for name, tensor in exact.items()
        }

    def rounded(self, exact: Mapping[str, SparseTensor]) -> dict[str, SparseTensor]:
        """Returns the weights that the file has in another type than the ONNX file."""
        kinds = {name: (type(tensor), tensor.values.dtype) for name, tensor in exact.items()}
        return {n: t for n, t in self.expected.items() if n in kinds and kinds[n] != (type(t), t.values.dtype)}

    def differing(self) -> tuple[list[str], list[str]]:
        """Returns the names of weights whose masks differ, and of others that differ."""
        masks, values = [], list(self.missing)
        for name, tensor in self.expected.items():
            if name in self.missing:
                continue
            other = self._read(name)
            if not tensor.mask.equals(other.mask):
                masks.append(name)
            elif tensor.values.dtype != other.values.dtype or tensor.values.tobytes() != other.values.tobytes():
                values.append(name)
        return masks, values


def _outputs(run: Run, inputs: Sequence[Array]) -> list[Outputs]:
    return [{name: array.astype(np.float64) for name, array in run(x).items()} for x in inputs]


def _with_rounding(source: OnnxSource, inputs: Sequence[Array], theirs: Sequence[Outputs]) -> list[Outputs] | None:
    """Returns outputs that are as far from those of ONNX Runtime as float32 rounds; None if that is not known.

    A fault of the code that is verified must not pass for rounding. So ONNX Runtime is compared with itself, without
    its fused nodes, and the reference with itself in double precision, which has the same faults. No more than
    `_MOST_ROUNDING` of the largest output counts.
    """
    try:
        runs = [(theirs, _outputs(OnnxSession(source.path, optimise=False).run_all, inputs))]
    except FormatError:
        runs = []
    exact, single = in_double(source, inputs), _interpreted(source, inputs, "float32")
    if exact is not None and single is not None:
        runs.append((exact, single))
    most = _MOST_ROUNDING * largest_output(theirs) + _SIGMOID_ERROR
    rounded: list[Outputs] = []
    for i, reference in enumerate(theirs):
        found: dict[str, Array] = {}
        for name, array in reference.items():
            pairs = [(one[i].get(name), other[i].get(name)) for one, other in runs]
            if not pairs or any(one is None or one.shape != array.shape for pair in pairs for one in pair):
                return None
            distance = np.max([np.abs(one - other) for one, other in cast("list[tuple[Array, Array]]", pairs)], axis=0)
            found[name] = array + np.minimum(distance, most)
        rounded.append(found)
    return rounded


def in_double(source: OnnxSource, inputs: Sequence[Array]) -> list[Outputs] | None:
    """Returns the outputs in double precision; None if the reference does not compute the model."""
    return _interpreted(source, inputs, "float64")


def _interpreted(source: OnnxSource, inputs: Sequence[Array], dtype: str) -> list[Outputs] | None:
    tensors = {n: SparseTensor(t.mask, t.values.astype(dtype)) for n, t in _as_floats(source.tensors).items()}
    graph: Graph = graph_in(source.graph, dtype)
    names = [value.name for value in graph.outputs]
    try:
        interpreter = Interpreter(graph, tensors)
        runs = [interpreter.run(x.astype(graph.inputs[0].dtype)) for x in inputs]
    except DsrError:
        return None
    return [{n: one.astype(np.float64) for n, one in zip(names, arrays, strict=True)} for arrays in runs]


def _as_floats(tensors: Mapping[str, SparseTensor]) -> dict[str, SparseTensor]:
    """Returns weights on grids as plain floats."""
    return {name: SparseTensor(tensor.mask, tensor.values) for name, tensor in tensors.items()}


def _sizes(inputs: Sequence[Array]) -> str:
    return " and ".join("x".join(map(str, x.shape)) for x in inputs)
