"""A recipe and the command line combined into arguments of `convert` and `TrainSettings`.

What the command line gives wins over `--set`, and that wins over the recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.recipes.files import find_recipe, parse_toml
from dsr_tool.recipes.keys import TRAIN_KEYS, find_key, value_errors
from dsr_tool.recipes.recipe import TABLES, Recipe
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget
from dsr_tool.train.settings import LEARNING_RATES, MOMENTA, TrainSettings

__all__ = [
    "conversion_options",
    "override",
    "parse_assignment",
    "require_model",
    "resolve_conversion",
    "resolve_training",
    "training_arguments",
]

_LINKS = ("from", "structure")
"""Keys of `[model]` that name the method whose run is needed; the user says where that run is."""


def resolve_training(
    name: str | None,
    sets: Sequence[str],
    given: Mapping[str, Any],
    method_options: Sequence[str] = (),
    *,
    base: Recipe | None = None,
) -> Recipe:
    """Returns a recipe with everything that the command line changes in it.

    Args:
        name: name or file of the recipe; None to start from `base`.
        sets: texts of `--set`, see `override`.
        given: settings and options of the method, by name with underscores.
        method_options: texts `key=value` of `--option`, for any option of the method.
        base: settings to start from, of the right types; None for the defaults.

    Raises:
        UsageError: the recipe does not exist, or has values that are not allowed; all of them are listed.
    """
    recipe = find_recipe(name) if name is not None else base or Recipe("")
    settings = {key: value for key, value in given.items() if key in TRAIN_KEYS}
    recipe = replace(recipe, train=_without_momentum(recipe.train, settings))
    if "method" in settings:  # before --set, since the method decides which options --set may change
        recipe = replace(recipe, train={**recipe.train, "method": settings["method"]})
    if name is not None or sets:
        recipe = override(recipe, sets)
    options = {key: value for key, value in given.items() if key not in TRAIN_KEYS}
    pairs = (parse_assignment(text, "--option") for text in method_options)
    options |= {key.replace("-", "_"): value for key, value in pairs}
    return replace(recipe, train={**recipe.train, **settings}, options={**recipe.options, **options})


def override(recipe: Recipe, sets: Sequence[str] = ()) -> Recipe:
    """Returns the recipe with some values replaced, and checks all of it.

    Args:
        recipe: the recipe to change.
        sets: `key=value` each: a key of the file with its table (`train.epochs`) or without, and a value as in TOML,
            where a text needs no quotes.

    Raises:
        UsageError: a text is not `key=value`, a key does not exist or a value is not allowed; all of them are listed.
    """
    # Errors are collected, so that the user sees all of them at once.
    changes: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    errors = []
    for text in sets:
        try:
            key, value = parse_assignment(text)
            table, name = find_key(key)
            changes[table][name] = value
        except UsageError as error:
            errors.append(str(error))
    model, options = ({**getattr(recipe, table), **changes[table]} for table in ("model", "options"))
    train = {**_without_momentum(recipe.train, changes["train"]), **changes["train"]}
    changed = replace(recipe, model=model, train=train, options=options)
    if problems := [*errors, *_problems(changed)]:
        where = f"recipe {recipe.origin or recipe.name!r}: " if recipe.name else ""
        raise UsageError(f"{where}{' '.join(problems)}")
    return changed


def resolve_conversion(name: str, sets: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of `dsr-tool convert` that a recipe and the command line ask for; `arch` is the architecture.

    Args:
        name: name or file of the recipe.
        sets: texts of `--set`, see `override`.
        given: options on the command line, by name with underscores.

    Raises:
        UsageError: the recipe does not exist, has values that are not allowed, is for another architecture than the
            one given, or starts from a run.
    """
    recipe = override(find_recipe(name), sets)
    if start := recipe.model.get("from"):
        raise UsageError(
            f"recipe {recipe.name!r} starts from the trained model of method {start!r}; train that first, then train "
            f"its run folder with `dsr-tool train RUN --recipe {recipe.name}`."
        )
    if "structure" in recipe.model and "structure" not in given:
        raise UsageError(
            f"recipe {recipe.name!r} needs the masks of a run of method {recipe.model['structure']!r}; give its folder "
            f"as --structure RUN."
        )
    options = conversion_options(recipe)
    if given.get("arch", options.get("arch")) != options.get("arch"):
        raise UsageError(
            f"ARCH {given['arch']!r} is not the {options.get('arch')!r} of recipe {recipe.name!r}; leave it out, or "
            f"change the recipe with --set arch={given['arch']}."
        )
    # Exactly one of the two is allowed, and the command line wins.
    for one, other in (("budget", "sparsity"), ("sparsity", "budget")):
        if one in given:
            options.pop(other, None)
    return {**options, **given}


def conversion_options(recipe: Recipe) -> dict[str, Any]:
    """Returns the `[model]` of a recipe as options of `dsr-tool convert`, without those that a mode excludes.

    Masks of another run replace every option but `arch` and `init`, and a thin model has no masks to distribute.
    """
    model = {key: value for key, value in recipe.model.items() if key not in _LINKS}
    if "structure" in recipe.model:
        return {key: value for key, value in model.items() if key in ("arch", "init")}
    if model.get("thin"):
        return {key: value for key, value in model.items() if key not in ("distribution", "positions", "granularity")}
    return model


def training_arguments(recipe: Recipe) -> dict[str, Any]:
    """Returns the `[train]` and `[options]` of a recipe as arguments of `TrainSettings`."""
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in recipe.train.items()}
    return {**settings, "options": dict(recipe.options)} if recipe.options else settings


def require_model(recipe: Recipe, model: SparseModel, where: str) -> None:
    """Raises `UsageError`, which lists all differences, if a recipe is for another model than the one at `where`."""
    config = model.config
    thin = config.conversion.get("thin")  # describes the sparse model that has as many parameters
    actual: dict[str, Any] = {**config.conversion, "arch": config.architecture, "thin": thin is not None}
    if isinstance(thin, Mapping):
        actual["sparsity"] = thin.get("sparsity")
    elif model.prunable_weights:
        actual["sparsity"] = round(model.sparsity, 4)
    differences = [
        f"{name} {actual[name]!r} instead of {wanted!r}"
        for name, wanted in conversion_options(recipe).items()
        if name in actual and not _nearly_equal(actual[name], wanted)
    ]
    if differences:
        raise UsageError(
            f"recipe {recipe.name!r} is for another model than {where!r}, which has {', '.join(differences)}; convert "
            f"one with --recipe {recipe.name}, or change the recipe with --set."
        )


def parse_assignment(text: str, option: str = "--set") -> tuple[str, Any]:
    """Returns key and value of a text `key=value`; raises `UsageError`, which names the option, for any other text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{option} {text!r} is not an assignment; write it as key=value.")
    return key.strip(), _parse_value(value.strip())


def _parse_value(text: str) -> object:
    """Parses a value as TOML, else as a number that TOML does not allow, such as .5, else as a text without quotes."""
    try:
        value: object = parse_toml(f"value = {text}", "--set")["value"]
        return value
    except FormatError:
        try:
            return float(text)
        except ValueError:
            return text


def _without_momentum(train: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Drops the recipe's momentum if the optimizer is replaced by one that has none."""
    has_none = given.get("optimizer") in LEARNING_RATES.keys() - MOMENTA
    return {key: value for key, value in train.items() if not (has_none and key == "momentum")}


def _problems(recipe: Recipe) -> Iterator[str]:
    """Yields a sentence for everything in a recipe that is not allowed."""
    wrong = dict(value_errors(recipe))
    yield from wrong.values()
    # Values of the wrong type are reported above; the rest must still be checked together.
    good = replace(
        recipe,
        train={key: value for key, value in recipe.train.items() if f"train.{key}" not in wrong},
        options={key: value for key, value in recipe.options.items() if f"options.{key}" not in wrong},
    )
    if "sparsity" in recipe.model and "model.sparsity" not in wrong:
        try:
            Budget.of_sparsity(recipe.model["sparsity"])
        except UsageError as error:
            yield f"model.{error}"
    # A recipe may be meant for another machine, so whether this one has a GPU does not matter here.
    settings = replace(TrainSettings(**training_arguments(good)), device="auto", precision="fp32")
    yield from map(_name_key, settings.problems())


def _name_key(text: str) -> str:
    """Rewrites a sentence about an option, `--stop 2 is not ...`, as one about a key, `train.stop 2 is not ...`."""
    option = re.match(r"(?P<method>[a-z-]+ )?--(?P<name>[a-z-]+) ", text)
    # The problem of a method's option begins with the method, as in "dsr --target 0 is not ...".
    if option is None or (option["method"] or "").startswith("-"):
        return text
    table = "options" if option["method"] else "train"
    return f"{table}.{option['name'].replace('-', '_')} {text[option.end() :]}"


def _nearly_equal(actual: object, wanted: object) -> bool:
    """Returns whether a model has a value that a recipe asks for; numbers may differ a little."""
    if isinstance(actual, (int, float)) and isinstance(wanted, (int, float)):
        # Counts are whole, so a sparsity is only nearly met: within 0.2 % of the density, plus 0.001 below 0.5.
        return abs(actual - wanted) <= 2e-3 * max(1 - wanted, 1e-3) + 1e-3 * (wanted < 0.5)
    if isinstance(wanted, (list, tuple)):
        return isinstance(actual, (list, tuple)) and list(actual) == list(wanted)
    return actual == wanted
