"""Rounding that is chosen by pictures, for exports with `--calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import UsageError, join_words
from exporters.base import ExportOptions
from exporters.values import GRID_BITS

if TYPE_CHECKING:
    import torch

    from dsr_tool.sparsity.grid import GridTensor
    from exporters.checked import CheckedModel

__all__ = ["check_calibration", "rounded_by_pictures"]


def check_calibration(source: object, images: int | None, options: ExportOptions) -> None:
    """Raises `UsageError` if a calibration does not fit the other options of an export.

    Args:
        source: the pictures; None without a calibration.
        images: largest number of pictures, if it was given.
        options: the other options.
    """
    if source is None:
        if images is not None:
            raise UsageError("--calibration-images goes with --calibrate, the folder of pictures; give that too.")
        return
    if isinstance(source, str) and not source:
        raise UsageError("--calibrate is empty; give a folder of pictures.")  # not the current one
    if options.values not in GRID_BITS:
        raise UsageError(
            f"--calibrate chooses how weights are rounded to few bits, and --values {options.values!r} does not do "
            f"that; leave it out, or give --values {join_words(list(GRID_BITS))}."
        )
    if options.compact:
        raise UsageError(
            "--calibrate rounds the layers of the model, and --compact removes channels before weights are rounded; "
            "leave one of them out."
        )


def rounded_by_pictures(
    checked: CheckedModel,
    source: str | Path | torch.Tensor | Iterable[object],
    images: int | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, GridTensor], tuple[str, ...]]:
    """Rounds weights so that the outputs of a model on pictures stay.

    Args:
        checked: the model, with values on a grid.
        source: the pictures; see `dsr_tool.calibrate.pictures.read_calibration`.
        images: largest number of them; None for the default of `convert`.
        on_progress: receives the number of layers that are done, and of all.

    Returns:
        The rounded weights by name, and remarks for the user.

    Raises:
        CheckFailed: the inputs of a layer contain NaN or inf.
        FileError: there is no such folder, or it holds no usable pictures.
        UsageError: the pictures do not fit the model, or take more memory than there is.
    """
    from dsr_tool.calibrate.memory import require_memory
    from dsr_tool.calibrate.pictures import DEFAULT_COUNT, read_calibration
    from dsr_tool.calibrate.rounding import round_to_grids
    from dsr_tool.sparse.capture import frozen_copy
    from dsr_tool.sparse.feeding import tensor_form

    model = checked.model
    # A fixed seed: the same model and pictures give the same bytes.
    pictures = read_calibration(source, model.config, DEFAULT_COUNT if images is None else images, seed=0)
    require_memory(tensor_form(frozen_copy(model.module)), model.config.input_shape, pictures.count)
    bits = GRID_BITS[str(checked.values)]
    rounded = round_to_grids(model, bits, pictures.inputs, seed=0, on_progress=on_progress)
    weights = sum(spec.weight for spec in model.specs.values())
    alone = f"; the pictures do not reach the other {weights - len(rounded)}" if weights > len(rounded) else ""
    note = f"{len(rounded)} weights were rounded to keep the outputs on {pictures.count} pictures{alone}"
    return rounded, (note, *pictures.warnings)
