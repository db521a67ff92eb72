"""The file of `--config`: model, data and all settings of a training, as the `settings.json` of a run folder has them.

The same keys may be written as TOML: the ending of the file says which it is. A recipe is another file: it knows no
model folder and no data, and belongs to `--recipe`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from dsr_tool.errors import FormatError, UsageError, first_line, unknown_name
from dsr_tool.files import require_file
from dsr_tool.recipes.files import parse_toml
from dsr_tool.recipes.keys import TRAIN_KEYS, value_errors
from dsr_tool.recipes.recipe import Recipe
from dsr_tool.train.datasets import names_code
from dsr_tool.train.resume import FOUND
from dsr_tool.train.settings import TrainSettings

__all__ = ["Config", "read_config"]

_TEXTS = ("model", "data", "log")
"""Keys of the file besides `settings`, each as the argument or option of that name."""
_MOST = 8
"""Faults that a message lists."""


@dataclass(frozen=True)
class Config:
    """A file asks for these things; what the command line gives wins.

    Attributes:
        path: path of the file, for messages.
        model: path of the model folder; None if the file does not say.
        data: data set, as `load_data` takes it; None if the file does not say.
        log: value of `--log`; None for none.
        recipe: settings and options of the method, without a name.
    """

    path: str
    model: str | None
    data: str | None
    log: str | None
    recipe: Recipe

    def for_method(self, method: str | None) -> Recipe:
        """Returns the settings for a method that the command line gives.

        The options of a method go with it: another one does not get those that the file has for its own.
        """
        own = self.recipe.train.get("method", TrainSettings.method)
        return self.recipe if method in (None, own) else replace(self.recipe, options={})

    def changes(self, row: Recipe, given: Mapping[str, str | None]) -> str:
        """Returns a line that says what the command line changes; empty if nothing.

        Args:
            row: the settings after the command line.
            given: model, data and log after the command line.
        """
        before, after = ({**one.train, **one.options} for one in (self.recipe, row))
        before |= {key: value for key in _TEXTS if (value := getattr(self, key)) is not None}
        after |= {key: value for key, value in given.items() if value is not None}
        told = [
            f"{key.replace('_', '-')} {_plain(after[key])} instead of {_plain(value)}"
            if key in after
            else f"no {key.replace('_', '-')}"
            for key, value in before.items()
            if key not in after or _plain(after[key]) != _plain(value)
        ]
        return f"--config {self.path!r}, with {', '.join(told)}" if told else ""


def read_config(path: Path, given: Mapping[str, object]) -> Config:
    """Reads a file of `--config`.

    Args:
        path: a file that ends in .json or .toml.
        given: model and data that the command line gives, or None for each; then the file need not have them.

    Raises:
        FileError: no such file.
        FormatError: the file is not JSON or TOML.
        UsageError: it is a recipe, or keys are unknown, missing, or have values of the wrong type; all are listed. Or
            its data is code, which only the command line may name.
    """
    tables = _read(path)
    if "train" in tables or str(tables.get("schema", "")).startswith("dsr-tool/recipe"):
        raise UsageError(f"--config {str(path)!r} is a recipe; give it as --recipe.")
    settings = tables.get("settings", {})
    table = settings if isinstance(settings, Mapping) else {}
    options = table.get("options", {})
    recipe = Recipe(
        "",
        train={key: _tuple(value) for key, value in table.items() if key != "options" and not _is_default(key, value)},
        options=options if isinstance(options, Mapping) else {},
    )
    faults = list(_faults(tables, given))
    called = {"train": "settings", "options": "settings.options"}
    faults += [text for _, text in value_errors(recipe, called)]
    if faults:
        more = f" And {len(faults) - _MOST} more." if len(faults) > _MOST else ""
        raise UsageError(f"--config {str(path)!r}: {' '.join(faults[:_MOST])}{more}")
    data = tables.get("data")
    if data is not None and given.get("data") is None and names_code(data):
        raise UsageError(
            f"--config {str(path)!r} has data {data!r}, code that no file may name to be run; if you trust it, give "
            f"--data {data} yourself."
        )
    return Config(str(path), tables.get("model"), data, tables.get("log"), recipe)


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        raise UsageError(f"--config {str(path)!r} is a folder; give a file, such as {str(path / 'settings.json')!r}.")
    if path.suffix not in (".json", ".toml"):
        raise UsageError(f"--config {str(path)!r} ends neither in .json nor in .toml; rename the file.")
    require_file(path, "--config file")
    try:
        text = path.read_text(encoding="utf-8")
        tables = parse_toml(text, str(path)) if path.suffix == ".toml" else json.loads(text)
    except FormatError:  # a ValueError too
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"--config file {str(path)!r} cannot be read ({first_line(error)}); correct it.") from error
    if not isinstance(tables, Mapping):
        raise FormatError(f"--config file {str(path)!r} holds no object; give one with model, data and settings.")
    return tables


def _faults(tables: Mapping[str, Any], given: Mapping[str, object]) -> Iterator[str]:
    """Yields a sentence for each key of the file itself that is unknown, missing or of the wrong type."""
    known = [*_TEXTS, "settings", *FOUND]
    for key, value in tables.items():
        if key not in known:
            yield str(unknown_name("key", key, known))
        elif key in _TEXTS and not isinstance(value, str):
            yield f"{key} is {value!r}, expected a text."
        elif key in _TEXTS and not value:
            yield f"{key} is empty; give a value, or leave it out."
    for key in ("settings", *(["settings.options"] if isinstance(tables.get("settings"), Mapping) else [])):
        value = tables["settings"].get("options", {}) if key != "settings" else tables.get(key, {})
        if not isinstance(value, Mapping):
            yield f"{key} is {value!r}, expected a table."
    missing = [key for key in ("model", "data") if key not in tables and given.get(key) is None]
    if missing:
        yield f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; add to the file or the command."


def _is_default(key: str, value: object) -> bool:
    """Returns whether a null stands for a default, as it does in `settings.json`."""
    return value is None and type(None) in get_args(TRAIN_KEYS.get(key))


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: object) -> str:
    """Returns a value as options are written; numbers that are equal are written alike."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_plain, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
