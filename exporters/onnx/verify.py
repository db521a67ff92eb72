"""Verifying an ONNX file: its weights, its outputs in ONNX Runtime, and that weights are decoded only once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from dsr_tool.files import temporary_folder
from dsr_tool.graph.compact.record import COMPACTED, compacted_specs
from dsr_tool.graph.compact.rewrite import fold_and_compact
from dsr_tool.sparse.feeding import graph_form
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.checked import CheckedModel
from exporters.onnx.forms import nonzero
from exporters.onnx.read import OnnxFile, read_onnx
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import folded, to_onnx
from exporters.verify.compare import compare_outputs
from exporters.verify.result import Verification
from exporters.verify.rounding import expected_tensors, how_rounded, steps_note
from exporters.verify.tensors import differing_tensors

__all__ = ["under", "verify_onnx"]


def verify_onnx(path: Path, checked: CheckedModel, *, samples: int, seed: int) -> Verification:
    """Verifies an ONNX file.

    A file of rounded weights is compared with the same weights stored as float32, both in ONNX Runtime; a note says how
    far the rounding moves the outputs of the model.

    Args:
        path: the file.
        checked: the model.
        samples: size of the second batch of inputs; the first has one.
        seed: seed of the inputs.

    Raises:
        CheckFailed: the file holds another architecture.
        FormatError: it is damaged.
    """
    model, graph = checked.model, checked.graph
    file = read_onnx(path)
    exact: Mapping[str, SparseTensor] = model.tensors()
    specs = model.specs
    if COMPACTED in file.record:
        compacted = fold_and_compact(graph, exact)[1]
        graph, exact, specs = compacted.graph, compacted.tensors, compacted_specs(compacted.tensors, specs)
    without_norms, unrounded = folded(graph, exact)
    if checked.values is None:
        # The file itself tells how it was exported, so `verify` needs no options.
        tensors = expected_tensors(checked, unrounded, specs, file.entries, partial(under, file, unrounded))
    else:
        tensors = folded(graph, {**exact, **checked.rounded}, values=checked.values, specs=specs)[1]
    # An exported file has no active zeros and no integer parameters among its weights.
    expected = {name: nonzero(tensor) for name, tensor in tensors.items() if tensor.values.dtype.kind == "f"}
    shapes = {name: entry.spec.shape for name, entry in file.entries.items() if name in expected}
    differing = differing_tensors(path, model, expected, shapes, file.tensor)
    session, left = _load(file)
    # Rounded weights have no module to compare with, since norms are folded as well.
    how, run = how_rounded(tensors, specs), None
    if how:
        run = OnnxSession(to_onnx(without_norms, _as_floats(tensors), encoding="dense").SerializeToString()).run_all
    return compare_outputs(
        path,
        "onnx",
        model.module,
        runs={"onnxruntime": session.run_all},
        value=graph.inputs[0],
        samples=samples,
        seed=seed,
        differing=differing,
        problems=[f"onnxruntime decodes weights at every inference ({left[0]})"] if left else [],
        notes=steps_note(tensors, unrounded) + _absent_note(checked),
        rounded=run,
        how=how,
        form=graph_form,
    )


def _absent_note(checked: CheckedModel) -> tuple[str, ...]:
    """Names weights that are not in the file, because no output depends on them; nothing if there are none."""
    used = set(checked.graph.parameters)
    absent = [name for name, spec in checked.model.specs.items() if spec.weight and name not in used]
    if not absent:
        return ()
    count = "a weight" if len(absent) == 1 else f"{len(absent)} weights"
    return (f"the file lacks {count} that no output depends on, such as {absent[0]!r}",)


def under(file: OnnxFile, exact: Mapping[str, SparseTensor], name: str) -> SparseTensor:
    """Decodes a weight; one on a grid under the mask of the model, since the file leaves out codes of zero."""
    found, mask = file.tensor(name), exact[name].mask
    if not isinstance(found, GridTensor) or found.mask.shape != mask.shape:
        return found
    own = found.mask.positions
    at = np.minimum(np.searchsorted(mask.positions, own), max(mask.active - 1, 0))
    if not mask.active or (mask.positions[at] != own).any():
        return found
    codes = np.zeros(mask.active, np.int8)
    codes[at] = found.codes
    return GridTensor(mask, codes, found.scales)


def _as_floats(tensors: Mapping[str, SparseTensor]) -> dict[str, SparseTensor]:
    """Returns weights on grids as plain floats, so that a file of them has no product with scales."""
    return {
        name: SparseTensor(tensor.mask, tensor.values) if isinstance(tensor, GridTensor) else tensor
        for name, tensor in tensors.items()
    }


def _load(file: OnnxFile) -> tuple[OnnxSession, list[str]]:
    """Loads a file; returns the session, and the decoding steps that optimisation did not fold away."""
    if not file.decode_steps:
        return OnnxSession(file.path), []
    # ONNX Runtime tells only by a file what its optimised graph looks like.
    with temporary_folder() as folder:
        optimized = folder / "optimized.onnx"
        session = OnnxSession(file.path, optimized=optimized)
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    return session, sorted(file.decode_steps.intersection(name for node in nodes for name in node.output))
