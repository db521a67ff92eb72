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

from dsr_tool.errors import first_few, unknown_name
from dsr_tool.sparse.aliases import later_names
from dsr_tool.sparse.compact.change import held_state
from dsr_tool.sparse.compact.marks import LAYERS
from dsr_tool.sparse.contract import require_state
from dsr_tool.sparsity.granularity import SINGLE, UNSTRUCTURED, Granularity
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["TINY_FRACTION", "TINY_WEIGHTS", "Rules", "discover", "is_weight"]

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_INPUTS_SECOND = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.MultiheadAttention)
"""Layers whose weights have outputs as their first dimension and input channels as their second."""
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
        granularity: pattern of the active weights; layers that cannot have it stay dense against everything else.
    """

    keep_dense: Sequence[str] = ()
    sparsify: Sequence[str] = ()
    preset_dense: Mapping[str, str] = field(default_factory=dict)
    small_layers: bool = True
    granularity: Granularity = SINGLE


def discover(module: nn.Module, rules: Rules | None = None) -> dict[str, LayerSpec]:
    """Decides for every entry of the state_dict whether it is sparse, dense or a buffer, and why.

    A tensor with several names, of one submodule or of several, is one layer under the first of them; patterns may use
    any. A parameter that modules share is sparse only if it is a weight to all of them.

    Args:
        module: any network; its weights are not read, so it may be on the meta device.
        rules: rules that override the defaults.

    Returns:
        One spec per state_dict entry, in its order. `with_macs` adds `macs_per_weight`.

    Raises:
        UsageError: a pattern matches no weight, or the state_dict cannot be saved; see `require_state`.
    """
    rules = rules or Rules()
    require_state(module)
    entries = _entries(module)
    specs = {name: _by_type(name, entry) for name, entry in entries.items()}
    _check_patterns(rules, [other for name, spec in specs.items() if spec.weight for other in entries[name].names])
    tiny_below = min(TINY_WEIGHTS, TINY_FRACTION * sum(spec.size for spec in specs.values() if spec.weight))
    decided = {
        name: _by_rules(spec, entries[name], rules, tiny_below) if spec.weight else spec for name, spec in specs.items()
    }
    return {name: _by_granularity(spec, entries[name], rules.granularity) for name, spec in decided.items()}


class _Entry(NamedTuple):
    """One entry of the state_dict.

    Attributes:
        shape: its shape.
        role: `parameter`, `buffer`, or `extra` for what a module adds to its state_dict beside these.
        owners: the modules that have it, by its name in each of them; one, unless it is tied.
        names: its names in the state_dict; several if it is tied, or if a module has several.
    """

    shape: tuple[int, ...]
    role: str
    owners: dict[str, nn.Module]
    names: tuple[str, ...]


def _entries(module: nn.Module) -> dict[str, _Entry]:
    """Returns every entry of the state_dict by its first name, in its order."""
    modules = dict(module.named_modules(remove_duplicate=False))
    others: dict[str, list[str]] = {}
    for name, earlier in later_names(module).items():
        others.setdefault(earlier, []).append(name)
    found: dict[str, _Entry] = {}
    for name, like, _ in held_state(module):
        names = (name, *others.get(name, ()))
        places = [(modules.get(path, module), local) for path, _, local in (each.rpartition(".") for each in names)]
        owner, local = places[0]
        is_parameter = local in owner._parameters or local in owner.__dict__.get(LAYERS, {})
        role = "parameter" if is_parameter else "buffer" if local in owner._buffers else "extra"
        distinct: dict[tuple[int, str], tuple[str, nn.Module]] = {}
        for each, (one, key) in zip(names, places, strict=True):
            distinct.setdefault((id(one), key), (each, one))  # a module under several names is one owner
        found[name] = _Entry(tuple(like.shape), role, dict(distinct.values()), names)
    return found


def is_weight(owner: nn.Module, local: str) -> bool:
    """Returns whether an attribute of a module is a weight by the type of the module."""
    if isinstance(owner, nn.MultiheadAttention):
        return local in _ATTENTION_WEIGHTS
    return isinstance(owner, _WEIGHT_LAYERS) and local == "weight"


def _by_type(name: str, entry: _Entry) -> LayerSpec:
    """Returns the spec of an entry by the types of its modules alone."""
    kind, tied = type(entry.owners[name]).__name__, _tied(entry)
    if entry.role != "parameter":
        what = "buffer" if entry.role == "buffer" else "extra state"
        return LayerSpec(name, entry.shape, kind, "buffer", False, f"{what} of {kind}{tied}")
    # A mask would reach every module that shares the parameter, so one that has no weights there decides.
    others = ((owner, each.rpartition(".")[2]) for each, owner in entry.owners.items())
    other = next(((owner, local) for owner, local in others if not is_weight(owner, local)), None)
    if other is None:
        return LayerSpec(name, entry.shape, kind, "sparse", True, f"weight of {kind}{tied}")
    return LayerSpec(name, entry.shape, kind, "dense", False, f"{_no_weight(*other)}{tied}")


def _no_weight(owner: nn.Module, local: str) -> str:
    """Returns what a parameter is that is no weight to its module."""
    kind = type(owner).__name__
    if isinstance(owner, _NORMS):
        return f"normalisation ({kind})"
    if isinstance(owner, (*_WEIGHT_LAYERS, nn.MultiheadAttention)) and "bias" in local:
        return f"bias of {kind}"
    return f"parameter of {kind}, which is no layer of weights"


def _tied(entry: _Entry) -> str:
    """Returns a clause that names the other modules' names of an entry; empty if it is not tied."""
    _, *others = entry.owners
    return f", tied to {first_few(others)}" if others else ""


def _by_rules(spec: LayerSpec, entry: _Entry, rules: Rules, tiny_below: float) -> LayerSpec:
    """Returns the spec of a weight after patterns, preset and defaults; the first that applies decides."""
    # The user's patterns come first, then the preset, then the defaults.
    if pattern := _match(entry.names, rules.sparsify):
        return replace(spec, reason=f"{spec.reason}, sparse by pattern {pattern!r}")
    if pattern := _match(entry.names, rules.keep_dense):
        return replace(spec, role="dense", reason=f"kept dense by pattern {pattern!r}")
    if kept := next((name for name in entry.names if name in rules.preset_dense), None):
        return replace(spec, role="dense", reason=rules.preset_dense[kept])
    if rules.small_layers and any(map(_is_depthwise, entry.owners.values())):
        return replace(spec, role="dense", reason="depthwise: one input channel per filter")
    if rules.small_layers and spec.size < tiny_below:
        return replace(spec, role="dense", reason=f"tiny: fewer than {TINY_WEIGHTS:,} weights")
    return spec


def _by_granularity(spec: LayerSpec, entry: _Entry, granularity: Granularity) -> LayerSpec:
    """Returns the spec of an entry, dense if it would be sparse but cannot have the pattern of the granularity."""
    if spec.role != "sparse" or granularity.kind in UNSTRUCTURED:
        return spec
    misfit = granularity.misfit(spec.shape)
    other = next((type(one).__name__ for one in entry.owners.values() if not isinstance(one, _INPUTS_SECOND)), None)
    if other is not None:
        misfit = f"{other} has no input channels to choose from ({granularity})"
    return replace(spec, role="dense", reason=misfit) if misfit else spec


def _is_depthwise(owner: nn.Module) -> bool:
    """Returns whether a convolution has one input channel per filter.

    At sparsity 0.9 more than a third of its 3x3 filters would be empty, and their channels dead.
    """
    if not isinstance(owner, _CONVOLUTIONS):
        return False
    return owner.groups > 1 and owner.groups == owner.in_channels


def _match(names: Sequence[str], patterns: Sequence[str]) -> str | None:
    """Returns the first pattern that matches one of the full names of an entry, or the path of the module before it."""
    texts = [text for name in names for text in (name, name.rpartition(".")[0])]
    # fnmatchcase, because fnmatch ignores case on some systems.
    return next((p for p in patterns if any(fnmatch.fnmatchcase(text, p) for text in texts)), None)


def _check_patterns(rules: Rules, weights: Sequence[str]) -> None:
    """Raises `UsageError` for a pattern that matches no weight, which is a typing error most of the time."""
    for parameter, patterns in (("--keep-dense", rules.keep_dense), ("--sparsify", rules.sparsify)):
        for pattern in patterns:
            if not _match(weights, [pattern]):
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
