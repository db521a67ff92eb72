"""The plugins of docs/examples, and those of docs/methods.md, as a user would install them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.cli.group import cli
from dsr_tool.errors import UsageError
from dsr_tool.methods import attach, make, plugins
from dsr_tool.methods.final_sparsity import active_count
from tests.methods.test_growing_and_shrinking import network
from tests.methods.test_plugins import ROOT, entry_point

EXAMPLES = {path.stem: path for path in (ROOT / "docs" / "examples").glob("*.py")}
ENTRIES = {"acdc": "acdc", "granet": "my-granet", "snfs": "my-snfs"}


def loaded(text):
    """Returns what a file defines, without the network or the folder of the repository."""
    found = {"__name__": "example"}
    exec(compile(text, "example.py", "exec"), found)  # noqa: S102 - our own documentation
    return found


@pytest.fixture
def example(monkeypatch):
    """Installs the class of an example, or of a piece of documentation, under a name; returns the name."""

    def install(name, text):
        methods = [made for made in loaded(text).values() if isinstance(made, type) and made.__module__ == "example"]
        monkeypatch.setattr(plugins, "entry_points", lambda group: [entry_point(name, methods[-1])])
        return name

    return install


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_is_short_and_says_how_it_is_installed(name):
    text = EXAMPLES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    (entry,) = re.findall(r'([a-z-]+) = "' + name + r':\w+" under \[project\.entry-points\."dsr_tool\.methods"\]', text)
    assert entry == ENTRIES[name]
    assert f"`docs/examples/{name}.py`" in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "sparsity"), [("acdc", 0), ("granet", 0.5), ("snfs", 0.9)])
def test_an_example_trains_for_an_epoch(example, tmp_path, monkeypatch, name, sparsity):
    method = example(ENTRIES[name], EXAMPLES[name].read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    convert("lenet-300-100", sparsity=sparsity, input_size=8).save("model")
    options = () if name == "snfs" else ("--option", "final_sparsity=0.9")
    train = ["train", "model", "-o", "run", "--data", "fake:400", "--batch-size", "10", "--epochs", "1", "--quiet"]
    done = CliRunner().invoke(cli, [*train, "--method", method, "--json", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    epoch = next(line for line in log if line["kind"] == "epoch")
    assert document["active_weights"] == epoch["active_weights"] == active_count("0.9", [document["prunable_weights"]])
    assert sum(epoch["grown"].values()) > 1000
    if name == "acdc":
        moved = [line for line in log if line["kind"] == "reallocation"]
        assert [line["step"] for line in moved] == [4, 8, 13, 17, 21, 25, 30]
        assert [sum(line["grown"].values()) > 0 for line in moved] == [False, True] * 3 + [False]


def steps_of(method, sparsity, **options):
    """Returns masks and weights after 30 steps with a method."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 12))
    model = convert(net, sparsity=sparsity, positions="random", seed=3)
    optimizer = optim.SGD(net.parameters(), 0.05, momentum=0.9)
    attached = attach(model, optimizer, make(method, 30, every=3, **options), seed=1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        optimizer.zero_grad()
        net(torch.randn(16, 30, generator=generator)).square().mean().backward()
        optimizer.step()
        model.check()
    attached.remove()
    return [*model.masks.values(), *net.state_dict().values()]


def test_the_example_and_the_method_granet_agree(example):
    mine = steps_of("granet", 0.5, final_sparsity=0.9)
    theirs = steps_of(example("my-granet", EXAMPLES["granet"].read_text(encoding="utf-8")), 0.5, final_sparsity=0.9)
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_the_example_and_the_method_snfs_agree_where_momentum_is_the_gradient(example):
    name = example("my-snfs", EXAMPLES["snfs"].read_text(encoding="utf-8"))
    for seed in range(20):
        weights = network([(60, 40), (50, 25), (20, 10)], seed)
        momentum = torch.cat([g[p] for g, p in zip(weights.gradients, weights.positions.per_layer(), strict=True)])
        one, other = (
            make(method, 100, every=1).update(replace(weights, momentum=momentum), 20, None)
            for method in ("snfs", name)
        )
        assert torch.equal(one.dropped.flat, other.dropped.flat) and torch.equal(one.grown.flat, other.grown.flat)


@pytest.mark.parametrize("name", ["granet", "snfs"])
def test_an_example_resumes(example, name):
    options = {} if name == "snfs" else {"final_sparsity": 0.9}
    method = example(ENTRIES[name], EXAMPLES[name].read_text(encoding="utf-8"))
    torch.manual_seed(0)
    net = nn.Linear(30, 40)
    model = convert(net, sparsity=0.5, positions="random")
    optimizer = optim.SGD(net.parameters(), 0.05, momentum=0.9)
    attached = attach(model, optimizer, make(method, 30, every=3, **options))
    for _ in range(10):
        net(torch.randn(16, 30)).square().mean().backward()
        optimizer.step()
    state = attached.state_dict()
    attached.remove()
    again = attach(model, optimizer, make(method, 30, every=3, **options))
    again.load_state_dict(state)
    assert str(again.state_dict()["method"]) == str(state["method"])


def test_the_documented_noise_reads_the_optimizer_and_moves_nothing(example):
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page.partition("### An empty answer, and `keep`")[2], re.DOTALL)
    method = example("noise", code)
    for storage in ("masked", "compact"):
        torch.manual_seed(0)
        net = nn.Linear(200, 100, bias=False)
        model = convert(net, sparsity=0.5, positions="random").to_storage(storage)
        optimizer = optim.SGD(model.module.parameters(), 0.1)
        attached = attach(model, optimizer, make(method, 10, scale=0.5))
        mask, before = model.masks["weight"].clone(), model.weights["weight"].detach().clone()
        model(torch.zeros(1, 200)).sum().backward()
        optimizer.step()
        change = (model.weights["weight"].detach() - before)[mask]
        assert torch.equal(model.masks["weight"], mask) and attached.last.facts == {"noise": pytest.approx(0.05)}
        assert float(change.std()) == pytest.approx(0.05, rel=0.03)


def test_acdc_refuses_a_sparse_model(example):
    method = example("acdc", EXAMPLES["acdc"].read_text(encoding="utf-8"))
    model = convert(nn.Sequential(nn.Linear(30, 40)), sparsity=0.5)
    with pytest.raises(UsageError, match="acdc starts from a dense model"):
        attach(model, optim.SGD(model.module.parameters(), 0.1), make(method, 30, final_sparsity=0.9))
