"""A run that was stopped anywhere and resumed ends with the same bits as one that was never stopped."""

import csv
import json
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import dsr_tool.train.checkpoint as checkpoint_module
import dsr_tool.train.run as run_module
from converters.conversion import convert
from converters.loading import load
from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.methods import METHODS, attach
from dsr_tool.methods.hidden_units import hidden_units
from dsr_tool.train import Observer, RunFolder, train
from dsr_tool.train.checkpoint import read_state, write_state

FILES = ("config.json", "masks.safetensors", "model.safetensors", "training.safetensors", "settings.json")


@pytest.fixture(autouse=True, scope="module")
def _captured_once():
    """Captures each graph once: that takes longer than all steps of these trainings."""
    found = {}

    def once(model, names):
        if tuple(names) not in found:
            found[tuple(names)] = hidden_units(model, names)
        return found[tuple(names)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsr_tool.methods.neuron_set.hidden_units", once)
        yield


class Killed(BaseException):
    """Stands for the end of the process: what runs afterwards has no effect."""


def go_on(tiny, folder, *more, granularity="weight", **changes):
    """Trains from the start, or from where an earlier call was killed."""
    method = changes.get("method", "dsr")
    if "final_sparsity" in METHODS[method].option_defaults():
        changes["options"] = {"final_sparsity": 0.7 if METHODS[method].starts_dense else 0.9}
    run = RunFolder(folder, resume=True)
    stopped = run.stopped
    sparsity = 0 if METHODS[method].starts_dense else 0.8
    model = load(folder, tiny.module()) if stopped else tiny.model(sparsity, granularity=granularity)
    settings = tiny.settings(**{"epochs": 4, "batch_size": 50, "every": 3, **changes})
    run.facts = {"data": "fake:200", "settings": settings.to_dict()}
    with run:
        train(model, tiny.data(), settings, [run, *more], state=stopped.state if stopped else None)


def log_of(folder):
    """Returns every line of the log without times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]
    return [{name: value for name, value in line.items() if name != "time_s"} for line in lines]


def table_of(folder):
    """Returns the rows of the table of epochs without times."""
    with (folder / "log.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "time_s"} for row in csv.DictReader(file)]


def assert_equal(folder, other):
    for name in FILES:
        # The container's writer orders its metadata and names alike, so that whole files can be compared.
        assert content(folder / name) == content(other / name), name
    for name in ("model.safetensors", "masks.safetensors"):
        assert (folder / "best" / name).read_bytes() == (other / "best" / name).read_bytes()
    assert log_of(folder) == log_of(other)
    assert table_of(folder) == table_of(other)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())


def content(path):
    if path.name != "training.safetensors":
        return path.read_bytes()
    state = read_state(path)
    del state["log_bytes"]  # how many digits the seconds have in it
    return flat(state)


def flat(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: flat(entry) for name, entry in value.items()}
    return [flat(entry) for entry in value] if isinstance(value, list) else value


def kill_at(monkeypatch, moment):
    """Lets the process die before the `moment`-th write to the disk or end of a step, without any clean-up."""
    count = iter(range(10**6))

    def strike(*_, **__):
        if next(count) == moment:
            raise Killed

    def struck(function):
        def call(*arguments, **options):
            strike()
            return function(*arguments, **options)

        return call

    class Step(Observer):
        on_step = strike

    for module, names in (
        (run_module, ("write_model", "save_folder", "finish_replacing", "sync")),
        (checkpoint_module, ("write_model", "write_state", "finish_replacing", "sync")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, struck(getattr(module, name)))
    monkeypatch.setattr(run_module.RunFolder, "_log", struck(run_module.RunFolder._log))
    monkeypatch.setattr(run_module.Path, "rename", struck(run_module.Path.rename))
    monkeypatch.setattr(run_module.Path, "replace", struck(run_module.Path.replace))
    # A process that dies loses its lock and does nothing else.
    monkeypatch.setattr(run_module.RunFolder, "__exit__", lambda run, *_: run._lock and run._lock.release())
    monkeypatch.setattr(run_module.shutil, "rmtree", lambda *_, **__: None)
    return Step()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_moments_resumes_to_the_same_bits(tiny, tmp_path, method):
    go_on(tiny, tmp_path / "whole", method=method)
    draw = np.random.default_rng(zlib.crc32(method.encode()))
    for trial in range(20):
        folder = tmp_path / f"cut-{trial}"
        for _ in range(draw.integers(1, 4)):
            with pytest.MonkeyPatch.context() as patch:
                step = kill_at(patch, draw.integers(60))
                with pytest.raises(Killed):
                    go_on(tiny, folder, step, method=method)
                    raise Killed
        go_on(tiny, folder, method=method)
        assert_equal(folder, tmp_path / "whole")
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adam"},
        {"optimizer": "rmsprop"},
        {"method": "snfs"},
        {"method": "granet"},
        {"optimizer": "adamw", "method": "dst"},
        {"optimizer": "rmsprop", "method": "tied"},
        {"schedule": "step"},
        {"l1": 1e-3, "method": "deepr"},
        {"values": "int5"},
        {"values": "int4", "method": "rigl"},
        {"options": {"cross_layer": False, "threshold": 0.05}},
        {"options": {"threshold": 0.05}, "granularity": "kernel"},
        {"method": "set", "granularity": "kernel"},
        {"method": "rigl", "granularity": "fan-in"},
    ],
)
def test_every_optimizer_and_variant_resumes(tiny, tmp_path, changes):
    go_on(tiny, tmp_path / "whole", **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        go_on(tiny, tmp_path / "cut", kill_at(patch, 40), **changes)
    assert RunFolder(tmp_path / "cut", resume=True).stopped is not None
    go_on(tiny, tmp_path / "cut", **changes)
    assert_equal(tmp_path / "cut", tmp_path / "whole")


def test_an_interrupted_run_resumes(tiny, tmp_path):
    class Interrupt(Observer):
        def on_step(self, step):
            if step == 10:
                raise KeyboardInterrupt

    go_on(tiny, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go_on(tiny, tmp_path / "cut", Interrupt())
    assert log_of(tmp_path / "cut")[-1]["status"] == "interrupted"
    go_on(tiny, tmp_path / "cut")
    assert_equal(tmp_path / "cut", tmp_path / "whole")


def test_a_complete_run_stays_as_it_is(tiny, tmp_path):
    go_on(tiny, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    go_on(tiny, tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_other_settings_or_data_are_refused(tiny, tmp_path):
    go_on(tiny, tmp_path / "run")
    stopped = RunFolder(tmp_path / "run", resume=True).stopped
    with pytest.raises(UsageError, match="--epochs 9 differs from the 4"):
        stopped.settings({"epochs": 9})
    with pytest.raises(UsageError, match="started with data"):
        stopped.require({"data": "fake:300"})
    assert stopped.settings({"epochs": 4, "workers": 1}).workers == 1


def test_options_of_the_method_and_the_model_are_compared_by_name(tiny, tmp_path):
    go_on(tiny, tmp_path / "run", options={"target": 0.2, "tolerance": 0.3})
    run = RunFolder(tmp_path / "run", resume=True)
    assert run.stopped.settings({"options": {"target": 0.2}}).options == {"target": 0.2, "tolerance": 0.3}
    with pytest.raises(UsageError, match="--target 0.5 differs from the 0.2 that"):
        run.stopped.settings({"options": {"target": 0.5}})
    with pytest.raises(UsageError, match="--threshold 1 was not given when"):
        run.stopped.settings({"options": {"threshold": 1}})
    run.facts = {"model": "another"}
    with pytest.raises(UsageError, match="give the same model"), run:
        train(tiny.model(), tiny.data(), run.stopped.settings({}), [run], state=run.stopped.state)


def test_a_run_in_training_by_another_process_is_refused(tiny, tmp_path):
    go_on(tiny, tmp_path / "run")
    holder = RunFolder(tmp_path / "run", resume=True)
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(FileError, match="another process is training in"):
            RunFolder(tmp_path / "run", **options)
    with holder:
        pass
    RunFolder(tmp_path / "run", resume=True)


def test_a_complete_run_without_a_checkpoint_is_not_overwritten(tiny, tmp_path):
    go_on(tiny, tmp_path / "run", epochs=1)
    (tmp_path / "run" / "training.safetensors").unlink()
    with pytest.raises(FileError, match="so it cannot be resumed; train again"):
        RunFolder(tmp_path / "run", resume=True)


def test_the_best_epoch_is_restored_if_its_replacement_was_killed(tiny, tmp_path):
    go_on(tiny, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / ".best.x.old").mkdir()
    (tmp_path / "cut" / "best").rename(tmp_path / "cut" / ".best.x.old" / "best")
    go_on(tiny, tmp_path / "cut")
    assert_equal(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    "settings", [None, {"epochs": "ten"}, {"milestones": 5}, {"options": None}, {"method": "nothing"}]
)
def test_settings_of_another_shape_are_refused(tiny, tmp_path, settings):
    go_on(tiny, tmp_path / "run")
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(FormatError, match="cannot be resumed"):
        RunFolder(tmp_path / "run", resume=True)


def test_a_recorded_momentum_is_ignored_if_the_optimizer_has_none(tiny, tmp_path):
    go_on(tiny, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "settings.json").read_text())
    facts["settings"] |= {"optimizer": "adam", "momentum": 0.9}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(facts))
    stopped = RunFolder(tmp_path / "run", resume=True).stopped
    assert stopped is not None
    assert stopped.started.momentum is None


def test_a_log_with_other_epochs_than_the_checkpoint_is_refused(tiny, tmp_path):
    go_on(tiny, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text().replace('"epoch": 2', '"epoch": 3'))
    with pytest.raises(FormatError, match="does not hold the epochs"):
        RunFolder(tmp_path / "run", resume=True)


def test_a_checkpoint_of_a_model_with_other_frozen_layers_is_refused(tiny, tmp_path):
    go_on(tiny, tmp_path / "run")
    model = load(tmp_path / "run", tiny.module())
    model.module.head.weight.requires_grad_(False)
    state = RunFolder(tmp_path / "run", resume=True).stopped.state
    with pytest.raises(FormatError, match="other parameters are frozen"):
        train(model, tiny.data(), tiny.settings(epochs=5), state=state)


def test_on_another_kind_of_device_random_numbers_start_anew(tiny):
    model = tiny.model()
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    attached = attach(model, optimizer, "set", total_steps=10)
    state = {"step": 3, "method": {}, "random": torch.zeros(16, dtype=torch.uint8), "device": "cuda"}
    attached.load_state_dict(state)
    assert attached.step == 3 and attached._generator.initial_seed() == 3


def test_folders_that_are_not_runs_are_refused(tiny, tmp_path):
    tiny.model().save(tmp_path / "model")
    with pytest.raises(FileError, match="not a run that could be resumed"):
        RunFolder(tmp_path / "model", resume=True)
    assert RunFolder(tmp_path / "absent", resume=True).stopped is None


@pytest.mark.parametrize("name", ["log.jsonl", "settings.json", "training.safetensors"])
def test_a_damaged_run_is_refused(tiny, tmp_path, name):
    go_on(tiny, tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FormatError, match=r"(cannot be read|is damaged and cannot be resumed)"):
        RunFolder(tmp_path / "run", resume=True)
    (tmp_path / "run" / "training.safetensors").unlink()
    if name == "settings.json":
        with pytest.raises(FileError, match="so it cannot be resumed; train again"):
            RunFolder(tmp_path / "run", resume=True)


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path):
    go_on(tiny, tmp_path / "run")
    state = read_state(tmp_path / "run" / "training.safetensors")["training"]
    del state["optimizer"]["param_groups"][0]["params"][0]
    with pytest.raises(FormatError, match="does not fit this model"):
        train(tiny.model(), tiny.data(), tiny.settings(epochs=4), state=state)


def test_a_checkpoint_keeps_every_bit(tmp_path):
    tree = {"a": [1, 0.1, None, {"7": torch.tensor([float("nan"), -0.0])}], "b": True, "c": torch.arange(3)}
    write_state(tmp_path / "state", tree)
    found = read_state(tmp_path / "state")
    assert flat(found) == flat(tree)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_by_sigkill_resumes(tmp_path, method):
    sparsity = 0 if METHODS[method].starts_dense else 0.8
    convert("shufflenet_v2_x0_5", sparsity=sparsity, num_classes=10, input_size=32).save(tmp_path / "model")
    options = "--data fake:512 --epochs 6 --batch-size 64 --every 3 --device cpu --resume --method"
    command = [Path(sys.executable).with_name("dsr-tool"), "train", tmp_path / "model", *options.split(), method]
    command += ["--final-sparsity", "0.9"] if "final_sparsity" in METHODS[method].option_defaults() else []
    start = time.monotonic()
    subprocess.run([*command, "-o", tmp_path / "whole"], check=True, capture_output=True)
    took = time.monotonic() - start
    draw = np.random.default_rng(zlib.crc32(method.encode()))
    for _ in range(20):
        process = subprocess.Popen([*command, "-o", tmp_path / "cut"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            process.communicate(timeout=draw.uniform(0.3, 1) * took)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    subprocess.run([*command, "-o", tmp_path / "cut"], check=True, capture_output=True)
    assert_equal(tmp_path / "cut", tmp_path / "whole")
