"""The storage of a training: compact wherever it saves memory and nothing stands against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsr_tool.errors import UsageError
from dsr_tool.sparse.aliases import later_names
from dsr_tool.sparse.compact.marks import VALUES
from dsr_tool.sparse.compact.modules import runner_of
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.ranks import Ranks
from dsr_tool.train.settings import TrainSettings

__all__ = ["MOST_DENSITY", "apply_storage", "kernels_line", "storage_line", "storage_to_load"]

MOST_DENSITY = 0.75
"""Density up to which compact storage is smaller: value, gradient, momentum and position of an active weight are 16
bytes, value, gradient and momentum of any weight 12."""


def storage_to_load(settings: TrainSettings) -> str:
    """Returns the storage in which to load a model for these settings, before anything is known of it."""
    if settings.storage != "auto":
        return settings.storage
    return "masked" if _settings_against(settings) else "compact"


def apply_storage(
    model: SparseModel, settings: TrainSettings, state: Mapping[str, Any] | None = None
) -> tuple[TrainSettings, str]:
    """Puts a model into the storage that its training gets.

    Args:
        model: the model; changed in place.
        settings: checked settings.
        state: the state of a training to resume, whose optimizer knows one storage; None for a training from the start.

    Returns:
        The settings, with `auto` replaced by what was chosen; and why not compact, an empty text if it is.

    Raises:
        UsageError: the storage that was asked for cannot hold this model or serve this method.
    """
    if state is not None and settings.storage == "auto":
        settings = replace(settings, storage="compact" if VALUES in state.get("trained", ()) else "masked")
    reason = _method_against(settings) or _tied_against(model, settings)
    if settings.storage == "compact" and reason:
        raise UsageError(f"--storage compact is not possible: {reason}; give masked or auto.")
    against = "" if settings.storage == "compact" else _settings_against(settings) or _model_against(model, settings)
    if settings.storage != "auto":
        model.to_storage(settings.storage)
        return settings, against
    if not against:
        try:
            model.to_storage("compact")
        except UsageError as error:  # it says what compact storage cannot hold
            against = str(error).partition(";")[0]
    return replace(settings, storage=model.to_storage("masked" if against else "compact").storage), against


def storage_line(model: SparseModel, against: str) -> str:
    """Returns the line that says how sparse weights are held, and what runs on kernels."""
    if model.store is None:
        return f"storage masked{': ' * bool(against)}{against}"
    return f"storage compact: {model.store.values.numel():,} values of {model.prunable_weights:,} weights"


def kernels_line(model: SparseModel) -> str:
    """Returns the line that says what of a compact model's last pass ran on kernels; empty if there was none."""
    runner = model.store and runner_of(model.module)
    if not runner:
        return ""
    if runner.note:
        return f"kernels: none, dense weights are rebuilt layer by layer, because {runner.note}"
    return f"kernels: {runner.coverage}" if runner.coverage else ""


def _settings_against(settings: TrainSettings) -> str:
    """Returns why `auto` means masked storage for these settings, whatever the network; empty if it does not."""
    if settings.torch_device.type != "cpu":
        return "kernels for compact storage run on the CPU"
    if settings.precision != "fp32":
        return f"kernels for compact storage have no {settings.precision}"
    return _method_against(settings)


def _method_against(settings: TrainSettings) -> str:
    """Returns why a training with these settings cannot be in compact storage; empty if it can."""
    if reason := settings.masked_because():
        return reason
    method = settings.make_method(10**6)  # plugins are in no table
    if "compact" not in method.storages:
        return f"method {settings.method} trains in masked storage"
    if not method.needs_gradients:
        return ""
    # Only the largest gradients of each backward pass are kept, and those cannot be added up.
    if Ranks.current().count > 1:
        return f"method {settings.method} needs gradients of inactive weights from all processes"
    if settings.accumulate > 1:
        return f"method {settings.method} needs gradients of inactive weights from all parts of a batch"
    return ""


def _model_against(model: SparseModel, settings: TrainSettings) -> str:
    if not model.prunable_weights:
        return "the model has no sparse layer"
    density = model.active_weights / model.prunable_weights
    if density > MOST_DENSITY:
        return f"{100 * density:.3g} % of the weights are active"
    return _tied_against(model, settings)


def _tied_against(model: SparseModel, settings: TrainSettings) -> str:
    """Returns why tied weights keep a model out of compact storage; empty if nothing does."""
    tied = next((name for name in later_names(model.module).values() if name in model.masks), None)
    # Each module that reads the weight has a gradient of its own, and the largest of each cannot be added up.
    if tied is None or not settings.make_method(10**6).needs_gradients:
        return ""
    return f"method {settings.method} needs gradients of inactive weights, and {tied!r} is tied"
