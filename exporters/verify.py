"""Does a file compute what the model computes? Every export asks before the file takes its name."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from dsr_tool.core.archive import open_archive
from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.files import require_file
from dsr_tool.core.graph import Array, Graph, Value
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.trace import trace
from exporters.onnx_compact import nonzero
from exporters.onnx_model import folded, to_onnx
from exporters.onnx_read import OnnxFile, read_onnx
from exporters.onnx_session import OnnxSession
from exporters.reference import largest_difference, outputs_of, random_inputs, rounding_error
from exporters.verification import Verification, require

__all__ = ["Verification", "checked_graph", "require", "verify", "verify_archive", "verify_onnx"]

Run = Callable[[Array], Array]

RELATIVE_TOLERANCE = 1e-5
"""Largest difference to PyTorch allowed to a file, as a fraction of the largest output, ..."""
ROUNDING_FACTOR = 4
"""... plus this many times PyTorch's own rounding error, which grows with the depth of a network."""


def verify(path: str | Path, model: SparseModel, *, samples: int = 3, seed: int = 0) -> Verification:
    """Compare an archive or ONNX file with the model that it should hold, on random inputs.

    Args:
        path: the file; its content says which of the two it is.
        model: the model.
        samples: size of the second batch of inputs; the first has one.
        seed: of the inputs.

    Raises:
        CheckFailed: the file holds another architecture.
        FileError: there is no such file.
        FormatError: it is damaged, or neither of the two.
        UsageError: the model has no input shape.
    """
    path = Path(path)
    require_file(path, "file")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file starts with the length of its header, eight bytes, and the header is a JSON object.
    check = verify_archive if start[8:] == b"{" else verify_onnx
    return check(path, model, samples=samples, seed=seed)


def checked_graph(model: SparseModel) -> Graph:
    """The graph of a model whose weights and masks agree.

    Raises:
        CheckFailed: they do not.
        UsageError: the input shape is unknown, or the module cannot be captured.
    """
    model.check()
    other = next((t.dtype for t in model.module.parameters() if t.dtype != torch.float32), None)
    if other is not None:
        raise UsageError(f"weights of {other} cannot be exported; call model.to(torch.float32) first.")
    if not model.config.input_shape:
        raise UsageError(
            f"{model.config.architecture} has no input shape, which an export needs; give an input size when you "
            f"convert it."
        )
    return trace(model.module, model.config.input_shape)


def verify_archive(path: Path, model: SparseModel, *, samples: int = 3, seed: int = 0) -> Verification:
    """`verify` for an archive: every tensor bit for bit, our runtime and ONNX Runtime."""
    from dsr_tool.runtime import Session

    archive = open_archive(path)
    differing = _differing(
        path,
        model,
        model.tensors(),
        {name: entry.spec.shape for name, entry in archive.entries.items()},
        archive.tensor,
    )
    tensors = {name: archive.tensor(name) for name in archive.graph.parameters}
    runs: dict[str, Run] = {}
    notes = []
    try:
        plain = to_onnx(archive.graph, tensors, encoding="dense")
        runs["onnxruntime"] = OnnxSession(plain.SerializeToString()).run
    except UsageError as error:
        notes.append(f"onnxruntime cannot run it: {error}")
    try:
        runs["sparse"] = Session(archive).run
    except UsageError as error:
        notes.append(f"the sparse runtime cannot run it: {error}")
    if not runs:
        raise UsageError(f"{str(path)!r} cannot be verified, since no runtime runs it: {'; '.join(notes)}")
    return _verification(
        path,
        "archive",
        model,
        runs=runs,
        value=archive.graph.inputs[0],
        samples=samples,
        seed=seed,
        differing=differing,
        notes=notes,
    )


def verify_onnx(
    path: Path, model: SparseModel, *, samples: int = 3, seed: int = 0, graph: Graph | None = None
) -> Verification:
    """`verify` for an ONNX file: its weights, ONNX Runtime, and that nothing is decoded at every inference.

    Args:
        path: the file.
        model: the model.
        samples: size of the second batch.
        seed: of the inputs.
        graph: the model's, when it was captured already.
    """
    graph = graph or checked_graph(model)
    _, tensors = folded(graph, model.tensors())
    expected = {name: nonzero(tensor) for name, tensor in tensors.items() if tensor.values.dtype.kind == "f"}
    file = read_onnx(path)
    shapes = {name: entry.spec.shape for name, entry in file.entries.items() if name in expected}
    differing = _differing(path, model, expected, shapes, file.tensor)
    session, left = _load(file)
    slow = [f"onnxruntime decodes weights at every inference ({left[0]})"] if left else []
    return _verification(
        path,
        "onnx",
        model,
        runs={"onnxruntime": session.run},
        value=graph.inputs[0],
        samples=samples,
        seed=seed,
        differing=differing,
        problems=slow,
    )


def _load(file: OnnxFile) -> tuple[OnnxSession, list[str]]:
    """A session, and the decoding steps that are left in it after optimisation."""
    if not file.decode_steps:
        return OnnxSession(file.path), []
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = OnnxSession(file.path, optimized=optimized)
        nodes = onnx.load(optimized).graph.node
    return session, sorted(file.decode_steps.intersection(name for node in nodes for name in node.output))


def _differing(
    path: Path,
    model: SparseModel,
    expected: Mapping[str, SparseTensor],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], SparseTensor],
) -> tuple[list[str], list[str]]:
    """Names of tensors whose masks differ, and of others whose values do; `CheckFailed` when shapes do."""
    _same_architecture(path, model, {name: tensor.mask.shape for name, tensor in expected.items()}, shapes)
    masks, values = [], []
    for name, tensor in expected.items():
        other = read(name)
        if not tensor.mask.equals(other.mask):
            masks.append(name)
        elif tensor.values.dtype != other.values.dtype or tensor.values.tobytes() != other.values.tobytes():
            values.append(name)
    return masks, values


def _same_architecture(
    path: Path,
    model: SparseModel,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    name = next((n for n in (*expected, *found) if expected.get(n) != found.get(n)), None)
    if name is not None:
        there, here = (f"of shape {shapes[name]}" if name in shapes else "absent" for shapes in (found, expected))
        raise CheckFailed(
            f"{str(path)!r} does not hold {model.config.architecture} as given: {name!r} is {there} in the file and "
            f"{here} in the model; compare it with the model that it was exported from."
        )


def _verification(
    path: Path,
    kind: str,
    model: SparseModel,
    *,
    runs: Mapping[str, Run],
    value: Value,
    seed: int,
    samples: int,
    differing: tuple[list[str], list[str]],
    problems: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Verification:
    inputs = random_inputs(value, samples, seed)
    module = frozen_copy(model.module)
    reference = outputs_of(module, inputs)
    scale = float(np.max([np.abs(y).max(initial=0.0) for y in reference]))
    runtimes = {name: largest_difference(reference, [run(x) for x in inputs]) for name, run in runs.items()}
    tolerance = RELATIVE_TOLERANCE * scale
    if max(runtimes.values()) > tolerance:
        # Double precision is slow, and needed only where a network rounds more than most.
        tolerance += ROUNDING_FACTOR * rounding_error(module, inputs, reference)
    masks, values = differing
    found = [f"the zeros of {name!r} differ" for name in masks[:1]]
    found += [f"the values of {name!r} differ" for name in values[:1]]
    if not np.isfinite(scale):
        found.append("the outputs of the model itself are not finite numbers")
    found += [
        f"{name} differs from PyTorch by {difference:.3g} where {tolerance:.3g} is allowed"
        for name, difference in runtimes.items()
        if not difference <= tolerance  # so that NaN is a difference
    ]
    dead = () if scale else ("every output is zero, so that only the weights were compared",)
    return Verification(
        path,
        kind,
        path.stat().st_size,
        runtimes,
        scale,
        tolerance,
        masks_equal=not masks,
        weights_equal=not (masks or values),
        problems=(*found, *problems),
        notes=(*notes, *dead),
    )
