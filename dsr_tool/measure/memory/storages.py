"""Tracks the lifetime of tensor storages and their peak total."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["StorageWatch", "storage_key"]

_MIN_COPIED_CHANNELS = 8
"""Fewest channels of a convolution's input that oneDNN copies into a blocked layout; a picture's three are read in
place."""


def storage_key(tensor: torch.Tensor) -> int:
    """Returns a number that identifies the storage of a tensor for as long as the storage lives."""
    return int(tensor.untyped_storage()._cdata)


@dataclass
class _Held:
    nbytes: int
    kind: str


class StorageWatch(TorchDispatchMode):
    """Tracks, while it is entered, the storages of all results of operators, real or fake.

    Attributes:
        live: bytes and kind of each storage that is alive, by `storage_key`.
        peak: largest sum of bytes so far, the scratch of kernels included.
        at_peak: the bytes of that moment by kind.
        moment: name of the operator that ran at that moment.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[int, _Held] = {}
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.moment = ""
        self._now = 0

    def add(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Tracks tensors under a kind; those that are tracked already change theirs."""
        for tensor in tensors:
            self._track(tensor, kind)
            self.live[storage_key(tensor)].kind = kind
        self._update_peak("")

    def relabel(self, keys: Iterable[int], kind: str) -> None:
        """Gives storages another kind."""
        for key in keys:
            self.live[key].kind = kind

    def bytes_by_kind(self) -> dict[str, int]:
        """Returns the bytes that are alive now by kind."""
        kinds: dict[str, int] = {}
        for held in self.live.values():
            kinds[held.kind] = kinds.get(held.kind, 0) + held.nbytes
        return kinds

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Collection[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._track(tensor, "activations")
        self._update_peak(str(func._overloadpacket), _scratch_bytes(func, args, out))
        return out

    def _track(self, tensor: torch.Tensor, kind: str) -> None:
        key, storage = storage_key(tensor), tensor.untyped_storage()
        # Views and in-place results have a storage that is tracked already.
        if key not in self.live:
            self.live[key] = _Held(storage.nbytes(), kind)
            self._now += storage.nbytes()
            # A finalizer runs when the last tensor on the storage is gone, views and saved activations included.
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self.live.pop(key).nbytes

    def _update_peak(self, moment: str, scratch: int = 0) -> None:
        if self._now + scratch > self.peak:
            self.peak, self.moment = self._now + scratch, moment
            self.at_peak = {**self.bytes_by_kind(), "scratch": scratch}


def _tensors(out: object) -> Iterator[torch.Tensor]:
    """Yields the tensors of an operator's result: one, or lists of them."""
    for item in out if isinstance(out, (tuple, list)) else (out,):
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, (tuple, list)):
            yield from _tensors(item)


def _scratch_bytes(func: OpOverload, args: Sequence[object], out: object) -> int:
    """Returns the bytes that a kernel takes besides its results: oneDNN's copies in blocked layouts.

    The rules were found by measuring convolutions layer by layer; docs/memory.md has how well the sums fit.
    """
    # The rules are oneDNN's; kernels of other builds were not measured.
    if not torch.backends.mkldnn.is_available():
        return 0
    if func is torch.ops.aten.convolution.default:
        # Input and result are copied one after the other, so only the larger copy counts.
        x, weight = _tensors(args[:2])
        (result,) = _tensors(out)
        return max(_copied_bytes(x), result.nbytes) + weight.nbytes
    if func is torch.ops.aten.convolution_backward.default:
        # The copies for the gradient of the input are freed before those for the gradient of the weight are made.
        gradient, x, weight = _tensors(args[:3])
        return max(_copied_bytes(x) + gradient.nbytes, weight.nbytes)
    return 0


def _copied_bytes(x: torch.Tensor) -> int:
    return x.nbytes if x.shape[1] >= _MIN_COPIED_CHANNELS else 0
