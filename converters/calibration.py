"""Conversion with pictures: layer budgets, masks and values are chosen by what they do to the network's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from converters.archive_size import captured
from converters.budgets import Fitted, solve, trim
from converters.output_budgets import OutputBudgets
from converters.prepared import Prepared, trained_part
from converters.pretrained import budget_notes, check_signal, known_moments, make_sparsifier
from converters.request import CalibrationOptions, SelectionOptions
from dsr_tool.calibrate.memory import require_memory
from dsr_tool.calibrate.pictures import Pictures, read_calibration
from dsr_tool.calibrate.reconstruct import Reconstruction, reconstruct
from dsr_tool.calibrate.views import affordable_views
from dsr_tool.errors import UsageError
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.density_file import DensityFile

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
    pictures = read_calibration(options.source, prepared.config, options.images, selection.seed)
    shape = prepared.config.input_shape or tuple(pictures.inputs.shape[1:])
    prepared = replace(prepared, config=replace(prepared.config, input_shape=shape))
    with trained_part(prepared) as network:
        require_memory(network, shape, pictures.count)
    # Before anything that takes minutes: a network that cannot be captured has no size in bytes.
    graph = captured(prepared.module, shape) if budget.kind == "bytes" else None
    outputs = None
    fixed = selection.pattern.density is not None
    if file is None and not fixed and selection.distribution in (None, OUTPUT):
        outputs = OutputBudgets.measured(prepared, selection, pictures, _stage(options, 0, _BUDGETS))
    spread = outputs.spread if outputs else file.spread if file else None
    # Layer budgets without pictures rank weights by what is known without pictures.
    moments = known_moments(prepared, graph) if spread is None else ""
    sparsifier = make_sparsifier(prepared, selection, moments, distribution=None if fixed else OUTPUT, spread=spread)
    total, nbytes = solve(sparsifier, budget, graph)
    if outputs and budget.macs is not None:
        # Any spread can meet the budget, and `solve` says so if none can; this one spends it where it matters most.
        within = outputs.within(budget.macs)
        sparsifier = make_sparsifier(prepared, selection, distribution=OUTPUT, spread=lambda _: within)
        total = sum(within)
    draft = sparsifier.preview(total, budget)
    counts = {name: count for name, count in sparsifier.counts(total).items() if name not in prepared.fresh}
    macs = sum(spec.size * spec.macs_per_weight for spec in draft.specs.values())
    with trained_part(prepared) as network:
        found = reconstruct(
            network,
            counts,
            pictures.inputs,
            granularity=sparsifier.granularity,
            views=affordable_views(macs, pictures.count),
            seed=selection.seed,
            on_progress=_stage(options, _BUDGETS, 1 - _BUDGETS),
        )
    masks = {name: found.masks.get(name, mask) for name, mask in draft.masks.items()}
    model = SparseModel(prepared.module, draft.specs, masks, _recorded(draft.config, pictures))
    model.apply_masks()
    # Other values take another number of bytes than those that the search for the budget saw.
    nbytes = trim(model, budget.amount, graph) if nbytes is not None else None
    notes = (*budget_notes(prepared, file, sparsifier, total), *_told(prepared, found, pictures))
    return Fitted(model, budget, nbytes, notes, (*pictures.warnings, *check_signal(model, selection)))


def _stage(options: CalibrationOptions, start: float, share: float) -> OnProgress:
    """Returns the progress of one stage as a part of the whole calibration."""

    def report(done: int, total: int) -> None:
        options.on_progress(round(_STEPS * (start + share * done / max(total, 1))), _STEPS)

    return report


def _recorded(config: ModelConfig, pictures: Pictures) -> ModelConfig:
    return replace(config, conversion={**config.conversion, "calibration": {"pictures": pictures.count}})


def _told(prepared: Prepared, found: Reconstruction, pictures: Pictures) -> list[str]:
    """Returns what was done, in words."""
    goal = "features that the new head reads" if prepared.new_head else "outputs"
    count = f"{pictures.count} picture{'s' * (pictures.count != 1)}"
    notes = [f"calibrated with {count}: {len(found.errors)} layers fitted, to keep the {goal}"]
    notes += [
        f"fitted in {slices} slices, since its moments would not fit into memory: {name}"
        for name, slices in found.sliced.items()
    ]
    notes += [f"chosen by magnitude: {name}, since {reason}" for name, reason in found.unfitted.items()]
    return notes
