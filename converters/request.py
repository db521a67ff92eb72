"""The options of `convert`, grouped by what they say, and the checks that need nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from converters.sources import find_source, load_network
from dsr_tool.errors import UsageError
from dsr_tool.sparse.wrappers import unwrapped
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import LONGEST_SIDE, ModelConfig
from dsr_tool.sparsity.granularity import Granularity

__all__ = ["CalibrationOptions", "NetworkOptions", "SelectionOptions", "build_network", "parse_budget", "refuse_with"]


@dataclass(frozen=True)
class NetworkOptions:
    """The options of `convert` that say what the network is; see there."""

    source: str | nn.Module
    weights: str | None
    num_classes: int | None
    input_size: int | None
    input_shape: Sequence[int]
    seed: int


@dataclass(frozen=True)
class SelectionOptions:
    """The options of `convert` that say which weights are active; see there."""

    preset: str | None
    keep_dense: Sequence[str]
    sparsify: Sequence[str]
    distribution: str | None
    positions: str | None
    granularity: str | None
    seed: int
    allow_starved: bool

    @property
    def pattern(self) -> Granularity:
        """The granularity; single weights if none is given.

        Raises:
            UsageError: there is no such granularity.
        """
        return Granularity.parse("weight" if self.granularity is None else self.granularity)


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of `convert` that say how pictures are used; see there."""

    source: str | Path | torch.Tensor | Iterable[object]
    images: int
    on_progress: Callable[[int, int], None]


def build_network(network: NetworkOptions, *, in_file: bool = False) -> tuple[nn.Module, ModelConfig, bool]:
    """Returns the network, its description, and whether its weights may be trained.

    Weights from a file may stay there with `in_file`; see `sparse.in_file`.
    """
    # Options are checked before the network is built, which may take seconds or download weights.
    source, shape = network.source, _checked_shape(network)
    if isinstance(source, str):
        module, config = load_network(
            source,
            network.weights,
            num_classes=network.num_classes,
            input_size=network.input_size,
            input_shape=shape,
            seed=network.seed,
            in_file=in_file,
        )
        return module, config, find_source(source).may_be_trained
    if network.weights is not None or network.num_classes is not None:
        raise UsageError("weights, num_classes and input_size go with a model name; a module has its own.")
    if not isinstance(source, nn.Module):
        raise UsageError(
            f"source is {type(source).__name__}, expected a torch.nn.Module, the name of a model or module:callable; "
            f"values alone are no network: give them as weights."
        )
    source = unwrapped(source)
    # A module has no name that could build it again; its class name is for messages only.
    return source, ModelConfig("module", type(source).__name__, 0, shape), True


def _checked_shape(network: NetworkOptions) -> tuple[int, ...]:
    """Returns the input shape that was given; empty for none."""
    shape, size = tuple(int(n) for n in network.input_shape), network.input_size
    if any(not 1 <= n < LONGEST_SIDE for n in shape):
        raise UsageError(f"--input-shape {list(shape)} is not allowed; give numbers from 1 to {LONGEST_SIDE - 1:,}.")
    if shape and size is not None:
        raise UsageError("--input-size and --input-shape exclude each other; give one of the two.")
    if size is not None and not isinstance(network.source, str):
        raise UsageError("weights, num_classes and input_size go with a model name; a module has its own.")
    return shape


def parse_budget(sparsity: float | str | None, budget: str | None, granularity: Granularity) -> Budget:
    """Returns the budget that exactly one of two options gives, or the density of N:M alone.

    Raises:
        UsageError: both are given, or none; a value is not allowed, or contradicts N:M.
    """
    if granularity.density is not None:
        own = Budget(sparsity=1 - granularity.density)
        if budget is not None:
            raise granularity.refuse(f"--budget {budget}")
        if sparsity is not None and Budget.of_sparsity(sparsity) != own:
            raise granularity.refuse(f"--sparsity {sparsity}")
        return own
    if (sparsity is None) == (budget is None):
        raise UsageError("exactly one of --sparsity and --budget is needed; give one of the two.")
    return Budget.parse(budget) if budget is not None else Budget.of_sparsity(sparsity if sparsity is not None else 0)


def refuse_with(option: str, **others: object) -> None:
    """Raises `UsageError` if one of the other options is given."""
    # `is not False`, since 0 == False: --sparsity 0 is given.
    given = [name for name, value in others.items() if value is not False and value not in (None, (), [])]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        pronoun = "it" if len(given) == 1 else "them"
        raise UsageError(f"{option} cannot be combined with {names}; leave {pronoun} out.")
