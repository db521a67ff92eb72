"""--config: the settings.json of a run makes an equal run, options win and are told, and faults are listed at once."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.conversion import convert
from dsr_tool.cli.train import command
from dsr_tool.errors import DsrError, FileError, FormatError, UsageError
from dsr_tool.recipes.config_file import read_config
from dsr_tool.recipes.keys import TRAIN_KEYS
from dsr_tool.train import TrainSettings


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Makes the model `net`, in the current directory of the test."""
    monkeypatch.chdir(tmp_path)
    convert("lenet-300-100", sparsity=0.9, input_size=8, seed=3).save("net")
    return "net"


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_settings_of_a_run_make_an_equal_run(model):
    many = ["--epochs", 2, "--lr", 0.05, "--schedule", "step", "--milestones", "0.5,1", "--label-smoothing", 0.1, "-q"]
    many += ["--option", "target=0.2", "--class-weights", "balanced", "--log", "tensorboard", "--seed", 4]
    run(model, "-o", "a", "--data", "digits", *many)
    again = run("--config", "a/settings.json", "-o", "b")
    assert again.exit_code == 0 and "--config" not in again.stderr
    for name in ("model.safetensors", "masks.safetensors", "config.json", "settings.json", "best/model.safetensors"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes(), name
    assert Path("b/tensorboard").is_dir()
    other = run("--config", "a/settings.json", "-o", "c", "--seed", 5, "-q")
    assert other.stderr == "" and Path("c/model.safetensors").read_bytes() != Path("a/model.safetensors").read_bytes()


def test_what_the_command_line_gives_wins_and_is_told(model):
    run(model, "-o", "a", "--data", "digits", "--epochs", 2, "--option", "target=0.2", "-q")
    convert("lenet-300-100", sparsity=0.8, input_size=8, seed=1).save("other")
    done = run("other", "--config", "a/settings.json", "-o", "b", "--epochs", 1, "--set", "lr=0.03", "--method", "set")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("--config")]
    assert line == (
        "--config 'a/settings.json', with method set instead of dsr, epochs 1 instead of 2, lr 0.03 instead of 0.1, "
        "no target, model other instead of net"
    )
    facts = json.loads(Path("b/settings.json").read_text())
    assert (facts["model"], facts["settings"]["epochs"], facts["settings"]["lr"]) == ("other", 1, 0.03)
    assert facts["settings"]["options"] == {} and facts["data"] == "digits"


@pytest.mark.usefixtures("model")
def test_a_run_from_a_file_resumes_bit_for_bit():
    places, settings = ['model = "net"', 'data = "digits"', "[settings]"], ["epochs = 3", "every = 3"]
    lines = [*places, *settings, 'storage = "auto"', 'class_weights = "balanced"']
    Path("c.toml").write_text("\n".join(lines))
    run("--config", "c.toml", "-o", "whole", "-q")
    for _ in range(3):
        run("--config", "c.toml", "-o", "cut", "-q", "--resume", "--max-time", 1e-3)
    for name in ("model.safetensors", "masks.safetensors", "settings.json"):
        assert Path("whole", name).read_bytes() == Path("cut", name).read_bytes()
    assert json.loads(Path("cut/settings.json").read_text())["settings"]["every"] == 3
    with pytest.raises(UsageError, match="--epochs 4 differs from the 3"):
        run("--config", "c.toml", "-o", "cut", "--resume", "--epochs", 4)


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


FULL = {"model": "net", "data": "digits"}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            {"modle": "net", "settings": {"epoch": 3, "lr": "fast", "milestones": 4, "seed": True}},
            [
                "key 'modle' is unknown; did you mean model?",
                "model and data are missing; add to the file or the command",
                "key 'settings.epoch' is unknown; did you mean settings.epochs",
                "settings.lr is 'fast', expected a number",
                "settings.milestones is 4, expected a list, each a number",
                "settings.seed is True, expected a whole number",
            ],
        ),
        (FULL | {"settings": {"epochs": None, "lr": None}}, ["settings.epochs is None, expected a whole number."]),
        (FULL | {"settings": [1]}, ["settings is [1], expected a table."]),
        (FULL | {"settings": {"options": 3}}, ["settings.options is 3, expected a table."]),
        (
            FULL | {"settings": {"options": {"targt": 3, "target": [1]}}},
            [
                "settings.options.targt 3 is not an option of method dsr; did you mean target",
                "settings.options.target is [1]",
            ],
        ),
        ({"model": 3, "data": "digits"}, ["model is 3, expected a text."]),
        ({"model": "", "data": "digits"}, ["model is empty; give a value, or leave it out."]),
        ({"model": "net"}, ["data is missing; add"]),
        ({f"key{i}": i for i in range(40)}, ["And 33 more."]),
        ({"train": {"epochs": 3}}, ["is a recipe; give it as --recipe."]),
    ],
)
def test_all_faults_of_a_file_are_in_one_message(tmp_path, content, parts):
    with pytest.raises(UsageError) as caught:
        read_config(written(tmp_path / "c.json", content), {})
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("c.json", "{", FormatError, "cannot be read .*; correct it"),
        ("c.json", "[1]", FormatError, "holds no object"),
        ("c.json", "[" * 100_000, FormatError, "cannot be read"),
        ("c.toml", "model = ", FormatError, "is not valid TOML"),
        ("c.yaml", "model: net", UsageError, "ends neither in .json nor in .toml"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, name, content, error, message):
    with pytest.raises(error, match=message):
        read_config(written(tmp_path / name, content), {})
    with pytest.raises(UsageError, match="is a folder; give a file, such as .*settings.json"):
        read_config(tmp_path, {})
    with pytest.raises(FileError, match="--config file .* does not exist"):
        read_config(tmp_path / "none.json", {})


def test_every_key_of_the_settings_is_read_back(tmp_path):
    values = TrainSettings(options={"target": 0.2}, milestones=(1.0, 2.0), epochs=40, schedule="step").to_dict()
    assert values.keys() == {*TRAIN_KEYS, "options"}
    recipe = read_config(written(tmp_path / "c.json", FULL | {"settings": values}), {}).recipe
    assert TrainSettings(**recipe.train, options=recipe.options).to_dict() == values


def test_code_in_a_file_is_not_run_unless_the_user_names_it(tmp_path):
    path = written(tmp_path / "c.json", {"model": "net", "data": "os:getcwd"})
    with pytest.raises(
        UsageError, match="code that no file may name to be run; if you trust it, give --data os:getcwd"
    ):
        read_config(path, {})
    assert read_config(path, {"data": "os:getcwd"}).data == "os:getcwd"


@pytest.mark.usefixtures("model")
def test_an_empty_text_on_the_command_line_does_not_stand_for_the_file():
    written(Path("c.json"), {"model": "net", "data": "os:getcwd"})
    with pytest.raises(UsageError, match="--data '' is unknown"):
        run("--config", "c.json", "-o", "a", "--data", "")
    with pytest.raises(UsageError, match="--log '' is unknown"):
        run("--config", "c.json", "-o", "a", "--data", "digits", "--log", "")


def test_options_of_the_default_method_stay_when_the_method_is_given_by_name(tmp_path):
    file = read_config(written(tmp_path / "c.json", FULL | {"settings": {"options": {"target": 0.2}}}), {})
    assert file.for_method("dsr").options == {"target": 0.2} and not file.for_method("set").options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL_DIR and --data must be given, or --config with a file that has them"),
        (["net"], "^--data must be given"),
        (["--data", "digits"], "^MODEL_DIR must be given"),
        (["--config", "c.json", "--recipe", "lenet-300-100/dsr@0.9"], "--config and --recipe both give all settings"),
        (["--config", "c.json", "--epochs", "0"], "--epochs 0 is not allowed"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "c.json", FULL)
    with pytest.raises(DsrError, match=message) as caught:
        run("-o", "run", *arguments)
    assert caught.value.exit_code == 2 and not Path("run").exists()
