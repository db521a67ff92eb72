"""The demo: its rows and files, with a small network and random images in place of ResNet-18 and digits."""

import json

import pytest

from dsr_tool.compare import demo
from dsr_tool.compare.demo_document import demo_text
from dsr_tool.errors import UsageError
from dsr_tool.measure.memory.process import can_measure

ROWS = ["dense", "tuned-90", "static-90", "dsr-90"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns the document and the folder of a demo of one epoch, and what it notified of."""
    lines = []
    output = tmp_path_factory.mktemp("demo") / "demo-out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_ARCHITECTURE", "lenet-300-100")
        patch.setattr(demo, "_DATA", "fake:128")
        patch.setattr(demo, "_SHAPE", (1, 28, 28))
        patch.setattr(demo, "_NETWORK", {"num_classes": 10, "input_size": 28})
        patch.setattr(demo, "_ROUNDS", 4)
        document = demo.run_demo(output, epochs=1, seed=0, force=False, quiet=True, notify=lines.append)
    return document, output, lines


def test_each_row_is_verified_and_measured(made):
    document, output, lines = made
    assert [row["name"] for row in document["runs"]] == ROWS
    assert [line.partition(":")[0] for line in lines] == ROWS
    for row in document["runs"]:
        assert row["verified"]
        assert row["archive_bytes"] == (output / f"{row['name']}.dsr").stat().st_size
        assert row["onnx_bytes"] == (output / f"{row['name']}.onnx").stat().st_size
        assert row["latency"]["ratio"]["low"] > 0 and row["train_time_s"] > 0
        assert (row["train_peak_bytes"] or 0) > 0 or not can_measure()
    dense, *sparse = document["runs"]
    assert dense["active_weights"] == dense["prunable_weights"]
    assert {row["active_weights"] for row in sparse} == {round(dense["prunable_weights"] / 10)}
    assert max(row["archive_bytes"] for row in sparse) < 0.3 * dense["archive_bytes"]


def test_it_leaves_no_path_of_its_temporary_folder(made):
    _, output, _ = made
    part = f".{output.name}."
    leaking = [path for path in output.rglob("*") if path.is_file() and part.encode() in path.read_bytes()]
    assert leaking == []
    for name in ROWS:
        first = (output / f"{name}.txt").read_text(encoding="utf-8").partition("\n")[0]
        assert first.startswith(f"{output}/{name}.dsr: ")


def test_the_tuned_network_names_the_weights_that_it_came_from(made):
    _, output, _ = made
    record = json.loads((output / "tuned-90" / "config.json").read_text(encoding="utf-8"))["model"]["conversion"]
    assert record["weights"] == str(output / "dense" / "model.safetensors")
    assert (output / "dense" / "model.safetensors").is_file()


def test_the_table_has_a_line_for_each_row(made):
    document, output, _ = made
    text = demo_text(document)
    _, _, *lines = text.splitlines()
    for row, line in zip(document["runs"], lines, strict=False):
        assert line.startswith(f"{row['name']} ")
        assert f"{row['test_accuracy']:.2%}" in line and f"{row['latency']['ratio']['median']:.2f}" in line
        assert line.endswith("yes")
    assert max(map(len, text.splitlines()[:-1])) <= 120  # the last line has the path of the folder
    assert json.loads((output / "demo.json").read_text(encoding="utf-8")) == document


def test_it_needs_scikit_learn_before_anything_is_trained(monkeypatch, tmp_path):
    def missing(*_):
        raise UsageError("--data 'digits' needs scikit-learn")

    monkeypatch.setattr(demo, "load_data", missing)
    with pytest.raises(UsageError, match="scikit-learn"):
        demo.run_demo(tmp_path / "out", epochs=1, seed=0, force=False, quiet=True, notify=print)
    assert list(tmp_path.iterdir()) == []
