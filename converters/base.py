"""The row of a source of models: how its names are recognised, and how its networks are built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from dsr_tool.sparsity.config import ModelConfig

__all__ = ["Load", "Source"]


class Load(Protocol):
    """Builds a network, fills in its weights, and describes it."""

    def __call__(
        self,
        name: str,
        weights: str | None = None,
        /,
        *,
        num_classes: int | None = None,
        input_size: int | None = None,
        input_shape: tuple[int, ...] = (),
        width: float = 1.0,
        seed: int = 0,
    ) -> tuple[nn.Module, ModelConfig]:
        """Returns the network and its description, preprocessing included.

        Args:
            name: a name that the source recognises.
            weights: weights to load; random when absent.
            num_classes: number of outputs; the network's own when absent.
            input_size: side of the square input in pixels; the network's own when absent.
            input_shape: instead of a size, the shape of one input without the batch.
            width: factor on the channels of the architecture.
            seed: seed of random weights.
        """


# Defaults of a row: a source that has nothing to say about names, reasons or presets.
def _no_names() -> list[str]:
    return []


def _no_reason(_: str) -> str | None:
    return None


def _no_layers(_: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    return iter(())


@dataclass(frozen=True)
class Source:
    """One source of models.

    Attributes:
        name: value of `ModelConfig.source` in files.
        recognises: returns whether a name belongs to the source.
        load: builds a network from a name.
        structure: builds the network of a description without values, on the meta device if possible; raises
            `UsageError` if only the user can build it.
        names: returns the names that it recognises, for suggestions; empty if they cannot be listed.
        reason: returns why a name that it knows cannot be converted, as in "a detector, ..."; otherwise None.
        widths: names of architectures that can be built narrower.
        preset_dense: returns the layers of a block that preset `paper` keeps dense, each with the reason.
        has_options: whether `load` takes a number of classes and an input size.
        may_be_trained: whether the weights that `load` returns may be trained, so that the largest should stay active.
    """

    name: str
    recognises: Callable[[str], bool]
    load: Load
    structure: Callable[[ModelConfig], nn.Module]
    names: Callable[[], list[str]] = _no_names
    reason: Callable[[str], str | None] = _no_reason
    widths: tuple[str, ...] = ()
    preset_dense: Callable[[nn.Module], Iterator[tuple[nn.Module, str]]] = _no_layers
    has_options: bool = True
    may_be_trained: bool = False
