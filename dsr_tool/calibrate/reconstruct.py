"""Masks and values of a whole network by reconstruction, layer by layer, from the first to the last.

Each layer is fitted to what it wrote in the dense network, on the inputs that it gets in the sparse one (He et al.,
ICCV 2017, section 3.2), so that later layers repair what earlier ones changed. Where a layer closes a residual branch,
its target includes what the stream has lost (section 3.3 there).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from dsr_tool.calibrate.calls import Call, rows_of_weight, weight_of_rows
from dsr_tool.calibrate.inputs import Collector, Layer, Reached, Statistics, survey
from dsr_tool.calibrate.segments import Segments, Values, evaluating, kept, used
from dsr_tool.calibrate.solver import Problem, solve

__all__ = ["Reconstruction", "reconstruct"]

_BATCH = 16
"""Pictures of one pass. Larger ones were no faster, and need memory in proportion."""

_VECTORS = 16384
"""Input vectors that a layer is fitted to, at least where it has as many."""

_VECTORS_PER_COLUMN = 6
"""Input vectors per column of a weight, where that is more."""

_PASSES = 12
"""Most passes over one stage. A stage with more layers solves several from one pass."""

_KEPT_BYTES = 1 << 30
"""Bytes of the values between two stages, of the dense and the sparse network together."""


@dataclass
class Reconstruction:
    """The result.

    Attributes:
        masks: for each weight with a count, True where active, in its shape.
        errors: relative squared error of each fitted layer's output on the pictures, 0 to about 1.
        unfitted: why a weight with a count was chosen by magnitude, by name.
    """

    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unfitted: dict[str, str] = field(default_factory=dict)


def reconstruct(
    module: nn.Module,
    counts: Mapping[str, int],
    pictures: torch.Tensor,
    *,
    units: Mapping[str, int] | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reconstruction:
    """Makes a dense network sparse in place.

    Args:
        module: the dense network. Its weights, biases and the means of its norms change.
        counts: number of active weights of each sparse weight, by name.
        pictures: inputs, shape (pictures, *input_shape), float32.
        units: weights that are active together, by name; 1 where absent.
        seed: seed of the choice of positions.
        on_progress: receives the number of fitted layers, and of all layers.

    Raises:
        CheckFailed: the inputs of a layer contain NaN or inf.
        UsageError: the module does not take the pictures.
    """
    return _Run(module, counts, pictures, units or {}, seed, on_progress).result()


class _Run:
    """One reconstruction, stage by stage."""

    def __init__(
        self,
        module: nn.Module,
        counts: Mapping[str, int],
        pictures: torch.Tensor,
        units: Mapping[str, int],
        seed: int,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._module, self._counts, self._units, self._seed = module, counts, units, seed
        self._on_progress = on_progress
        self._parameters = dict(module.named_parameters())
        self._buffers = dict(module.named_buffers())
        self._pictures = len(pictures)
        self._segments = Segments.of(module, pictures[:2], most_values=_KEPT_BYTES // 4 // len(pictures))
        with evaluating(module):
            self._layers = survey(module, lambda: self._segments.run(self._segments.begin(pictures[:1].clone())))
        self._dense_values = [self._segments.begin(batch) for batch in pictures.split(_BATCH)]
        self._sparse_values = self._dense_values
        # Dense values of everything that has changed so far.
        self._dense: dict[str, torch.Tensor] = {}
        self._result = Reconstruction()

    def result(self) -> Reconstruction:
        """Runs everything."""
        with evaluating(self._module):
            for name in self._counts:
                if name not in self._layers:
                    self._by_magnitude(name)
            fitted = [layer for layer in self._layers.values() if layer.name in self._parameters]
            done = 0
            for stage in range(len(self._segments)):
                own = [layer for layer in fitted if self._segments.stage_of[layer.name] == stage]
                size = -(-len(own) // _PASSES)
                groups = [own[i : i + size] for i in range(0, len(own), max(size, 1))]
                for group in groups:
                    self._fit(stage, group, last=group is groups[-1])
                    done += len(group)
                    self._on_progress(done, len(fitted))
                self._advance(stage, dense=not groups)
        return self._result

    def _advance(self, stage: int, dense: bool) -> None:
        shared = self._sparse_values is self._dense_values
        if shared and not self._dense:
            pass
        self._sparse_values = [
            self._kept(self._segments.advance(stage, used(values))) for values in self._sparse_values
        ]
        if dense:
            with self._as_dense():
                self._dense_values = [self._kept(self._segments.advance(stage, used(v))) for v in self._dense_values]

    def _kept(self, values: Values) -> Values:
        return kept(values, half=True)

    def _as_dense(self):
        import contextlib

        @contextlib.contextmanager
        def swap():
            state = {**self._buffers, **self._parameters}
            sparse = {name: state[name].data.clone() for name in self._dense}
            for name, value in self._dense.items():
                state[name].data.copy_(value)
            try:
                yield
            finally:
                for name, value in sparse.items():
                    state[name].data.copy_(value)

        return swap()

    def _by_magnitude(self, name: str) -> None:
        weight = self._parameters[name].data
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[weight.abs().reshape(-1).topk(self._counts[name]).indices] = True
        self._result.masks[name] = mask.reshape(weight.shape)
        self._result.unfitted[name] = "no input of this layer was seen"
        self._change(name, weight * self._result.masks[name])

    def _change(self, name: str, value: torch.Tensor) -> None:
        tensor = self._parameters.get(name, self._buffers.get(name))
        self._dense.setdefault(name, tensor.data.clone())
        tensor.data.copy_(value)

    def _fit(self, stage: int, group: Sequence[Layer], last: bool) -> None:
        statistics = {layer.name: None for layer in group}
        for number in range(len(self._dense_values)):

            def rows(call: Call, use: int) -> torch.Tensor:
                layer = self._layers[call.name]
                columns = rows_of_weight(self._parameters[call.name].data, self._kind(call.name), layer.groups).shape[
                    -1
                ]
                share = max(_VECTORS, _VECTORS_PER_COLUMN * columns) / (layer.length * self._pictures)
                wanted = min(call.length, -(-int(call.length * share * 1000) // 1000))
                if wanted >= call.length:
                    return torch.arange(call.length)
                generator = torch.Generator().manual_seed(hash((self._seed, number, use)) % (1 << 31))
                return torch.randperm(call.length, generator=generator)[:wanted].sort().values

            with self._as_dense():
                dense = Collector(self._module, group, rows, inputs=False, to_the_end=last)
                values = self._pass(stage, self._dense_values[number], dense)
                if last:
                    self._next = getattr(self, "_next", [])
                    self._next.append(self._kept(values))
            sparse = Collector(self._module, group, rows, inputs=True)
            self._pass(stage, self._sparse_values[number], sparse)
            for layer in group:
                statistics[layer.name] = self._add(layer, statistics[layer.name], dense, sparse)
        if last:
            if self._sparse_values is self._dense_values:
                self._sparse_values = list(self._dense_values)
            self._dense_values = self._next
            del self._next
        for layer in group:
            self._solve(layer, statistics.pop(layer.name))

    def _pass(self, stage: int, values: Values, collector: Collector) -> Values:
        try:
            with collector:
                return self._segments.advance(stage, used(values))
        except Reached:
            return {}

    def _kind(self, name: str) -> str:
        return type(self._module.get_submodule(name.rpartition(".")[0])).__name__

    def _norm(self, layer: Layer) -> nn.Module | None:
        return self._module.get_submodule(layer.norm) if layer.norm else None

    def _gain(self, layer: Layer) -> torch.Tensor:
        norm = self._norm(layer)
        if norm is None:
            return torch.ones(1)
        gain = (norm.running_var + norm.eps).rsqrt()
        return gain * norm.weight.data if norm.weight is not None else gain

    def _add(self, layer: Layer, sums: Statistics | None, dense: Collector, sparse: Collector) -> Statistics:
        weight = rows_of_weight(self._parameters[layer.name].data, self._kind(layer.name), layer.groups)
        blocks = layer.groups * layer.parts
        weight = weight.reshape(blocks, -1, weight.shape[-1])
        if sums is None:
            sums = Statistics.zeros(*weight.shape)
        for d, s in zip(dense.samples[layer.name], sparse.samples[layer.name], strict=True):
            target = d.outputs
            if layer.joins:
                gain = self._gain(layer)
                usable = gain.abs() > 1e-3 * gain.abs().mean()
                target = target + torch.where(usable, (d.addend - s.addend) / gain, 0.0)
            for group in range(layer.groups):
                block = group if layer.groups > 1 else s.call.first_row // weight.shape[1]
                t = target.reshape(len(target), layer.groups, -1)[:, group]
                if t.shape[1] == weight.shape[1]:
                    sums.add(block, s.inputs[group], t)
                else:
                    for part in range(layer.parts):
                        sums.add(part, s.inputs[0], t[:, part * weight.shape[1] : (part + 1) * weight.shape[1]])
        return sums

    def _solve(self, layer: Layer, sums: Statistics) -> None:
        parameter = self._parameters[layer.name]
        kind = self._kind(layer.name)
        weight = rows_of_weight(parameter.data, kind, layer.groups)
        shape = weight.shape
        weight = weight.reshape(sums.tx.shape)
        n = sums.count.clamp_min(1)[:, None]
        mean_x, mean_t = sums.x / n, sums.t / n
        bias = layer.name[: -len("weight")] + "bias"
        if kind == "MultiheadAttention":
            bias = layer.name.replace("weight", "bias")
        free = bool(layer.norm) or bias in self._parameters
        xx, tx, tt = sums.xx / n[..., None], sums.tx / n[..., None], sums.tt / n
        if free:
            xx = xx - mean_x[:, :, None] * mean_x[:, None, :]
            tx = tx - mean_t[:, :, None] * mean_x[:, None, :]
            tt = tt - mean_t.square()
        importance = torch.ones_like(mean_t)
        if layer.norm:
            importance = self._gain(layer).square().reshape(importance.shape)
        count = self._counts.get(layer.name, parameter.numel())
        problem = Problem(weight, xx, tx, importance, self._units.get(layer.name, 1))
        solution = solve(problem, count)
        total = float((tt * importance).sum())
        self._result.errors[layer.name] = (problem.error(solution.weight) + total) / max(total, 1e-12)
        if layer.name in self._counts:
            self._result.masks[layer.name] = weight_of_rows(solution.mask.reshape(shape), parameter.shape, kind)
        self._change(layer.name, weight_of_rows(solution.weight.reshape(shape), parameter.shape, kind))
        if free:
            # What the outputs lack in the mean.
            shift = (mean_t - (solution.weight * mean_x[:, None]).sum(-1)).reshape(-1)
            if layer.norm:
                if bias in self._parameters:
                    shift = shift - self._parameters[bias].data
                name = f"{layer.norm}.running_mean"
                self._change(name, self._buffers[name] - shift)
            else:
                self._change(bias, shift)
