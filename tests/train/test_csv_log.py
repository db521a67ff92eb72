"""The table of epochs has fixed columns and the rows of the log, whatever ended the run before."""

import csv
import json

import pytest

from dsr_tool.errors import FileError
from dsr_tool.train import RunFolder, train
from dsr_tool.train import run as run_module
from tests.train.test_resume import go_on

HEADER = (
    "epoch,step,train_loss,train_accuracy,test_loss,test_accuracy,lr,time_s,active_weights,sparsity,dropped,grown,"
    "threshold"
)


def rows_of_log(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    prunable = lines[0]["prunable_weights"]
    return [
        {
            **{name: "" if line.get(name) is None else str(line.get(name)) for name in HEADER.split(",")},
            "sparsity": str(1 - line["active_weights"] / prunable),
            "dropped": str(sum(line["dropped"].values())),
            "grown": str(sum(line["grown"].values())),
        }
        for line in lines
        if line["kind"] == "epoch"
    ]


def rows_of_table(folder):
    with (folder / "log.csv").open(newline="", encoding="ascii") as file:
        return list(csv.DictReader(file, strict=True))


def run_in(tiny, folder, *, sparsity=0.8, **changes):
    with RunFolder(folder) as run:
        run.facts = {"data": "fake:200"}
        train(tiny.model(sparsity), tiny.data(), tiny.settings(**changes), [run])


@pytest.mark.parametrize(
    "changes", [{}, {"method": "static"}, {"method": "gmp", "sparsity": 0, "options": {"final_sparsity": 0.5}}]
)
def test_the_table_has_a_row_for_each_epoch_of_the_log(tiny, tmp_path, changes):
    run_in(tiny, tmp_path / "run", epochs=3, every=2, batch_size=16, **changes)
    content = (tmp_path / "run" / "log.csv").read_bytes()
    assert content.startswith(HEADER.encode() + b"\r\n") and content.endswith(b"\r\n")
    assert content.count(b"\n") == content.count(b"\r\n") == 4
    assert rows_of_table(tmp_path / "run") == rows_of_log(tmp_path / "run")
    last = rows_of_table(tmp_path / "run")[-1]
    assert float(last["sparsity"]) == pytest.approx(0.5 if "sparsity" in changes else 0.8, abs=1e-3)
    assert any(row["threshold"] for row in rows_of_table(tmp_path / "run")) == (changes == {})


@pytest.mark.parametrize("damage", ["lost", "cut", "ahead", "left over"])
def test_a_run_that_resumes_has_the_rows_of_its_log(tiny, tmp_path, damage):
    folder = tmp_path / "run"
    go_on(tiny, folder)
    whole = (folder / "log.csv").read_bytes()
    table = folder / "log.csv"
    if damage == "lost":  # a run of an older version
        table.unlink()
    if damage == "cut":
        table.write_bytes(whole[:-9])
    if damage == "ahead":
        table.write_bytes(whole + whole.splitlines(keepends=True)[-1])
    if damage == "left over":
        (folder / ".log.csv.x.part").write_bytes(b"epoch")
    go_on(tiny, folder)
    assert table.read_bytes() == whole and not list(folder.glob(".log.csv.*"))


def test_a_full_disk_ends_the_run_in_a_sentence_and_a_resume_repairs_the_table(tiny, tmp_path, monkeypatch):
    def full(folder, record, prunable):
        append(folder, record, prunable)
        if record.epoch == 2:
            content = (folder / "log.csv").read_bytes()
            (folder / "log.csv").write_bytes(content[:-5])
            raise OSError(28, "No space left on device")

    append = run_module.append_epoch
    with monkeypatch.context() as patch, pytest.raises(FileError, match="is full; .*what was saved before is complete"):
        patch.setattr(run_module, "append_epoch", full)
        go_on(tiny, tmp_path / "cut")
    go_on(tiny, tmp_path / "cut")
    assert [row["epoch"] for row in rows_of_table(tmp_path / "cut")] == ["1", "2", "3", "4"]
    assert rows_of_table(tmp_path / "cut") == rows_of_log(tmp_path / "cut")
