"""A network before its conversion: its values, what is known about them, and which weights may become sparse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from converters.plain import make_plain
from converters.presets import make_rules
from converters.request import NetworkOptions, SelectionOptions, build_network
from converters.tickets import CHECKSUM, checksum
from converters.torchvision_weights import AUXILIARY, FRESH
from dsr_tool.sparse.computed import computes_functions
from dsr_tool.sparse.contract import require_state, require_values
from dsr_tool.sparse.detectors import detector_kind
from dsr_tool.sparse.discover import Rules, discover
from dsr_tool.sparse.feeding import tensor_form
from dsr_tool.sparse.in_file import bring_in, is_in_file
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["Prepared", "prepare", "trained_part"]

_NEW_HEAD = "new head: its values are random"
"""Reason of a weight that stays dense because it was never trained."""


@dataclass(frozen=True)
class Prepared:
    """A dense network and what decides about its weights.

    Attributes:
        module: the network, without hooks of pruning. Its weights may lie in a file, see `in_file`.
        config: its description, with a record of the options that select weights.
        rules: which weights stay dense.
        masks: masks that the weights came with, by parameter name; usually none.
        trained: whether its weights are known to be trained.
        may_be_trained: whether they may be.
        new_head: paths of modules with random values that the outputs depend on; empty if all were trained.
        fresh: names of weights that are sparse by the user's will although their values are random.
        notes: sentences on what was decided.
    """

    module: nn.Module
    config: ModelConfig
    rules: Rules
    masks: Mapping[str, torch.Tensor]
    trained: bool
    may_be_trained: bool
    new_head: tuple[str, ...]
    fresh: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def in_file(self) -> bool:
        """True if weights stay in their file until they are pruned; see `sparse.in_file`."""
        return any(map(is_in_file, self.module.parameters()))


def prepare(network: NetworkOptions, selection: SelectionOptions, *, in_file: bool = False) -> Prepared:
    """Builds the network and finds out what is known about its weights.

    Args:
        network: what the network is.
        selection: which weights are active.
        in_file: whether weights may stay in their file, if nothing needs more than one of them at a time.

    Raises:
        UsageError, FileError, FormatError: see `convert`.
    """
    built, config, may_be_trained = build_network(network, in_file=in_file)
    plain = make_plain(built)
    module = plain.module
    # Before anything is computed with them.
    require_state(module)
    require_values(module)
    rules = make_rules(
        module,
        preset=selection.preset,
        keep_dense=tuple(selection.keep_dense),
        sparsify=tuple(selection.sparsify),
    )
    fresh = [name for name in config.conversion.get(FRESH, ()) if module.get_parameter(name).ndim > 1]
    # Ranked by its values, a new head would be pruned at random, and it has few weights.
    dense = {**rules.preset_dense, **dict.fromkeys(fresh, _NEW_HEAD)}
    rules = replace(rules, preset_dense=dense, granularity=selection.pattern)
    specs = discover(module, rules)
    if in_file and not _one_at_a_time(module, specs, config.input_shape):
        bring_in(module)
    chosen = tuple(name for name in fresh if specs[name].role == "sparse")
    # Heads for training alone may be random in files; the outputs do not depend on them.
    kept = [name for name in fresh if name not in chosen and not name.startswith(AUXILIARY)]
    new_head = sorted({name.rpartition(".")[0] for name in fresh if not name.startswith(AUXILIARY)} - {""})
    record = {
        "preset": selection.preset,
        "keep_dense": list(selection.keep_dense),
        "sparsify": list(selection.sparsify),
        # Taken before anything becomes zero, so that a ticket can check that it has the original weights again.
        CHECKSUM: checksum(module),
    }
    return Prepared(
        module,
        replace(config, conversion={**config.conversion, **record}),
        rules,
        plain.masks,
        trained=network.weights is not None,
        may_be_trained=may_be_trained,
        new_head=tuple(new_head),
        fresh=chosen,
        notes=(*_notes(config, kept, chosen), *plain.notes),
    )


def _one_at_a_time(module: nn.Module, specs: Mapping[str, LayerSpec], input_shape: tuple[int, ...]) -> bool:
    """Returns whether a network whose weights lie in a file can be pruned weight by weight."""
    sparse = [module.get_parameter(name) for name, spec in specs.items() if spec.role == "sparse"]
    # Compact storage has one type. What is computed from a pruned weight is only known when the network runs.
    same = len({parameter.dtype for parameter in sparse}) == 1
    return same and any(map(is_in_file, sparse)) and not computes_functions(module, specs, input_shape)


@contextlib.contextmanager
def trained_part(prepared: Prepared) -> Iterator[nn.Module]:
    """Gives the network in a form that takes a batch of pictures, without a head that was never trained.

    Its outputs are then the features that the head reads, which is what a conversion should keep.
    """
    module = prepared.module
    # A detector reshapes what its heads return, so they stay.
    paths = () if detector_kind(module) is not None else prepared.new_head
    heads = {path: module.get_submodule(path) for path in paths}
    for path in heads:
        module.set_submodule(path, nn.Identity())
    try:
        yield tensor_form(module)
    finally:
        for path, head in heads.items():
            module.set_submodule(path, head)


def _notes(config: ModelConfig, kept: Sequence[str], chosen: Sequence[str]) -> list[str]:
    read = config.conversion.get("weights_read")
    notes = [f"weights: {'; '.join(read)}"] if read else []
    notes += [f"the new head {', '.join(kept)} stays dense: its values are random"] * bool(kept)
    notes += [f"the new head {', '.join(chosen)} has random positions: its values are random"] * bool(chosen)
    return notes
