"""A recipe against what there is to be told: options of `convert`, of a training, and of its method."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsr_tool.errors import FormatError, UsageError, unknown_name
from dsr_tool.recipes.files import find_recipe, parse_toml
from dsr_tool.recipes.keys import MODEL_KEYS, OPTION_KEYS, TRAIN_KEYS, wrong_values
from dsr_tool.recipes.recipe import TABLES, Recipe
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget
from dsr_tool.train.settings import LEARNING_RATES, MOMENTA, TrainSettings

__all__ = [
    "as_run",
    "changed",
    "conversion",
    "conversion_options",
    "own_options",
    "pair",
    "require_model",
    "settings",
]

_KEYS = {"train": TRAIN_KEYS, "model": MODEL_KEYS, "options": OPTION_KEYS}
_LINKS = ("from", "structure")
"""Names of methods whose runs are needed; where those lie is the user's to say."""


def as_run(name: str | None, sets: Sequence[str], given: Mapping[str, Any]) -> Recipe:
    """The recipe of a name or file, as it is run: what is `given` on the command line wins over `sets`, those over it.

    Args:
        name: of the recipe; None for an empty one.
        sets: see `changed`.
        given: settings and options of methods.

    Raises:
        UsageError: no such recipe, or one with values that are not allowed; all of them are listed.
    """
    recipe = find_recipe(name) if name is not None else Recipe("")
    own = {key: value for key, value in given.items() if key in TRAIN_KEYS}
    recipe = replace(recipe, train=_kept(recipe.train, own))
    if "method" in own:  # before --set, which knows the options of one method
        recipe = replace(recipe, train={**recipe.train, "method": own["method"]})
    if name is not None or sets:
        recipe = changed(recipe, sets)
    options = {key: value for key, value in given.items() if key not in TRAIN_KEYS}
    return replace(recipe, train={**recipe.train, **own}, options={**recipe.options, **options})


def changed(recipe: Recipe, sets: Sequence[str] = ()) -> Recipe:
    """The recipe with some values replaced, and all of it checked.

    Args:
        recipe: to begin with.
        sets: `key=value` each; the key as in the file, with its table (`train.epochs`) or without, the value as in
            TOML, where text needs no quotes.

    Raises:
        UsageError: something that is no `key=value`, keys that do not exist and values that are not allowed; all of
            them are listed.
    """
    given: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    errors = []
    # The method first, since it decides which options there are.
    for text in sorted(sets, key=lambda text: not text.startswith(("method=", "train.method="))):
        try:
            key, value = pair(text)
            table, name = _place(key)
            given[table][name] = value
        except UsageError as error:
            errors.append(str(error))
    model, options = ({**getattr(recipe, table), **given[table]} for table in ("model", "options"))
    train = {**_kept(recipe.train, given["train"]), **given["train"]}
    made = replace(recipe, model=model, train=train, options=options)
    if problems := [*errors, *_problems(made)]:
        where = f"recipe {recipe.origin or recipe.name!r}: " if recipe.name else ""
        raise UsageError(f"{where}{' '.join(problems)}")
    return made


def _kept(train: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings where others are given: its momentum goes with its optimizer, when the other has none."""
    without = [name for name in LEARNING_RATES if name not in MOMENTA]
    left = ("momentum",) if given.get("optimizer") in without else ()
    return {key: value for key, value in train.items() if key not in left}


def _problems(recipe: Recipe) -> Iterator[str]:
    """A sentence for everything in a recipe that is not allowed."""
    wrong = dict(wrong_values(recipe))
    yield from wrong.values()
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
    # A recipe may be meant for another machine.
    here = replace(TrainSettings(**settings(good)), device="auto", precision="fp32")
    yield from map(_as_key, here.problems())


def own_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a method, whichever it has, from `key=value` texts; raises `UsageError` for anything else."""
    return {key.replace("-", "_"): value for key, value in (pair(text, "--option") for text in texts)}


def settings(recipe: Recipe) -> dict[str, Any]:
    """Arguments of `TrainSettings`."""
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in recipe.train.items()}
    return {**told, "options": dict(recipe.options)} if recipe.options else told


def conversion(name: str, sets: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe tells `convert`, by the names of its options; `arch` is the source.

    Args:
        name: of the recipe, or its file.
        sets: see `changed`.
        given: what is given on the command line, and wins.

    Raises:
        UsageError: no such recipe, or one with values that are not allowed; or it is for another architecture than
            the one given, or starts from a run.
    """
    recipe = changed(find_recipe(name), sets)
    if start := recipe.model.get("from"):
        raise UsageError(
            f"recipe {recipe.name!r} starts from the trained model of method {start!r}; train that first, and then its "
            f"run folder with `dsr-tool train RUN --recipe {recipe.name}`."
        )
    told = conversion_options(recipe)
    if "structure" in recipe.model and "structure" not in given:
        raise UsageError(
            f"recipe {recipe.name!r} takes the masks of a run of method {recipe.model['structure']!r}; give its folder "
            f"as --structure RUN."
        )
    if given.get("arch", told.get("arch")) != told.get("arch"):
        raise UsageError(
            f"ARCH {given['arch']!r} is not the {told.get('arch')!r} of recipe {recipe.name!r}; leave it out, or "
            f"change the recipe with --set arch={given['arch']}."
        )
    for one, other in (("budget", "sparsity"), ("sparsity", "budget")):
        if one in given:
            told.pop(other, None)
    return {**told, **given}


def conversion_options(recipe: Recipe) -> dict[str, Any]:
    """The model of a recipe by the names of `convert`'s options, without those that others leave no room for."""
    model = {key: value for key, value in recipe.model.items() if key not in _LINKS}
    if "structure" in recipe.model:
        return {key: value for key, value in model.items() if key in ("arch", "init")}
    if model.get("thin"):
        return {key: value for key, value in model.items() if key not in ("distribution", "positions", "granularity")}
    return model


def require_model(recipe: Recipe, model: SparseModel, where: str) -> None:
    """Raise `UsageError` when a model is not the one that a recipe is for; all differences are listed."""
    config = model.config
    beside = config.conversion.get("thin")  # the sparse model that a thin one has as many parameters as
    has: dict[str, Any] = {**config.conversion, "arch": config.architecture, "thin": beside is not None}
    if isinstance(beside, Mapping):
        has["sparsity"] = beside.get("sparsity")
    elif model.prunable_weights:
        has["sparsity"] = round(model.sparsity, 4)
    wanted = conversion_options(recipe)
    differing = [
        f"{name} {has[name]!r} instead of {want!r}"
        for name, want in wanted.items()
        if name in has and not _same(has[name], want)
    ]
    if differing:
        raise UsageError(
            f"recipe {recipe.name!r} is for another model than {where!r}, which has {', '.join(differing)}; convert "
            f"one with --recipe {recipe.name}, or change the recipe with --set."
        )


def _same(has: Any, want: Any) -> bool:
    if isinstance(has, (int, float)) and isinstance(want, (int, float)):
        # Counts are whole, so that the sparsity that was asked for is met only nearly.
        return abs(has - want) <= 2e-3 * max(1 - want, 1e-3) + 1e-3 * (want < 0.5)
    return list(has) == list(want) if isinstance(want, (list, tuple)) else bool(has == want)


def pair(text: str, option: str = "--set") -> tuple[str, Any]:
    """Key and value of `key=value`; raises `UsageError`, which names the option, for anything else."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{option} {text!r} is not understood; write it as key=value.")
    return key.strip(), _value(value.strip())


def _place(key: str) -> tuple[str, str]:
    """The table that a key belongs to, and its name there; raises `UsageError` where none has it."""
    table, _, name = key.rpartition(".")
    found = next((known for known, names in _KEYS.items() if name in names and table in ("", known)), "")
    # A method from elsewhere may have options of any name; those of ours are looked at together with the method.
    if not found and table == "options" and name:
        return table, name
    if not found:
        raise unknown_name("--set", key, [*MODEL_KEYS, *TRAIN_KEYS, *OPTION_KEYS])
    return found, name


def _value(text: str) -> Any:
    """A value as TOML, or else as a number such as .5, or else the text itself."""
    try:
        return parse_toml(f"value = {text}", "--set")["value"]
    except FormatError:
        try:
            return float(text)
        except ValueError:
            return text


def _as_key(text: str) -> str:
    """A sentence about an option of the command line as one about a key of a file."""
    told = re.match(r"(?P<method>[a-z-]+ )?--(?P<name>[a-z-]+) ", text)
    if told is None or (told["method"] or "").startswith("-"):
        return text
    table = "options" if told["method"] else "train"
    return f"{table}.{told['name'].replace('-', '_')} {text[told.end() :]}"
