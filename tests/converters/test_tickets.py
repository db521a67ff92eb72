"""Tickets: exact masks, and original weights that are equal bit for bit or refused."""

import json

import pytest
import torch
from torch import nn

from converters.conversion import convert
from converters.loading import load
from converters.paper_models import build
from converters.tickets import CHECKSUM, checksum
from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError
from dsr_tool.methods import attach, make

NETS = """
from torch import nn

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
"""
OPTIONS = {"input_size": 6, "num_classes": 4}


def started(model):
    """Returns the weights before training, with the zeros of the mask."""
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def train(model, method="set", **options):
    """Trains a few steps with reallocations."""
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.5)
    attach(model, optimizer, make(method, 8, every=1, **options))
    for step in range(8):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(16, *model.config.input_shape)).square().mean().backward()
        optimizer.step()
    return model


@pytest.fixture
def run_folder(tmp_path):
    before = convert("lenet-300-100", sparsity=0.9, seed=7, **OPTIONS)
    masks = {key: mask.clone() for key, mask in before.masks.items()}
    after = train(before)
    assert any(not torch.equal(after.masks[key], mask) for key, mask in masks.items())
    after.save(tmp_path / "run")
    return tmp_path / "run", after


def test_a_ticket_has_the_masks_and_fresh_weights(run_folder):
    path, after = run_folder
    new = convert("lenet-300-100", structure=path, seed=3)
    assert new.masks.keys() == after.masks.keys()
    assert all(torch.equal(new.masks[key], mask) for key, mask in after.masks.items())
    dense = convert("lenet-300-100", sparsity=0, seed=3, **OPTIONS)
    assert all(torch.equal(new.weights[key], weight * after.masks[key]) for key, weight in dense.weights.items())
    assert torch.equal(new.module.bn1.running_mean, torch.zeros(300))
    assert new.active_weights == after.active_weights == new.config.conversion["active_weights"]
    assert new.config.conversion["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert new.specs == after.specs
    new.check()


def test_fresh_weights_are_never_the_original_ones(run_folder):
    path, _ = run_folder
    fresh = convert("lenet-300-100", structure=path)
    original = convert("lenet-300-100", structure=path, init="original")
    assert fresh.config.conversion["seed"] == 1_000_007
    assert all(not torch.equal(fresh.weights[key], weight) for key, weight in original.weights.items())
    with pytest.raises(UsageError, match="--init fresh with seed 7 gives exactly the weights that .* started with"):
        convert("lenet-300-100", structure=path, seed=7)


def test_original_weights_equal_those_of_the_run_bit_for_bit(run_folder, tmp_path):
    path, after = run_folder
    new = convert("lenet-300-100", structure=path, init="original")
    whole = convert("lenet-300-100", sparsity=0, seed=7, **OPTIONS)
    assert all(torch.equal(new.weights[key], weight * after.masks[key]) for key, weight in whole.weights.items())
    assert new.config.conversion[CHECKSUM] == after.config.conversion[CHECKSUM] == checksum(whole.module)
    new.save(tmp_path / "again")
    third = convert("lenet-300-100", structure=tmp_path / "again", init="original")  # a ticket has a structure too
    assert all(torch.equal(third.weights[key], weight) for key, weight in new.weights.items())


def test_a_dense_start_has_its_original_weights_under_the_final_mask(tmp_path):
    model = train(convert("lenet-300-100", sparsity=0, seed=2, **OPTIONS), "gmp", final_sparsity=0.8)
    assert model.sparsity == pytest.approx(0.8, abs=1e-3)
    model.save(tmp_path / "pruned")
    new = convert("lenet-300-100", structure=tmp_path / "pruned", init="original")
    whole = convert("lenet-300-100", sparsity=0, seed=2, **OPTIONS)
    assert new.active_weights == model.active_weights
    assert all(torch.equal(new.weights[key], weight * model.masks[key]) for key, weight in whole.weights.items())


def test_weights_from_a_file_must_still_be_there(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(build("lenet-300-100", 4, (1, 6, 6)).state_dict(), path)
    convert("lenet-300-100", weights=str(path), sparsity=0.5, **OPTIONS).save(tmp_path / "m")
    new = convert("lenet-300-100", structure=tmp_path / "m", init="original")
    assert torch.equal(new.module.bn1.weight, torch.load(path, weights_only=True)["bn1.weight"])
    torch.save(build("lenet-300-100", 4, (1, 6, 6)).state_dict(), path)
    with pytest.raises(CheckFailed, match="cannot be made again.*--init fresh"):
        convert("lenet-300-100", structure=tmp_path / "m", init="original")
    path.unlink()
    with pytest.raises(FileError, match=r"cannot be made again: --weights file .*w.pth' does not exist"):
        convert("lenet-300-100", structure=tmp_path / "m", init="original")
    assert convert("lenet-300-100", structure=tmp_path / "m").config.conversion["weights"] is None


def test_thin_models_torchvision_and_callables_have_tickets_too(tmp_path, monkeypatch):
    (tmp_path / "ticket_nets_for_test.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    cases = {
        "lenet-300-100": {"thin": True, "sparsity": 0.9, **OPTIONS},
        "squeezenet1_1": {"sparsity": 0.9, "num_classes": 3, "input_size": 32},
        "ticket_nets_for_test:net": {"sparsity": 0.5, "input_shape": (1, 4, 4)},
    }
    for i, (name, options) in enumerate(cases.items()):
        model = convert(name, seed=4, **options)
        model.save(tmp_path / f"m{i}")
        new = convert(name, structure=tmp_path / f"m{i}", init="original")
        assert all(torch.equal(value, started(model)[key]) for key, value in new.module.state_dict().items())
        assert (new.config.width, new.config.input_shape) == (model.config.width, model.config.input_shape)


def test_modules_are_used_unchanged_and_checked(tmp_path):
    def network(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    model = convert(network(1), sparsity=0.5, input_shape=(6,))
    model.save(tmp_path / "m")
    again = convert(network(1), structure=tmp_path / "m", init="original")
    assert all(torch.equal(again.weights[key], weight) for key, weight in model.weights.items())
    assert convert(network(2), structure=tmp_path / "m").active_weights == model.active_weights
    with pytest.raises(CheckFailed, match="cannot be made again"):
        convert(network(2), structure=tmp_path / "m", init="original")
    with pytest.raises(UsageError, match=r"disagrees about '0.weight' with the Sequential"):
        convert(nn.Sequential(nn.Linear(6, 9)), structure=tmp_path / "m")


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("wrn-28-2", {}, "holds lenet-300-100; give that as ARCH"),
        ("lenet-300-100", {"init": "orginal"}, "did you mean original"),
        ("lenet-300-100", {"init": "original", "seed": 0}, "--seed goes with --init fresh"),
        ("lenet-300-100", {"sparsity": 0}, "--structure cannot be combined with --sparsity; leave it out"),
        (
            "lenet-300-100",
            {"num_classes": 4, "thin": True},
            "combined with --thin, --num-classes; leave them out",
        ),
        (
            "lenet-300-100",
            {"keep_dense": ["fc1"], "positions": "random"},
            "combined with --keep-dense, --positions",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(run_folder, arch, options, words):
    with pytest.raises(UsageError, match=words):
        convert(arch, structure=run_folder[0], **options)
    with pytest.raises(UsageError, match="--init goes with --structure"):
        convert(arch, sparsity=0.5, init="fresh")


def test_folders_without_a_record_of_their_start_are_refused(run_folder):
    config = run_folder[0] / "config.json"
    document = json.loads(config.read_text())
    for value, error in (("8", FormatError), (-1, FormatError), (8, CheckFailed)):
        document["model"]["conversion"]["seed"] = value
        config.write_text(json.dumps(document))
        with pytest.raises(error, match="--init fresh|damaged"):
            convert("lenet-300-100", structure=run_folder[0], init="original")
    del document["model"]["conversion"][CHECKSUM]
    config.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="older versions.*--init fresh"):
        convert("lenet-300-100", structure=run_folder[0], init="original")


def test_the_checksum_depends_on_every_bit_and_name():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = checksum(module)
    assert checksum(module) == before
    module[1].num_batches_tracked += 1
    assert checksum(module) != before
    assert checksum(nn.Sequential(module)) != checksum(module)
    assert checksum(module.to(torch.bfloat16)) != before


def test_the_command_line_makes_and_trains_a_ticket(tmp_path, run):
    first = ("convert", "lenet-300-100", "--input-size", "8", "--sparsity", "0.9", "--seed", "5", "-o", tmp_path / "m")
    assert run(*first)[0] == 0
    data = ("--data", "fake:64", "--epochs", "1", "--batch-size", "16", "--quiet")
    code, _, err = run("train", tmp_path / "m", *data, "--every", "1", "-o", tmp_path / "r")
    assert code == 0, err
    again = ("convert", "lenet-300-100", "--structure", tmp_path / "r", "--init", "original", "-o", tmp_path / "t")
    code, out, err = run(*again)
    assert code == 0, err
    one, other = load(tmp_path / "r"), load(tmp_path / "t")
    assert f"{one.active_weights:,} of" in out
    assert all(torch.equal(one.masks[key], mask) for key, mask in other.masks.items())
    code, _, err = run("train", tmp_path / "t", *data, "--method", "static", "-o", tmp_path / "tr")
    assert code == 0, err
    assert run("report", tmp_path / "tr", "--html", tmp_path / "tr.html")[0] == 0
