"""What a model is, beside its weights: the architecture, what it takes as input, how it was converted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from dsr_tool.errors import FormatError

__all__ = ["LONGEST_SIDE", "MOST_CLASSES", "ModelConfig", "Preprocessing", "installed_versions"]

MOST_CLASSES, LONGEST_SIDE = 10**6, 1 << 20


def installed_versions() -> dict[str, str]:
    """Versions of what makes a file, for the record in it."""
    return {name: version(name) for name in ("dsr-tool", "torch", "torchvision")}


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes an input: resize the short side, crop the centre, scale to [0, 1], normalise.

    Attributes:
        resize: length of the short side in pixels; 0 to leave the size as it is.
        crop: side of the centred square in pixels; 0 for none.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
        interpolation: `bilinear`, `bicubic` or `nearest`.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class ModelConfig:
    """The part of a model folder or archive that says what the model is.

    Attributes:
        source: `torchvision`, `paper` for a network of the papers', `callable` for one that a function of the user's
            own returns, or `module` for one that was given as it is.
        architecture: name of the model, `module:callable`, or the class name of the module.
        num_classes: length of the output.
        input_shape: channels, frames for video, height, width of one input; empty while unknown.
        preprocessing: how pictures become inputs.
        labels: class names, or none.
        conversion: how the model was converted: budget, distribution, seed, for the record.
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
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
            FormatError: a field is missing, unknown or of the wrong type.
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
                width=float(data.get("width", 1)),  # older files have none
            )
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the model's description is not understood: {error!r}; the file is damaged.") from error
        shape_allowed = all(0 < n < LONGEST_SIDE for n in config.input_shape)
        if not (0 <= config.num_classes <= MOST_CLASSES and shape_allowed and 0 < config.width <= 1):
            raise FormatError(
                f"the model's description claims {config.num_classes} classes, inputs of {config.input_shape} and "
                f"width {config.width}; the file is damaged."
            )
        return config


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value
