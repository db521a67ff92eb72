"""A plain state_dict, zeros in place, as safetensors or as torch.save writes it: for tools that know neither."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn

from dsr_tool.errors import FormatError, first_line, unknown_name
from dsr_tool.files import new_file, refuse_existing
from dsr_tool.formats.footprint import footprint
from dsr_tool.graph.ir import Value
from dsr_tool.sparse.capture import INPUT, frozen_copy
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.containers import kind_of
from exporters.values import stored_as
from exporters.verify.outputs import outputs_of, random_inputs
from exporters.verify.rounding import rounded_model, rounding_notes
from exporters.verify.tensors import Verification, check_exportable, compared, differing_tensors, require

__all__ = ["DENSE_ENCODINGS", "export_safetensors", "export_state_dict", "verify_state_dict", "verify_tensors"]

DENSE_ENCODINGS = ("auto", "dense")


def export_safetensors(
    model: SparseModel, path: str | Path, *, encoding: str = "auto", values: str = "fp32", force: bool = False
) -> Verification:
    """Write a model's state_dict as a safetensors file that plain PyTorch code loads, and verify it.

    Args:
        model: the model; `config.input_shape` says what it takes.
        path: the new file.
        encoding: `auto` or `dense`, which are the same.
        values: `fp32` as they are, or weights as `fp16`.
        force: replace an existing file.

    Returns:
        What the verification measured; a note says how large the file is for a sparse model.

    Raises:
        CheckFailed: weights and masks disagree, or the file does not hold what the model does; no file is left.
        UsageError: unknown encoding or type of values, or no input shape.
        FileError: the file exists without `force`, or the disk refuses it.
    """
    return _export(model, Path(path), _write_safetensors, encoding, values, force)


def export_state_dict(
    model: SparseModel, path: str | Path, *, encoding: str = "auto", values: str = "fp32", force: bool = False
) -> Verification:
    """Write a model's state_dict as `torch.save` does; see `export_safetensors` for everything else."""
    return _export(model, Path(path), _write_pth, encoding, values, force)


def verify_state_dict(path: Path, model: SparseModel, *, samples: int = 3, seed: int = 0) -> Verification:
    """`verify` for a state_dict: every tensor bit for bit, and PyTorch with the tensors of the file."""
    kind = kind_of(path)
    state = {name: _array(path, name, tensor) for name, tensor in _read(path, kind).items()}
    masks = {name: tensor.mask for name, tensor in model.tensors().items()}

    def read(name: str) -> SparseTensor:
        return _under(masks[name], state[name])

    shapes = {name: array.shape for name, array in state.items()}
    halves = any(state[name].dtype == np.float16 for name, spec in model.specs.items() if spec.weight and name in state)
    return verify_tensors(path, kind, model, shapes, read, halves=halves, samples=samples, seed=seed)


def verify_tensors(
    path: Path,
    kind: str,
    model: SparseModel,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], SparseTensor],
    *,
    halves: bool,
    samples: int,
    seed: int,
) -> Verification:
    """Compare a file without a graph with its model: bit for bit, and by running a copy of the module with its tensors.

    Args:
        path: the file.
        kind: what it is.
        model: the model.
        shapes: of the tensors in the file, by state_dict name.
        read: gives one of them.
        halves: whether its weights are of float16, so that it is compared with the model rounded likewise.
        samples: size of the second batch of inputs; the first has one.
        seed: of the inputs.
    """
    check_exportable(model)
    value = Value(INPUT, (None, *model.config.input_shape), "float32")
    expected = model.tensors()
    notes: tuple[str, ...] = ()
    if halves:
        expected, rounded = stored_as(expected, model.specs, "fp16"), rounded_model(model)
        notes = rounding_notes(model, rounded, random_inputs(value, samples, seed))
        model = rounded
    found = differing_tensors(path, model, expected, shapes, read)
    module = _with_state(model.module, {name: read(name).to_dense() for name in shapes})
    return compared(
        path,
        kind,
        model,
        runs={"pytorch": lambda x: outputs_of(module, [x])[0]},
        value=value,
        samples=samples,
        seed=seed,
        differing=found,
        notes=notes,
    )


def _export(
    model: SparseModel,
    path: Path,
    write: Callable[[Path, dict[str, Array]], None],
    encoding: str,
    values: str,
    force: bool,
) -> Verification:
    if encoding not in DENSE_ENCODINGS:
        raise unknown_name("state_dict encoding", encoding, DENSE_ENCODINGS)
    refuse_existing(path, force=force)
    check_exportable(model)
    tensors = stored_as(model.tensors(), model.specs, values)
    with new_file(path, force=force) as part:
        write(part, {name: tensor.to_dense() for name, tensor in tensors.items()})
        verification = require(verify_state_dict(part, model))
    coded = footprint(tensors, model.specs).everything.coded_bytes
    size = (
        f"zeros are stored in place, so this file is as large as a dense one; an archive (.dsr) holds the same weights "
        f"in {coded:,} bytes, and a few kB of graph"
    )
    return replace(verification, path=path, notes=(*verification.notes, size))


def _write_safetensors(path: Path, state: dict[str, Array]) -> None:
    # The entry that other tools look for, to know that this is a state_dict of PyTorch.
    save_file(state, path, metadata={"format": "pt"})


def _write_pth(path: Path, state: dict[str, Array]) -> None:
    # Into an open file: given a path, torch.save writes its name into the file too.
    with path.open("wb") as file:
        try:
            torch.save({name: torch.from_numpy(array) for name, array in state.items()}, file)
        except RuntimeError as error:
            # What the disk said, which closing the archive in torch hides behind an error of its own.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _read(path: Path, kind: str) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles, which fail below if they are no state_dict
            state: Any = (
                load_file(path) if kind == "safetensors" else torch.load(path, map_location="cpu", weights_only=True)
            )
    except Exception as error:  # a damaged pickle or zip ends in whatever the reader trips over
        raise FormatError(f"{str(path)!r} cannot be read as a state_dict ({first_line(error)}).") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise FormatError(f"{str(path)!r} holds no state_dict of tensors.")
    return state


def _array(path: Path, name: str, tensor: torch.Tensor) -> Array:
    try:
        return tensor.contiguous().numpy()
    except (RuntimeError, TypeError) as error:
        raise FormatError(f"{str(path)!r} holds {name!r} as {tensor.dtype}, which no export writes.") from error


def _under(mask: Mask, array: Array) -> SparseTensor:
    """The array under the mask, or under its own zeros where it has values outside the mask."""
    if array.shape == mask.shape:
        tensor = SparseTensor.from_dense(array, mask)
        if np.count_nonzero(tensor.values) == np.count_nonzero(array):
            return tensor
    return SparseTensor.from_dense(array, Mask.from_bool(array != 0))


def _with_state(module: nn.Module, state: Mapping[str, Array]) -> nn.Module:
    """A copy of the module in eval mode with the state loaded strictly, in the module's own types."""
    types = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    copied = frozen_copy(module)
    # Assigned, since the copy shares the tensors that it has with the model.
    copied.load_state_dict(
        {name: torch.from_numpy(array).to(types[name]) for name, array in state.items()}, assign=True
    )
    return copied
