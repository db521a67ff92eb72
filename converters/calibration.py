"""Conversion with pictures: layer budgets, masks and values are chosen by what they do to the network's outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn

from converters.budgets import Fitted, solve, trim
from converters.prepared import Prepared
from converters.pretrained import check_signal, known_moments, make_sparsifier
from converters.request import CalibrationOptions, SelectionOptions
from dsr_tool.calibrate.allocation import Curves
from dsr_tool.calibrate.memory import require_memory
from dsr_tool.calibrate.pictures import Pictures, read_calibration
from dsr_tool.calibrate.reconstruct import Reconstruction, reconstruct
from dsr_tool.calibrate.sensitivity import measure
from dsr_tool.calibrate.views import affordable_views
from dsr_tool.errors import UsageError
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.feeding import tensor_form
from dsr_tool.sparse.macs import with_macs
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.density_file import DensityFile
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["OUTPUT", "calibrated"]

OUTPUT = "output"
"""Name of the distribution by what pruning each layer does to the outputs."""
_BUDGETS = 0.2
"""Share of the layer budgets in the time of a calibration: MobileNetV2 and ResNet-50 on one core, about."""
_STEPS = 1000
"""Number of steps in which the progress of a calibration is reported."""

OnProgress = Callable[[int, int], None]


def calibrated(
    prepared: Prepared,
    selection: SelectionOptions,
    budget: Budget,
    file: DensityFile | None,
    options: CalibrationOptions,
) -> Fitted:
    """Converts to a sparse model that meets a budget, by what it does on pictures.

    Args:
        prepared: the dense network, which becomes sparse.
        selection: the options of `convert` that say which weights are active.
        budget: the budget.
        file: densities of the layers; None for a distribution.
        options: the pictures, and who is told of the progress.

    Raises:
        UsageError, FileError, CheckFailed: see `convert`.
    """
    if selection.positions == "random":
        raise UsageError("--calibrate chooses the active weights by pictures, so their positions are not random.")
    pictures = read_calibration(
        () if options.source is None else options.source, prepared.config, options.images, selection.seed
    )
    shape = prepared.config.input_shape or tuple(pictures.inputs.shape[1:])
    prepared = replace(prepared, config=replace(prepared.config, input_shape=shape))
    with _trained_part(prepared) as network:
        require_memory(network, shape, pictures.count)
    spread = file.spread if file else None
    if file is None and selection.distribution in (None, OUTPUT):
        outputs = _ByOutput.measured(prepared, selection, pictures, _stage(options, 0, _BUDGETS))
        spread = outputs.spread
    # Layer budgets without pictures rank weights by what is known without pictures.
    moments = known_moments(prepared) if spread is None else ""
    sparsifier = make_sparsifier(prepared, selection, moments, distribution=OUTPUT, spread=spread)
    total, nbytes = solve(sparsifier, budget)
    if spread is not None and file is None and budget.macs is not None:
        # Any spread can meet the budget, and `solve` says so if none can; this one spends it where it matters most.
        within = outputs.within(budget.macs)
        sparsifier = make_sparsifier(prepared, selection, distribution=OUTPUT, spread=lambda _: within)
        total = sum(within)
    draft = sparsifier.preview(total, budget)
    units = {spec.name: unit for spec, unit in zip(sparsifier.sparse, sparsifier.units, strict=True)}
    counts = {name: count for name, count in sparsifier.counts(total).items() if name not in prepared.fresh}
    macs = sum(spec.size * spec.macs_per_weight for spec in draft.specs.values())
    with _trained_part(prepared) as network:
        found = reconstruct(
            network,
            counts,
            pictures.inputs,
            units=units,
            views=affordable_views(macs, pictures.count),
            seed=selection.seed,
            on_progress=_stage(options, _BUDGETS, 1 - _BUDGETS),
        )
    masks = {name: found.masks.get(name, mask) for name, mask in draft.masks.items()}
    model = SparseModel(prepared.module, draft.specs, masks, _recorded(draft.config, pictures))
    model.apply_masks()
    # Other values take another number of bytes than those that the search for the budget saw.
    nbytes = trim(model, budget.amount) if nbytes is not None else None
    notes = (*prepared.notes, *([f"densities: {file.note}"] if file else []), *_told(found, pictures))
    return Fitted(model, budget, nbytes, notes, (*pictures.warnings, *check_signal(model, selection)))


@dataclass(frozen=True)
class _ByOutput:
    """Layer budgets by what they do to the outputs.

    Attributes:
        curves: cost curves of the trained sparse layers.
        specs: all specs of the network.
        fresh: names of sparse weights with random values; they get the density of the network.
    """

    curves: Curves
    specs: Mapping[str, LayerSpec]
    fresh: tuple[str, ...]

    @classmethod
    def measured(
        cls, prepared: Prepared, selection: SelectionOptions, pictures: Pictures, on_progress: OnProgress
    ) -> _ByOutput:
        """Measures the curves."""
        specs = with_macs(prepared.module, discover(prepared.module, prepared.rules), prepared.config.input_shape)
        with _trained_part(prepared) as network:
            curves = measure(
                network,
                {name: spec for name, spec in specs.items() if name not in prepared.fresh},
                pictures.inputs,
                # Without its head, a classifier returns features.
                classifier=False if prepared.config.conversion.get("fresh") else None,
                seed=selection.seed,
                on_progress=on_progress,
            )
        curves = replace(curves, allow_starved=selection.allow_starved)
        return cls(curves, specs, prepared.fresh)

    def spread(self, total: int) -> list[int]:
        """Returns the counts of all sparse layers that change the outputs least."""
        sparse = self._sparse
        even = {spec.name: max(1, round(total * spec.size / sum(s.size for s in sparse))) for spec in sparse}
        fresh = {name: even[name] for name in self.fresh}
        found = dict(zip(self.curves.layers, self.curves.spread(total - sum(fresh.values())), strict=True))
        return [{**found, **fresh}[spec.name] for spec in sparse]

    def within(self, macs: int) -> list[int]:
        """Returns the counts of all sparse layers that change the outputs least within a number of multiply-adds."""
        work = {name: spec.macs_per_weight for name, spec in self.specs.items()}
        whole = sum(spec.size * work[spec.name] for spec in self.specs.values())
        fresh = {name: max(1, round(self.specs[name].size * min(macs / whole, 1))) for name in self.fresh}
        dense = sum(spec.size * work[spec.name] for spec in self.specs.values() if spec.role != "sparse")
        left = macs - dense - sum(count * work[name] for name, count in fresh.items())
        found = self.curves.spread_for([work[name] for name in self.curves.layers], left)
        counts = {**dict(zip(self.curves.layers, found, strict=True)), **fresh}
        return [counts[spec.name] for spec in self._sparse]

    @property
    def _sparse(self) -> list[LayerSpec]:
        return [spec for spec in self.specs.values() if spec.role == "sparse"]


@contextlib.contextmanager
def _trained_part(prepared: Prepared) -> Iterator[nn.Module]:
    """Gives the network in a form that takes a batch of pictures, without a head that was never trained.

    Its outputs are then the features that the head reads, which is what a conversion should keep.
    """
    module = prepared.module
    paths = sorted({name.rpartition(".")[0] for name in prepared.config.conversion.get("fresh", ())})
    heads = {path: module.get_submodule(path) for path in paths if path}
    for path in heads:
        module.set_submodule(path, nn.Identity())
    try:
        yield tensor_form(module)
    finally:
        for path, head in heads.items():
            module.set_submodule(path, head)


def _stage(options: CalibrationOptions, start: float, share: float) -> OnProgress:
    """Returns the progress of one stage as a part of the whole calibration."""

    def report(done: int, total: int) -> None:
        options.on_progress(round(_STEPS * (start + share * done / max(total, 1))), _STEPS)

    return report


def _recorded(config: ModelConfig, pictures: Pictures) -> ModelConfig:
    return replace(config, conversion={**config.conversion, "calibration": {"pictures": pictures.count}})


def _told(found: Reconstruction, pictures: Pictures) -> list[str]:
    """Returns what was done, in words."""
    notes = [f"calibrated with {pictures.count} pictures: {len(found.errors)} layers fitted to the dense outputs"]
    notes += [f"chosen by magnitude: {name}, since {reason}" for name, reason in found.unfitted.items()]
    return notes
