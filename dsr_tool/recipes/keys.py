"""The keys that a recipe may have, and the type of each: parameters of `convert`, of a training, and of its method."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from converters.conversion import convert
from dsr_tool.errors import closest, unknown_name
from dsr_tool.methods import OPTIONS
from dsr_tool.recipes.recipe import Recipe
from dsr_tool.train.settings import TrainSettings

__all__ = ["MODEL_KEYS", "OPTION_KEYS", "TRAIN_KEYS", "wrong_values"]

_RENAMED = {"source": "arch", "sparsify_patterns": "sparsify"}
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _conversion_hints() -> dict[str, Any]:
    """The type of each parameter of `convert` that a file can hold, by its name there."""
    hints = get_type_hints(convert)
    names = [name for name in inspect.signature(convert).parameters if not name.startswith("on_")]
    return {_RENAMED.get(name, name): hints[name] for name in names} | {"source": str, "arch": str, "from": str}


MODEL_KEYS = {name: hint for name, hint in _conversion_hints().items() if name not in ("source", "seed")}
TRAIN_KEYS = {f.name: get_type_hints(TrainSettings)[f.name] for f in fields(TrainSettings) if f.name != "options"}
OPTION_KEYS = sorted({name for names in OPTIONS.values() for name in names})


def wrong_values(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys that do not exist or have values of another type, each with a sentence."""
    for table, hints in (("model", MODEL_KEYS), ("train", TRAIN_KEYS)):
        for key, value in getattr(recipe, table).items():
            if key not in hints:
                known = [f"{table}.{name}" for name in hints]
                yield f"{table}.{key}", str(unknown_name("key", f"{table}.{key}", known))
            elif not _is_a(value, hints[key]):
                yield f"{table}.{key}", f"{table}.{key} is {value!r}, and should be {_described(hints[key])}."
    method = str(recipe.train.get("method", "dsr"))
    own = OPTIONS.get(method, ())
    for key, value in recipe.options.items():
        if method in OPTIONS and key not in own:
            close = closest(key, own)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(own) or 'none'}."
            yield f"options.{key}", f"options.{key} {value!r} is no option of method {method}; {hint}"
        elif not isinstance(value, (str, int, float)):
            yield f"options.{key}", f"options.{key} is {value!r}, and should be a number or a text."


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value fits an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_a(value, one) for one in get_args(hint))
    if get_origin(hint) in (tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(_is_a(one, get_args(hint)[0]) for one in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint in (str, bool) and isinstance(value, hint)


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(text for one in get_args(hint) if (text := _described(one))))
    if get_origin(hint) in (tuple, Sequence):
        return f"a list, each {_described(get_args(hint)[0])}"
    return _KINDS.get(hint, "")
