"""The storage of a training: what auto means, what is refused, and that both storages learn the same."""

import json

import pytest
from click.testing import CliRunner

from converters.conversion import convert
from converters.loading import load
from dsr_tool.cli.train import command
from dsr_tool.errors import UsageError
from dsr_tool.train import Observer, train
from dsr_tool.train.storage import apply_storage, storage_line, storage_to_load


@pytest.mark.parametrize(
    ("sparsity", "changes", "storage", "why"),
    [
        (0.8, {}, "compact", ""),
        (0.8, {"method": "rigl"}, "compact", ""),
        (0.8, {"storage": "masked"}, "masked", ""),
        (0.2, {}, "masked", "80 % of the weights are active"),
        (0.2, {"storage": "compact"}, "compact", ""),
        (0.0, {"method": "dst", "options": {"final_sparsity": 0.5}}, "masked", "dst needs all positions of a weight"),
        (0.0, {"method": "tied", "options": {"final_sparsity": 0.5}}, "masked", "tied needs all positions of a weight"),
        (0.8, {"precision": "bf16"}, "masked", "have no bf16"),
        (0.8, {"compile": True}, "masked", "torch.compile sees no weights"),
    ],
)
def test_auto_takes_compact_storage_where_nothing_stands_against_it(tiny, sparsity, changes, storage, why):
    model, settings = tiny.model(sparsity), tiny.settings(**changes)
    chosen, reason = apply_storage(model, settings)
    assert chosen.storage == model.storage == storage
    assert why in reason and bool(why) == bool(reason)
    assert storage_line(model, reason).startswith(f"storage {storage}")
    assert storage_to_load(settings) in (storage, "compact")


def test_types_that_cannot_be_held_fall_back_to_masked_storage(tiny):
    model = tiny.model()
    model.module.head.double()
    chosen, reason = apply_storage(model, tiny.settings())
    assert chosen.storage == model.storage == "masked"
    assert "compact storage holds all in one vector" in reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "packed"}, "--storage 'packed' is unknown"),
        (
            {"storage": "compact", "method": "dst", "options": {"final_sparsity": 0.5}},
            "--storage compact is not possible: method dst needs all positions of a weight, active or not; give masked "
            "or auto",
        ),
        ({"storage": "compact", "compile": True}, "--storage compact is not possible: torch.compile"),
    ],
)
def test_a_storage_that_cannot_be_is_refused(tiny, changes, message):
    with pytest.raises(UsageError, match=message):
        tiny.settings(**changes).check()


@pytest.mark.parametrize("method", ["dsr", "set", "rigl", "deepr", "static"])
def test_both_storages_learn_the_same(tiny, method):
    class Losses(Observer):
        def on_epoch(self, model, record):
            self.found = [*getattr(self, "found", []), record.train_loss]
            self.storage = model.storage

    seen, accuracies = [], []
    for storage in ("masked", "compact"):
        losses, model = Losses(), tiny.model()
        # A low rate: rounding errors grow with it.
        result = train(model, tiny.data(), tiny.settings(method=method, storage=storage, epochs=4, lr=0.01), [losses])
        assert losses.storage == storage and model.storage == "masked"
        seen.append(losses.found)
        accuracies.append(result.best.test_accuracy)
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.05)


def test_a_model_stays_as_it_is_when_the_training_fails(tiny):
    model = tiny.model(granularity="kernel")
    with pytest.raises(UsageError, match="method deepr does not keep the pattern"):
        train(model, tiny.data(), tiny.settings(method="deepr"))
    assert model.storage == "masked"


def test_the_command_records_the_storage_and_goes_on_with_it(tmp_path):
    convert("lenet-300-100", sparsity=0.9, input_size=8).save(tmp_path / "model")
    line = [str(tmp_path / "model"), "-o", str(tmp_path / "run"), "--data", "digits", "--epochs", "2", "--json"]
    first = CliRunner().invoke(command, [*line, "--max-time", "0.001"], catch_exceptions=False)
    assert "storage compact" in first.stderr
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert settings["storage"] == "compact"
    second = CliRunner().invoke(command, [*line, "--resume"], catch_exceptions=False)
    assert json.loads(second.stdout)["finished"]
    whole = [*line[:2], str(tmp_path / "whole"), *line[3:]]
    CliRunner().invoke(command, whole, catch_exceptions=False)
    for name in ("model.safetensors", "masks.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert load(tmp_path / "run").storage == "masked"
    other = CliRunner().invoke(command, [*line, "--resume", "--storage", "masked"])
    assert "--storage masked differs from the compact" in str(other.exception)
