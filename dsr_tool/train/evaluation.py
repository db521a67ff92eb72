"""The loss of a training step, and loss and accuracy on all test images."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.data import Data
from dsr_tool.train.failures import require_scores
from dsr_tool.train.ranks import Ranks
from dsr_tool.train.settings import TrainSettings
from dsr_tool.train.teacher import distillation

__all__ = ["AUXILIARY_WEIGHT", "evaluate", "training_loss"]

AUXILIARY_WEIGHT = 0.3
"""Factor on the loss of each auxiliary classifier (Szegedy et al., Going deeper with convolutions, section 5)."""


def training_loss(
    outputs: object,
    labels: torch.Tensor,
    classes: int,
    settings: TrainSettings,
    taught: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss of a batch, and the scores by which its accuracy is counted, shape (batch, classes).

    Args:
        outputs: outputs of the model; GoogLeNet and Inception return auxiliary outputs after the main one.
        labels: class numbers, shape (batch,).
        classes: number of classes of the data.
        settings: for the smoothing of labels, and for weight and temperature of the teacher.
        taught: scores of a teacher for this batch, shape (batch, outputs); None without one.
        class_weights: factors on the loss of an image by its class, shape (classes,); None for 1.

    Raises:
        UsageError: the outputs are not scores.
    """
    # Under autocast, outputs are in half precision, in which a loss would be too coarse: hence float() below.
    every = outputs if isinstance(outputs, tuple) else (outputs,)
    scores = require_scores(every[0], classes)
    weights = None if class_weights is None else class_weights[labels]
    main, *auxiliary = (
        _label_loss(output.float(), labels, settings.label_smoothing, weights) for output in every if output is not None
    )
    if taught is not None:
        learned = distillation(scores.float(), taught.float(), settings.teacher_temperature, weights)
        main = (1 - settings.teacher_weight) * main + settings.teacher_weight * learned
    return main + AUXILIARY_WEIGHT * sum(auxiliary), scores


def _label_loss(
    scores: torch.Tensor, labels: torch.Tensor, smoothing: float, weights: torch.Tensor | None
) -> torch.Tensor:
    """Returns the mean over a batch of the weighted losses of its images.

    torch's own class weights divide by the sum of weights in the batch instead, so that the loss of a batch would not
    be the mean of its parts, and a rare class would count more in the batches that hold it.
    """
    if weights is None:
        return cross_entropy(scores, labels, label_smoothing=smoothing)
    return (weights * cross_entropy(scores, labels, label_smoothing=smoothing, reduction="none")).mean()


@torch.no_grad()
def evaluate(model: SparseModel, data: Data, settings: TrainSettings) -> tuple[float, float]:
    """Returns mean loss and accuracy over all test images, in fp32.

    In a distributed run, all ranks must call it.

    Raises:
        UsageError: the model's outputs are not scores.
    """
    model.module.eval()
    # Summed on the device in float64: one transfer to the host at the end, and no rounding over many batches.
    totals = torch.zeros(2, dtype=torch.float64, device=settings.torch_device)
    for inputs, labels in data.test_batches(settings):
        outputs = require_scores(model(inputs), data.dataset.num_classes)
        loss = cross_entropy(outputs, labels, reduction="sum")
        totals += torch.stack([loss, (outputs.argmax(1) == labels).sum()])
    loss_sum, correct = Ranks.current().total(totals).tolist()
    count = len(data.dataset.test.labels)
    return loss_sum / count, correct / count
