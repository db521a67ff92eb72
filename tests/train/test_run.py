import json
import os
import resource

import pytest
import torch

from converters.loading import load
from dsr_tool.errors import DsrError, FileError
from dsr_tool.methods import ReallocationSchedule
from dsr_tool.train import Observer, RunFolder, train
from dsr_tool.train import run as run_module
from dsr_tool.train.checkpoint import replace_model


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def state(folder, tiny):
    return load(folder, tiny.module())


def same(a, b):
    ours, theirs = a.module.state_dict(), b.module.state_dict()
    masks = all(torch.equal(mask.cpu(), b.masks[name].cpu()) for name, mask in a.masks.items())
    return masks and all(torch.equal(value, theirs[name]) for name, value in ours.items())


class Stop(Observer):
    """Raises in the middle of an epoch."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step(self, step):
        if step == self.step:
            raise self.error


def start(tiny, folder, *more, force=False, **changes):
    model = tiny.model()
    with RunFolder(folder, force=force) as run:
        run.facts = {"data": "fake:200"}
        result = train(model, tiny.data(), tiny.settings(**changes), [run, *more])
    return model, result


def test_a_run_is_a_model_folder_of_the_last_epoch(tiny, tmp_path):
    model, result = start(tiny, tmp_path / "run", epochs=3, every=1, batch_size=16)
    assert same(state(tmp_path / "run", tiny), model)
    assert state(tmp_path / "run", tiny).config == model.config
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best",
        "config.json",
        "log.csv",
        "log.jsonl",
        "masks.safetensors",
        "model.safetensors",
        "settings.json",
        "training.safetensors",
    ]
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == {"data": "fake:200"}
    assert result.last.epoch == 3


def test_the_log_has_every_event_once(tiny, tmp_path):
    model, result = start(tiny, tmp_path / "run", epochs=3, every=2, batch_size=16)
    log = lines(tmp_path / "run")
    first, *_, last = log
    assert first["kind"] == "start" and first["total_steps"] == 36 and first["data"] == "fake:200"
    assert first["active_weights"] == model.active_weights and set(first["versions"]) >= {"torch", "dsr-tool"}
    epochs = [line for line in log if line["kind"] == "epoch"]
    explored_before = dict.fromkeys(result.last.density, 0)
    for line, record in zip(epochs, result.epochs, strict=True):
        explored = line.pop("explored")
        assert line == {"kind": "epoch", **json.loads(json.dumps(record.__dict__))}
        assert all(count >= explored_before[name] for name, count in explored.items())
        explored_before = explored
    moves = [line for line in log if line["kind"] == "reallocation"]
    due = ReallocationSchedule.spread(36, every=2).due
    assert [line["step"] for line in moves] == [step for step in range(1, 37) if due(step)] != []
    for line in moves:
        assert line["dropped"].keys() == model.masks.keys() and line["threshold"] > 0
        assert sum(line["dropped"].values()) == sum(line["grown"].values())
    assert last == {
        "kind": "end",
        "status": "complete",
        "epochs": 3,
        "best_accuracy": result.best.test_accuracy,
    }


def test_best_is_the_state_of_the_best_epoch(tiny, tmp_path):
    states = {}

    class Keep(Observer):
        def on_epoch(self, model, record):
            states[record.epoch] = {k: v.clone() for k, v in model.module.state_dict().items()}

    _, result = start(tiny, tmp_path / "run", Keep(), epochs=5, lr=0.3)
    best = state(tmp_path / "run" / "best", tiny).module.state_dict()
    assert all(torch.equal(value, best[name]) for name, value in states[result.best.epoch].items())


def test_the_same_seed_gives_the_same_bytes(tiny, tmp_path):
    for name in ("a", "b"):
        start(tiny, tmp_path / name)
    for file in ("model.safetensors", "masks.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "interrupted"), (DsrError("it went wrong."), "failed")]
)
def test_a_stopped_run_keeps_its_last_complete_epoch(tiny, tmp_path, error, status):
    with pytest.raises(type(error)):
        start(tiny, tmp_path / "run", Stop(8, error), epochs=3, schedule="step", gamma=1.0)
    log = lines(tmp_path / "run")
    assert log[-1]["status"] == status and log[-1]["epochs"] == 2
    two, _ = start(tiny, tmp_path / "two", epochs=2, schedule="step", gamma=1.0, stop=1.0)
    assert state(tmp_path / "run", tiny).active_weights == two.active_weights


def test_a_run_without_a_complete_epoch_leaves_nothing(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path / "run", Stop(2, KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_an_interrupt_between_two_files_still_moves_both(tiny, tmp_path, monkeypatch, call):
    model, folder = tiny.model(), tmp_path / "run"
    model.save(folder)
    for weight in model.weights.values():
        weight.data.mul_(2)
    moves = iter(range(100))
    replace = run_module.Path.replace

    def interrupted(path, target):
        if next(moves) == call:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(run_module.Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_model(model, {"epoch": 1}, folder)
    assert same(state(folder, tiny), model)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "masks.safetensors",
        "model.safetensors",
        "training.safetensors",
    ]


def test_a_full_disk_keeps_what_was_saved_before(tiny, tmp_path):
    class Fill(Observer):
        def on_epoch(self, _model, _record):
            resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(FileError, match="could not be written: .*; what was saved before is complete"):
            start(tiny, tmp_path / "run", Fill(), epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state(tmp_path / "run", tiny).active_weights == tiny.model().active_weights
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert [line["epoch"] for line in lines(tmp_path / "run") if line["kind"] == "epoch"] == [1]


def test_an_existing_run_is_not_replaced_without_force(tiny, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    start(tiny, folder, epochs=1)
    before = (folder / "log.jsonl").read_bytes()
    with pytest.raises(FileError, match="exists already"):
        RunFolder(folder)
    assert (folder / "log.jsonl").read_bytes() == before
    start(tiny, folder, epochs=2, force=True)
    assert lines(folder)[-1]["epochs"] == 2


def test_force_replaces_runs_only(tmp_path):
    (tmp_path / "precious").write_text("not a run")
    with pytest.raises(FileError, match="folder of something else"):
        RunFolder(tmp_path, force=True)
    assert (tmp_path / "precious").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to the superuser")
def test_a_folder_that_cannot_be_created_is_an_error(tiny, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(FileError, match="could not be written"):
        start(tiny, tmp_path / "locked" / "run")


def test_force_keeps_the_old_run_if_the_new_one_completes_no_epoch(tiny, tmp_path):
    old, _ = start(tiny, tmp_path / "run", epochs=1)
    with pytest.raises(KeyboardInterrupt):
        start(tiny, tmp_path / "run", Stop(2, KeyboardInterrupt()), force=True)
    assert same(state(tmp_path / "run", tiny), old)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    start(tiny, tmp_path / "run", epochs=1, force=True, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_never_starts_writes_nothing(tmp_path):
    with RunFolder(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
