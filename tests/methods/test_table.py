"""The table of methods: every fact in a row is true, and a method that is added to it is known everywhere."""

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.cli.group import cli
from dsr_tool.errors import UsageError
from dsr_tool.methods import METHODS, SET, ReallocationSchedule, attach, make, option_names
from dsr_tool.methods.final_sparsity import active_count
from dsr_tool.recipes.apply import override
from dsr_tool.recipes.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
STEPS = 40


class Toy(SET):
    """SET with another option and schedule."""

    name = "toy"
    summary = "is here to be added to the table"
    bytes_per_weight = 7

    def __init__(self, schedule, *, share=0.25):
        super().__init__(schedule, drop_fraction=share)

    @classmethod
    def default_schedule(cls, timing):
        return ReallocationSchedule.times(4, **timing)


@pytest.fixture(name="_toy")
def _toy_in_the_table(monkeypatch):
    """Adds one line to the table."""
    monkeypatch.setitem(METHODS, Toy.name, Toy)


def options_of(name):
    final = 0.8 if METHODS[name].starts_dense else 0.95
    return {"final_sparsity": final} if "final_sparsity" in METHODS[name].option_defaults() else {}


def model(sparsity):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10))
    return convert(net, sparsity=sparsity, input_shape=(40,), positions="random")


def trained(name, sparsity=None):
    """Returns a model after a short training, and its attached method."""
    made = model((0 if METHODS[name].starts_dense else 0.7) if sparsity is None else sparsity)
    optimizer = optim.SGD(made.module.parameters(), 0.05, momentum=0.5)
    attached = attach(made, optimizer, name, total_steps=STEPS, **options_of(name))
    for _ in range(STEPS):
        optimizer.zero_grad()
        made(torch.randn(8, 40)).square().mean().backward()
        optimizer.step()
    return made, attached


def reachable(thing, found):
    """Collects the tensors that objects of dsr_tool hold, by id."""
    if isinstance(thing, torch.Tensor):
        found[id(thing)] = thing
    elif isinstance(thing, dict):
        for value in thing.values():
            reachable(value, found)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            reachable(value, found)
    elif type(thing).__module__.startswith("dsr_tool."):
        reachable(vars(thing), found)


def held_bytes(attached):
    found = {}
    reachable([attached.method, attached._keeper, attached.model.masks, attached.model.weights], found)
    return sum(tensor.nbytes for tensor in found.values())


def test_a_method_added_to_the_table_is_known_to_every_command(_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    help_text = " ".join(CliRunner().invoke(cli, ["train", "--help"]).output.split())
    assert f"{list(METHODS)[-2]}, toy, or a plugin method" in help_text
    assert "toy is here to be added to the table. Options: share=0.25." in help_text
    assert "share" in option_names()
    convert("lenet-300-100", sparsity=0.9, input_size=8).save("model")
    train = ["train", "model", "--data", "digits", "--epochs", "1", "--method", "toy", "--json", "-q"]
    done = CliRunner().invoke(cli, [*train, "-o", "run", "--option", "share=0.5"])
    assert done.exit_code == 0, done.output
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert log[0]["settings"]["method"] == "toy" and log[0]["settings"]["options"] == {"share": 0.5}
    assert len([line for line in log if line["kind"] == "reallocation"]) == 4
    reported = CliRunner().invoke(cli, ["report", "run", "--memory", "--batch", "2", "--json", "-q"])
    prunable = 64 * 300 + 300 * 100 + 100 * 10
    memory = json.loads(reported.stdout)["memory"]["training"]
    assert memory["method"] == {"name": "toy", "bytes": 7 * prunable}
    refused = CliRunner().invoke(cli, [*train, "-o", "other", "--option", "shar=0.5"])
    assert isinstance(refused.exception, UsageError)
    assert "shar is unknown to every method; the options of toy are share." in str(refused.exception)


def test_a_recipe_takes_the_options_of_an_added_method(_toy):
    row = override(Recipe("mine", train={"method": "toy"}), ["share=0.5"])
    assert row.options == {"share": 0.5}
    with pytest.raises(UsageError, match=r"options\.shar 0\.5 is .* option of method toy; did you mean share"):
        override(Recipe("mine", train={"method": "toy"}, options={"shar": 0.5}), [])


@pytest.mark.parametrize("name", METHODS)
def test_options_come_from_the_signature(name):
    row = METHODS[name]
    assert row.name == name
    made = make(name, STEPS, **row.option_defaults() | options_of(name))
    assert isinstance(made, row)
    with pytest.raises(UsageError, match=f"option nothing-such is unknown to every method; .*{name}"):
        make(name, STEPS, nothing_such=1)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_starts_dense_exactly_if_it_refuses_a_sparse_model(name):
    if METHODS[name].starts_dense:
        with pytest.raises(UsageError, match="--sparsity 0"):
            trained(name, sparsity=0.9)
    else:
        trained(name, sparsity=0.9)


@pytest.mark.parametrize("name", METHODS)
def test_the_density_changes_exactly_if_the_row_says_so(name):
    made, attached = trained(name)
    before = model(0 if METHODS[name].starts_dense else 0.7).active_weights
    method = attached.method
    assert (made.active_weights != before) == (method.final_sparsity is not None) == (method.final_step > 0)
    if method.final_sparsity is not None:
        assert made.active_weights == active_count(method.final_sparsity, list(made.sizes.values()))


@pytest.mark.parametrize("name", METHODS)
def test_bytes_per_weight_are_those_that_the_method_holds(name):
    """Measured as the tensors that its objects hold in addition to those of static."""
    plain = held_bytes(trained("static")[1])
    row, made = METHODS[name], model(0 if METHODS[name].starts_dense else 0.7)
    attached = attach(
        made, optim.SGD(made.module.parameters(), 0.05, momentum=0.5), name, total_steps=STEPS, **options_of(name)
    )
    # Until after the first update, in which a method may allocate what it holds from then on.
    for _ in range(next((step for step in range(1, STEPS) if attached.method.due(step)), 1)):
        made(torch.randn(8, 40)).square().mean().backward()
        attached._keeper.optimizer.step()
    per_output = 8 * sum(weight.shape[0] for weight in made.weights.values())  # thresholds of dst, and their momentum
    extra = held_bytes(attached) - plain
    assert 0 <= extra - row.bytes_per_weight * made.prunable_weights <= per_output


@pytest.mark.parametrize("name", METHODS)
def test_the_default_schedule_is_that_of_a_made_method(name):
    timing = {"total_steps": 4000, "every": None}
    expected = METHODS[name].default_schedule(timing)
    assert getattr(make(name, 4000, **options_of(name)), "schedule", None) == expected
    assert (expected is None) == (name in ("static", "dense", "tied"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_line_of_help_and_a_paragraph(name):
    summary = METHODS[name].summary
    assert summary and not summary.endswith(".") and len(summary) < 90
    page = DOCS.read_text(encoding="utf-8")
    assert re.search(rf"^## {name}$", page, re.MULTILINE), f"docs/methods.md has no section on {name}"
    assert re.search(rf"^\|.*\[{name}\]\(#{name}\)", page, re.MULTILINE), f"the table of docs/methods.md lacks {name}"
