"""An interrupted comparison leaves no process, and a folder in which the same command gets the same results."""

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
    """Returns the ids of the worker processes of a folder, without the command that started them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # the process ended after it was listed
            continue
        if "dsr_tool.compare.work" in arguments and any(str(folder) in argument for argument in arguments):
            found.append(int(process.name))
    return found


def epochs(comparison, cell):
    log = comparison.run_folder(cell) / "log.jsonl"
    return log.read_text().count('"kind": "epoch"') if log.is_file() else 0


@pytest.fixture
def command(family, tmp_path):
    """The installed command, over two cells by two processes, and its comparison."""
    arguments = f"--recipe {family} --methods dsr,static --data digits --set epochs=12 --jobs 2 -o".split()
    command = Path(sys.executable).with_name("dsr-tool")
    return [command, "compare", *arguments, tmp_path / "cut"], Comparison(tmp_path / "cut")


@pytest.fixture(autouse=True)
def _default_sigint():
    """A shell makes its background processes ignore SIGINT, and the processes that the tests start inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(command, comparison, number):
    """Starts the command, and sends it a signal once two more epochs are complete."""
    before = sum(epochs(comparison, cell) for cell in CELLS)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while sum(epochs(comparison, cell) for cell in CELLS) < before + 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert len(workers(comparison.path)) == 2
    process.send_signal(number)
    return process


def complete_here(comparison, grid):
    """Runs the rest of the cells in this process. Returns True if all are complete and the plan is as expected."""
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
        out, err = process.communicate()  # would block if a worker still held its stderr
        assert out == "" and "Traceback" not in err and [cut.record(cell) for cell in CELLS] == [None, None]
        if number != signal.SIGKILL:
            assert process.returncode == 130 and err.splitlines()[-1] == SENTENCE
    grid, whole = make_grid(tables(data="digits", set={"epochs": 12}), "grid"), Comparison(tmp_path / "whole")
    whole.add(grid)
    assert complete_here(cut, grid) and complete_here(whole, grid)
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
