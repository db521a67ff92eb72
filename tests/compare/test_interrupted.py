"""What a comparison leaves when it is interrupted: no process, and a folder that goes on to the same end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsr_tool.compare.cells import Comparison
from dsr_tool.compare.grid import make_grid
from dsr_tool.compare.work import Order, stopped_by_sigterm, work

CELLS = ("dsr@0.9-s0", "static@0.9-s0")
SAME = ("test_accuracy", "test_loss", "best_test_accuracy", "nonzeros", "archive_bytes", "inference_macs", "steps")
SENTENCE = "dsr-tool: interrupted; what was completely written before is kept."

linux = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")


def workers(folder):
    """Processes that work in a folder, except commands."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if "dsr_tool.compare.work" in said and any(str(folder) in word for word in said):
            found.append(int(process.name))
    return found


def epochs(comparison, cell):
    log = comparison.run_folder(cell) / "log.jsonl"
    return log.read_text().count('"kind": "epoch"') if log.is_file() else 0


@pytest.fixture
def command(family, tmp_path):
    """The real command over two cells by two processes, and what it works on."""
    told = f"--recipe {family} --methods dsr,static --data digits --set epochs=12 --jobs 2 -o".split()
    command = Path(sys.executable).with_name("dsr-tool")
    return [command, "compare", *told, tmp_path / "cut"], Comparison(tmp_path / "cut")


@pytest.fixture(autouse=True)
def _sigint_is_heard():
    """Tests that run in the background of a shell ignore SIGINT, and what they start would do so too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(command, comparison, number):
    """Start the command, and send it a signal once a cell has come further."""
    before = sum(epochs(comparison, cell) for cell in CELLS)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while sum(epochs(comparison, cell) for cell in CELLS) < before + 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert len(workers(comparison.path)) == 2
    process.send_signal(number)
    return process


def work_on(comparison, grid):
    """Do the rest here; whether all is there then."""
    work(Order(str(comparison.path), CELLS, time.time()), lambda text: None)
    return comparison.plan() == grid and [comparison.record(cell)["status"] for cell in CELLS] == ["complete"] * 2


@linux
@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGTERM],
        pytest.param([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_comparison_leaves_no_worker_and_resumes(tables, command, tmp_path, numbers):
    line, cut = command
    for number in numbers:
        process = interrupt(line, cut, number)
        give_up = time.monotonic() + 10
        while workers(cut.path) and time.monotonic() < give_up:
            time.sleep(0.02)
        assert workers(cut.path) == []
        out, err = process.communicate()  # workers hold its stderr for as long as they are there
        assert out == "" and "Traceback" not in err and [cut.record(cell) for cell in CELLS] == [None, None]
        if number != signal.SIGKILL:
            assert process.returncode == 130 and err.splitlines()[-1] == SENTENCE
    grid, whole = make_grid(tables(data="digits", set={"epochs": 12}), "grid"), Comparison(tmp_path / "whole")
    whole.add(grid)
    assert work_on(cut, grid) and work_on(whole, grid)
    for cell in CELLS:
        one, other = cut.record(cell), whole.record(cell)
        assert {key: one[key] for key in SAME} == {key: other[key] for key in SAME}
        for name in ("model.safetensors", "masks.safetensors", "model.dsr"):
            assert (cut.run_folder(cell) / name).read_bytes() == (whole.run_folder(cell) / name).read_bytes()


def test_sigterm_interrupts_only_within_the_context():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stopped_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
