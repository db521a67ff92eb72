"""Plain state_dicts with zeros in place, as safetensors or as torch.save writes them: for tools that know neither.

Such files are as large as a dense model.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from dsr_tool.errors import FormatError, UsageError, first_line
from dsr_tool.formats.footprint import footprint
from dsr_tool.formats.manifest import METADATA
from dsr_tool.sparsity.granularity import Granularity
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.base import Container, Draft, ExportOptions, Head

if TYPE_CHECKING:
    import torch
    from torch import nn

    from exporters.checked import CheckedModel
    from exporters.verify.result import Verification

__all__ = ["SafetensorsFiles", "StateDicts"]

_SCALE = "_scale"
"""What the name of a weight gets to name its scales, as other tools of quantised weights call them."""


class _PlainWeights(Container):
    """A container that holds a state_dict and nothing else; subclasses read and write the bytes."""

    encodings = ("auto", "dense")

    @abstractmethod
    def _write(self, path: Path, state: Mapping[str, Array]) -> None:
        """Writes a state_dict."""

    @abstractmethod
    def _read(self, path: Path) -> object:
        """Reads what the file holds; raises whatever the reading library raises."""

    def encode(self, checked: CheckedModel, options: ExportOptions) -> Draft:  # noqa: ARG002
        """Decodes the weights to dense arrays; a note says how large the file is for a sparse model.

        Raises:
            UsageError: a weight that float16 cannot hold, or a name that the scales of another weight need.
        """
        from dsr_tool.sparse.aliases import aliased_entries

        model = checked.model
        tensors = checked.stored(model.tensors(), model.specs)
        state = _state_of(tensors)
        # Plain code looks for every name of a tensor that has several.
        state |= aliased_entries(state, _later_names(model.module))
        coded = footprint(tensors, model.specs).everything.codec_bytes["delta"]
        note = (
            f"zeros are stored in place, so this file is as large as a dense one; an archive (.dsr) holds the same "
            f"weights in {coded:,} bytes, and a few kB of graph"
        )
        return Draft(partial(self._write, state=state), (note, *_semi_structured(model.granularity)))

    def verify(self, path: Path, checked: CheckedModel, *, samples: int, seed: int) -> Verification:
        """Compares every tensor bit for bit, and the outputs of the module with the tensors of the file."""
        from exporters.verify.tensors import verify_tensors

        state = {name: _array(path, name, tensor) for name, tensor in self._state(path).items()}
        state = _under_first_names(state, _later_names(checked.model.module))
        # The file has no masks. An active weight may be zero, so the model's masks say which zeros are meant.
        masks = {name: tensor.mask for name, tensor in checked.model.tensors().items()}
        scales = {name: state.pop(name + _SCALE) for name in [*state] if _has_scale(name, state, masks)}
        return verify_tensors(
            path,
            self.name,
            checked,
            {name: array.shape for name, array in state.items()},
            lambda name: _masked(masks[name], state[name], scales.get(name)),
            samples=samples,
            seed=seed,
        )

    def _state(self, path: Path) -> dict[str, torch.Tensor]:
        import torch

        try:
            with warnings.catch_warnings():
                # torch warns about unusual pickles; those that are no state_dict are refused below.
                warnings.simplefilter("ignore")
                state = self._read(path)
        except Exception as error:  # a damaged pickle or zip ends in whatever error its reader runs into
            raise FormatError(f"{str(path)!r} cannot be read as a state_dict ({first_line(error)}).") from error
        if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise FormatError(f"{str(path)!r} holds no state_dict of tensors.")
        return state


class SafetensorsFiles(_PlainWeights):
    """The container of safetensors files, which plain PyTorch code loads.

    A weight in few bits is an int8 tensor of codes, and its scales, one for each first index, have the name of the
    weight with `_scale` behind it: `weight.float() * weight_scale` is the weight.
    """

    name = "safetensors"
    endings = (".safetensors",)

    def recognises(self, head: Head) -> bool:
        """Looks for a readable safetensors header without the entry of an archive."""
        metadata = head.safetensors_metadata
        return metadata is not None and METADATA not in metadata

    def _write(self, path: Path, state: Mapping[str, Array]) -> None:
        # Other tools look for this entry to know that the file is a state_dict of PyTorch.
        save_file(dict(state), path, metadata={"format": "pt"})

    def _read(self, path: Path) -> object:
        from safetensors.torch import load_file

        return load_file(path)


class StateDicts(_PlainWeights):
    """The container of files that `torch.save` writes, for code that calls `load_state_dict`: floats alone."""

    name = "state-dict"
    endings = (".pth", ".pt")
    values = ("fp32", "fp16")

    def recognises(self, head: Head) -> bool:
        """Looks for the pickle that torch.save writes as the first member of a zip archive."""
        return head.zip_member.endswith(b"data.pkl")

    def _write(self, path: Path, state: Mapping[str, Array]) -> None:
        import torch

        # Into an open file: given a path, torch.save writes its name into the file, and equal models would differ.
        with path.open("wb") as file:
            try:
                torch.save({name: torch.from_numpy(array) for name, array in state.items()}, file)
            except RuntimeError as error:
                # Closing the zip archive hides the disk's own error behind one of torch.
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def _read(self, path: Path) -> object:
        import torch

        # weights_only: an unpickled file of a stranger could run any code.
        state: object = torch.load(path, map_location="cpu", weights_only=True)
        return state


def _semi_structured(granularity: Granularity) -> tuple[str, ...]:
    """Returns what torch can do with weights of which at most 2 of 4 neighbours are not zero; nothing for others."""
    density = granularity.density
    if density is None or 4 % granularity.group or density > Fraction(1, 2):
        return ()
    return (
        f"the masks are {granularity} along the input channels: torch.sparse.to_sparse_semi_structured takes the "
        f"weights of linear layers as they are, on a GPU in float16 or bfloat16",
    )


def _array(path: Path, name: str, tensor: torch.Tensor) -> Array:
    try:
        return tensor.contiguous().numpy()
    except (RuntimeError, TypeError) as error:
        raise FormatError(f"{str(path)!r} holds {name!r} as {tensor.dtype}, which no export writes.") from error


def _later_names(module: nn.Module) -> dict[str, str]:
    """Returns the first name of every entry of a file by each of its later ones, those of scales among them."""
    from dsr_tool.sparse.aliases import later_names

    later = later_names(module)
    return later | {name + _SCALE: first + _SCALE for name, first in later.items()}


def _under_first_names(state: dict[str, Array], later: Mapping[str, str]) -> dict[str, Array]:
    """Returns a state under the first name of each entry; as it is if two names of one entry differ in their values."""
    from dsr_tool.sparse.aliases import aliased_entries

    first = {name: array for name, array in state.items() if name not in later}
    others = aliased_entries(first, later)
    same = all(name in state and state[name].tobytes() == array.tobytes() for name, array in others.items())
    return first if same else state


def _state_of(tensors: Mapping[str, SparseTensor]) -> dict[str, Array]:
    """Returns the arrays of a file: one for each tensor, and the scales of those on grids."""
    state: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, GridTensor):
            state[name] = tensor.to_dense()
            continue
        if name + _SCALE in tensors:
            raise UsageError(
                f"--values in few bits stores the scales of {name!r} as {name + _SCALE!r}, which is an entry of the "
                f"model itself; use --values fp32, or an archive."
            )
        state[name] = SparseTensor(tensor.mask, tensor.codes).to_dense()
        rows, _ = matrix_shape(tensor.mask.shape)
        # Of the weight's own rank, so that a product with it needs no reshape.
        state[name + _SCALE] = tensor.scales.reshape(rows, *(1,) * (len(tensor.mask.shape) - 1))
    return state


def _has_scale(name: str, state: Mapping[str, Array], masks: Mapping[str, Mask]) -> bool:
    scale = name + _SCALE
    return scale in state and scale not in masks and state[name].dtype == np.int8


def _masked(mask: Mask, array: Array, scales: Array | None) -> SparseTensor:
    """Returns the array under the mask of the model, or under its own zeros if it has values outside that mask."""
    tensor = SparseTensor.from_dense(array, mask) if array.shape == mask.shape else None
    if tensor is None or np.count_nonzero(tensor.values) != np.count_nonzero(array):
        tensor = SparseTensor.from_dense(array, Mask.from_bool(array != 0))
    # Readers multiply by the scales as they are, so a row of them would scale columns.
    expected = (matrix_shape(array.shape)[0], *(1,) * (array.ndim - 1))
    fits = scales is not None and scales.shape == expected and scales.dtype == np.float32
    return GridTensor(tensor.mask, tensor.values, scales.reshape(-1)) if scales is not None and fits else tensor
