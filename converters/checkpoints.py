"""Finds the weights of a network in a checkpoint, whatever keys hold them and whatever prefix their names have.

All tensors of a file count by their path through its keys, `model_ema.module.conv1.weight`. The names of the network
end some of these paths; the beginning that most of them share is what the weights are under.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from converters.torch_prune import split_masks
from dsr_tool.errors import UsageError, first_few, join_words

__all__ = ["Checkpoint", "Found", "dense"]

Shapes = Mapping[str, Sequence[int]]
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Parts of names that wrappers of modules add, anywhere in a name: DataParallel and AveragedModel, compile, FSDP."""
_COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
"""Ends of names of no weights, which may be missing or unknown: of norms, AveragedModel, and the package thop."""
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
"""Names in torchvision's published DenseNets, which its own loader renames too: `denselayer1.norm.1.weight`."""
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged)($|[._])")
"""Keys of averaged weights, such as `model_ema`, `state_dict_ema`, `ema` and `swa_model`."""
_TRIED = 16
"""Largest number of beginnings that are compared in full."""
_DEEPEST = 12
"""Largest number of keys and parts of a name that are looked at."""
_SHOWN = 3
"""Largest number of names that a sentence lists."""


@dataclass(frozen=True)
class Found:
    """Entries of a checkpoint under the names of a network.

    Attributes:
        state: tensors by name; also under names that the network does not have.
        masks: masks of `torch.nn.utils.prune` by name, True where active.
        missing: names of the network without a tensor, apart from counters of batch normalisation.
        problems: number of names that are missing or unknown, and of shapes that differ.
        fits: number of names that have a tensor of the right shape, apart from those counters.
        label: the keys and the prefix that lead to the entries, joined by dots; empty for a plain state_dict.
        notes: what was chosen, removed and left out, in words; empty for a plain state_dict.
    """

    state: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]
    missing: tuple[str, ...]
    problems: int
    fits: int
    label: str
    notes: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, list[str]]:
        """Entry of a model's description that says how the weights were found; empty for a plain state_dict."""
        return {"weights_read": list(self.notes)} if self.notes else {}


class _Start(NamedTuple):
    """A beginning of paths, and the child of the network that is there instead: usually none, the whole network."""

    prefix: str
    child: str


@dataclass
class Checkpoint:
    """The tensors of a file.

    Attributes:
        tensors: tensors by path, without the parts that wrappers add; pairs of pruning are one entry.
        masks: masks of pruning by path.
        keys: for each path, the keys of the file that lead to it.
        wrappers: for each path, the parts of wrappers that its name had.
        swapped: whether `ema_state_dict` holds the weights of the last step, and `state_dict` their average.
    """

    tensors: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    wrappers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    swapped: bool = False

    @classmethod
    def of(cls, content: object, shapes: Shapes) -> Checkpoint:
        """Collects the tensors of a file.

        Args:
            content: what the file holds: mappings in mappings, with tensors in them.
            shapes: the network; parts of its own names are no wrappers.
        """
        own = {part for name in shapes for part in name.split(".")}
        # mmengine saves them so, and its checkpoints have this key.
        result = cls({}, swapped=isinstance(content, dict) and "message_hub" in content)
        for keys, name, tensor in _walk(content, (), set()):
            parts = _OLD_DENSENET.sub(r"\1\2", name).split(".")
            removed = tuple(part for part in parts if part in _WRAPPERS and part not in own)
            path = ".".join([*keys, *(part for part in parts if part not in removed)])
            result.tensors.setdefault(path, tensor)
            result.keys.setdefault(path, ".".join(keys))
            result.wrappers.setdefault(path, removed)
        result.tensors, result.masks = split_masks(result.tensors)
        for path in result.masks:
            result.keys[path], result.wrappers[path] = result.keys[f"{path}_orig"], result.wrappers[f"{path}_orig"]
        return result

    def find(self, shapes: Shapes, optional: Sequence[str] = (), choice: str = "") -> Found:
        """Returns the entries that fit a network best.

        Of several that fit equally, averaged weights come first, since they are what a training is for that keeps
        them; then those that the file has first.

        Args:
            shapes: shapes of the network by name.
            optional: starts of names that may be missing, or there without need.
            choice: keys or prefix of the entries that are meant; empty for the best.

        Raises:
            LookupError: there are no tensors.
            UsageError: the choice names no entries.
        """
        if not self.tensors:
            raise LookupError("no tensors")
        found = [self._under(start, shapes, optional) for start in self._starts(shapes)]
        if choice:
            chosen = [one for one in found if choice in (one.label, *one.label.split("."))]
            chosen += [one for one in found if one.label.startswith(f"{choice}.") and one not in chosen]
            if not chosen:
                known = join_words(list(dict.fromkeys(repr(one.label) for one in found if one.label))[:8])
                raise UsageError(
                    f"--weights ...#{choice} names no weights in the file; it has {known or 'only one set'}."
                )
            found = chosen
        # Not the fewest problems first: of a larger network, a block that fits would have fewer than the whole.
        most = max((one.fits, -one.problems) for one in found)
        fitting = [one for one in found if (one.fits, -one.problems) == most]
        best = min(fitting, key=lambda one: not self._is_averaged(one.label))
        others = dict.fromkeys(one.label for one in fitting if one.label != best.label)
        if not others:
            return best
        named = join_words([repr(label) for label in others][:_SHOWN], "and")
        told = f"read {repr(best.label) if best.label else 'what has no key'}, not {named}"
        told += f" (add #{next(iter(others))} to the file to choose that)"
        return replace(best, notes=(told, *(note for note in best.notes if not note.startswith("read "))))

    def _starts(self, shapes: Shapes) -> list[_Start]:
        """Returns the beginnings of paths that most names of the network can follow, the best first."""
        ends: dict[str, list[str]] = defaultdict(list)
        for name in shapes:
            child, _, rest = name.partition(".")
            ends[name].append("")
            ends[rest].append(f"{child}.")
        votes: Counter[_Start] = Counter()
        for path in self.tensors:
            parts = path.split(".")
            for i in range(min(len(parts), _DEEPEST)):
                for child in ends.get(".".join(parts[i:]), ()):
                    votes[_Start("".join(f"{part}." for part in parts[:i]), child)] += 1
        # Weights of a child alone are believed only where nothing holds those of the network.
        whole = [start for start, _ in votes.most_common() if not start.child]
        most = max((votes[start] for start in whole), default=0)
        parts_only = [start for start, count in votes.most_common() if start.child and count > most]
        largest = Counter(self.keys[path] for path in self.tensors).most_common(1)
        plain = [_Start(f"{keys}." if keys else "", "") for keys, _ in largest]
        return [*parts_only[:_TRIED], *whole[:_TRIED]] or plain

    def _under(self, start: _Start, shapes: Shapes, optional: Sequence[str]) -> Found:
        """Returns the entries under a beginning, and whatever else the same keys hold of the network."""
        taken = {name: start.prefix + name[len(start.child) :] for name in shapes if name.startswith(start.child)}
        taken = {name: path for name, path in taken.items() if path in self.tensors}
        keys = {self.keys[path] for path in taken.values()} or {self.keys[next(iter(self.tensors))]}
        inside = [path for path in self.tensors if self.keys[path] in keys]
        missing = [name for name in shapes if name not in taken and not name.endswith(_COUNTERS)]
        elsewhere = self._elsewhere(missing, set(inside) - set(taken.values())) if len(missing) < len(taken) else {}
        used = {*taken.values(), *elsewhere.values()}
        rest = [path for path in inside if path not in used]
        beside = [path for path in rest if path.startswith(start.prefix) and not path.endswith(_COUNTERS)]
        unknown = {start.child + path[len(start.prefix) :]: path for path in beside}
        unknown = {name: path for name, path in unknown.items() if not name.startswith(tuple(optional))}
        taken |= elsewhere
        missing = [name for name in missing if name not in taken and not name.startswith(tuple(optional))]
        differing = [name for name, path in taken.items() if self.tensors[path].shape != torch.Size(shapes[name])]
        left_out = [path for path in rest if path not in unknown.values()]
        return Found(
            {name: self.tensors[path] for name, path in {**taken, **unknown}.items()},
            {name: self.masks[path] for name, path in taken.items() if path in self.masks},
            tuple(missing),
            len(missing) + len(unknown) + len(differing),
            sum(not name.endswith(_COUNTERS) for name in taken) - len(differing),
            start.prefix.rstrip("."),
            self._notes(start, taken, left_out),
        )

    def _elsewhere(self, missing: Sequence[str], paths: set[str]) -> dict[str, str]:
        """Returns the only path that ends in a missing name, by name: heads often have a prefix of their own."""
        ending: dict[str, list[str]] = {name: [] for name in missing}
        for path in paths:
            parts = path.split(".")
            for i in range(min(len(parts), _DEEPEST)):
                if (end := ".".join(parts[i:])) in ending:
                    ending[end].append(path)
        return {name: found[0] for name, found in ending.items() if len(found) == 1}

    def _notes(self, start: _Start, taken: Mapping[str, str], left_out: Sequence[str]) -> tuple[str, ...]:
        """Returns what was read, removed, added and left out; nothing for a plain state_dict."""
        prefixes: dict[str, None] = {}
        for name, path in taken.items():
            keys = f"{self.keys[path]}." if self.keys[path] else ""
            start_of_path = path.removesuffix(name.removeprefix(start.child))
            before = start_of_path.removeprefix(keys) if start_of_path.startswith(keys) else ""
            prefixes |= dict.fromkeys([f"{part}." for part in self.wrappers[path]] + [before] * bool(before))
        read = dict.fromkeys(
            self.keys[path] for path in taken.values() if start.prefix.startswith(f"{self.keys[path]}.")
        )
        notes = [f"read {key!r}" for key in read if key]
        notes += [f"removed prefix {join_words([repr(prefix) for prefix in prefixes], 'and')}"] * bool(prefixes)
        notes += [f"added prefix {start.child!r}"] * bool(start.child)
        if left_out:
            notes.append(f"left out {len(left_out)} more ({first_few([repr(path[:80]) for path in left_out])})")
        return tuple(notes)

    def _is_averaged(self, label: str) -> bool:
        """Returns whether entries are an average over the steps of a training."""
        prefix = f"{label}." if label else ""
        # torch's AveragedModel counts its updates; before the first one it holds the random weights.
        unused = any(
            int(tensor) == 0
            for path, tensor in self.tensors.items()
            if path.startswith(prefix) and path.endswith("n_averaged") and tensor.numel() == 1
        )
        swapped = self.swapped and label.startswith("ema_state_dict")
        return bool(_AVERAGED.search(label)) and not unused and not swapped


def _walk(
    content: object, keys: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], str, torch.Tensor]]:
    """Yields keys, name and tensor for each tensor in nested mappings; each mapping once, since a file may nest it."""
    if not isinstance(content, dict) or id(content) in seen or len(keys) > _DEEPEST:
        return
    seen.add(id(content))
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            yield keys, key, dense(value)
        elif isinstance(key, str):
            yield from _walk(value, (*keys, key), seen)


def dense(value: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in the usual layout; pruned weights and masks are sometimes saved in a sparse one."""
    return value if value.layout == torch.strided else value.to_dense()
