"""Source: `module:callable`, a function or class of the user's own that returns a network."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from converters.state_dicts import load_strictly, read_state
from dsr_tool.errors import UsageError, first_line, unknown_name
from dsr_tool.sparse.macs import output_shape
from dsr_tool.sparsity.config import MOST_CLASSES, ModelConfig

__all__ = ["build", "is_callable_name", "load"]


def is_callable_name(source: str) -> bool:
    """Whether ARCH is written as `module:callable`, both possibly with dots."""
    module, colon, attribute = source.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def load(
    source: str, weights: str | None = None, *, input_shape: tuple[int, ...], seed: int = 0
) -> tuple[nn.Module, ModelConfig]:
    """Call what `source` names, fill in weights, and describe the network.

    Args:
        source: `module:callable`; the module may lie in the current directory.
        weights: a state_dict file; the callable's own values when absent.
        input_shape: shape of one input, without the batch.
        seed: of torch's random state while the callable runs.

    Raises:
        UsageError: no such callable, it fails or returns something else, or the weights are not its own.
        FileError: there is no such file of weights.
        FormatError: that file cannot be read.
    """
    module = build(source, seed)
    if weights is not None:
        load_strictly(module, source, read_state(Path(weights)), weights)
    shape = output_shape(module, input_shape)
    classes = min(shape[0], MOST_CLASSES) if shape else 0
    return module, ModelConfig("callable", source, classes, input_shape, conversion={"weights": weights})


def build(source: str, seed: int = 0) -> nn.Module:
    """Import the module, also from the current directory, and call the callable without arguments.

    Only names that a user typed come here: nothing that is read from a file is ever imported.

    Raises:
        UsageError: the name is not importable, or what it names returns no network.
    """
    if not is_callable_name(source):
        raise UsageError(f"model {source!r} is not written as module:callable; write it as in mypackage.nets:small.")
    path, _, attribute = source.partition(":")
    with _current_directory(), torch.random.fork_rng(devices=[]):
        function = _find(source, path, attribute)
        torch.manual_seed(seed)  # after the import, which may draw numbers of its own
        try:
            module = function()
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise UsageError(
                f"{source!r} failed when it was called without arguments "
                f"({type(error).__name__}: {first_line(error)}); name a callable that needs none."
            ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{source!r} returned {type(module).__name__}; it must return a torch.nn.Module.")
    return module


def _find(source: str, path: str, attribute: str) -> Any:
    try:
        found: Any = importlib.import_module(path)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise UsageError(
            f"module {path!r} of {source!r} cannot be imported ({type(error).__name__}: {first_line(error)}); run from "
            f"the folder that holds it, or install it."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise unknown_name(f"callable of {path!r}", attribute, [name for name in vars(found) if name[0] != "_"])
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise UsageError(
            f"{source!r} is {type(found).__name__}, not a function or class that makes a network; name one."
        )
    return found


@contextlib.contextmanager
def _current_directory() -> Iterator[None]:
    """As `python -m` does it: the current directory first."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
