"""Reads the inputs of a network: `.npy` arrays, which numpy reads, and pictures, which need Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import DsrError, FileError, FormatError, UsageError
from dsr_tool.files import require_file
from dsr_tool.packages import needed_by
from dsr_tool.sparsity.config import ModelConfig

__all__ = ["load_inputs"]

_Float32 = npt.NDArray[np.float32]


def load_inputs(paths: Sequence[str | Path], config: ModelConfig) -> _Float32:
    """Reads pictures, or arrays that are preprocessed already, as one batch.

    Pictures are resized, cropped and normalized by the model's preprocessing. If the result has another size than the
    model's input, it is resized once more.

    Args:
        paths: image files, and `.npy` files with one float32 input (channels, height, width) or a batch of them.
        config: input shape and preprocessing of the model.

    Returns:
        The inputs in order, shape (count, channels, height, width).

    Raises:
        FileError: a file is missing or cannot be read.
        FormatError: a file is neither a picture nor an array of numbers.
        MissingPackage: a file is a picture, and Pillow is not installed.
        UsageError: no paths are given, or an array or a picture does not fit the model.
    """
    if not paths:
        raise UsageError("no inputs were given; name at least one picture or .npy file.")
    batches = [_load(Path(path), config) for path in paths]
    for path, batch in zip(paths, batches, strict=True):
        if batch.shape[1:] != batches[0].shape[1:]:
            raise UsageError(
                f"input {str(path)!r} has shape {batch.shape[1:]}, and the first input has {batches[0].shape[1:]}; "
                f"give inputs of one shape."
            )
    return np.concatenate(batches)


def _load(path: Path, config: ModelConfig) -> _Float32:
    """Returns the batch that a file holds."""
    require_file(path, "input")
    try:
        if path.suffix.lower() == ".npy":
            return _read_array(path, config)
        with needed_by(f"reading the picture {str(path)!r}"):
            from dsr_tool.runtime.pictures import read_picture
        return read_picture(path, config)[None]
    except DsrError:  # some are OSErrors too
        raise
    except OSError as error:
        raise FileError(f"input {str(path)!r} cannot be read: {error.strerror or error}; check the file.") from error


def _read_array(path: Path, config: ModelConfig) -> _Float32:
    """Returns the batch that a `.npy` file holds; a single input becomes a batch of one."""
    try:
        with path.open("rb") as file:
            # Unpickling can run code, so arrays of objects are refused.
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FormatError(f"input {str(path)!r} is not a .npy file of numbers; save one with numpy.save.") from error
    rank = len(config.input_shape) or 3
    batch = array[None] if array.ndim == rank else array
    expected = config.input_shape or batch.shape[1:]
    if batch.dtype != np.float32 or batch.ndim != rank + 1 or batch.shape[1:] != expected or not len(batch):
        raise UsageError(
            f"input {str(path)!r} holds {array.dtype} of shape {array.shape}; the model expects float32 of shape "
            f"{expected}, or a batch of them."
        )
    if not np.isfinite(batch).all():
        raise UsageError(f"input {str(path)!r} contains NaN or inf, so its values are not finite; give numbers.")
    return np.asarray(batch, np.float32)
