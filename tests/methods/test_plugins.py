"""Plugin methods: the example of the documentation, and everything that can be wrong with one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.errors import CheckFailed, DsrError, UsageError
from dsr_tool.methods import SET, Method, Reallocation, ReallocationSchedule, attach, make, names, plugins
from dsr_tool.methods.final_sparsity import active_count
from dsr_tool.methods.prune import smallest_of_all
from dsr_tool.sparse.active import Positions
from dsr_tool.train.failures import require_end

ALWAYS = ReallocationSchedule(((0, 1),), 10**9)
ROOT = Path(__file__).parents[2]

NETWORK = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
"""


@pytest.fixture
def installed(tmp_path):
    """The example of docs/methods.md as an installed distribution; returns its folder."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition("## A method of your own")[2]
    code, table = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("python", "toml"))
    assert len(code.splitlines()) < 60
    (tmp_path / "shuffle_method.py").write_text(code, encoding="utf-8")
    (tmp_path / "tiny_net.py").write_text(NETWORK, encoding="utf-8")
    info = tmp_path / "shuffle_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shuffle-method\nVersion: 1.0\n")
    group, entry = re.search(r'entry-points\."(.*?)"\]\n(.*)', table).groups()
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry.replace(chr(34), '')}\n")
    return tmp_path


def cli(folder, *arguments):
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from dsr_tool.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_documented_plugin_trains_from_the_command_line(installed):
    made = cli(installed, "convert", "tiny_net:make", "--input-shape", "3,8,8", "--sparsity", 0.8, "-o", "model")
    assert made.returncode == 0, made.stderr
    train = ["train", "model", "--model", "tiny_net:make", "--data", "fake:40", "--batch-size", 8, "--epochs", 1]
    train += ["--method", "shuffle"]
    done = cli(installed, *train, "-o", "run", "--option", "share=0.5", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["method"] == "shuffle"
    log = [json.loads(line) for line in (installed / "run" / "log.jsonl").read_text().splitlines()]
    epoch = next(line for line in log if line["kind"] == "epoch")
    assert epoch["active_weights"] == document["active_weights"]
    assert sum(epoch["dropped"].values()) == sum(epoch["grown"].values()) > 200
    refused = cli(installed, *train, "-o", "other", "--option", "part=0.5")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "method 'shuffle' (entry point shuffle_method:Shuffle of shuffle-method) cannot be made with part=0.5" in (
        refused.stderr
    )
    assert not (installed / "other").exists()


class Wrong(Method):
    """SET with a reallocation that a test changes."""

    name = "wrong"

    def __init__(self, change):
        self.inner, self.change = SET(ALWAYS, drop_fraction=0.3), change

    def due(self, step):
        return step > 0

    def update(self, weights, step, generator):
        return self.change(weights, self.inner.update(weights, step, generator))


@pytest.fixture
def found(monkeypatch):
    """Returns a function that gives the name `mine` to an object, as an entry point does."""

    def point(target):
        monkeypatch.setattr(plugins, "entry_points", lambda group: [entry_point("mine", target)])

    return point


def entry_point(name, target):
    """Returns an entry point that loads an object, or fails as `broken` does."""

    class Found(EntryPoint):
        def load(self):
            return target() if target is broken else target

    return Found(name, f"{name}_method:{name.capitalize()}", plugins.GROUP)


def broken():
    raise ImportError("no module named numba")


def attached_run(method):
    """Returns an optimizer and its attached method, on the network of `attached`."""
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 6)), sparsity=0.6, positions="random")
    optimizer = optim.SGD(model.module.parameters(), lr=0.1)
    run = attach(model, optimizer, method)
    model(torch.randn(4, 12)).square().sum().backward()
    return optimizer, run


def attached(method):
    optimizer, run = attached_run(method)
    return run.model, optimizer


@pytest.mark.parametrize(
    ("target", "what"),
    [
        (broken, r"cannot be loaded \(ImportError: no module named numba\)"),
        (7, "is of type int, expected a Method class or a function"),
        (lambda timing: "nothing", "makes str, expected a Method of dsr_tool.methods"),
        (lambda timing: timing["nonsense"], r"cannot be made with no options \(KeyError: 'nonsense'\)"),
    ],
)
def test_an_entry_point_that_is_no_method_is_refused_in_one_sentence(found, target, what):
    found(target)
    assert names()[-1] == "mine"
    with pytest.raises(
        UsageError,
        match=rf"^method 'mine' \(entry point mine_method:Mine\) {what}; fix the plugin, or give another method",
    ):
        make("mine", 100)
    with pytest.raises(UsageError, match="did you mean mine"):
        make("mime", 100)


def with_flat(positions, flat):
    return Positions.of(flat.sort().values, positions.sizes)


def fewer(_, moved):
    return Reallocation(moved.dropped, with_flat(moved.grown, moved.grown.flat[1:]))


def not_active(_, moved):
    return Reallocation(moved.grown, moved.grown)


def not_free(_, moved):
    return Reallocation(moved.dropped, moved.dropped)


def disordered(weights, moved):
    flat = moved.dropped.flat
    return Reallocation(Positions(weights.sizes, moved.dropped.counts, flat[[1, 0, *range(2, len(flat))]]), moved.grown)


def miscounted(weights, moved):
    return Reallocation(Positions(weights.sizes, (0, sum(moved.dropped.counts)), moved.dropped.flat), moved.grown)


def emptied(weights, moved):
    last = weights.counts[-1]
    dropped = with_flat(moved.dropped, weights.positions.flat[-last:])
    free = torch.ones(sum(weights.sizes), dtype=torch.bool)
    free[weights.positions.flat] = False
    return Reallocation(dropped, with_flat(dropped, free.nonzero().squeeze(1)[:last]))


def too_short(weights, moved):
    return Reallocation(moved.dropped, moved.grown, values=weights.values[1:])


def crash(*_, **__):
    return 1 / 0


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (fewer, "drops 23 weights and grows 22, which changes the budget; .* declares a final_sparsity"),
        (not_active, "wants to drop a weight that is not active"),
        (not_free, "wants to grow a weight that is not free"),
        (disordered, "positions to drop that do not rise"),
        (miscounted, "in other layers"),
        (emptied, "empties layer 1"),
        (too_short, r"gave torch.float32 values of shape \(71,\), expected torch.float32 of shape \(72,\)"),
        (crash, r"failed in update\(\) \(ZeroDivisionError: division by zero\)"),
        (lambda weights, moved: None, "returned NoneType from update\\(\\), expected a Reallocation"),
    ],
)
def test_a_wrong_reallocation_of_a_plugin_is_refused_before_anything_changes(found, change, what):
    found(lambda timing: Wrong(change))
    model, optimizer = attached(make("mine", 100))
    masks = {name: mask.clone() for name, mask in model.masks.items()}
    with pytest.raises(DsrError, match=f"method '?mine.*{what}"):
        optimizer.step()
    assert all(torch.equal(model.masks[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("change", [fewer, not_active, not_free, emptied])
def test_a_method_object_of_ones_own_is_checked_as_a_plugin_is(change):
    model, optimizer = attached(Wrong(change))
    masks = {name: mask.clone() for name, mask in model.masks.items()}
    with pytest.raises(CheckFailed, match="method wrong"):
        optimizer.step()
    assert all(torch.equal(model.masks[name], mask) for name, mask in masks.items())


class Falling(Wrong):
    """Prunes at random to the declared path, unless a test changes the number."""

    def __init__(self, final_sparsity=0.9, final_step=4, more=0, path=None):
        self.final_sparsity, self.final_step, self.more = final_sparsity, final_step, more
        if path is not None:
            self.sparsity = path

    def due(self, step):
        return step in (2, 4)

    def update(self, weights, step, generator):
        total = active_count(0.8 if step < 4 else 0.9, weights.sizes) + self.more * (step == 4)
        drop = smallest_of_all(weights, sum(weights.counts) - total)
        assert generator is not None
        return replace(
            Reallocation.nothing(weights), dropped=with_flat(weights.positions, weights.positions.flat[drop])
        )


@pytest.mark.parametrize(
    ("options", "step", "message"),
    [
        ({}, 0, ""),
        ({"path": lambda step: 0.8 if step < 4 else 0.9}, 0, ""),
        ({"path": lambda step: None}, 0, ""),
        ({"more": 1}, 4, "leaves 19 active weights after step 4, but its sparsity there, 0.9, means 18"),
        ({"path": lambda step: 0.7}, 2, "leaves 36 active weights after step 2, but its sparsity there, 0.7, means 54"),
        ({"path": crash}, 2, r"failed in sparsity\(\) \(ZeroDivisionError"),
        ({"path": lambda step: 1.5}, 2, r"sparsity 1\.5 is not in \[0, 1\)"),
    ],
)
def test_a_plugin_that_changes_the_density_is_held_to_its_path(found, options, step, message):
    found(lambda timing: Falling(**options))
    model, optimizer = attached(make("mine", 100))
    for number in range(1, 6):
        masks = {name: mask.clone() for name, mask in model.masks.items()}
        if number == step:
            with pytest.raises(DsrError, match=message):
                optimizer.step()
            assert all(torch.equal(model.masks[name], mask) for name, mask in masks.items())
            return
        optimizer.step()
        assert model.active_weights == (72 if number < 2 else 36 if number < 4 else 18)
    assert not message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"final_sparsity": 1.5}, r"declares a final_sparsity that cannot be \(sparsity 1\.5 is not in \[0, 1\)\)"),
        ({"final_sparsity": "half"}, r"declares a final_sparsity that cannot be \(sparsity 'half' is not a number"),
        ({"final_step": 0}, r"declares final_sparsity 0\.9 and final_step 0, expected a step from 1 on"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused_when_the_plugin_is_made(found, options, message):
    found(lambda timing: Falling(**options))
    with pytest.raises(UsageError, match=f"^method 'mine' .*{message}"):
        make("mine", 100)


def test_a_training_that_does_not_end_at_the_declared_sparsity_fails(found):
    found(lambda timing: Falling(final_step=5))
    optimizer, run = attached_run(make("mine", 100))
    for _ in range(3):
        optimizer.step()
    with pytest.raises(CheckFailed, match=r"method mine reaches its final sparsity at step 5"):
        require_end(run, 3)
    for _ in range(3):
        optimizer.step()
    require_end(run, 6)
    found(lambda timing: Falling(final_step=1))
    optimizer, run = attached_run(make("mine", 100))
    optimizer.step()
    with pytest.raises(
        CheckFailed, match=r"method mine ended with 72 active weights, but its final sparsity 0\.9 means 18"
    ):
        require_end(run, 1)


def test_dense_gradients_come_at_the_steps_that_a_plugin_names(found):
    class Picky(Wrong):
        needs_gradients = True

        def __init__(self):
            self.seen = []

        def wants_gradients(self, step):
            return step == 2

        def update(self, weights, *_):
            self.seen.append(weights.gradients is not None)
            return Reallocation.nothing(weights)

    method = Picky()
    found(lambda timing: method)
    _, optimizer = attached(make("mine", 100))
    for _ in range(3):
        optimizer.step()
    assert method.seen == [False, True, False]


def test_a_plugin_that_returns_no_keeper_is_refused(found, monkeypatch):
    found(lambda timing: Wrong(lambda weights, moved: moved))
    monkeypatch.setattr(Wrong, "keep", lambda *_, **__: None, raising=False)
    with pytest.raises(UsageError, match=r"method 'mine'.*returned NoneType from keep\(\), expected a MaskKeeper"):
        attached(make("mine", 100))


def test_a_valid_reallocation_of_a_plugin_is_applied(found):
    found(lambda timing: Wrong(lambda weights, moved: moved))
    model, optimizer = attached(make("mine", 100))
    before = {name: mask.clone() for name, mask in model.masks.items()}
    optimizer.step()
    changed = sum(int((model.masks[name] != mask).sum()) for name, mask in before.items())
    assert changed == 46 and model.active_weights == 72


def test_counts_are_checked_for_every_method():
    def full(weights, moved):
        return Reallocation(moved.dropped, Positions(weights.sizes, (0, 37), torch.arange(120, 157)))

    _, optimizer = attached(Wrong(full))
    with pytest.raises(CheckFailed, match="method wrong wants to grow 37 weights in layer 1, which has 36 to grow"):
        optimizer.step()


def test_a_plugin_method_is_used_without_a_wrapper(found):
    found(lambda timing: Wrong(lambda weights, moved: moved))
    method = make("mine", 100)
    assert type(method) is Wrong and method.plugin.name == "mine" and SET.plugin is None


@pytest.mark.parametrize("name", ["begin", "keep", "due", "state_dict", "load_state_dict"])
def test_an_exception_of_a_plugin_names_the_entry_point_and_the_call(found, monkeypatch, name):
    found(lambda timing: Wrong(lambda weights, moved: moved))
    monkeypatch.setattr(Wrong, name, crash, raising=False)
    model = convert(nn.Sequential(nn.Linear(12, 10)), sparsity=0.6)
    optimizer = optim.SGD(model.module.parameters(), lr=0.1)
    with pytest.raises(
        UsageError, match=rf"^method 'mine' \(entry point mine_method:Mine\) failed in {name}\(\) \(Zero"
    ):
        run = attach(model, optimizer, "mine", total_steps=100)
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
        run.load_state_dict(run.state_dict())


def test_exceptions_of_the_methods_here_are_not_hidden():
    _, optimizer = attached(Wrong(crash))
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
