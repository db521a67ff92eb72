"""Which parameters of a module are weights, and which of those become sparse.

Weights are found by the type of the module that owns them, never by name. Normalisation, biases, class tokens,
position embeddings, layer scale and relative-position tables belong to other types and stay dense.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
"""A layer with fewer weights than the first and a smaller part of all weights than the second stays dense.

Sparse at 0.9 it would keep fewer than a hundred weights and save less than four kilobytes, while such layers are
bottlenecks that everything passes: 3-channel stems of small networks, the squeeze of squeeze-and-excitation. The
second bound keeps small networks, where every layer counts, out of this rule.
"""


@dataclass(frozen=True)
class Rules:
    """What the user says about layers; patterns match full names or module paths, `*` and `?` allowed.

    Attributes:
        keep_dense: patterns of weights that stay dense.
        sparsify: patterns of weights that become sparse against the defaults; stronger than `keep_dense`.
        preset_dense: names kept dense by a preset, with the reason.
        small_layers: whether depthwise and tiny layers stay dense (the default).
    """

    keep_dense: Sequence[str] = ()
    sparsify: Sequence[str] = ()
    preset_dense: Mapping[str, str] = field(default_factory=dict)
    small_layers: bool = True


def discover(module: nn.Module, rules: Rules | None = None) -> dict[str, LayerSpec]:
    """Say for every entry of the state_dict what it is: sparse, dense or buffer, and why.

    Args:
        module: any network; its weights are not read, so it may live on the meta device.
        rules: what the user asked for beyond the defaults.

    Returns:
        One spec per state_dict entry, in its order; `macs_per_weight` is filled in by `with_macs`.

    Raises:
        UsageError: a pattern matches no weight, two names share one tensor, or a layer has no shape yet.
    """
    rules = rules or Rules()
    owners = _owners(module)
    specs = {name: _by_type(name, *owners[name]) for name in module.state_dict() if name in owners}
    _check_patterns(rules, [name for name, spec in specs.items() if spec.weight])
    tiny_below = min(TINY_WEIGHTS, TINY_FRACTION * sum(spec.size for spec in specs.values() if spec.weight))
    return {
        name: _by_rules(spec, owners[name][0], rules, tiny_below) if spec.weight else spec
        for name, spec in specs.items()
    }


def _owners(module: nn.Module) -> dict[str, tuple[nn.Module, str, tuple[int, ...], bool]]:
    """For each entry of the state_dict: owning module, local name, shape, whether it is a parameter."""
    owners: dict[str, tuple[nn.Module, str, tuple[int, ...], bool]] = {}
    seen: dict[int, str] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        entries = [(n, t, True) for n, t in owner._parameters.items()]
        entries += [(n, t, False) for n, t in owner._buffers.items()]
        for local, tensor, is_parameter in entries:
            if tensor is None:
                continue
            name = f"{path}.{local}" if path else local
            if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
                raise UsageError(f"parameter {name!r} has no shape yet; run one input through the model first.")
            if id(tensor) in seen:
                raise UsageError(
                    f"entries {seen[id(tensor)]!r} and {name!r} are one shared tensor, which cannot be converted; "
                    f"give each layer its own weights."
                )
            seen[id(tensor)] = name
            owners[name] = (owner, local, tuple(tensor.shape), is_parameter)
    return owners


def _by_type(name: str, owner: nn.Module, local: str, shape: tuple[int, ...], is_parameter: bool) -> LayerSpec:
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
    """One input channel per filter: at 0.9 a third of all 3x3 filters would be empty and their channels dead."""
    if not isinstance(owner, _CONVOLUTIONS):
        return False
    return owner.groups > 1 and owner.groups == owner.in_channels


def _match(name: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that matches the full name or the path of the module that owns it."""
    path = name.rpartition(".")[0]
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(path, p)), None)


def _check_patterns(rules: Rules, weights: Sequence[str]) -> None:
    for parameter, patterns in (("--keep-dense", rules.keep_dense), ("--sparsify", rules.sparsify)):
        for pattern in patterns:
            if not any(_match(name, [pattern]) for name in weights):
                known = [*weights, *(name.rpartition(".")[0] for name in weights)]
                raise unknown_name(f"{parameter} pattern", pattern, known)


def count(specs: Mapping[str, LayerSpec]) -> dict[str, int]:
    """Parameters by role.

    Returns:
        `parameters`: all trainable entries; `weights`: those that are weights by type; `prunable`: those made sparse.
    """
    trainable = [spec for spec in specs.values() if spec.role != "buffer"]
    return {
        "parameters": sum(spec.size for spec in trainable),
        "weights": sum(spec.size for spec in trainable if spec.weight),
        "prunable": sum(spec.size for spec in trainable if spec.role == "sparse"),
        "sparse_layers": sum(spec.role == "sparse" for spec in trainable),
    }
