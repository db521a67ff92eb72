import json
import sys
import types
from importlib.metadata import EntryPoint

import pytest
from torch import nn

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.methods import Static, plugins
from dsr_tool.recipes.apply import (
    override,
    parse_assignment,
    require_model,
    resolve_conversion,
    resolve_training,
    training_arguments,
)
from dsr_tool.recipes.files import families, find_recipe
from dsr_tool.recipes.recipe import Recipe
from dsr_tool.train import TrainSettings
from dsr_tool.train.optimizers import lr_factor

ROW = "lenet-300-100/dsr@0.99"
QUICK = (
    "--data",
    "digits",
    "--set",
    "epochs=1",
    "--set",
    "every=1",
    "--set",
    "target=300",
    "--set",
    "device=cpu",
    "--quiet",
)


@pytest.mark.parametrize("family", families())
def test_every_shipped_row_is_allowed(family):
    for row in families()[family].rows():
        override(row)
        TrainSettings(**training_arguments(row)).check()


def test_shipped_rows_have_the_schedules_of_the_paper():
    steps = 500 * 200
    method = TrainSettings(**training_arguments(find_recipe("wrn-28-2/dsr@0.9"))).make_method(steps)
    assert method.schedule.periods == ((0, 100), (25 * 500, 200), (80 * 500, 400), (140 * 500, 800))
    assert method.schedule.stop == 190 * 500 and method.target == 20000
    steps = 5004 * 100
    method = TrainSettings(**training_arguments(find_recipe("resnet50/set@0.9"))).make_method(steps)
    assert method.schedule.periods == tuple((5004 * e, 1000 * 2**i) for i, e in enumerate((0, 25, 50, 75)))
    prunes = TrainSettings(**training_arguments(find_recipe("wrn-28-2/gmp@0.9"))).make_method(500 * 50)
    assert sum(map(prunes.due, range(1, 500 * 50 + 1))) == 20 and prunes.final_step == 40 * 500


def test_the_authors_schedule_on_mnist_is_theirs():
    """Their mnist_schedule.yaml and prune_schedule_mnist.yaml, and the options of mnist_experiments.yaml."""
    family = "lenet-300-100-paper"
    settings = TrainSettings(**training_arguments(find_recipe(f"{family}/dsr@0.99")))
    factor = lr_factor(settings, 600)
    rates = {epoch: 0.1 * factor(600 * epoch) for epoch in (0, 24, 25, 49, 50, 74, 75, 99)}
    expected = {0: 0.1, 24: 0.1, 25: 0.02, 49: 0.02, 50: 0.004, 74: 0.004, 75: 0.0008, 99: 0.0008}
    assert rates == pytest.approx(expected)
    method = settings.make_method(600 * 100)
    assert method.schedule.periods == tuple((600 * epoch, 100 * 2**i) for i, epoch in enumerate((0, 25, 50, 75)))
    assert method.schedule.stop == 600 * 90 and method.target == 600 and method.threshold == 1e-3
    assert (settings.l1, settings.weight_decay, settings.batch_size) == (1e-4, 0.0, 100)
    static = TrainSettings(**training_arguments(find_recipe(f"{family}/static@0.99")))
    assert (static.l1, static.weight_decay, static.epochs) == (0.0, 1e-4, 100)
    pruning = TrainSettings(**training_arguments(find_recipe(f"{family}/gmp@0.99")))
    gmp = pruning.make_method(600 * 39)
    assert [step / 600 for step in range(1, 600 * 39) if gmp.due(step)] == list(range(2, 21, 2))
    factor = lr_factor(pruning, 600)
    rates = {epoch: 0.02 * factor(600 * epoch) for epoch in (1, 19, 20, 29, 30, 38)}
    assert rates == pytest.approx({1: 0.02, 19: 0.02, 20: 0.004, 29: 0.004, 30: 0.0008, 38: 0.0008})


@pytest.mark.parametrize("family", ["lenet-300-100", "lenet-300-100-paper"])
def test_figures_that_a_third_party_read_off_a_plot_are_not_published(family):
    rows = {row.name.partition("/")[2]: row for row in families()[family].rows()}
    assert not any(row.paper for name, row in rows.items() if name.startswith(("set", "deepr", "rigl")))
    assert rows["dsr@0.99"].paper == {"accuracy": 0.9775, "sd": 0.0004, "n": 5}
    for name in ("set", "static", "rigl"):
        other = {"set": "set-erk", "static": "static-erk", "rigl": "rigl-uniform"}[name]
        one, two = rows[f"{name}@0.99"], rows[f"{other}@0.99"]
        assert one.train == two.train and one.options == two.options
        assert {one.model["distribution"], two.model["distribution"]} == {"uniform", "erk"}


def test_the_command_line_wins_over_set_over_the_recipe():
    row = resolve_training(ROW, ["epochs=7", "target=.5", "lr=0.3"], {"lr": 0.2, "threshold": 0.01})
    assert row.train["epochs"] == 7 and row.train["lr"] == 0.2 and row.train["batch_size"] == 100
    assert row.options == {"target": 0.5, "threshold": 0.01}


def test_a_recipes_momentum_is_dropped_with_its_optimizer_and_no_other_is():
    assert find_recipe(ROW).train["momentum"] == 0.9
    for row in (resolve_training(ROW, ["optimizer=adam"], {}), resolve_training(ROW, [], {"optimizer": "adam"})):
        assert "momentum" not in row.train and row.train["optimizer"] == "adam"
    assert resolve_training(ROW, ["optimizer=rmsprop"], {}).train["momentum"] == 0.9
    with pytest.raises(UsageError, match="train.momentum 0.5 needs --optimizer sgd or rmsprop; adamw has none"):
        resolve_training(ROW, ["optimizer=adamw", "momentum=0.5"], {})
    with pytest.raises(UsageError, match="'mine.toml': train.momentum 0.9 needs --optimizer sgd or rmsprop"):
        override(Recipe("mine", train={"optimizer": "adam", "momentum": 0.9}, origin="mine.toml"))
    for row in (
        resolve_training(ROW, ["momentum=0.5"], {"optimizer": "adam"}),
        resolve_training(ROW, ["optimizer=adam"], {"momentum": 0.5}),
        resolve_training(None, [], {"optimizer": "adam", "momentum": 0.5}),
    ):
        with pytest.raises(UsageError, match="--momentum 0.5 needs --optimizer sgd or rmsprop; adam has none"):
            TrainSettings(**training_arguments(row)).check()


def test_set_works_without_a_recipe():
    row = resolve_training(None, ["drop_fraction=0.2"], {"method": "set"})
    assert training_arguments(row) == {"method": "set", "options": {"drop_fraction": 0.2}}
    with pytest.raises(UsageError, match="^--set 'epoch' is unknown; did you mean epochs"):
        resolve_training(None, ["epoch=2"], {})


def test_a_plugin_method_may_have_options_of_any_name(monkeypatch):
    point = EntryPoint("shake", f"{__name__}:_static", "dsr_tool.methods")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == plugins.GROUP else [])
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, types.ModuleType(__name__)))
    monkeypatch.setattr(sys.modules[__name__], "_static", lambda timing, share: Static(), raising=False)
    row = resolve_training(None, ["options.share=0.2", "method=shake"], {})
    assert training_arguments(row) == {"method": "shake", "options": {"share": 0.2}}
    with pytest.raises(UsageError, match="options.share 0.2 is not an option of method dsr; it has target"):
        resolve_training(None, ["options.share=0.2"], {})
    with pytest.raises(UsageError, match="'share' is unknown"):
        resolve_training(None, ["share=0.2", "method=shake"], {})


def test_set_and_option_parse_assignments_alike():
    row = resolve_training(None, [], {"target": 3}, ["cross-layer = false", "eta=.5"])
    assert row.options == {"target": 3, "cross_layer": False, "eta": 0.5}
    assert parse_assignment("epochs=3") == ("epochs", 3) and parse_assignment("scope=global") == ("scope", "global")
    for call in (
        lambda: parse_assignment("=3"),
        lambda: parse_assignment("epochs"),
        lambda: resolve_training(None, [], {}, ["eta"]),
    ):
        with pytest.raises(UsageError, match="^--(set|option) .* is not an assignment; write it as key=value"):
            call()


def test_all_errors_are_listed_with_key_value_and_close_names():
    sets = ["epochs=ten", "lr=-1", "weights=3", "sparsity=1.2", "epoch=3", "nothing", "target=0"]
    with pytest.raises(UsageError) as caught:
        override(find_recipe(ROW), sets)
    message = str(caught.value)
    for part in (
        "lenet-300-100.toml",
        "train.epochs is 'ten', expected a whole number.",
        "train.lr -1 is not allowed; give a positive number.",
        "model.weights is 3, expected a text.",
        "model.sparsity 1.2 is not in [0, 1)",
        "--set 'epoch' is unknown; did you mean epochs",
        "--set 'nothing' is not an assignment; write it as key=value.",
        "options.target 0 is not allowed",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["method=set", "target=600"], "options.target 600 is not an option of method set; it has drop_fraction"),
        (["epochs=5", "schedule=step", "milestones=[2, 9]"], "milestones .* ends after the training"),
        (["milestones=[3, 9]"], "needs --schedule step"),
        (["warmup_epochs=50"], "train.warmup_epochs 50 is not allowed; give fewer than the 40 epochs"),
        (["every=1000000", "stop=0.5"], "leaves dsr no update before its schedule ends"),
        (["target=many"], "an option of method dsr has a value of the wrong type"),
        (["milestones=3"], "expected a list, each a number"),
    ],
)
def test_options_that_contradict_each_other_are_refused(sets, message):
    with pytest.raises(UsageError, match=message):
        override(find_recipe(ROW), sets)


def test_unknown_keys_of_a_file_are_named():
    recipe = Recipe("mine", model={"arhc": "x"}, train={"epohcs": 3}, options={"target": [1]}, origin="mine.toml")
    with pytest.raises(UsageError) as caught:
        override(recipe)
    for part in (
        "'mine.toml': key 'model.arhc'",
        "did you mean model.arch",
        "did you mean train.epochs",
        "options.target",
    ):
        assert part in str(caught.value)


def test_a_recipe_resolves_to_options_of_convert():
    told = resolve_conversion("wrn-28-2/dsr@0.9", ["seed=3"], {"keep_dense": ("a",)})
    assert told["arch"] == "wrn-28-2" and told["sparsity"] == 0.9 and told["keep_dense"] == ("a",)
    told = resolve_conversion("wrn-28-2/dsr@0.9", [], {"budget": "1MB"})
    assert "sparsity" not in told and told["budget"] == "1MB"
    with pytest.raises(UsageError, match="starts from the trained model of method 'dense'"):
        resolve_conversion("wrn-28-2/gmp@0.9", [], {})
    with pytest.raises(UsageError, match="ARCH 'resnet18' is not the 'wrn-28-2' of recipe"):
        resolve_conversion("wrn-28-2/dsr@0.9", [], {"arch": "resnet18"})


def test_a_model_of_another_recipe_is_refused_with_all_differences():
    class Tiny(nn.Linear):
        pass

    model = convert(Tiny(40, 30), sparsity=0.8, positions="random")
    recipe = find_recipe("wrn-28-2/dsr@0.9")
    with pytest.raises(UsageError) as caught:
        require_model(recipe, model, "net")
    for part in ("another model than 'net'", "arch 'Tiny' instead of 'wrn-28-2'", "instead of 0.9"):
        assert part in str(caught.value)
    require_model(Recipe("mine", model={"sparsity": 0.8, "distribution": "uniform"}), model, "net")


def test_two_commands_run_a_row(run, tmp_path):
    net, out = tmp_path / "net", tmp_path / "run"
    assert run("convert", "--recipe", ROW, "-o", net, "--quiet")[0] == 0
    code, text, err = run("train", net, "--recipe", ROW, "-o", out, *QUICK, "--json")
    assert code == 0, err
    assert json.loads(text)["recipe"] == ROW and json.loads(text)["active_weights"] == 2662
    start = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert start["recipe"] == ROW and start["settings"]["options"] == {"target": 300}
    again = find_recipe(str(out / "recipe.toml"))
    assert again.name == ROW and again.train["epochs"] == 1 and again.train["every"] == 1
    assert "resume" not in err
    code, _, err = run("train", net, "--recipe", "lenet-300-100/dsr@0.98", "-o", tmp_path / "other", *QUICK)
    assert code == 2 and "for another model" in err and not (tmp_path / "other").exists()


def test_a_run_does_not_resume_with_another_recipe(run, tmp_path):
    net, out = tmp_path / "net", tmp_path / "run"
    run("convert", "--recipe", ROW, "-o", net, "--quiet")
    run("train", net, "--recipe", ROW, "-o", out, *QUICK)
    code, _, err = run("train", net, "--recipe", "lenet-300-100/static@0.99", "-o", out, *QUICK[:4], "--resume")
    assert code == 2 and "differs from the dsr that" in err
    assert run("train", net, "--recipe", ROW, "-o", out, *QUICK, "--resume")[0] == 0
    assert run("train", net, "-o", out, "--data", "digits", "--resume", "--quiet")[0] == 0


def test_recipes_are_listed_printed_and_copied(run, tmp_path):
    code, text, _ = run("recipes")
    assert code == 0 and "lenet-300-100/dsr@S" in text and "Mostafa & Wang" in text
    code, text, _ = run("recipes", "wrn-28-2")
    assert "wrn-28-2/dsr@0.9" in text and "93.59 % ± 0.17 (n=5)" in text
    code, text, _ = run("recipes", ROW)
    assert text == find_recipe(ROW).to_toml()
    assert run("recipes", ROW, "-o", tmp_path / "mine.toml")[0] == 0
    assert (tmp_path / "mine.toml").read_text() == text
    assert run("recipes", ROW, "-o", tmp_path / "mine.toml")[0] == 1
    document = json.loads(run("recipes", "--json")[1])
    assert document["schema"] == "dsr-tool/recipes/1" and len(document["recipes"]) > 60
    document = json.loads(run("recipes", ROW, "--json")[1])
    assert document["train"]["method"] == "dsr" and document["paper"]["n"] == 5
    assert run("recipes", "-o", tmp_path / "all.toml")[0] == 2


@pytest.mark.parametrize("method", ["thin-dense", "static", "dense"])
def test_convert_makes_the_model_that_train_requires(run, tmp_path, method):
    row = "lenet-300-100/dense" if method == "dense" else f"lenet-300-100/{method}@0.95"
    assert run("convert", "--recipe", row, "-o", tmp_path / "net", "--quiet")[0] == 0
    code, _, err = run("train", tmp_path / "net", "--recipe", row, "-o", tmp_path / "run", *QUICK[:4], "--quiet")
    assert code == 0, err


def test_a_ticket_needs_the_run_that_has_its_masks(run, tmp_path):
    assert run("convert", "--recipe", ROW, "-o", tmp_path / "net", "--quiet")[0] == 0
    ticket = "lenet-300-100/ticket-original@0.99"
    code, _, err = run("convert", "--recipe", ticket, "-o", tmp_path / "ticket")
    assert code == 2 and "needs the masks of a run of method 'dsr'; give its folder as --structure RUN" in err
    assert run("convert", "--recipe", ticket, "--structure", tmp_path / "net", "-o", tmp_path / "ticket", "-q")[0] == 0
    code, _, err = run("train", tmp_path / "ticket", "--recipe", ticket, "-o", tmp_path / "run", *QUICK[:4], "-q")
    assert code == 0, err
