"""Description of a model beside its weights: architecture, input, preprocessing, and how it was converted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from dsr_tool.errors import FormatError

__all__ = ["LONGEST_SIDE", "MOST_CLASSES", "ModelConfig", "Preprocessing", "installed_versions"]

MOST_CLASSES, LONGEST_SIDE = 10**6, 1 << 20
"""Largest number of classes, and largest size of an input dimension, that a file may claim."""


def installed_versions() -> dict[str, str]:
    """Returns the versions of the packages that write a file, for the record in it."""
    return {name: version(name) for name in ("dsr-tool", "torch", "torchvision")}


@dataclass(frozen=True)
class Preprocessing:
    """Steps from a picture to an input: resize the short side, crop the centre, scale to [0, 1], normalise.

    Attributes:
        resize: length of the short side in pixels; 0 skips the step.
        crop: side of the centred square in pixels; 0 skips the step.
        mean: mean per channel that is subtracted, of values in [0, 1].
        std: standard deviation per channel by which is divided.
        interpolation: `bilinear`, `bicubic` or `nearest`.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class ModelConfig:
    """Description of a model, as model folders and archives hold it.

    Attributes:
        source: origin of the network: `torchvision`, `paper` (a network of a paper), `callable` (a function of the
            user) or `module` (a module that the user passed).
        architecture: name of the model, `module:callable`, or the class name of the module.
        num_classes: length of the output.
        input_shape: shape of one input (channels, frames for video, height, width); empty if unknown.
        preprocessing: steps from a picture to an input.
        labels: names of the classes; may be empty.
        conversion: options of the conversion (budget, distribution, seed), for the record.
        width: factor on the channels of the architecture, in (0, 1]; below 1 for a thin model.
    """

    source: str
    architecture: str
    num_classes: int = 1000
    input_shape: tuple[int, ...] = ()
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    labels: tuple[str, ...] = ()
    conversion: dict[str, Any] = field(default_factory=dict)
    width: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Returns the description of plain values, the inverse of `to_dict`. Unknown fields are ignored.

        Raises:
            FormatError: a field is missing, of the wrong type or out of range.
        """
        try:
            picture = data["preprocessing"]
            config = cls(
                source=_text(data["source"]),
                architecture=_text(data["architecture"]),
                num_classes=int(data["num_classes"]),
                input_shape=tuple(int(n) for n in data["input_shape"]),
                preprocessing=Preprocessing(
                    int(picture["resize"]),
                    int(picture["crop"]),
                    tuple(float(x) for x in picture["mean"]),
                    tuple(float(x) for x in picture["std"]),
                    _text(picture["interpolation"]),
                ),
                labels=tuple(_text(label) for label in data["labels"]),
                conversion=dict(data["conversion"]),
                width=float(data.get("width", 1)),  # older files have no width
            )
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the model's description is invalid: {error!r}; the file is damaged.") from error
        shape_allowed = all(0 < n < LONGEST_SIDE for n in config.input_shape)
        if not (0 <= config.num_classes <= MOST_CLASSES and shape_allowed and 0 < config.width <= 1):
            raise FormatError(
                f"the model's description claims {config.num_classes} classes, inputs of {config.input_shape} and "
                f"width {config.width}; the file is damaged."
            )
        return config


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value
