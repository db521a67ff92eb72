"""A training with a deadline stops after an epoch, says so, and resumes to the same result."""

import json
import time

import pytest
import torch
from click.testing import CliRunner

from converters.conversion import convert
from converters.loading import load
from dsr_tool.cli.train import command
from dsr_tool.errors import UsageError
from dsr_tool.train import Observer, RunFolder, train


class Listener(Observer):
    def __init__(self):
        self.paused = []

    def on_pause(self, epoch):
        self.paused.append(epoch)


@pytest.mark.parametrize(("seconds", "epochs"), [(-1, 1), (1000, 3)])
def test_no_epoch_starts_that_would_end_after_the_deadline(tiny, seconds, epochs):
    listener = Listener()
    settings = tiny.settings(epochs=3, method="static")
    result = train(tiny.model(), tiny.data(), settings, [listener], deadline=time.monotonic() + seconds)
    assert result.last.epoch == epochs and listener.paused == ([1] if epochs < 3 else [])


def test_a_deadline_after_the_last_epoch_is_not_a_pause(tiny):
    listener = Listener()
    train(tiny.model(), tiny.data(), tiny.settings(epochs=1, method="static"), [listener], deadline=0.0)
    assert listener.paused == []


def test_a_training_in_pieces_ends_with_the_same_bits(tiny, tmp_path):
    settings = tiny.settings(epochs=4, batch_size=50, every=3, augment="crop-flip")
    whole = tiny.model()
    train(whole, tiny.data(), settings)
    for piece in range(1, 5):
        run = RunFolder(tmp_path / "run", resume=True)
        run.facts = {"settings": settings.to_dict()}
        model = load(tmp_path / "run", tiny.module()) if run.stopped else tiny.model()
        with run:
            train(model, tiny.data(), settings, [run], state=run.stopped.state if run.stopped else None, deadline=0.0)
        end = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
        assert end["status"] == ("paused" if piece < 4 else "complete") and end["epochs"] == piece
    expected = whole.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.module.state_dict().items())


def test_the_command_says_that_a_paused_run_is_not_finished(tmp_path):
    convert("shufflenet_v2_x0_5", num_classes=10, input_size=32, sparsity=0.8).save(tmp_path / "model")
    line = [tmp_path / "model", "-o", tmp_path / "run", "--data", "fake:40", "--batch-size", 20, "--epochs", 2]
    line = [*map(str, line), "--method", "static", "--device", "cpu", "--max-time", "0.001", "--resume", "-q"]
    first = CliRunner().invoke(command, line, catch_exceptions=False)
    assert first.exit_code == 0 and "paused by --max-time after epoch 1 of 2" in first.stdout
    second = CliRunner().invoke(command, [*line, "--json"], catch_exceptions=False)
    document = json.loads(second.stdout)
    assert second.exit_code == 0 and document["finished"] is True and document["last"]["epoch"] == 2
    with pytest.raises(UsageError, match="--max-time nan is not allowed"):
        CliRunner().invoke(command, [*line, "--max-time", "nan"], catch_exceptions=False)
