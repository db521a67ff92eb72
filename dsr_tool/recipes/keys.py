"""Keys that a recipe may have, and their types.

Each is read where it is defined: the parameters of `convert`, the fields of `TrainSettings`, the options of methods.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from converters.conversion import convert
from dsr_tool.errors import closest, unknown_name
from dsr_tool.methods import METHODS, option_names
from dsr_tool.recipes.recipe import Recipe
from dsr_tool.train.settings import TrainSettings

__all__ = ["MODEL_KEYS", "TRAIN_KEYS", "find_key", "to_parameters", "value_errors"]

_PARAMETERS = {"arch": "source", "sparsify": "sparsify_patterns"}
"""Parameters of `convert` whose option has another name, by the name of the option."""
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _model_keys() -> dict[str, Any]:
    """Returns the annotation of each parameter of `convert` that a file can hold, by option name."""
    # Resolved, since annotations are text under `from __future__ import annotations`.
    hints = get_type_hints(convert)
    options = {parameter: option for option, parameter in _PARAMETERS.items()}
    names = [name for name in inspect.signature(convert).parameters if not name.startswith("on_") and name != "seed"]
    # A file can name an architecture, but not hold a module; and it names the method whose run it starts from.
    return {options.get(name, name): hints[name] for name in names} | {"arch": str, "from": str}


MODEL_KEYS = _model_keys()
"""Annotations of the keys of `[model]`."""
TRAIN_KEYS = {f.name: get_type_hints(TrainSettings)[f.name] for f in fields(TrainSettings) if f.name != "options"}
"""Annotations of the keys of `[train]`."""


def to_parameters(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options of `dsr-tool convert` as keyword arguments of `convert`."""
    return {_PARAMETERS.get(name, name): value for name, value in options.items()}


def find_key(key: str) -> tuple[str, str]:
    """Returns the table of a key, which may be written before it as in `train.epochs`, and its name there.

    Raises:
        UsageError: no table has this key.
    """
    table, _, name = key.rpartition(".")
    known = {"train": TRAIN_KEYS, "model": MODEL_KEYS, "options": option_names()}
    found = next((other for other, names in known.items() if name in names and table in ("", other)), "")
    # A plugin method may have options of any name; `value_errors` checks those of our methods once the method is known.
    if not found and table == "options" and name:
        return table, name
    if not found:
        raise unknown_name("--set", key, [name for names in known.values() for name in names])
    return found, name


def value_errors(recipe: Recipe, called: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields each key that does not exist or has a value of the wrong type, with a sentence.

    Args:
        recipe: the recipe.
        called: names of its tables in another file; those of recipes when absent.
    """
    names = {"model": "model", "train": "train", "options": "options", **(called or {})}
    for table, hints in (("model", MODEL_KEYS), ("train", TRAIN_KEYS)):
        for key, value in getattr(recipe, table).items():
            where = f"{names[table]}.{key}"
            if key not in hints:
                yield where, str(unknown_name("key", where, [f"{names[table]}.{name}" for name in hints]))
            elif not _matches(value, hints[key]):
                yield where, f"{where} is {value!r}, expected {_describe(hints[key])}."
    name = str(recipe.train.get("method", TrainSettings.method))
    method = METHODS.get(name)  # None for a plugin method, which checks its options itself
    for key, value in recipe.options.items():
        where = f"{names['options']}.{key}"
        if method is not None and key not in (known := method.option_defaults()):
            close = closest(key, known)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known) or 'none'}."
            yield where, f"{where} {value!r} is not an option of method {name}; {hint}"
        elif not isinstance(value, (str, int, float)):
            yield where, f"{where} is {value!r}, expected a number or a text."


def _matches(value: object, hint: Any) -> bool:
    """Returns whether a plain value fits an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_matches(value, one) for one in get_args(hint))
    if get_origin(hint) in (tuple, Sequence):
        return isinstance(value, (list, tuple)) and all(_matches(one, get_args(hint)[0]) for one in value)
    if hint is float:  # TOML writes 1 for 1.0, and True is an int in Python
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint in (str, bool) and isinstance(value, hint)


def _describe(hint: Any) -> str:
    """Returns the words for an annotation; empty for types that no file can hold, such as a path."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(text for one in get_args(hint) if (text := _describe(one))))
    if get_origin(hint) in (tuple, Sequence):
        return f"a list, each {_describe(get_args(hint)[0])}"
    return _KINDS.get(hint, "")
