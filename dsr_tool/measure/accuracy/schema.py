"""The keys of the accuracy document, as `dsr-tool report --accuracy --json` prints them."""

from __future__ import annotations

from typing import TypedDict

__all__ = ["AccuracyDocument", "NetworkAccuracy"]


class NetworkAccuracy(TypedDict):
    """The accuracy of one network; intervals are 95 % by Wilson, lower and upper end.

    Attributes:
        path: path as it was given.
        kind: `model folder`, or the kind of the file.
        runtime: what ran it: `pytorch`, `native`, `scipy` or `onnxruntime`.
        top1_fraction: fraction of pictures whose class has the highest score; None without classes.
        top1_interval: interval of it.
        top5_fraction: fraction of pictures whose class is among the five highest scores; None without classes, and
            for models of five classes or fewer, where it would be 1.
        top5_interval: interval of it.
    """

    path: str
    kind: str
    runtime: str
    top1_fraction: float | None
    top1_interval: tuple[float, float] | None
    top5_fraction: float | None
    top5_interval: tuple[float, float] | None


class AccuracyDocument(TypedDict):
    """Accuracy on a folder of pictures.

    Attributes:
        data: path of the folder.
        pictures: number of pictures that were counted, n.
        labels: how the class of each picture was found; `none` if there are no classes.
        this: the network of the report.
        against: the network of `--against`; None without one.
        agreement_fraction: fraction of pictures to which both give the highest score for the same class; None
            without `--against`, as the two below.
        agreement_interval: 95 % interval of it.
        kl_divergence_nats: mean of KL(against || this) over the pictures, of softmax probabilities; 0 if equal.
        notes: remarks, such as which files were damaged and not counted.
    """

    data: str
    pictures: int
    labels: str
    this: NetworkAccuracy
    against: NetworkAccuracy | None
    agreement_fraction: float | None
    agreement_interval: tuple[float, float] | None
    kl_divergence_nats: float | None
    notes: list[str]
