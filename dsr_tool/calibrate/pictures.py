"""Reads the unlabelled pictures that a calibration looks at: from a folder, a tensor or a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dsr_tool.errors import FileError, FormatError, UsageError, first_few
from dsr_tool.runtime import load_inputs
from dsr_tool.runtime.picture_folder import input_files
from dsr_tool.sparsity.config import ModelConfig

__all__ = ["DEFAULT_COUNT", "Pictures", "read_calibration"]

DEFAULT_COUNT = 256
"""Number of pictures without `--calibration-images`: 154 MB in float32 at 224 pixels."""

_FEW = 16
"""Number of pictures below which the user is warned: means and second moments of so few are mostly noise."""

_NAMED = 3
"""Largest number of skipped files that a warning names."""


@dataclass(frozen=True)
class Pictures:
    """Preprocessed pictures, ready for a network.

    Attributes:
        inputs: the pictures, contiguous float32 on the CPU, shape (count, *input_shape). They are in random order, so
            the first n of them are a fair sample.
        names: where each is from: a path below the folder, with an index for an array of several; else its number.
        warnings: sentences for the user, such as which files were skipped.
    """

    inputs: torch.Tensor
    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of pictures."""
        return len(self.inputs)


def read_calibration(
    source: str | Path | torch.Tensor | Iterable[object],
    config: ModelConfig,
    count: int = DEFAULT_COUNT,
    seed: int = 0,
) -> Pictures:
    """Reads pictures for a calibration; labels are never used.

    Args:
        source: one of
            - a folder of pictures and preprocessed `.npy` files, recursively; more than `count` are sampled by seed;
            - a tensor of preprocessed inputs, shape (N, *input_shape), sampled by seed likewise;
            - a loader or another iterable of such tensors or of (tensor, label) pairs, which is read in its own order
              until there are `count` inputs; items of shape `input_shape` count as one.
        config: input shape and preprocessing of the model.
        count: largest number of pictures.
        seed: seed of the sample.

    Raises:
        FileError: there is no such folder, it holds no pictures, or none can be used.
        UsageError: `count` is not positive, the model takes no pictures, or a tensor is not finite or does not fit it.
    """
    if count < 1:
        raise UsageError(f"--calibration-images {count} is not 1 or more; give the number of pictures, such as 256.")
    if isinstance(source, (str, Path)):
        found = _from_folder(Path(source), config, count, seed)
    elif isinstance(source, torch.Tensor):
        inputs = _checked(source, config.input_shape)
        chosen = _order(len(inputs), seed)[:count]
        found = Pictures(_float32(inputs[chosen]), tuple(map(str, chosen)))
    else:
        inputs = _first_inputs(source, config.input_shape, count)
        found = Pictures(inputs, tuple(map(str, range(len(inputs)))))
    if found.count >= _FEW:
        return found
    few = (
        f"the calibration has {found.count} usable {'picture' if found.count == 1 else 'pictures'}; with fewer than "
        f"{_FEW}, what it measures is mostly noise: give {DEFAULT_COUNT} if you can."
    )
    return Pictures(found.inputs, found.names, (*found.warnings, few))


def _from_folder(folder: Path, config: ModelConfig, count: int, seed: int) -> Pictures:
    """Reads `count` usable inputs of a folder, fewer if there are no more; others replace files that cannot be."""
    files = input_files(folder, "--calibrate")
    names: list[str] = []
    skipped: dict[str, str] = {}
    inputs: torch.Tensor | None = None
    for index in _order(len(files), seed):
        name = files[index].relative_to(folder).as_posix()
        try:
            batch = torch.from_numpy(load_inputs([files[index]], config))
        except (FileError, FormatError) as error:
            skipped[name] = str(error)
            continue
        if inputs is None:
            # One tensor from the start: a list of pictures, concatenated at the end, would take twice the memory.
            inputs = torch.empty(_most(files, count), *batch.shape[1:])
        _same_shape(name, batch, inputs)
        taken = min(len(batch), count - len(names))
        inputs[len(names) : len(names) + taken] = batch[:taken]
        names += [name] if len(batch) == 1 else [f"{name}[{i}]" for i in range(taken)]
        if len(names) == count:
            break
    if inputs is None:
        raise FileError(
            f"--calibrate {str(folder)!r} holds {len(files)} pictures or arrays, none of which can be used: "
            f"{next(iter(skipped.values()))}"
        )
    return Pictures(inputs[: len(names)], tuple(names), _skipped_warning(skipped))


def _most(files: Sequence[Path], count: int) -> int:
    """Returns the largest number of inputs that `count` or the files allow; an array may hold any number."""
    return count if any(path.suffix.lower() == ".npy" for path in files) else min(count, len(files))


def _order(number: int, seed: int) -> list[int]:
    """Returns the numbers below `number` in an order that depends on the seed alone."""
    order: list[int] = np.random.default_rng(seed).permutation(number).tolist()
    return order


def _skipped_warning(skipped: Mapping[str, str]) -> tuple[str, ...]:
    """Returns a warning with the reason of the first, since files may be damaged or of a kind that is refused."""
    if not skipped:
        return ()
    names = list(map(repr, skipped))
    files = "1 file was" if len(names) == 1 else f"{len(names)} files were"
    return (
        f"{files} skipped in the calibration folder: {first_few(names, _NAMED)}; of the first, "
        f"{next(iter(skipped.values()))}",
    )


def _same_shape(name: str, batch: torch.Tensor, inputs: torch.Tensor) -> None:
    """Raises `UsageError` if an input has another shape than the first; only models of any input size get here."""
    if batch.shape[1:] != inputs.shape[1:]:
        raise UsageError(
            f"calibration input {name!r} has shape {tuple(batch.shape[1:])}, and the first has "
            f"{tuple(inputs.shape[1:])}; give inputs of one shape."
        )


def _first_inputs(source: Iterable[object], input_shape: tuple[int, ...], count: int) -> torch.Tensor:
    """Returns the first `count` inputs of a loader, fewer if it ends before."""
    batches: list[torch.Tensor] = []
    found = 0
    for item in source:
        batch = item[0] if isinstance(item, (tuple, list)) and item else item
        if not isinstance(batch, torch.Tensor):
            raise UsageError(
                f"calibrate yields {type(batch).__name__}; give a loader of tensors or of (tensor, label) pairs."
            )
        # Items of a data set are single inputs without a batch.
        batch = _checked(batch[None] if tuple(batch.shape) == input_shape else batch, input_shape)
        if batches and batch.shape[1:] != batches[0].shape[1:]:
            _same_shape(str(found), batch, batches[0])
        batches.append(_float32(batch[: count - found]))
        found += len(batches[-1])
        if found == count:
            break
    if not batches:
        raise UsageError("calibrate yields no inputs; give a loader with at least one batch, which can be read again.")
    return torch.cat(batches)


def _checked(inputs: torch.Tensor, input_shape: tuple[int, ...]) -> torch.Tensor:
    """Returns preprocessed inputs if they fit the model.

    Raises:
        UsageError: they are of another type or shape, empty, or not finite.
    """
    shape = tuple(inputs.shape)
    expected = input_shape or shape[1:]
    if not inputs.is_floating_point() or len(shape) < 2 or shape[1:] != expected or not shape[0]:
        raise UsageError(
            f"calibrate holds {str(inputs.dtype).removeprefix('torch.')} of shape {shape}; the model expects "
            f"preprocessed floating-point inputs of shape (N, {', '.join(map(str, expected))})."
        )
    if not torch.isfinite(inputs).all():
        raise UsageError("calibrate contains NaN or inf; give finite inputs.")
    return inputs


def _float32(inputs: torch.Tensor) -> torch.Tensor:
    """Returns a copy of the inputs: contiguous float32 on the CPU, without a history of gradients."""
    return inputs.detach().to("cpu", torch.float32, copy=True).contiguous()
