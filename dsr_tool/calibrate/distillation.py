"""How far a sparse network is from the dense one on a batch: in its outputs, and in what its last layer reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere
from torch.utils._pytree import tree_leaves

__all__ = ["Distillation"]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""Modules of which the one that is called last counts as the network's head."""

_FLAT = 1e-12
"""Least sum of squares by which an error is divided, for outputs that are the same for all pictures."""


class Distillation:
    """The objective of a last pass over a sparse network: outputs and features of the dense one.

    It is the sum of dimensionless terms: the Kullback-Leibler divergence of class scores, or the relative squared error
    of any other output; and the relative squared error of the head's input, which says more of a picture than the
    scores of its few likely classes (Wang et al., "Practical network acceleration with tiny sets", CVPR 2023, fit it
    alone). Outputs whose shapes depend on values, such as boxes, are left out.

    Attributes:
        module: the sparse network.
        dense: the dense one; it only runs.
    """

    def __init__(self, module: nn.Module, dense: nn.Module, example: torch.Tensor) -> None:
        """Finds the head.

        Args:
            module: the sparse network.
            dense: the same network before it became sparse.
            example: a batch of inputs, shape (batch, *input_shape).
        """
        self.module, self.dense = module, dense
        self._head = _called_last(dense, example)

    def loss(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """Returns the objective for a batch, a mean over its pictures; None if nothing can be compared.

        Args:
            inputs: the batch, shape (batch, *input_shape); a network may overwrite it.
        """
        with torch.no_grad():
            theirs, aim = self._run(self.dense, inputs.clone())
        ours, features = self._run(self.module, inputs)
        terms = [_distance(a, b, len(inputs)) for a, b in zip(ours, theirs, strict=False) if a.shape == b.shape]
        if features is not None and aim is not None and features.shape == aim.shape:
            terms.append(_relative_error(features, aim))
        terms = [term for term in terms if term.requires_grad or not torch.is_grad_enabled()]
        return torch.stack(terms).sum() if terms else None

    def _run(self, network: nn.Module, inputs: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Returns the floating-point outputs of a network, and the input of its head."""
        seen: list[torch.Tensor] = []
        with contextlib.ExitStack() as stack:
            if self._head is not None:
                head = network.get_submodule(self._head)
                stack.enter_context(_recording(head, seen))
            outputs = tree_leaves(network(inputs))
        return [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()], seen[-1] if seen else None


@contextlib.contextmanager
def _recording(layer: nn.Module, seen: list[torch.Tensor]) -> Iterator[None]:
    """Appends the first input of every call of a layer to `seen`."""

    def record(_: nn.Module, inputs: tuple[object, ...]) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor):
            seen.append(inputs[0])

    handle = layer.register_forward_pre_hook(record)
    try:
        yield
    finally:
        handle.remove()


def _called_last(module: nn.Module, example: torch.Tensor) -> str | None:
    """Returns the name of the layer of weights that a network calls last; None if it calls none by its module."""
    called: list[str] = []
    with contextlib.ExitStack() as stack:
        for name, layer in module.named_modules():
            if isinstance(layer, _LAYERS):
                # The name is bound now: the loop goes on.
                handle = layer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
                stack.callback(handle.remove)
        with torch.no_grad():
            module(example.clone())
    return called[-1] if called else None


def _distance(ours: torch.Tensor, theirs: torch.Tensor, pictures: int) -> torch.Tensor:
    """Returns the divergence of class scores (pictures, classes), or the relative error of another output."""
    if ours.dim() == 2 and ours.shape[0] == pictures and ours.shape[1] > 1:
        return F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True)
    return _relative_error(ours, theirs)


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Returns the sum of squared errors over that of the dense values around their mean over the pictures."""
    spread = (theirs - theirs.mean(0, keepdim=True)).square().sum() if len(theirs) > 1 else theirs.square().sum()
    return (ours - theirs).square().sum() / spread.clamp_min(_FLAT)
