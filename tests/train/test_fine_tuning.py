"""A model from trained weights has defaults of its own; every other model trains as before."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

import dsr_tool.train.loop as loop_module
from converters.conversion import convert
from dsr_tool.cli.train import command
from dsr_tool.methods import METHODS
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.train import Observer, RunFolder, TrainSettings, train, train_in_folder
from dsr_tool.train.fine_tuning import announcement, chance, doubt, few_steps, starts_trained
from dsr_tool.train.resume import find_stopped


def trained(model, **conversion):
    """Returns the model as if it had been converted from a file of weights."""
    config = {**model.config.conversion, "weights": "net.pth", **conversion}
    model.config = replace(model.config, conversion=config)
    return model


def in_folder(tiny, path, model, resume=False, **given):
    run = RunFolder(path, resume=resume)
    given = {"epochs": 2, "batch_size": 50, "device": "cpu", **given}
    return train_in_folder(run, model, tiny.data(), given, facts={"data": "fake:200"}, quiet=True)


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({}, False),
        ({"weights": None}, False),
        ({"weights": "IMAGENET1K_V1"}, True),
        ({"weights": None, "calibration": {"pictures": 256}}, True),
        ({"budget": "keep"}, True),
        ({"budget": "12MB"}, False),
    ],
)
def test_the_record_of_the_conversion_says_where_the_weights_come_from(record, answer):
    assert starts_trained(ModelConfig("torchvision", "resnet18", conversion=record)) is answer


def test_the_defaults_of_both_kinds_of_models_are_pinned():
    usual, tuned = (TrainSettings(device="cpu").resolve("none", trained=answer) for answer in (False, True))
    assert (usual.lr, usual.stop, usual.options, usual.fine_tune) == (0.1, None, {}, False)
    assert (tuned.lr, tuned.stop, tuned.fine_tune) == (0.003, 0.5, True)
    assert tuned.options == {"target": 0.03, "threshold": "auto"}
    assert (tuned.weight_decay, tuned.warmup_epochs, tuned.momentum) == (5e-4, 0.0, 0.9)
    for name, options in (
        ("set", {"drop_fraction": 0.03}),
        ("rigl", {"drop_fraction": 0.06}),
        ("neuron-set", {"drop_fraction": 0.03}),
        ("deepr", {}),
    ):
        settings = TrainSettings(method=name, device="cpu").resolve("none", trained=True)
        assert (settings.stop, settings.options) == (0.5, options)
    gradual = TrainSettings(method="gmp", optimizer="adam", options={"final_sparsity": 0.8}).resolve(
        "none", trained=True
    )
    assert (gradual.lr, gradual.stop, gradual.options) == (1e-4, None, {"final_sparsity": 0.8, "scope": "lamp"})


def test_what_is_given_wins_over_both_kinds_of_defaults():
    given = TrainSettings(lr=0.2, stop=0.9, options={"target": 0.4}, device="cpu").resolve("none", trained=True)
    assert (given.lr, given.stop, given.options) == (0.2, 0.9, {"target": 0.4, "threshold": "auto"})
    usual = TrainSettings(fine_tune=False, device="cpu").resolve("none", trained=True)
    assert (usual.lr, usual.options) == (0.1, {})
    assert TrainSettings(fine_tune=True, device="cpu").resolve("none").lr == 0.003


@pytest.mark.parametrize("trained", [False, True])
def test_resolved_settings_resolve_to_themselves(trained):
    once = TrainSettings(device="cpu").resolve("none", trained=trained)
    assert once.resolve("shift", trained=not trained) == once


def test_fine_tuning_defaults_are_options_of_their_method():
    for row in METHODS.values():
        assert row.fine_tuning.keys() <= row.option_defaults().keys() | {"stop"}


def test_random_weights_train_as_with_the_old_defaults_and_without_a_first_evaluation(tiny, monkeypatch):
    old = {"lr": 0.1, "stop": 0.95, "options": {"target": 0.15, "tolerance": 0.1, "threshold": 1e-3}}
    now, then, blind = tiny.model(), tiny.model(), tiny.model()
    train(now, tiny.data(), tiny.settings())
    train(then, tiny.data(), tiny.settings(**old, fine_tune=False))
    monkeypatch.setattr(loop_module._Training, "_evaluate_start", lambda self: None)
    train(blind, tiny.data(), tiny.settings())
    for other in (then, blind):
        assert all(torch.equal(a, b) for a, b in zip(now.module.parameters(), other.module.parameters(), strict=True))
        assert all(torch.equal(now.masks[name], other.masks[name]) for name in now.masks)


def test_trained_weights_take_small_steps_and_stop_at_half_time(tiny, tmp_path):
    settings, _ = in_folder(tiny, tmp_path / "run", trained(tiny.model()), epochs=5)
    assert settings.lr == 0.003
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())["settings"]
    assert (saved["lr"], saved["stop"], saved["options"]) == (0.003, 0.5, {"target": 0.03, "threshold": "auto"})
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    moves = [line for line in lines if line["kind"] == "reallocation"]
    active = lines[0]["active_weights"]
    assert sum(moves[0]["dropped"].values()) == round(0.03 * active)
    assert moves[0]["share"] == pytest.approx(0.03, abs=0.01) and max(move["step"] for move in moves) <= 10


def test_a_run_from_before_resumes_with_the_settings_that_it_was_started_with(tiny, tmp_path):
    """Old settings name neither `fine_tune` nor a stop, and lr as it was: from trained weights, too, 0.1."""
    run = tmp_path / "run"
    in_folder(tiny, run, trained(tiny.model()), fine_tune=False)
    path = run / "settings.json"
    saved = json.loads(path.read_text())
    new = ("fine_tune", "teacher", "teacher_weight", "teacher_temperature", "channels_last", "accumulate")
    saved["settings"] = {name: value for name, value in saved["settings"].items() if name not in new}
    path.write_text(json.dumps(saved))
    log = run / "log.jsonl"
    lines = [json.loads(line) for line in log.read_bytes().splitlines()]
    assert "start_accuracy" in lines[0]
    stopped = find_stopped(run)
    settings = stopped.settings({"epochs": 2}).resolve("none", trained=True)
    assert (settings.lr, settings.stop, settings.options, settings.fine_tune) == (0.1, None, {}, False)
    assert (settings.channels_last, settings.accumulate) == (False, 1)


def test_the_announcement_says_what_changed():
    lines = [
        announcement(TrainSettings(method=name, options=options).resolve("none", trained=True))
        for name, options in (("dsr", {}), ("dsr", {"target": 200.0}), ("static", {}), ("gmp", {"final_sparsity": 0.8}))
    ]
    assert lines == [
        "from trained weights: learning rate 0.003, dsr moves 3 % a time until half time",
        "from trained weights: learning rate 0.003, dsr moves 200 weights a time until half time",
        "from trained weights: learning rate 0.003",
        "from trained weights: learning rate 0.003",
    ]


def test_the_first_evaluation_is_logged_once_and_survives_a_resumption(tiny, tmp_path):
    class Interrupt(Observer):
        def __init__(self):
            self.starts = []

        def on_evaluated_start(self, start):
            self.starts.append(start)

        def on_step(self, step):
            if step == 6:
                raise KeyboardInterrupt

    observer = Interrupt()
    settings = tiny.settings(batch_size=50)
    run = RunFolder(tmp_path / "run")
    run.facts = {"settings": settings.to_dict()}
    with pytest.raises(KeyboardInterrupt), run:
        train(tiny.model(), tiny.data(), settings, [run, observer])
    assert len(observer.starts) == 1 and 0 <= observer.starts[0].test_accuracy <= 1
    stopped = RunFolder(tmp_path / "run", resume=True).stopped
    assert stopped.start_accuracy == observer.starts[0].test_accuracy
    again = Interrupt()
    again.on_step = lambda step: None
    result = train(tiny.model(), tiny.data(), stopped.started, [again], state=stopped.state)
    assert again.starts == [] and result.start_accuracy is None
    assert (tmp_path / "run" / "log.jsonl").read_text().count("start_accuracy") == 1


def test_a_network_at_chance_is_doubted_unless_its_head_is_new():
    counts, dead, alive = [70, 83], 83 / 153, 0.8
    config = ModelConfig("torchvision", "resnet18", conversion={"weights": "net.pth"})
    assert chance(counts) == pytest.approx(0.542 + 2 * 0.0403, abs=1e-3)
    assert "at chance (0.5425)" in doubt(config, dead, counts) and "--num-classes 2" in doubt(config, dead, counts)
    assert doubt(config, alive, counts) == ""
    assert doubt(ModelConfig("torchvision", "resnet18"), dead, counts) == ""
    fresh = {"weights": "net.pth", "fresh": ["fc.weight"]}
    assert doubt(ModelConfig("torchvision", "resnet18", conversion=fresh), dead, counts) == ""


def test_the_command_prints_the_defaults_the_first_evaluation_and_the_doubt(tmp_path):
    made = convert("lenet-300-100", sparsity=0.9, input_size=8)
    with torch.no_grad():  # the same answer to every image
        made.module.fc3.weight.abs_()[1:].neg_()
    torch.save(made.module.state_dict(), tmp_path / "net.pth")
    convert("lenet-300-100", sparsity=0.9, input_size=8, weights=str(tmp_path / "net.pth")).save(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "-o", str(tmp_path / "run"), "--data", "digits", "--epochs", "1", "--json"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    lines = done.stderr.splitlines()
    assert lines[0] == "from trained weights: learning rate 0.003, dsr moves 3 % a time until half time"
    assert lines[1].startswith("this training has 11 steps, since --batch-size is 128; ")
    assert lines[2].startswith("storage compact: ")
    assert lines[3].startswith("epoch 0/1  accuracy 0.") and lines[3].endswith("before the training")
    assert lines[4].startswith("warning: before the training the network is at chance")
    document = json.loads(done.stdout)
    assert f"accuracy {document['start_accuracy']:.4f}" in lines[3]
    assert document["settings"]["lr"] == 0.003 and document["settings"]["options"]["threshold"] == "auto"


def test_many_steps_need_no_line():
    settings = TrainSettings(batch_size=32)
    assert few_steps(settings, 30) == ""
    assert few_steps(settings, 1).startswith("this training has 1 step, since --batch-size is 32; ")


def test_help_says_both_defaults():
    # Lines may break after a hyphen.
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split()).replace("- ", "-")
    for words in (
        "default 0.1 for sgd, 0.001 for the others; from trained weights 0.003 for sgd, 0.0001 for the others",
        "default 0.15; from trained weights 0.03",
        "from trained weights, for dsr, set, deepr, rigl and neuron-set 0.5",
        "default 0.001; from trained weights auto",
    ):
        assert words in text
