"""The savings of compaction, measured at export, for the file's own record and for reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsr_tool.errors import FormatError
from dsr_tool.graph.compact.rewrite import Compacted, Removed
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["COMPACTED", "Savings", "compacted_specs", "measure_savings"]

COMPACTED = "compacted"
"""Key of the record in a model's `conversion` and in the metadata of an ONNX file."""

_MAX_COUNT = 1 << 53
"""Larger counts are not exact in JSON, whose numbers most readers hold as float64."""
_PAIRS = ("weights", "active", "dense_macs", "sparse_macs")


@dataclass(frozen=True)
class Savings:
    """The savings of compaction; pairs are before and after.

    Attributes:
        layers: the channels that each layer lost, for layers that lost any.
        weights: number of entries in all weights of convolutions and linear layers.
        active: number of active entries among them.
        dense_macs: multiply-adds for one input with every weight.
        sparse_macs: multiply-adds for one input with the active weights alone.
        plain_bytes: size of the same export without compaction, in bytes.
    """

    layers: tuple[Removed, ...]
    weights: tuple[int, int]
    active: tuple[int, int]
    dense_macs: tuple[int, int]
    sparse_macs: tuple[int, int]
    plain_bytes: int

    @property
    def filters(self) -> int:
        """Number of filters removed from all layers."""
        return sum(layer.filters[0] - layer.filters[1] for layer in self.layers)

    @property
    def inputs(self) -> int:
        """Number of input channels removed from all layers."""
        return sum(layer.inputs[0] - layer.inputs[1] for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            **{name: list(getattr(self, name)) for name in _PAIRS},
            "plain_bytes": self.plain_bytes,
            "layers": {layer.weight: [*layer.filters, *layer.inputs] for layer in self.layers},
        }

    @classmethod
    def from_dict(cls, data: Any) -> Savings:
        """Reads what `to_dict` wrote.

        Args:
            data: the record of a file, of any type.

        Raises:
            FormatError: a field is missing or is not a count.
        """
        try:
            layers = []
            # The record stands in a file of unknown origin: every value is checked, and nothing else is copied.
            for name, counts in data["layers"].items():
                filters, kept_filters, inputs, kept_inputs = map(_count, counts)
                layers.append(Removed(str(name), (filters, kept_filters), (inputs, kept_inputs)))
            pairs = {name: (_count(data[name][0]), _count(data[name][1])) for name in _PAIRS}
            return cls(tuple(layers), **pairs, plain_bytes=_count(data["plain_bytes"]))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise FormatError(f"the record of compaction is invalid: {error!r}.") from error


def measure_savings(
    before: Mapping[str, SparseTensor], result: Compacted, specs: Mapping[str, LayerSpec], plain_bytes: int
) -> Savings:
    """Measures what compaction saved.

    Args:
        before: the parameters before compaction.
        result: the compacted computation.
        specs: the description of each parameter of the model.
        plain_bytes: size of the same export without compaction, in bytes.
    """
    counts = [_counts(tensors, specs) for tensors in (before, result.tensors)]
    pairs = {name: (first, second) for name, first, second in zip(_PAIRS, *counts, strict=True)}
    return Savings(result.removed, **pairs, plain_bytes=plain_bytes)


def compacted_specs(tensors: Mapping[str, SparseTensor], specs: Mapping[str, LayerSpec]) -> dict[str, LayerSpec]:
    """Returns the descriptions of a compacted graph's parameters: the model's with new shapes, and new biases.

    Args:
        tensors: the parameters of the compacted graph.
        specs: the description of each parameter of the model.
    """
    described = {}
    for name, tensor in tensors.items():
        # Folding a norm into a convolution without a bias creates one that the model does not have.
        new = LayerSpec(name, tensor.mask.shape, "Bias", "dense", False, "bias that folding made")
        described[name] = replace(specs.get(name, new), shape=tensor.mask.shape)
    return described


def _counts(tensors: Mapping[str, SparseTensor], specs: Mapping[str, LayerSpec]) -> tuple[int, int, int, int]:
    """Returns the entries of all weights, the active ones, and the multiply-adds of both."""
    weights = [
        (tensor.mask, specs[name].macs_per_weight) for name, tensor in tensors.items() if _is_weight(name, specs)
    ]
    return (
        sum(mask.size for mask, _ in weights),
        sum(mask.active for mask, _ in weights),
        round(sum(mask.size * macs for mask, macs in weights)),
        round(sum(mask.active * macs for mask, macs in weights)),
    )


def _is_weight(name: str, specs: Mapping[str, LayerSpec]) -> bool:
    return name in specs and specs[name].weight


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise ValueError(f"{str(value)[:40]!r} is not a count")
    return value
