"""Fine-tuning: which models start from trained weights, what then changes, and whether they still work."""

from __future__ import annotations

import math
from collections.abc import Sequence

from converters.kept_zeros import KEEP
from converters.torchvision_weights import FRESH
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.train.settings import TrainSettings

__all__ = ["announcement", "chance", "doubt", "few_steps", "starts_trained"]

_FROM_TRAINED = ("weights", "calibration")
"""Keys in the record of a conversion that only trained weights have."""

_FEW_STEPS = 30
"""Steps below which a fine-tuning hardly begins. A ResNet-18 at .8 with a new head, on 244 photographs of two classes
for six epochs, ended at 81 % after 12 steps, in batches of 128; in batches of 32, its first epoch of 8 steps ended at
91.5 %."""


def starts_trained(config: ModelConfig) -> bool:
    """Returns whether a model was converted from trained weights, which a training should keep."""
    record = config.conversion
    # Zeros that were kept are those of a pruned network, which was trained.
    return record.get("budget") == KEEP or any(record.get(key) not in (None, False) for key in _FROM_TRAINED)


def announcement(settings: TrainSettings) -> str:
    """Returns the line that says what the defaults for trained weights changed; `settings` are resolved."""
    parts = [f"learning rate {settings.learning_rate:g}"]
    share = settings.options.get("target", settings.options.get("drop_fraction"))
    if isinstance(share, (int, float)):
        amount = f"{share:.3g} weights" if share >= 1 else f"{100 * share:.3g} %"
        parts.append(f"{settings.method} moves {amount} a time{_until(settings.stop)}")
    return f"from trained weights: {', '.join(parts)}"


def few_steps(settings: TrainSettings, steps: int) -> str:
    """Returns a line that says if a fine-tuning has too few steps to change much; else nothing.

    Args:
        settings: the settings.
        steps: steps of the whole training.
    """
    if steps >= _FEW_STEPS:
        return ""
    return (
        f"this training has {steps} {'step' if steps == 1 else 'steps'}, since --batch-size is {settings.batch_size}; "
        f"a smaller one makes more of the same images, and so do more --epochs"
    )


def _until(stop: float | None) -> str:
    if stop is None or stop >= 1:
        return ""
    return " until half time" if stop == 0.5 else f" until {100 * stop:.3g} % of the training"


def chance(counts: Sequence[int]) -> float:
    """Returns the accuracy up to which a network may only be guessing.

    Args:
        counts: number of test images of each class.

    Returns:
        The accuracy of the answer that is right most often, plus two standard deviations of the sample.
    """
    images = sum(counts)
    best = max(counts) / images
    return best + 2 * math.sqrt(best * (1 - best) / images)


def doubt(config: ModelConfig, accuracy: float, counts: Sequence[int]) -> str:
    """Returns a warning if a network from trained weights only guesses before it is trained further; else nothing.

    Args:
        config: description of the model.
        accuracy: fraction of test images classified correctly.
        counts: number of test images of each class.
    """
    # A new head guesses until it is trained, whatever comes before it.
    if not starts_trained(config) or config.conversion.get(FRESH) or accuracy > chance(counts):
        return ""
    return (
        f"warning: before the training the network is at chance ({accuracy:.4f}), so little is left of its trained "
        f"weights; convert it with --calibrate, or to a lower sparsity. If its classes are not those of the data, "
        f"convert it with --num-classes {len(counts)}."
    )
