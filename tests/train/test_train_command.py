import json
import sys
from io import StringIO

import pytest
from click.testing import CliRunner
from rich.console import Console

from converters.conversion import convert
from converters.loading import load
from dsr_tool import cli
from dsr_tool.cli.train import command
from dsr_tool.train import EpochRecord, Progress
from dsr_tool.train.progress import summary


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "shuffle"
    model = convert("shufflenet_v2_x0_5", num_classes=10, input_size=32, sparsity=0.8)
    model.save(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_result_is_one_json_document(model_dir, tmp_path):
    done = run(model_dir, "-o", tmp_path / "run", "--data", "fake:40", "--epochs", 1, "--batch-size", 20, "--json")
    document = json.loads(done.stdout)
    model = load(tmp_path / "run")
    assert done.exit_code == 0 and document["schema"] == "dsr-tool/train/1"
    assert document["active_weights"] == model.active_weights == load(model_dir).active_weights
    assert document["steps"] == 2 and document["best"]["epoch"] == 1
    storage, before, kernels, after = done.stderr.splitlines()
    assert storage.startswith("storage compact: ") and kernels.startswith("kernels: ")
    assert before.startswith("epoch 0/1  accuracy") and after.startswith("epoch 1/1  accuracy")
    saved = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert saved["data"] == "fake:40" and saved["settings"]["lr"] == 0.1 and saved["train_images"] == 40


def test_quiet_leaves_stderr_empty(model_dir, tmp_path):
    done = run(model_dir, "-o", tmp_path / "run", "--data", "fake:40", "--epochs", 1, "--method", "static", "--quiet")
    assert done.stderr == ""
    assert "static" in (tmp_path / "run" / "settings.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "fake:40", "--epochs", "0", "--lr", "-1"], 2, "--epochs 0 is not allowed; give 1 or more. --lr -1"),
        (["--data", "cifar"], 2, "did you mean cifar"),
        (["--data", "fake:40", "--milestones", "a,b", "--schedule", "step"], 2, "not a list of numbers"),
        (["--data", "mnist:nowhere"], 1, "has no train-images"),
        (["--data", "fake:40", "--lr", "1e30", "--epochs", "3", "--batch-size", "8"], 1, "is NaN or inf at step"),
    ],
)
def test_mistakes_are_one_sentence_and_an_exit_code(model_dir, tmp_path, monkeypatch, capsys, arguments, code, message):
    line = ["dsr-tool", "train", str(model_dir), "-o", str(tmp_path / "run"), "-q", *arguments]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    output = capsys.readouterr()
    assert caught.value.code == code and message in output.err and output.out == ""


def test_wrong_arguments_create_no_run_folder(model_dir, tmp_path, monkeypatch, capsys):
    for arguments in (["--data", "cifar"], ["--data", "fake:40", "--epochs", "0"], ["--data", "arrays:none.npz"]):
        monkeypatch.setattr(sys, "argv", ["dsr-tool", "train", str(model_dir), "-o", str(tmp_path / "run"), *arguments])
        with pytest.raises(SystemExit):
            cli.main()
    assert not (tmp_path / "run").exists() and capsys.readouterr().err.count("\n") == 3


def record(**changes):
    layers = ("a.weight", "b.weight", "c.weight", "d.weight", "e.weight")
    values = {
        "epoch": 1,
        "step": 10,
        "train_loss": 1.0,
        "train_accuracy": 0.5,
        "test_loss": 2.0,
        "test_accuracy": 0.25,
        "lr": 0.1,
        "time_s": 3.0,
        "active_weights": 100,
        "density": dict.fromkeys(layers, 0.1),
        "dropped": dict(zip(layers, (10, 10, 10, 10, 2000), strict=True)),
        "grown": dict(zip(layers, (1010, 510, 310, 210, 0), strict=True)),
        "threshold": 0.001,
    }
    return EpochRecord(**{**values, **changes})


def test_a_line_names_the_layers_that_gained_and_lost_most():
    line = summary(record(), 12)
    assert line.startswith("epoch  1/12  accuracy 0.2500  loss 1.0000 (test 2.0000)  3.0 s")
    assert line.endswith("moved 2,040: +a 1,000 +b 500 +c 300 -e 2,000")
    assert "moved" not in summary(record(dropped={}, grown={}), 12)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_drawn_only_on_a_terminal(tiny, terminal):
    text = StringIO()
    console = Console(file=text, force_terminal=terminal, width=200, highlight=False)
    with Progress(3, 64, console=console) as progress:
        progress.on_start(tiny.model(), 30)
        progress.on_step(10)
        progress.on_epoch(tiny.model(), record())
    assert "accuracy 0.2500" in text.getvalue() and ("\x1b[" in text.getvalue()) == terminal


def test_help_answers_with_examples():
    text = run("--help").stdout
    assert "dsr-tool train resnet18-90 -o run --data digits" in text and "--threshold" in text
