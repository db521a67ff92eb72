"""Measures accuracy on a folder of pictures, batch by batch in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.measure.accuracy.class_names import shown
from dsr_tool.measure.accuracy.labels import Labelled, read_labels
from dsr_tool.measure.accuracy.networks import Network, open_network, with_preprocessing
from dsr_tool.measure.accuracy.request import AccuracyRequest
from dsr_tool.measure.accuracy.schema import AccuracyDocument, NetworkAccuracy
from dsr_tool.measure.accuracy.scores import Scores, wilson
from dsr_tool.runtime import load_inputs
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.tensor import Array

__all__ = ["Progress", "accuracy_document"]

_BATCH = 16
"""Inputs per call of a network: activations take far more memory than inputs do."""

Progress = Callable[[int, int], object]
"""Called after each batch with the number of files that are done, and of all."""

_Example = tuple[int, tuple[Array, ...]]
"""Index of a file, and one input from it, prepared for each network."""


def accuracy_document(path: Path, request: AccuracyRequest, on_progress: Progress | None = None) -> AccuracyDocument:
    """Returns accuracy, and agreement with another network, as plain values.

    Args:
        path: the model folder, run folder or exported file that is measured.
        request: the pictures, and the model to compare with.
        on_progress: called after each batch.

    Raises:
        DsrError: outputs are not finite.
        FileError: a path does not exist, or the folder holds no usable pictures.
        FormatError: a file or `labels.csv` is damaged.
        UsageError: no classes are known and there is no other network, the other has another architecture, or one
            of them takes no pictures.
    """
    this, other = _networks(path, request)
    networks = [this] if other is None else [this, other]
    # An ONNX file has no names of classes, and the model that it was exported from may have them.
    described = next((one.config for one in networks if one.config.labels), this.config)
    found = read_labels(request.data, described, required=other is None)
    _check_inputs(found, networks)
    scores, damaged = _scores(found, networks, on_progress)
    if not scores.count:
        raise FileError(
            f"--accuracy {str(request.data)!r} holds no picture that can be read: {len(damaged)} damaged, such as "
            f"{damaged[0].name!r}; give a folder with others."
        )
    skipped = [
        f"files that cannot be used and were not counted: {len(damaged)} ({shown(path.name for path in damaged)})"
    ]
    return {
        "data": str(request.data),
        "pictures": scores.count,
        "labels": found.rule,
        "this": _accuracy(this, scores, scores.right[0], known=found.classes is not None),
        "against": _accuracy(other, scores, scores.right[1], known=found.classes is not None) if other else None,
        "agreement_fraction": scores.equal / scores.count if other else None,
        "agreement_interval": wilson(scores.equal, scores.count) if other else None,
        # Rounding may end a hair below zero for equal networks.
        "kl_divergence_nats": max(scores.divergence / scores.count, 0.0) if other else None,
        "notes": [*found.notes, *(skipped if damaged else [])],
    }


def _networks(path: Path, request: AccuracyRequest) -> tuple[Network, Network | None]:
    """Opens both networks, which must have the same architecture and classes.

    Raises:
        UsageError: they have not, or one does not say how many classes it has.
    """
    this = open_network(path, "PATH", request.maker)
    other = open_network(request.against, "--against", request.maker, this.config) if request.against else None
    for network in (this, other):
        if network and not network.config.num_classes:
            raise UsageError(
                f"{str(network.path)!r} does not say how many classes it has; --accuracy needs a fixed number."
            )
    if other is None:
        return this, None
    # The name in an ONNX file is what its exporter wrote, often nothing, so only classes are compared.
    named = "onnx" not in (this.kind, other.kind)
    facts = [(one.config.architecture if named else "", one.config.num_classes) for one in (this, other)]
    if facts[0] != facts[1]:
        (name, classes), (other_name, other_classes) = [
            (one.config.architecture, one.config.num_classes) for one in (this, other)
        ]
        raise UsageError(
            f"--against {str(other.path)!r} is {other_name} with {other_classes} classes, and {str(path)!r} is {name} "
            f"with {classes}; give a model of the same architecture and classes."
        )
    return with_preprocessing(this, other), with_preprocessing(other, this)


def _check_inputs(found: Labelled, networks: Sequence[Network]) -> None:
    """Raises `UsageError` if there are pictures for a network that does not say how they become inputs."""
    pictures = [path for path in found.files if path.suffix.lower() != ".npy"]
    unknown = [network for network in networks if not network.preprocesses]
    if pictures and unknown:
        raise UsageError(
            f"{str(unknown[0].path)!r} does not say how to preprocess pictures such as {str(pictures[0])!r}; give the "
            f"model folder or archive that it belongs to as --against, or preprocessed .npy arrays."
        )


def _scores(found: Labelled, networks: Sequence[Network], on_progress: Progress | None) -> tuple[Scores, list[Path]]:
    """Runs the networks on all inputs; returns what was counted, and the damaged files."""
    scores, damaged = Scores(), list[Path]()
    # Networks that prepare pictures alike share the inputs.
    configs = list({_preparation(network.config): network.config for network in networks}.values())
    which = [list(map(_preparation, configs)).index(_preparation(network.config)) for network in networks]
    examples = _examples(found.files, configs, damaged)
    while batch := list(islice(examples, _BATCH)):
        inputs = [np.stack([prepared[i] for _, prepared in batch]) for i in range(len(configs))]
        outputs = [network.scores(inputs[i]) for network, i in zip(networks, which, strict=True)]
        classes = None
        if found.classes is not None:
            classes = np.array([found.classes[index] for index, _ in batch], np.int64)
        scores.add(outputs[0], outputs[1] if len(outputs) > 1 else None, classes)
        if on_progress:
            on_progress(batch[-1][0] + 1, len(found.files))
    return scores, damaged


def _preparation(config: ModelConfig) -> tuple[object, ...]:
    """Returns everything that decides how a picture becomes an input."""
    return config.input_shape, config.preprocessing


def _examples(files: Sequence[Path], configs: Sequence[ModelConfig], damaged: list[Path]) -> Iterator[_Example]:
    """Yields every input of every file; files that cannot be read are added to `damaged`."""
    for index, path in enumerate(files):
        try:
            prepared = [load_inputs([path], config) for config in configs]
        except (FileError, FormatError):
            damaged.append(path)
            continue
        # A file has one picture, or an array of any number of inputs.
        for inputs in zip(*prepared, strict=True):
            yield index, inputs


def _accuracy(network: Network, scores: Scores, right: Sequence[int], *, known: bool) -> NetworkAccuracy:
    """Returns the accuracy of one network.

    Args:
        network: the network.
        scores: all counts.
        right: right answers among its first 1 and 5.
        known: whether the classes of the pictures are known.
    """
    first, five = (
        hits if shown else None for hits, shown in zip(right, (known, known and scores.has_top5), strict=True)
    )
    return {
        "path": str(network.path),
        "kind": network.kind,
        "runtime": network.runtime,
        "top1_fraction": None if first is None else first / scores.count,
        "top1_interval": None if first is None else wilson(first, scores.count),
        "top5_fraction": None if five is None else five / scores.count,
        "top5_interval": None if five is None else wilson(five, scores.count),
    }
