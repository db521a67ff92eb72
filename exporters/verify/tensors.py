"""Does a file compute what the model computes? Every export asks before the file takes its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.graph.compact.record import COMPACTED, compacted_specs
from dsr_tool.graph.compact.rewrite import folded_and_compacted
from dsr_tool.graph.ir import Graph, Value
from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.containers import kind_of
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import to_onnx
from exporters.values import stored_as
from exporters.verify.outputs import largest_difference, outputs_of, random_inputs, rounding_error
from exporters.verify.result import Verification, require
from exporters.verify.rounding import rounded_model, rounding_notes

__all__ = [
    "Verification",
    "check_exportable",
    "checked_graph",
    "compared",
    "differing_tensors",
    "require",
    "verify",
    "verify_archive",
]

Run = Callable[[Array], Array]

_ONE_FILE = (1 << 31) - (1 << 24)  # bytes of weights; protobuf ends at 2 GiB, and the graph needs a part of it

RELATIVE_TOLERANCE = 1e-5
"""Largest difference to PyTorch allowed to a file, as a fraction of the largest output, ..."""
ROUNDING_FACTOR = 4
"""... plus this many times PyTorch's own rounding error, which grows with the depth of a network."""


def verify(path: str | Path, model: SparseModel, *, samples: int = 3, seed: int = 0) -> Verification:
    """Compare an exported file with the model that it should hold, by running both on random inputs.

    Args:
        path: the file; its content says of which kind it is.
        model: the model.
        samples: size of the second batch of inputs; the first has one.
        seed: of the inputs.

    Raises:
        CheckFailed: the file holds another architecture.
        FileError: there is no such file.
        FormatError: it is damaged, or no export.
        UsageError: the model has no input shape.
    """
    from exporters.csr import verify_csr
    from exporters.onnx.check import verify_onnx
    from exporters.state_dict import verify_state_dict

    checks: dict[str, Callable[..., Verification]] = {
        "archive": verify_archive,
        "onnx": verify_onnx,
        "csr": verify_csr,
        "safetensors": verify_state_dict,
        "state-dict": verify_state_dict,
    }
    path = Path(path)
    return checks[kind_of(path)](path, model, samples=samples, seed=seed)


def check_exportable(model: SparseModel) -> None:
    """Look at what every export needs.

    Raises:
        CheckFailed: weights and masks disagree.
        UsageError: weights of another type than float32, or an unknown input shape.
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


def checked_graph(model: SparseModel) -> Graph:
    """The graph of a model whose weights and masks agree.

    Raises:
        CheckFailed: they do not.
        UsageError: the input shape is unknown, or the module cannot be captured.
    """
    check_exportable(model)
    return trace(model.module, model.config.input_shape)


def verify_archive(path: Path, model: SparseModel, *, samples: int = 3, seed: int = 0) -> Verification:
    """`verify` for an archive: every tensor bit for bit, our runtime and ONNX Runtime.

    One whose weights are float16 is compared with the model rounded likewise; a note says what the rounding does.
    """
    from dsr_tool.runtime import Session
    from dsr_tool.runtime.kernels.library import library

    archive = open_archive(path)
    notes: list[str] = []
    rounded_run = None
    half = any(entry.dtype == "float16" and entry.spec.weight for entry in archive.entries.values())
    if COMPACTED in archive.config.conversion:
        expected, rounded_run = _compacted(model, half=half)
    elif half:
        expected = stored_as(model.tensors(), model.specs, "fp16")
        rounded = rounded_model(model)
        notes += rounding_notes(model, rounded, random_inputs(archive.graph.inputs[0], samples, seed))
        model = rounded
    else:
        expected = model.tensors()
    differing = differing_tensors(
        path,
        model,
        expected,
        {name: entry.spec.shape for name, entry in archive.entries.items()},
        archive.tensor,
    )
    tensors = {name: archive.tensor(name) for name in archive.graph.parameters}
    runs: dict[str, Run] = {}
    try:
        # What is too large for one ONNX file as it is, fits in compact form.
        large = sum(tensor.mask.size * tensor.values.dtype.itemsize for tensor in tensors.values()) > _ONE_FILE
        plain = to_onnx(archive.graph, tensors, encoding="auto" if large else "dense")
        runs["onnxruntime"] = OnnxSession(plain.SerializeToString()).run
    except UsageError as error:
        notes.append(f"onnxruntime cannot run it: {error}")
    try:
        # Not `auto`, which has ONNX Runtime compute what is nearly dense: that is compared already.
        runs["sparse"] = Session(archive, runtime="scipy" if library() is None else "native").run
    except UsageError as error:
        notes.append(f"the sparse runtime cannot run it: {error}")
    if not runs:
        raise UsageError(f"{str(path)!r} cannot be verified, since no runtime runs it: {'; '.join(notes)}")
    return compared(
        path,
        "archive",
        model,
        runs=runs,
        value=archive.graph.inputs[0],
        samples=samples,
        seed=seed,
        differing=differing,
        notes=notes,
        rounded=rounded_run,
    )


def _compacted(model: SparseModel, *, half: bool) -> tuple[dict[str, SparseTensor], Run | None]:
    """What a compacted archive of the model holds, and where its weights are rounded, what runs them so."""
    _, small = folded_and_compacted(checked_graph(model), model.tensors())
    if not half:
        return dict(small.tensors), None
    tensors = stored_as(small.tensors, compacted_specs(small.tensors, model.specs), "fp16")
    return tensors, OnnxSession(to_onnx(small.graph, tensors, encoding="dense").SerializeToString()).run


def differing_tensors(
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


def compared(
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
    rounded: Run | None = None,
) -> Verification:
    """Run a file on random inputs beside its model in PyTorch.

    Args:
        path: the file.
        kind: what it is.
        model: the model.
        runs: what runs the file, by name.
        value: the input.
        seed: of the inputs.
        samples: size of the second batch of inputs; the first has one.
        differing: what `differing_tensors` found.
        problems: what else was found wrong.
        notes: what could not be compared, and why.
        rounded: runs the model with its weights rounded as they are in the file, to compare with in place of PyTorch.
    """
    inputs = random_inputs(value, samples, seed)
    module = frozen_copy(model.module)
    reference = outputs_of(module, inputs)
    if rounded is not None:
        exact, reference = reference, [rounded(x) for x in inputs]
        notes = [*notes, _rounding_note(exact, reference)]
    scale = float(np.max([np.abs(y).max(initial=0.0) for y in reference]))
    runtimes = {name: largest_difference(reference, [run(x) for x in inputs]) for name, run in runs.items()}
    tolerance = RELATIVE_TOLERANCE * scale
    if max(runtimes.values()) > tolerance and rounded is None:
        # Double precision is slow, and needed only where a network rounds more than most.
        tolerance += ROUNDING_FACTOR * rounding_error(module, inputs, reference)
    other = "PyTorch" if rounded is None else "the same rounded weights, stored dense,"
    masks, values = differing
    found = [f"the zeros of {name!r} differ" for name in masks[:1]]
    found += [f"the values of {name!r} differ" for name in values[:1]]
    if not np.isfinite(scale):
        found.append("the outputs of the model itself are not finite numbers")
    found += [
        f"{name} differs from {other} by {difference:.3g} where {tolerance:.3g} is allowed"
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


def _rounding_note(exact: list[Array], rounded: list[Array]) -> str:
    largest = max(float(np.abs(y).max(initial=0.0)) for y in exact)
    return (
        f"with weights rounded to float16, outputs differ by up to {largest_difference(exact, rounded):.3g} from those "
        f"of the model as it was (largest output {largest:.3g})"
    )
