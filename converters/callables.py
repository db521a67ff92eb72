"""Source: `module:callable`, a function or class of the user's own that returns a network."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from converters.base import Source
from converters.state_dicts import fill_from_file
from dsr_tool.errors import UsageError, first_line, unknown_name
from dsr_tool.sparse.contract import require_state
from dsr_tool.sparse.macs import output_shape
from dsr_tool.sparse.wrappers import unwrapped
from dsr_tool.sparsity.config import MOST_CLASSES, ModelConfig

__all__ = ["SOURCE", "build", "call", "is_callable_name", "load"]


def is_callable_name(name: str) -> bool:
    """Returns whether a name is written as `module:callable`, both possibly with dots."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])


def load(
    name: str,
    weights: str | None = None,
    *,
    num_classes: int | None = None,  # noqa: ARG001 - the callable decides
    input_size: int | None = None,  # noqa: ARG001
    input_shape: tuple[int, ...] = (),
    width: float = 1.0,  # noqa: ARG001
    seed: int = 0,
) -> tuple[nn.Module, ModelConfig]:
    """Calls the callable, fills in weights, and describes the network.

    Args:
        name: `module:callable`; the module may be in the current directory.
        weights: a state_dict file; the callable's own values when absent.
        num_classes: not used; the callable makes the head.
        input_size: not used.
        input_shape: shape of one input, without the batch.
        width: not used.
        seed: seed of torch's random state while the callable runs.

    Raises:
        UsageError: the shape is missing; the callable does not exist, fails or returns no network; or the weights are
            those of another network.
        FileError: the file of weights does not exist.
        FormatError: the file of weights cannot be read.
    """
    if not input_shape:
        raise UsageError(f"{name!r} needs --input-shape, the shape of one input, such as 3,224,224.")
    module = build(name, seed)
    record = fill_from_file(module, name, weights)
    shape = output_shape(module, input_shape)
    classes = min(shape[0], MOST_CLASSES) if shape else 0
    return module, ModelConfig("callable", name, classes, input_shape, conversion=record)


def build(name: str, seed: int = 0) -> nn.Module:
    """Imports the module, also from the current directory, and calls the callable without arguments.

    Only names that a user typed may be passed: nothing that is read from a file is ever imported.

    Raises:
        UsageError: the name cannot be imported, or the callable returns no network or one that cannot be saved.
    """
    if not is_callable_name(name):
        raise UsageError(f"model {name!r} is not written as module:callable; write it as in mypackage.nets:small.")
    module = call(name, seed)
    if not isinstance(module, nn.Module):
        raise UsageError(f"{name!r} returned {type(module).__name__}, expected a torch.nn.Module.")
    module = unwrapped(module)
    require_state(module)
    return module


def call(name: str, seed: int = 0, *, makes: str = "a network") -> object:
    """Returns what the callable of a name returns.

    Args:
        name: `module:callable`, typed by the user, as for `build`.
        seed: seed of torch's random state while the callable runs.
        makes: what it should return, for messages.

    Raises:
        UsageError: the name cannot be imported, is no callable, or fails.
    """
    with _current_directory(), torch.random.fork_rng(devices=[]):
        function = _find(name, makes)
        torch.manual_seed(seed)  # after the import, which may draw numbers of its own
        try:
            return function()
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise UsageError(
                f"{name!r} failed when it was called without arguments "
                f"({type(error).__name__}: {first_line(error)}); name a callable that needs none."
            ) from error


def _find(name: str, makes: str) -> Callable[[], object]:
    path, _, attribute = name.partition(":")
    try:
        found: object = importlib.import_module(path)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise UsageError(
            f"module {path!r} of {name!r} cannot be imported ({type(error).__name__}: {first_line(error)}); run from "
            f"the folder that holds it, or install it."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise unknown_name(f"callable of {path!r}", attribute, [own for own in vars(found) if own[0] != "_"])
        found = getattr(found, part)
    # A module object is callable too, but calling it runs the network.
    if isinstance(found, nn.Module) or not callable(found):
        raise UsageError(f"{name!r} is {type(found).__name__}, expected a function or class that makes {makes}.")
    return found


@contextlib.contextmanager
def _current_directory() -> Iterator[None]:
    """Puts the current directory first on the import path, as `python -m` does."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def _refuse_structure(config: ModelConfig) -> NoReturn:
    """Raises `UsageError`: the name is from a file, and only the user may decide that it is imported."""
    raise UsageError(
        f"the model was made by {config.architecture!r}, code that no file may name to be run; if you trust it, give "
        f"--model {config.architecture} (in Python: load(path, {config.architecture!r}))."
    )


SOURCE = Source(
    name="callable",
    # Any colon, so that a name with a typing error gets the message on how to write it.
    recognises=lambda name: ":" in name,
    load=load,
    structure=_refuse_structure,
    has_options=False,
    may_be_trained=True,
)
"""The row of this source."""
