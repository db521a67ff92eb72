"""The answers of a file on pictures: how often they equal those of the model that it was exported from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError
from dsr_tool.runtime import Session, load_inputs
from dsr_tool.runtime.picture_folder import input_files
from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.tensor import Array
from exporters.base import Container
from exporters.checked import CheckedModel
from exporters.verify.outputs import Run, outputs_of, random_inputs
from exporters.verify.result import Verification
from exporters.verify.rounding import rounded_model

__all__ = ["Images", "check_images", "with_agreement"]

Images = str | Path | torch.Tensor | Iterable[torch.Tensor]
"""A folder of pictures and preprocessed `.npy` files, or preprocessed inputs: a tensor of shape (N, *input_shape), or
batches of that shape."""

_BATCH = 16
"""Inputs of one call of a network: activations take far more memory than inputs do."""


def check_images(images: Images | None, least: float | None, checked: CheckedModel) -> None:
    """Checks before anything takes minutes that answers can be compared.

    Raises:
        FileError: there is no such folder, or it holds no pictures.
        UsageError: a floor without pictures or outside of (0, 1], or a model whose output is no row of scores.
    """
    if least is not None and images is None:
        raise UsageError("--min-agreement compares answers on pictures; give --images too, a folder of them.")
    if least is not None and not 0 < least <= 1:
        raise UsageError(f"--min-agreement {least} is not in (0, 1]; give a share of pictures, such as 0.98.")
    if images is None:
        return
    if isinstance(images, (str, Path)):
        if not str(images):
            raise UsageError("--images is empty; give a folder of pictures.")  # not the current one
        input_files(Path(images), "--images")
    (outputs,) = outputs_of(frozen_copy(checked.model.module), random_inputs(checked.input, 1, seed=0)[:1])
    shapes = [output.shape for output in outputs.values()]
    if len(shapes) > 1 or len(shapes[0]) != 2 or shapes[0][1] < 2:
        returned = f"an output of shape {shapes[0]}" if len(shapes) == 1 else f"{len(shapes)} outputs"
        raise UsageError(
            f"--images compares top-1 answers, and {checked.model.config.architecture} returns {returned} where a "
            f"classifier has one of (1, classes); leave it out."
        )


def with_agreement(
    found: Verification,
    container: Container,
    path: Path,
    checked: CheckedModel,
    images: Images,
    least: float | None,
) -> Verification:
    """Adds the share of pictures for which a file answers as the model before rounding.

    Args:
        found: the verification of the file, which passed.
        container: its container.
        path: the file.
        checked: the model.
        images: the pictures; labels are not used.
        least: least share that is allowed; None for any.

    Raises:
        CheckFailed: the share is lower.
        FileError: no picture can be read.
        UsageError: inputs do not fit the model.
    """
    exact, run = frozen_copy(checked.model.module), _run(container, path, checked)
    count = equal = 0
    damaged: list[str] = []
    for inputs in _batches(images, checked.model.config, damaged):
        (one,), (other,) = outputs_of(exact, [inputs])[0].values(), run(inputs).values()
        # The largest of scores with NaN would be the same entry in both.
        finite = np.isfinite(one).all(1) & np.isfinite(other).all(1)
        equal += int(((one.argmax(1) == other.argmax(1)) & finite).sum())
        count += len(inputs)
    if not count:
        what = f"of {len(damaged)} damaged ones, such as {damaged[0]!r}" if damaged else "of no inputs"
        raise FileError(f"--images {str(images)[:80]!r} consists {what}; give pictures that can be read.")
    # Not equal < least * count: 0.55 * 100 is above 55 in floats.
    if least is not None and equal / count < least:
        raise CheckFailed(
            f"the file answers {equal} of {count} pictures as the model does, which is less than --min-agreement "
            f"{least:g}; give --values with more bits, or --calibrate with a folder of pictures."
        )
    notes = found.notes
    if damaged:
        files = "1 damaged file" if len(damaged) == 1 else f"{len(damaged)} damaged files"
        notes = (*notes, f"{files} of --images not counted, such as {damaged[0]!r}")
    return replace(found, pictures=count, agreement=equal / count, notes=notes)


def _run(container: Container, path: Path, checked: CheckedModel) -> Run:
    """Returns the file as a session runs it, or the module with the weights that the file was found to hold."""
    if container.has_graph:
        # A network may have operators that ONNX Runtime alone has.
        with contextlib.suppress(UsageError):
            return Session(container.reader()(path)).run_all
    model = checked.model
    module = rounded_model(model, checked.stored(model.tensors(), model.specs)).module
    return lambda x: outputs_of(module, [x])[0]


def _batches(images: Images, config: ModelConfig, damaged: list[str]) -> Iterator[Array]:
    """Yields the inputs in batches; names of files that cannot be read are added to `damaged`."""
    if isinstance(images, (str, Path)):
        singles = _from_folder(Path(images), config, damaged)
        while some := list(islice(singles, _BATCH)):
            yield np.stack(some)
        return
    for batch in [images] if isinstance(images, torch.Tensor) else images:
        if not isinstance(batch, torch.Tensor) or tuple(batch.shape[1:]) != config.input_shape:
            what = tuple(batch.shape) if isinstance(batch, torch.Tensor) else type(batch).__name__
            raise UsageError(
                f"images holds {what}, and the model expects tensors of preprocessed inputs, of shape "
                f"(N, {', '.join(map(str, config.input_shape))})."
            )
        for part in batch.detach().to("cpu", torch.float32).split(_BATCH):
            yield part.numpy()


def _from_folder(folder: Path, config: ModelConfig, damaged: list[str]) -> Iterator[Array]:
    for path in input_files(folder, "--images"):
        try:
            inputs = load_inputs([path], config)
        except (FileError, FormatError):
            damaged.append(path.relative_to(folder).as_posix())
            continue
        # A file has one picture, or an array of any number of inputs.
        yield from inputs
