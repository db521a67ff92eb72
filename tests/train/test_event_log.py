"""Events for TensorBoard, read back by its own reader: every epoch once, however often the run was stopped."""

import csv
import sys

import pytest
from click.testing import CliRunner

from converters.conversion import convert
from converters.loading import load
from dsr_tool.cli.train import command
from dsr_tool.errors import FileError, UsageError
from dsr_tool.train import RunFolder, event_log, train_in_folder
from dsr_tool.train.event_log import require_log

EventAccumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
).EventAccumulator


class Killed(BaseException):
    """Stands for the end of the process."""


def events(run):
    """Returns steps and values by tag."""
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def in_folder(tiny, folder, *, log="tensorboard", pause=False, **given):
    run = RunFolder(folder, resume=True)
    model = load(folder, tiny.module()) if run.stopped else tiny.model()
    given = {"epochs": 3, "batch_size": 50, "every": 1, "device": "cpu", **given}
    deadline = 0.0 if pause else float("inf")
    return train_in_folder(
        run, model, tiny.data(), given, facts={"data": "fake:200"}, log=log, quiet=True, deadline=deadline
    )


def without_time(found):
    return {tag: values for tag, values in found.items() if tag != "epoch_time_s"}


def test_the_figures_of_the_log_are_shown_by_epoch(tiny, tmp_path):
    _, result = in_folder(tiny, tmp_path / "run")
    found = events(tmp_path / "run")
    assert [tag for tag in found if not tag.startswith("density/")] == [
        *("accuracy/test", "loss/test", "loss/train", "accuracy/train", "learning_rate", "epoch_time_s", "sparsity"),
        *("moved/dropped", "moved/grown", "threshold"),
    ]
    assert {tag for tag in found if tag.startswith("density/")} == {"density/first", "density/second", "density/head"}
    assert [step for step, _ in found["accuracy/test"]] == [0, 1, 2, 3]
    assert found["accuracy/test"][0][1] == pytest.approx(result.start_accuracy)
    for index, record in enumerate(result.epochs):
        step, loss = found["loss/train"][index]
        assert (step, loss) == (record.epoch, pytest.approx(record.train_loss))
        assert found["density/second"][index][1] == pytest.approx(record.density["second.weight"])
        assert found["moved/grown"][index][1] == sum(record.grown.values())
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [value for _, value in found["sparsity"]] == pytest.approx([float(row["sparsity"]) for row in table])


@pytest.mark.parametrize("moment", ["before", "after"])
def test_no_epoch_is_there_twice_or_never_after_a_kill(tiny, tmp_path, monkeypatch, moment):
    """The process dies around the checkpoint of the second epoch."""
    in_folder(tiny, tmp_path / "whole")
    save = RunFolder.on_state

    def die(run, model, state):
        if state["epoch"] < 2 or moment == "after":
            save(run, model, state)
        if state["epoch"] == 2:
            raise Killed

    folder = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "on_state", die)
        in_folder(tiny, folder)
    assert len(events(folder)["loss/train"]) == 2
    in_folder(tiny, folder)
    assert without_time(events(folder)) == without_time(events(tmp_path / "whole"))
    assert [path.name[-6:] for path in sorted((folder / "tensorboard").iterdir())] == ["000000", "000001"]
    in_folder(tiny, folder)  # a complete run gets no further file
    assert len(list((folder / "tensorboard").iterdir())) == 2
    for name in ("model.safetensors", "masks.safetensors", "settings.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_log_that_begins_at_a_resume_has_the_epochs_before(tiny, tmp_path):
    in_folder(tiny, tmp_path / "whole")
    in_folder(tiny, tmp_path / "run", log=None, pause=True)
    assert not (tmp_path / "run" / "tensorboard").exists()
    in_folder(tiny, tmp_path / "run")
    found, whole = (without_time(events(tmp_path / name)) for name in ("run", "whole"))
    assert found.pop("loss/test") == whole.pop("loss/test")[1:]  # the log does not hand on that of epoch 0
    assert found == whole


def test_a_full_disk_is_one_sentence(tiny, tmp_path, monkeypatch):
    def write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", write)
    with pytest.raises(FileError, match="is full; free some space there.*what was saved before is complete"):
        in_folder(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # no epoch was complete


def test_a_log_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"--log 'tensorbord' is unknown; did you mean tensorboard\?"):
        require_log("tensorbord")
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(UsageError, match=r"needs the package tensorboard, .*pip install 'dsr-tool\[tensorboard\]'"):
        CliRunner().invoke(
            command,
            ["nowhere", "-o", str(tmp_path / "run"), "--data", "digits", "--log", "tensorboard"],
            catch_exceptions=False,
        )
    assert event_log.LOGS == ("tensorboard",) and not (tmp_path / "run").exists()


def test_the_command_writes_and_records_the_log(tmp_path):
    convert("lenet-300-100", sparsity=0.9, input_size=8, seed=3).save(tmp_path / "sparse")
    line = [tmp_path / "sparse", "-o", tmp_path / "run", "--data", "digits", "--epochs", "1", "--log", "tensorboard"]
    done = CliRunner().invoke(command, [*map(str, line), "-q"], catch_exceptions=False)
    assert done.exit_code == 0 and [step for step, _ in events(tmp_path / "run")["loss/train"]] == [1]
    assert '"log": "tensorboard"' in (tmp_path / "run" / "settings.json").read_text()
