"""Distillation: a trained network of the same architecture, whose outputs a model learns from.

Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network", 2015, section 2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from converters.state_dicts import load_strictly, read_weights
from converters.tickets import checksum
from dsr_tool.errors import DsrError, FileError, FormatError, UsageError
from dsr_tool.sparse.compact.modules import uninstall
from dsr_tool.sparse.folder import read_folder
from dsr_tool.sparse.model import SparseModel

__all__ = ["Teacher", "distillation", "open_teacher"]


class Teacher:
    """A network that only answers: in evaluation mode, without gradients.

    Attributes:
        module: the network.
        checksum: SHA-256 of its state_dict.
    """

    def __init__(self, module: nn.Module) -> None:
        """Freezes the network.

        Args:
            module: the network, with its weights; changed in place.
        """
        self.module = module.eval().requires_grad_(False)
        self.checksum = checksum(module)

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the scores of a batch, shape (batch, classes)."""
        scores: torch.Tensor = self.module(inputs)
        return scores


def open_teacher(path: str, model: SparseModel) -> Teacher:
    """Reads a teacher for a model.

    Args:
        path: a model folder, a run folder, or a state_dict file (`FILE#KEY` for one of several states in it).
        model: the student, which the teacher must equal in architecture; its module is copied and stays as it is.

    Raises:
        FileError: the path does not exist.
        FormatError: the file or folder is damaged, or has a value that is NaN or inf.
        UsageError: the weights are those of another architecture, or of another number of classes.
    """
    name = model.config.architecture
    state = read_folder(path).weights() if Path(path).is_dir() else _read_file(path, model.module)
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FormatError(f"--teacher {path!r}: {key!r} contains NaN or inf; use an earlier checkpoint.")
    _require_fit(path, name, model.module, state)
    module = copy.deepcopy(model.module)
    uninstall(module)  # a teacher is dense
    load_strictly(module, name, state, path)
    return Teacher(module)


def _read_file(path: str, module: nn.Module) -> dict[str, torch.Tensor]:
    if not Path(path.partition("#")[0]).exists():  # the key of one of several states may follow
        raise FileError(f"--teacher {path!r} does not exist; give a model folder, a run folder or a state_dict file.")
    try:
        return read_weights(path, module).state
    except DsrError as error:  # its sentence is about --weights, which nobody gave here
        text = str(error).replace("--weights file", "--weights").replace("--weights", "--teacher")
        raise type(error)(text) from error


def _require_fit(path: str, name: str, module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Raises `UsageError` unless the state has the names and shapes of the module, counters of norms aside."""
    own = {key: value.shape for key, value in module.state_dict().items() if value.ndim}
    given = {key: value.shape for key, value in state.items() if value.ndim}
    differing = [key for key in {**own, **given} if own.get(key) != given.get(key)]
    if not differing:
        return
    head = [key for key, shape in own.items() if key in given and given[key][1:] == shape[1:]]
    if set(differing) <= set(head):
        classes, wanted = given[differing[0]][0], own[differing[0]][0]
        raise UsageError(
            f"--teacher {path!r} has {classes} outputs, and the model has {wanted}; train the dense network on this "
            f"data first (convert it with --sparsity 0 and --num-classes {wanted}), and give its run folder."
        )
    raise UsageError(
        f"--teacher {path!r} is no {name}: {len(differing)} weights are missing, unknown or of another shape (first: "
        f"{differing[0][:80]!r}); give a network of the model's own architecture."
    )


def distillation(
    scores: torch.Tensor, taught: torch.Tensor, temperature: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns temperature^2 * KL(teacher || student), the mean over a batch, of scores divided by the temperature.

    The square keeps the size of the gradients when the temperature changes (section 2).

    Args:
        scores: scores of the student, shape (batch, classes), float32.
        taught: scores of the teacher, of the same shape.
        temperature: divisor of both scores; a higher one weighs the classes that are not the answer more.
        weights: factors on the images, shape (batch,); None for 1.
    """
    student, teacher = (log_softmax(values / temperature, 1) for values in (scores, taught))
    if weights is None:
        return temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)
    of_image = kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    return temperature**2 * (weights * of_image).mean()
