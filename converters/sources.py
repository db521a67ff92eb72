"""The table of sources of models, and the two things asked of it: a network from a name, and one for a file."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from converters import callables, onnx_files, paper_models, torchvision_models
from converters.base import Source
from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparse.in_file import bring_in
from dsr_tool.sparsity.config import MOST_CLASSES, ModelConfig

__all__ = ["SOURCES", "build_structure", "find_source", "load_network"]

SOURCES: dict[str, Source] = {
    row.name: row for row in (onnx_files.SOURCE, callables.SOURCE, paper_models.SOURCE, torchvision_models.SOURCE)
}
"""All sources by name. The first that recognises the name of a network builds it."""


def find_source(name: str) -> Source:
    """Returns the source of a name.

    Raises:
        UsageError: no source recognises it; the message says why if one knows it, and suggests close names otherwise.
    """
    for source in SOURCES.values():
        if source.recognises(name):
            return source
    # Asked only now, so that a name that one source refuses may belong to another.
    for source in SOURCES.values():
        if reason := source.reason(name):
            raise UsageError(
                f"ARCH {name!r} is {reason}; give a torchvision model for classification, segmentation, video or "
                f"detection, or module:callable for a network of your own."
            )
    # A file of weights as ARCH is a common mistake, and close names would not help.
    if name and ("/" in name or Path(name).suffix or Path(name).exists()):
        raise UsageError(
            f"ARCH {name!r} is a path; give the name of a torchvision model, such as resnet18, or module:callable for "
            f"a network of your own, and a file of its values as --weights."
        )
    raise unknown_name("ARCH", name, [known for source in SOURCES.values() for known in source.names()])


def load_network(
    name: str,
    weights: str | None = None,
    *,
    num_classes: int | None = None,
    input_size: int | None = None,
    input_shape: tuple[int, ...] = (),
    width: float = 1.0,
    seed: int = 0,
    in_file: bool = False,
) -> tuple[nn.Module, ModelConfig]:
    """Builds the network of a name, and describes it.

    Args:
        name: a torchvision model, a paper's network, an ONNX file, or `module:callable`.
        weights: torchvision enum name or state_dict file; random when absent.
        num_classes: number of outputs of a new head; not for callables.
        input_size: side of the square input in pixels; not for callables.
        input_shape: instead of a size, the shape of one input without the batch; callables need it.
        width: factor on the channels, for architectures that can be built narrower.
        seed: seed of random weights.
        in_file: whether weights may stay in their file; see `sparse.in_file`.

    Raises:
        UsageError: a name, weights or another value that is not allowed.
        FileError: the file of weights does not exist.
        FormatError: the file of weights cannot be read.
    """
    source = find_source(name)
    if not source.has_options and (num_classes is not None or input_size is not None):
        raise UsageError(
            f"--num-classes and --input-size go with names of models; let {name!r} make the head that you need, and "
            f"give --input-shape."
        )
    # Bounds of what a file may hold: a larger model could be converted, but not loaded again.
    if num_classes is not None and not 1 <= num_classes <= MOST_CLASSES:
        raise UsageError(f"--num-classes {num_classes} is not allowed; give 1 to {MOST_CLASSES:,}.")
    if input_size is not None and input_size < 1:
        raise UsageError(f"--input-size {input_size} is not allowed; give pixels, 1 or more.")
    module, config = source.load(
        name,
        weights,
        num_classes=num_classes,
        input_size=input_size,
        input_shape=input_shape,
        width=width,
        seed=seed,
    )
    if not in_file:
        bring_in(module)
    return module, config


def build_structure(config: ModelConfig) -> nn.Module:
    """Builds the network of a description without values, on the meta device if possible.

    Raises:
        UsageError: no source can build it.
    """
    source = SOURCES.get(config.source)
    if source is None:
        raise UsageError(
            f"dsr-tool cannot build architecture {config.architecture!r}; give load() a module of that class."
        )
    return source.structure(config)
