"""Finds the weights of a module, and decides which of them become sparse.

A parameter is a weight by the type of the module that owns it, never by its name. Normalisation, biases, class tokens,
position embeddings, layer scale and relative-position tables belong to other types and stay dense.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import nn

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["TINY_FRACTION", "TINY_WEIGHTS", "Rules", "discover"]

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_WEIGHT_LAYERS = (*_CONVOLUTIONS, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)

TINY_WEIGHTS, TINY_FRACTION = 1024, 0.01
"""Number of weights, and fraction of all weights, below both of which a layer stays dense.

At sparsity 0.9 such a layer would keep fewer than 103 weights and save less than 4 kB, while these layers are
bottlenecks that everything passes: 3-channel stems of small networks, the squeeze of squeeze-and-excitation. The
fraction exempts small networks, where every layer counts.
"""


@dataclass(frozen=True)
class Rules:
    """Rules of the user for layers. Patterns match full names or module paths; `*` and `?` are wildcards.

    Attributes:
        keep_dense: patterns of weights that stay dense.
        sparsify: patterns of weights that become sparse against the defaults; they override `keep_dense`.
        preset_dense: reason for each weight that a preset keeps dense, by name.
        small_layers: whether depthwise and tiny layers stay dense.
    """

    keep_dense: Sequence[str] = ()
    sparsify: Sequence[str] = ()
    preset_dense: Mapping[str, str] = field(default_factory=dict)
    small_layers: bool = True


def discover(module: nn.Module, rules: Rules | None = None) -> dict[str, LayerSpec]:
    """Decides for every entry of the state_dict whether it is sparse, dense or a buffer, and why.

    Args:
        module: any network; its weights are not read, so it may be on the meta device.
        rules: rules that override the defaults.

    Returns:
        One spec per state_dict entry, in its order. `with_macs` adds `macs_per_weight`.

    Raises:
        UsageError: a pattern matches no weight, two names share one tensor, or a layer has no shape yet.
    """
    rules = rules or Rules()
    entries = _entries(module)
    # A state_dict may have entries that are no tensors of the module, and leaves out buffers that are not persistent.
    specs = {name: _by_type(name, entries[name]) for name in module.state_dict() if name in entries}
    _check_patterns(rules, [name for name, spec in specs.items() if spec.weight])
    tiny_below = min(TINY_WEIGHTS, TINY_FRACTION * sum(spec.size for spec in specs.values() if spec.weight))
    return {
        name: _by_rules(spec, entries[name].owner, rules, tiny_below) if spec.weight else spec
        for name, spec in specs.items()
    }


class _Entry(NamedTuple):
    """One entry of the state_dict: its module, its name there, its shape, and whether it is a parameter or a buffer."""

    owner: nn.Module
    local: str
    shape: tuple[int, ...]
    is_parameter: bool


def _entries(module: nn.Module) -> dict[str, _Entry]:
    """Returns every parameter and buffer by full name."""
    found: dict[str, _Entry] = {}
    seen: dict[int, str] = {}
    # With duplicates, so that a module used twice is found as two names of one tensor.
    for path, owner in module.named_modules(remove_duplicate=False):
        tensors = [(n, t, True) for n, t in owner._parameters.items()]
        tensors += [(n, t, False) for n, t in owner._buffers.items()]
        for local, tensor, is_parameter in tensors:
            if tensor is None:
                continue
            name = f"{path}.{local}" if path else local
            if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
                raise UsageError(f"parameter {name!r} has no shape yet; run one input through the model first.")
            # One tensor under two names would need one mask under two names.
            if id(tensor) in seen:
                raise UsageError(
                    f"entries {seen[id(tensor)]!r} and {name!r} are one shared tensor, which cannot be made sparse; "
                    f"give each layer its own weights."
                )
            seen[id(tensor)] = name
            found[name] = _Entry(owner, local, tuple(tensor.shape), is_parameter)
    return found


def _by_type(name: str, entry: _Entry) -> LayerSpec:
    """Returns the spec of an entry by the type of its module alone."""
    owner, local, shape, is_parameter = entry
    kind = type(owner).__name__
    weight = is_parameter and (
        (isinstance(owner, _WEIGHT_LAYERS) and local == "weight")
        or (isinstance(owner, nn.MultiheadAttention) and local in _ATTENTION_WEIGHTS)
    )
    if weight:
        return LayerSpec(name, shape, kind, "sparse", True, f"weight of {kind}")
    if not is_parameter:
        return LayerSpec(name, shape, kind, "buffer", False, f"buffer of {kind}")
    if isinstance(owner, _NORMS):
        reason = f"normalisation ({kind})"
    elif isinstance(owner, (*_WEIGHT_LAYERS, nn.MultiheadAttention)) and "bias" in local:
        reason = f"bias of {kind}"
    else:
        reason = f"parameter of {kind}, which is no layer of weights"
    return LayerSpec(name, shape, kind, "dense", False, reason)


def _by_rules(spec: LayerSpec, owner: nn.Module, rules: Rules, tiny_below: float) -> LayerSpec:
    """Returns the spec of a weight after patterns, preset and defaults; the first that applies decides."""
    # The user's patterns come first, then the preset, then the defaults.
    if pattern := _match(spec.name, rules.sparsify):
        return replace(spec, reason=f"{spec.reason}, sparse by pattern {pattern!r}")
    if pattern := _match(spec.name, rules.keep_dense):
        return replace(spec, role="dense", reason=f"kept dense by pattern {pattern!r}")
    if spec.name in rules.preset_dense:
        return replace(spec, role="dense", reason=rules.preset_dense[spec.name])
    if rules.small_layers and _is_depthwise(owner):
        return replace(spec, role="dense", reason="depthwise: one input channel per filter")
    if rules.small_layers and spec.size < tiny_below:
        return replace(spec, role="dense", reason=f"tiny: fewer than {TINY_WEIGHTS:,} weights")
    return spec


def _is_depthwise(owner: nn.Module) -> bool:
    """Returns whether a convolution has one input channel per filter.

    At sparsity 0.9 more than a third of its 3x3 filters would be empty, and their channels dead.
    """
    if not isinstance(owner, _CONVOLUTIONS):
        return False
    return owner.groups > 1 and owner.groups == owner.in_channels


def _match(name: str, patterns: Sequence[str]) -> str | None:
    """Returns the first pattern that matches a full name or the path of the module that owns it."""
    path = name.rpartition(".")[0]
    # fnmatchcase, because fnmatch ignores case on some systems.
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(path, p)), None)


def _check_patterns(rules: Rules, weights: Sequence[str]) -> None:
    """Raises `UsageError` for a pattern that matches no weight, which is a typing error most of the time."""
    for parameter, patterns in (("--keep-dense", rules.keep_dense), ("--sparsify", rules.sparsify)):
        for pattern in patterns:
            if not any(_match(name, [pattern]) for name in weights):
                known = [*weights, *(name.rpartition(".")[0] for name in weights)]
                raise unknown_name(f"{parameter} pattern", pattern, known)


def count(specs: Mapping[str, LayerSpec]) -> dict[str, int]:
    """Counts parameters by role.

    Returns:
        `parameters`: entries of all parameters; `weights`: those of weights by type; `prunable`: those of sparse
        weights; `sparse_layers`: number of sparse weights.
    """
    trainable = [spec for spec in specs.values() if spec.role != "buffer"]
    return {
        "parameters": sum(spec.size for spec in trainable),
        "weights": sum(spec.size for spec in trainable if spec.weight),
        "prunable": sum(spec.size for spec in trainable if spec.role == "sparse"),
        "sparse_layers": sum(spec.role == "sparse" for spec in trainable),
    }
