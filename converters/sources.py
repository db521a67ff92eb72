"""Which source a name belongs to: a network built from a name, or built again for a file."""

from __future__ import annotations

from torch import nn

from converters import callables, paper_models, torchvision_models
from dsr_tool.errors import UsageError
from dsr_tool.sparsity.config import MOST_CLASSES, ModelConfig

__all__ = ["fresh", "named"]


def named(
    source: str,
    weights: str | None = None,
    *,
    num_classes: int | None = None,
    input_size: int | None = None,
    input_shape: tuple[int, ...] = (),
    width: float = 1.0,
    seed: int = 0,
) -> tuple[nn.Module, ModelConfig]:
    """The network of a name: torchvision's, a paper's, or `module:callable`.

    Args:
        source: the name.
        weights: torchvision enum name or state_dict file; random when absent.
        num_classes: outputs of a new head; not for callables.
        input_size: side of the square input in pixels; not for callables.
        input_shape: instead, the whole shape of one input; callables need it.
        width: factor on the channels of an architecture that has a width.
        seed: of random weights.

    Raises:
        UsageError: a name, weights or a value that is not allowed.
        FileError: there is no such file of weights.
        FormatError: it cannot be read.
    """
    if ":" in source:
        if num_classes is not None or input_size is not None:
            raise UsageError(
                f"--num-classes and --input-size go with names of models; let {source!r} make the head that you need, "
                f"and give --input-shape."
            )
        if not input_shape:
            raise UsageError(f"{source!r} needs --input-shape, the shape of one input, such as 3,224,224.")
        return callables.load(source, weights, input_shape=input_shape, seed=seed)
    if num_classes is not None and not 1 <= num_classes <= MOST_CLASSES:
        raise UsageError(f"--num-classes {num_classes} is not allowed; give 1 to {MOST_CLASSES:,}.")
    if input_size is not None and input_size < 1:
        raise UsageError(f"--input-size {input_size} is not allowed; give pixels, 1 or more.")
    load = paper_models.load if source in paper_models.MODELS else torchvision_models.load
    return load(
        source,
        weights,
        num_classes=num_classes,
        input_size=input_size,
        input_shape=input_shape,
        width=width,
        seed=seed,
    )


def fresh(config: ModelConfig) -> nn.Module:
    """The network that a description is of, to be filled; on the meta device where that is possible.

    Raises:
        UsageError: only the user can make it.
    """
    if config.source == "callable":
        # The name came out of a file, so that only the user may say that it is to be imported.
        raise UsageError(
            f"the model was made by {config.architecture!r}, code that no file may name to be run; if you trust it, "
            f"say --model {config.architecture} (in Python: load(path, {config.architecture!r}))."
        )
    if config.source == "paper" and config.architecture in paper_models.MODELS:
        return paper_models.structure(config)
    if config.source != "torchvision":
        raise UsageError(
            f"architecture {config.architecture!r} is none that dsr-tool can build; give load() a module of that class."
        )
    return torchvision_models.structure(config.architecture, config.num_classes, config.width)
