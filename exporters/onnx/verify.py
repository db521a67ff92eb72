"""Verifying an ONNX file: its weights, its outputs in ONNX Runtime, and that weights are decoded only once."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx

from dsr_tool.graph.compact.record import COMPACTED
from dsr_tool.graph.compact.rewrite import fold_and_compact
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.checked import CheckedModel
from exporters.onnx.forms import nonzero
from exporters.onnx.read import OnnxFile, read_onnx
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import folded, to_onnx
from exporters.verify.outputs import compare_outputs
from exporters.verify.result import Verification
from exporters.verify.tensors import differing_tensors

__all__ = ["verify_onnx"]


def verify_onnx(path: Path, checked: CheckedModel, *, samples: int, seed: int) -> Verification:
    """Verifies an ONNX file.

    A file of float16 values is compared with the same rounded weights stored as float32, both in ONNX Runtime; a note
    says how far the rounding moves the outputs of the model.

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
    # The file itself tells how it was exported, so `verify` needs no options.
    values = "fp16" if _has_half_weights(file, model) else "fp32"
    tensors: Mapping[str, SparseTensor] = model.tensors()
    if COMPACTED in file.record:
        small = fold_and_compact(graph, tensors)[1]
        graph, tensors = small.graph, small.tensors
    graph, tensors = folded(graph, tensors, values=values, specs=model.specs)
    # An exported file has no active zeros and no integer parameters among its weights.
    expected = {name: nonzero(tensor) for name, tensor in tensors.items() if tensor.values.dtype.kind == "f"}
    shapes = {name: entry.spec.shape for name, entry in file.entries.items() if name in expected}
    differing = differing_tensors(path, model, expected, shapes, file.tensor)
    session, left = _load(file)
    # Rounded weights have no module to compare with, since norms are folded before rounding.
    rounded = None
    if values == "fp16":
        rounded = OnnxSession(to_onnx(graph, tensors, encoding="dense").SerializeToString()).run
    return compare_outputs(
        path,
        "onnx",
        model.module,
        runs={"onnxruntime": session.run},
        value=graph.inputs[0],
        samples=samples,
        seed=seed,
        differing=differing,
        problems=[f"onnxruntime decodes weights at every inference ({left[0]})"] if left else [],
        rounded=rounded,
    )


def _has_half_weights(file: OnnxFile, model: SparseModel) -> bool:
    half = (name for name, entry in file.entries.items() if entry.dtype == "float16")
    return any(name in model.specs and model.specs[name].weight for name in half)


def _load(file: OnnxFile) -> tuple[OnnxSession, list[str]]:
    """Loads a file; returns the session, and the decoding steps that optimisation did not fold away."""
    if not file.decode_steps:
        return OnnxSession(file.path), []
    # ONNX Runtime tells only by a file what its optimised graph looks like.
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = OnnxSession(file.path, optimized=optimized)
        nodes = onnx.load(optimized, load_external_data=False).graph.node
    return session, sorted(file.decode_steps.intersection(name for node in nodes for name in node.output))
