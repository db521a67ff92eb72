"""Every tensor storage from its making to its end, and the moment at which they are most together."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["StorageWatch", "storage_key"]

_READ_PLAIN = 8  # channels; an input with fewer, as a picture, is read by oneDNN as it is


def storage_key(tensor: torch.Tensor) -> int:
    """What identifies the storage of a tensor while it lives."""
    return int(tensor.untyped_storage()._cdata)


@dataclass
class _Held:
    nbytes: int
    kind: str


class StorageWatch(TorchDispatchMode):
    """While entered, follows the storages of all results of operators, real or fake.

    Attributes:
        live: bytes and kind of each storage that is there.
        peak: most bytes so far, with what kernels take besides.
        at_peak: these by kind.
        moment: the operator that ran then.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, _Held] = {}
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.moment = ""
        self._now = 0

    def add(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Enter tensors under a kind, also those that are there already."""
        for tensor in tensors:
            self._enter(tensor, kind)
            self.live[storage_key(tensor)].kind = kind
        self._look("")

    def relabel(self, keys: Iterable[int], kind: str) -> None:
        """Give storages another kind."""
        for key in keys:
            self.live[key].kind = kind

    def bytes_by_kind(self) -> dict[str, int]:
        """What is there now."""
        kinds: dict[str, int] = {}
        for held in self.live.values():
            kinds[held.kind] = kinds.get(held.kind, 0) + held.nbytes
        return kinds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._enter(tensor, "activations")
        self._look(str(func._overloadpacket), _scratch(func, args, out))
        return out

    def _enter(self, tensor: torch.Tensor, kind: str) -> None:
        key, storage = storage_key(tensor), tensor.untyped_storage()
        if key not in self.live:
            self.live[key] = _Held(storage.nbytes(), kind)
            self._now += storage.nbytes()
            weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self._now -= self.live.pop(key).nbytes

    def _look(self, moment: str, scratch: int = 0) -> None:
        if self._now + scratch > self.peak:
            self.peak, self.moment = self._now + scratch, moment
            self.at_peak = {**self.bytes_by_kind(), "scratch": scratch}


def _tensors(out: Any) -> Iterator[torch.Tensor]:
    for item in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _tensors(item)


def _scratch(func: Any, args: Sequence[Any], out: Any) -> int:
    """Bytes that a kernel takes besides its results: oneDNN's copies in blocked layouts, as measured layer by layer."""
    if not torch.backends.mkldnn.is_available():
        return 0
    if func is torch.ops.aten.convolution.default:
        # Input and result are copied one after the other, so that only the larger copy counts.
        x, weight = args[:2]
        return max(_copied(x), int(out.nbytes)) + int(weight.nbytes)
    if func is torch.ops.aten.convolution_backward.default:
        gradient, x, weight = args[:3]
        return max(_copied(x) + int(gradient.nbytes), int(weight.nbytes))
    return 0


def _copied(x: torch.Tensor) -> int:
    return int(x.nbytes) if x.shape[1] >= _READ_PLAIN else 0
