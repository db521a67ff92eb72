"""Opens whatever `report` reads, and files of plain weights, as functions from inputs to scores of classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsr_tool.errors import DsrError, UsageError
from dsr_tool.measure.accuracy.scores import Logits
from dsr_tool.runtime import Session
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.tensor import Array
from exporters.containers import container_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Network", "open_network", "with_preprocessing"]

_ONNX = "onnx"
"""Source, in a description, of a network that only its ONNX file describes."""


@dataclass(frozen=True)
class Network:
    """A classifier that is ready to run.

    Attributes:
        path: the file or folder.
        kind: `model folder`, or the name of the file's container.
        runtime: `pytorch`, or the runtime that a session chose.
        config: number of classes, their names, input shape and preprocessing.
        preprocesses: True if `config` says how pictures become inputs.
        run: computes the outputs for a float32 batch of inputs.
    """

    path: Path
    kind: str
    runtime: str
    config: ModelConfig
    preprocesses: bool
    run: Callable[[Array], Array]

    def scores(self, inputs: Array) -> Logits:
        """Computes the scores of a batch, shape (inputs, classes).

        Raises:
            UsageError: the outputs are not one score for each class and input.
            DsrError: the outputs are not finite.
        """
        outputs = np.asarray(self.run(inputs), np.float32)
        if outputs.ndim != 2 or outputs.shape != (len(inputs), self.config.num_classes):
            raise UsageError(
                f"{str(self.path)!r} returns shape {outputs.shape} for {len(inputs)} inputs; --accuracy needs a "
                f"classifier with one score for each of its {self.config.num_classes} classes."
            )
        # The order of NaN is arbitrary, and so would be the accuracy.
        if not np.isfinite(outputs).all():
            raise DsrError(f"the outputs of {str(self.path)!r} contain NaN or inf; check the scale of its weights.")
        return outputs


def open_network(path: Path, what: str, maker: str | None = None, like: ModelConfig | None = None) -> Network:
    """Opens a model folder, a file of any container, or a file of plain weights.

    Args:
        path: the folder or file.
        what: the parameter that it was given as, for messages.
        maker: `module:callable` that builds the network, for networks of the user's own.
        like: description of a network of the same architecture, which a file of plain weights does not name.

    Raises:
        FileError: there is nothing at the path.
        FormatError: it is damaged, or of no known kind.
        UsageError: its network cannot be built, weights are those of another one, or a file has several outputs.
    """
    if path.is_dir():
        from converters.loading import load

        model = load(path, maker)
        return Network(path, "model folder", "pytorch", model.config, True, _runner(model.module, path))
    container = container_of(path, what)
    if container.has_graph:
        session = Session(path)
        _refuse_several(path, len(session.outputs))
        return Network(path, container.name, session.runtime, session.config, container.preprocesses, _sized(session))
    if container.measurable:
        from dsr_tool.formats.csr_file import load_csr

        file = load_csr(path)
        arrays = {name: file.tensor(name).to_dense() for name in file.entries}
        with _named(what):
            module = _with_arrays(file.config, maker, arrays, path)
        return Network(path, container.name, "pytorch", file.config, True, _runner(module, path))
    if like is None:
        raise UsageError(f"{what} {str(path)!r} holds weights alone, of no named architecture; give a model folder.")
    with _named(what):
        module, classes = _with_weights(like, maker, str(path))
    config = replace(like, num_classes=classes)
    return Network(path, container.name, "pytorch", config, True, _runner(module, path))


def with_preprocessing(network: Network, other: Network | None) -> Network:
    """Returns a network that prepares pictures as the other does, if only the other says how."""
    if network.preprocesses or other is None or not other.preprocesses:
        return network
    config = replace(
        network.config,
        preprocessing=other.config.preprocessing,
        input_shape=network.config.input_shape or other.config.input_shape,
    )
    return replace(network, config=config, preprocesses=True)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Gives messages about weights the name of the parameter: `convert` reads such files too, as `--weights`."""
    try:
        yield
    except DsrError as error:
        raise type(error)(str(error).replace("--weights", what, 1)) from error


def _with_arrays(config: ModelConfig, maker: str | None, arrays: Mapping[str, Array], path: Path) -> nn.Module:
    """Builds the network of a description and fills it with arrays that must be exactly its own."""
    import torch

    from converters.state_dicts import load_strictly

    module = _structure(config, maker)
    load_strictly(module, config.architecture, {key: torch.from_numpy(a) for key, a in arrays.items()}, str(path))
    return module


def _with_weights(like: ModelConfig, maker: str | None, weights: str) -> tuple[nn.Module, int]:
    """Builds a network of the same architecture with the weights of a file, as `convert --weights` does.

    Returns:
        The network, and the number of classes that the file has.
    """
    from converters.sources import load_network
    from converters.state_dicts import load_file

    # By its source, which knows the auxiliary heads that a file may lack; a source builds its own width alone.
    if like.source == "torchvision" and like.width == 1:
        module, config = load_network(like.architecture, weights, input_shape=like.input_shape)
        return module, config.num_classes
    module = _structure(like, maker)
    load_file(module, like.architecture, weights)
    return module, like.num_classes


def _structure(config: ModelConfig, maker: str | None) -> nn.Module:
    from converters import callables
    from converters.sources import build_structure

    return callables.build(maker) if maker else build_structure(config)


def _runner(module: nn.Module, path: Path) -> Callable[[Array], Array]:
    """Returns a function that runs a module in eval mode on numpy arrays; it raises as `_refuse_several` does."""
    import torch

    from dsr_tool.sparse.feeding import named_floats, tensor_form

    network = tensor_form(module).eval()

    def run(inputs: Array) -> Array:
        with torch.inference_mode():
            outputs = named_floats(network(torch.from_numpy(inputs)))
        _refuse_several(path, len(outputs))
        (output,) = outputs.values()
        array: Array = output.float().numpy()
        return array

    return run


def _refuse_several(path: Path, outputs: int) -> None:
    """Raises `UsageError` unless a network has one output of real numbers."""
    if outputs != 1:
        raise UsageError(
            f"{str(path)!r} returns {outputs} outputs of real numbers; --accuracy needs a classifier, which has one."
        )


def _sized(session: Session) -> Callable[[Array], Array]:
    """Returns the session's `run`, one input at a time for a file that was made for a batch of one."""
    if session.input.shape[:1] != (1,):
        return session.run
    return lambda inputs: np.concatenate([session.run(one[None]) for one in inputs])
