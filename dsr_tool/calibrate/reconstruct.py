"""Masks and values of a whole network by reconstruction, layer by layer, from the first to the last.

Each layer is fitted to what it wrote in the dense network, on the inputs that it gets in the sparse one (He et al.,
ICCV 2017, section 3.2), so that later layers repair what earlier ones changed. Where a layer's output is added to a
stream, its target includes what the stream has lost (section 3.3 there).
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from dsr_tool.calibrate.calls import Call, owners_of
from dsr_tool.calibrate.fitting import Fitting, by_magnitude
from dsr_tool.calibrate.inputs import Collector, Reached
from dsr_tool.calibrate.memory import BATCH, release_freed
from dsr_tool.calibrate.segments import Segments, Values, kept, used
from dsr_tool.calibrate.survey import Layer, survey
from dsr_tool.calibrate.views import with_views
from dsr_tool.sparse.feeding import evaluating
from dsr_tool.sparsity.granularity import SINGLE, Granularity

__all__ = ["Reconstruction", "reconstruct"]

_VECTORS, _VECTORS_PER_COLUMN = 16384, 6
"""Input vectors that a layer is fitted to: at least so many, and so many per column of its weight, if there are."""

_KEPT_VALUES = 1 << 28
"""Values between two stages, of all pictures: 1 GiB in half precision for the dense and the sparse network."""

_MOST_PASSES, _MACS = 12, 1.5e13
"""Most passes over one stage of several layers, and the multiply-adds of all of them, about ten minutes of one core."""

_MOMENT_BYTES = 1 << 29
"""Bytes of the second moments that are summed in one pass."""


@dataclass
class Reconstruction:
    """The result.

    Attributes:
        masks: for each weight with a count, True where active, in its shape.
        errors: squared error of each fitted layer's outputs on the pictures, relative to their variance, by weight.
        unfitted: why a weight with a count was chosen by magnitude, by name.
        sliced: number of slices in which a weight was fitted whose moments would be too large (`wide`), by name.
    """

    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unfitted: dict[str, str] = field(default_factory=dict)
    sliced: dict[str, int] = field(default_factory=dict)


def reconstruct(
    module: nn.Module,
    counts: Mapping[str, int],
    pictures: torch.Tensor,
    *,
    granularity: Granularity = SINGLE,
    views: int = 0,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    fitting: Callable[[nn.Module, Layer], Fitting] = Fitting,
) -> Reconstruction:
    """Makes a dense network sparse in place.

    Weights without a count stay dense and are fitted too, because they can repair what was lost before them.

    Args:
        module: the dense network. Its weights, biases and the means of its batch norms change, nothing else.
        counts: number of active weights of each sparse weight, by name.
        pictures: inputs, shape (pictures, *input_shape), float32.
        granularity: pattern of the active weights, which the counts must allow.
        views: number of views of each picture that are shown as well.
        seed: seed of the choice of positions, and of the views.
        on_progress: receives the number of layers that are done, and of all.
        fitting: makes the fitting of a layer, given the network and the layer.

    Raises:
        CheckFailed: the inputs of a layer contain NaN or inf.
        UsageError: the module does not take the pictures.
    """
    with evaluating(module):
        return _Run(module, counts, pictures, granularity, views, seed, fitting).result(on_progress)


class _Run:
    """One reconstruction, stage by stage."""

    def __init__(
        self,
        module: nn.Module,
        counts: Mapping[str, int],
        pictures: torch.Tensor,
        granularity: Granularity,
        views: int,
        seed: int,
        fitting: Callable[[nn.Module, Layer], Fitting],
    ) -> None:
        self._fitting = fitting
        self._module, self._counts, self._granularity, self._seed = module, counts, granularity, seed
        self._state = {**dict(module.named_buffers()), **dict(module.named_parameters())}
        self._owners = owners_of(module)  # values are copied into place, so addresses stay
        pictures = with_views(pictures, views, seed)
        self._pictures = len(pictures)
        self._segments = Segments.of(module, pictures[:2], most_values=_KEPT_VALUES // len(pictures))
        first = self._segments.begin(pictures[:1])
        self._layers = survey(module, lambda: self._segments.run(used(first)))
        # In half precision: views would take half a gigabyte more.
        self._dense = [kept(self._segments.begin(batch), half=True) for batch in pictures.split(BATCH)]
        self._sparse = list(self._dense)
        self._changed: dict[str, torch.Tensor] = {}  # dense values of everything that has changed
        self._result = Reconstruction()

    def result(self, on_progress: Callable[[int, int], None] | None) -> Reconstruction:
        """Fits every layer in order."""
        for name in self._counts.keys() - self._layers.keys():
            self._fall_back(name)
        done = 0
        for stage in range(len(self._segments)):
            groups = self._groups([x for x in self._layers.values() if self._segments.stage_of[x.name] == stage])
            last = stage == len(self._segments) - 1
            for i, group in enumerate(groups):
                self._fit(stage, group, advance=i == len(groups) - 1 and not last)
                done += len(group)
                if on_progress is not None:
                    on_progress(done, len(self._layers))
            if not last:
                self._advance(stage, both=not groups)
        return self._result

    def _groups(self, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Returns the layers of one stage in groups that are fitted from the same passes."""
        macs = sum(layer.length * self._state[layer.name].numel() / layer.groups for layer in self._layers.values())
        # Each pass costs about half a run of the dense network, and half a run of the sparse one.
        affordable = int(_MACS / max(macs * self._pictures, 1))
        size = -(-len(layers) // max(2, min(_MOST_PASSES, affordable)))
        groups: list[list[Layer]] = []
        room = 0
        for layer in layers:
            if not groups or len(groups[-1]) >= size or layer.moment_bytes > room:
                groups.append([])
                room = _MOMENT_BYTES
            groups[-1].append(layer)
            room -= layer.moment_bytes
        return groups

    def _fall_back(self, name: str) -> None:
        """Chooses a layer that no run reached by magnitude."""
        self._result.masks[name] = by_magnitude(self._module, name, self._counts[name], self._granularity)
        self._result.unfitted[name] = "the pictures do not reach it as a convolution or a product of matrices"
        self._change(name, self._state[name] * self._result.masks[name])

    def _change(self, name: str, value: torch.Tensor) -> None:
        self._changed.setdefault(name, self._state[name].detach().clone())
        self._state[name].copy_(value)

    @contextlib.contextmanager
    def _as_dense(self, stage: int) -> Iterator[None]:
        """Gives a stage the values of the dense network for a while."""
        names = self._changed.keys() & self._segments.names(stage)
        sparse = {name: self._state[name].clone() for name in names}
        for name in names:
            self._state[name].copy_(self._changed[name])
        try:
            yield
        finally:
            for name, value in sparse.items():
                self._state[name].copy_(value)

    def _fit(self, stage: int, group: Sequence[Layer], advance: bool) -> None:
        """Samples and fits some layers; the dense values go on to the next stage if asked for."""
        fittings = {layer.name: self._fitting(self._module, layer) for layer in group}
        for number, (dense_values, sparse_values) in enumerate(zip(self._dense, self._sparse, strict=True)):

            def rows(call: Call, use: int, number: int = number) -> torch.Tensor:
                return self._rows(call, f"{number} {use}")

            dense = Collector(self._owners, group, rows, inputs=False, to_the_end=advance)
            with self._as_dense(stage):
                after = self._pass(stage, dense_values, dense)
            if advance:
                self._dense[number] = kept(after, half=True)
            sparse = Collector(self._owners, group, rows, inputs=True)
            self._pass(stage, sparse_values, sparse)
            for name, fitting in fittings.items():
                fitting.add(dense.samples[name], sparse.samples[name])
        release_freed()
        for name, fitting in fittings.items():
            size = self._state[name].numel()
            fitted = fitting.fit(self._counts.get(name, size), self._granularity)
            self._result.errors[name] = fitted.error
            if fitting.layer.slices > 1:
                self._result.sliced[name] = fitting.layer.slices
            if name in self._counts:
                self._result.masks[name] = fitted.mask
            for changed, value in fitted.changes.items():
                self._change(changed, value)

    def _rows(self, call: Call, salt: str) -> torch.Tensor:
        """Returns the positions to sample of a call: the same ones in the dense and the sparse network."""
        layer = self._layers[call.name]
        vectors = max(_VECTORS, _VECTORS_PER_COLUMN * layer.columns // layer.slices)
        wanted = -int(-call.length * vectors // max(layer.length * self._pictures, 1))
        if wanted >= call.length:
            return torch.arange(call.length)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {salt}".encode()))
        return torch.randperm(call.length, generator=generator)[:wanted].sort().values

    def _pass(self, stage: int, values: Values, collector: Collector) -> Values:
        """Runs a stage while a collector watches; returns the values after it, none if it ended early."""
        try:
            with collector:
                return self._segments.advance(stage, used(values))
        except Reached:
            return {}

    def _advance(self, stage: int, both: bool) -> None:
        """Takes the sparse values to the next stage, and the dense ones where no fit did."""
        for number, values in enumerate(self._sparse):
            self._sparse[number] = kept(self._segments.advance(stage, used(values)), half=True)
        if both:
            with self._as_dense(stage):
                for number, values in enumerate(self._dense):
                    self._dense[number] = kept(self._segments.advance(stage, used(values)), half=True)
