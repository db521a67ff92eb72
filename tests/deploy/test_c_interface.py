"""Every function of dsr.h, given what it must refuse: one sentence with a remedy, nothing printed, nothing broken."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dsr_tool.errors import FormatError
from dsr_tool.runtime.deploy import plan as plan_module
from dsr_tool.runtime.deploy.library import include_dir, library
from dsr_tool.runtime.deploy.plan import PlanFile
from dsr_tool.runtime.kernels.library import FOLDER

Tensor, declared = plan_module._Tensor, plan_module._declared
X = np.random.default_rng(2).standard_normal((1, 3, 40, 36)).astype(np.float32)
REMEDIES = ("give ", "set ", "copy ", "open ", "install ", "make ", "export ", "use ")


@pytest.fixture(scope="module")
def dsr():
    return declared(ctypes.CDLL(str(library())))


@pytest.fixture(autouse=True)
def silent(capfd):
    """Asserts that nothing was printed."""
    yield
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def handle(dsr, plan_path):
    opened = ctypes.c_void_p(dsr.dsr_open(os.fsencode(plan_path), 2))
    assert opened
    yield opened
    dsr.dsr_close(ctypes.byref(opened))


def sentence(dsr):
    """Returns what dsr_last_error says, which must be one sentence with a remedy."""
    said = dsr.dsr_last_error().decode()
    assert said.endswith(".") and "\n" not in said and not said.rstrip(".").endswith(","), said
    assert any(word in said for word in REMEDIES), said
    return said


def tensor(array, **fields):
    made = plan_module._tensor(array)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def run(dsr, handle, x, y):
    return dsr.dsr_run(handle, ctypes.byref(x), 1, ctypes.byref(y), 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the file is of another format")
def test_no_memory_but_the_last_error_belongs_to_threads():
    """What kernels need while they run belongs to the handle: memory of threads would stay after dsr_close."""
    content = library().read_bytes()
    first, size, count = (int.from_bytes(content[at : at + n], "little") for at, n in ((32, 8), (54, 2), (56, 2)))
    headers = [content[first + i * size : first + (i + 1) * size] for i in range(count)]
    thread_local = 7  # PT_TLS of ELF
    (found,) = [header for header in headers if int.from_bytes(header[:4], "little") == thread_local]
    assert int.from_bytes(found[40:48], "little") <= 1024


def test_null_is_refused_everywhere(dsr, handle):
    assert dsr.dsr_open(None, 1) is None and "path" in sentence(dsr)
    assert dsr.dsr_open_memory(None, 100, 1) is None and "NULL" in sentence(dsr)
    assert dsr.dsr_input_count(None) == dsr.dsr_output_count(None) == 0
    assert dsr.dsr_input(None, 0).rank == dsr.dsr_output(None, 0).rank == 0
    assert dsr.dsr_text(None, b"level") is None and dsr.dsr_text(handle, None) is None
    dsr.dsr_close(None)
    empty = ctypes.c_void_p(None)
    dsr.dsr_close(ctypes.byref(empty))
    x, y = tensor(X), tensor(np.empty((1, 7), np.float32))
    assert dsr.dsr_run(None, ctypes.byref(x), 1, ctypes.byref(y), 1) == 1 and "plan is NULL" in sentence(dsr)
    assert dsr.dsr_run(handle, None, 1, ctypes.byref(y), 1) == 1 and "array of inputs is NULL" in sentence(dsr)
    assert dsr.dsr_run(handle, ctypes.byref(x), 1, None, 1) == 1 and "array of outputs is NULL" in sentence(dsr)


def test_a_second_close_does_nothing(dsr, plan_path):
    handle = ctypes.c_void_p(dsr.dsr_open(os.fsencode(plan_path), 2))
    for _ in range(2):
        dsr.dsr_close(ctypes.byref(handle))
        assert not handle


@pytest.mark.parametrize("index", [-1, 1, 2**31 - 1, -(2**31)])
def test_inputs_and_outputs_that_are_not_there_have_rank_0(dsr, handle, index):
    assert dsr.dsr_input(handle, index).rank == dsr.dsr_output(handle, index).rank == 0
    assert dsr.dsr_input(handle, index).name is None


def test_texts_describe_the_model(dsr, handle):
    assert dsr.dsr_text(handle, b"mean") == b"0.4 0.5 0.6"
    assert dsr.dsr_text(handle, b"label/6") == b"class 6"
    for unknown in (b"label/7", b"label/-1", b"", b"Mean"):
        assert dsr.dsr_text(handle, unknown) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"type": 0}, "type 0; give float32"),
        ({"type": 7}, "type 7"),
        ({"rank": 3}, "rank 3 and shape (1, 3, 40); give an array of shape (1, 3, 40, 36)"),
        ({"rank": 0}, "rank 0"),
        ({"rank": -1}, "rank -1 and shape ()"),
        ({"rank": 9}, "rank 9"),
        ({"rank": 2**31 - 1}, "rank 2147483647"),
        ({"data": None}, "no data"),
        ({"data": X.ctypes.data + 1}, "multiple of 4 bytes"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(dsr, handle, fields, words):
    y = tensor(np.empty((1, 7), np.float32))
    assert run(dsr, handle, tensor(X, **fields), y) == 1
    assert words in sentence(dsr) and "input 'x'" in sentence(dsr)
    assert run(dsr, handle, tensor(X), tensor(np.empty((1, 7), np.float32), **fields)) == 1
    assert "output 'scores'" in sentence(dsr)


@pytest.mark.parametrize("shape", [(2, 3, 40, 36), (1, 3, 36, 40), (1, 3, 40, 0), (1, 3, 40, -36), (1, 3, 2**62, 36)])
def test_another_shape_is_refused(dsr, handle, shape):
    shaped = (ctypes.c_int64 * 8)(*shape)
    assert run(dsr, handle, tensor(X, shape=shaped), tensor(np.empty((1, 7), np.float32))) == 1
    assert str(shape) in sentence(dsr)


def test_strides_other_than_those_of_row_major_order_are_refused(dsr, handle):
    y = np.empty((1, 7), np.float32)
    for strides, axis in [((4320, 1440, 36, 2), 3), ((4320, 1440, -36, 1), 2), ((4320, 0, 36, 1), 1)]:
        given = (ctypes.c_int64 * 4)(*strides)
        assert run(dsr, handle, tensor(X, strides=ctypes.addressof(given)), tensor(y)) == 1
        assert f"axis {axis}" in sentence(dsr) and "row-major" in sentence(dsr)
    # The first axis has one entry, so its stride means nothing.
    given = (ctypes.c_int64 * 4)(5, 1440, 36, 1)
    assert run(dsr, handle, tensor(X, strides=ctypes.addressof(given)), tensor(y)) == 0


@pytest.mark.parametrize("count", [0, 2, -1, 2**31 - 1])
def test_another_number_of_arrays_is_refused(dsr, handle, count):
    x, y = tensor(X), tensor(np.empty((1, 7), np.float32))
    assert dsr.dsr_run(handle, ctypes.byref(x), count, ctypes.byref(y), 1) == 1
    assert f"number of inputs is {count}; give 1" in sentence(dsr)
    assert dsr.dsr_run(handle, ctypes.byref(x), 1, ctypes.byref(y), count) == 1
    assert f"number of outputs is {count}" in sentence(dsr)


def test_an_output_inside_another_array_is_refused(dsr, handle, plan_of):
    x = X.copy()
    for last in (0, 6, X.size - 1):
        assert run(dsr, handle, tensor(x), tensor(np.empty((1, 7), np.float32), data=x.ctypes.data + 4 * last)) == 1
        assert "'scores' shares memory with 'x'" in sentence(dsr)
    content = plan_of("heads")
    heads = ctypes.c_void_p(dsr.dsr_open_memory(content, len(content), 1))
    outputs = [dsr.dsr_output(heads, index) for index in range(3)]
    memory = np.empty(10**5, np.float32)
    given = (Tensor * 3)(*outputs)
    for one in given:
        one.data = memory.ctypes.data
    assert dsr.dsr_run(heads, ctypes.byref(tensor(x)), 1, given, 3) == 1
    assert "'fine' shares memory with 'vector'" in sentence(dsr)
    dsr.dsr_close(ctypes.byref(heads))


def test_outputs_side_by_side_in_one_block_are_fine(dsr, handle):
    block = np.zeros(X.size + 7, np.float32)
    block[: X.size] = X.ravel()
    x, y = tensor(block, rank=4, shape=(ctypes.c_int64 * 8)(*X.shape)), tensor(block[X.size :].reshape(1, 7))
    assert run(dsr, handle, x, y) == 0
    assert block[X.size :].any() and np.array_equal(block[: X.size], X.ravel())


@pytest.mark.parametrize("threads", [0, -1, 257, 2**31 - 1])
def test_a_number_of_threads_out_of_range_is_refused(dsr, plan_path, threads):
    assert dsr.dsr_open(os.fsencode(plan_path), threads) is None
    assert f"threads {threads} is not in [1, 256]" in sentence(dsr)


def renumbered(content, version):
    return content[:8] + struct.pack("<q", version) + content[16:]


def changed(content):
    """A plan of another interface."""
    return content[:16] + struct.pack("<q", 1) + content[24:]


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: b"", "no plan file"),
        (lambda content: b"PK\3\4" + bytes(1000), "no plan file"),
        (lambda content: content[:7], "no plan file"),
        (lambda content: content[:47], "no plan file"),
        (lambda content: content[:48], "48 bytes instead of"),
        (lambda content: content[: len(content) // 2], "instead of"),
        (lambda content: content + bytes(8), "instead of"),
        (lambda content: renumbered(content, 2), "newer than this library; install a newer"),
        (lambda content: renumbered(content, 0), "damaged: its format is 0"),
        (changed, "another version of the library (interface 1"),
        (flipped, "its checksum does not fit"),
    ],
)
def test_files_that_are_no_plan_for_this_library_are_refused(dsr, plan_of, tmp_path, change, words):
    content = change(plan_of())
    path = tmp_path / "changed.dsrplan"
    path.write_bytes(content)
    assert dsr.dsr_open(os.fsencode(path), 1) is None
    assert words in sentence(dsr) and str(path)[:200] in sentence(dsr)
    assert dsr.dsr_open_memory(content, len(content), 1) is None
    assert words in sentence(dsr)


def test_paths_that_lead_to_no_file_are_refused(dsr, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in [
        (tmp_path / "none", "No such file"),
        (tmp_path, "no regular file"),
        (tmp_path / "pipe", "no regular file"),  # it is not waited for
        ("", "No such file"),
        ("/" + "a" * 5000, "name too long"),
    ]:
        assert dsr.dsr_open(os.fsencode(path), 1) is None
        assert words in sentence(dsr)


def test_a_plan_for_another_processor_says_which_and_what_to_do(dsr, plan_of, levels):
    others = [row.name for row in levels if not row.runs]
    if not others:
        pytest.skip("this processor runs every level")
    content = plan_of(levels=(others[0],))
    assert dsr.dsr_open_memory(content, len(content), 1) is None
    assert f"for processors with {others[0]}" in sentence(dsr) and "export it with --level" in sentence(dsr)


def test_the_last_error_belongs_to_its_thread(dsr):
    assert dsr.dsr_open(None, 1) is None
    mine, gate, theirs = sentence(dsr), threading.Barrier(4), []

    def fail(threads):
        before = dsr.dsr_last_error()
        assert dsr.dsr_open_memory(b"x", 1, threads) is None
        gate.wait()
        theirs.append((threads, before, dsr.dsr_last_error()))

    workers = [threading.Thread(target=fail, args=(-number,)) for number in range(1, 5)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert sorted(before for _, before, _ in theirs) == [b""] * 4
    assert all(f"threads {threads} ".encode() in said for threads, _, said in theirs)
    assert sentence(dsr) == mine


def test_several_threads_use_one_handle_and_handles_of_their_own(plan_of):
    content = plan_of("heads")
    inputs = [np.random.default_rng(seed).standard_normal(X.shape).astype(np.float32) for seed in range(24)]
    wanted = [PlanFile(content).run(x) for x in inputs]
    shared, own = PlanFile(content, 2), [PlanFile(content, 2) for _ in range(3)]
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit((own[i % 3] if i % 2 else shared).run, inputs[i % 24]) for i in range(96)]
        for i, job in enumerate(jobs):
            for name, array in job.result().items():
                assert array.tobytes() == wanted[i % 24][name].tobytes()


def test_a_plan_goes_on_after_its_bytes_and_its_file_are_gone(plan_of, tmp_path):
    content = bytearray(plan_of())
    wanted = PlanFile(bytes(content)).run(X)["scores"]
    (tmp_path / "p").write_bytes(content)
    plan, from_file = PlanFile(bytes(content)), PlanFile(tmp_path / "p")
    (tmp_path / "p").unlink()
    for one in (plan, from_file):
        assert np.array_equal(one.run(X)["scores"], wanted)
        assert one.text("label/3") == "class 3"


FORKS = """
import os, sys, threading, numpy as np
from dsr_tool.runtime.deploy.plan import PlanFile
plan = PlanFile(sys.argv[1], int(sys.argv[2]))
x = np.random.default_rng(2).standard_normal((1, 3, 40, 36)).astype(np.float32)
wanted = plan.run(x)["scores"]
stop = threading.Event()
def predict():
    while not stop.is_set():
        plan.run(x)
workers = [threading.Thread(target=predict) for _ in range(2)]
[worker.start() for worker in workers]
for _ in range(20):
    child = os.fork()
    if not child:
        found = []
        inside = [threading.Thread(target=lambda: found.append(plan.run(x)["scores"])) for _ in range(3)]
        [one.start() for one in inside]
        [one.join() for one in inside]
        good = len(found) == 3 and all(np.array_equal(one, wanted) for one in found)
        if not os.fork():
            good = np.array_equal(plan.run(x)["scores"], wanted)
            plan.close()
            os._exit(0 if good else 4)
        good = good and os.wait()[1] == 0
        plan.close()
        os._exit(0 if good else 3)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
[worker.join() for worker in workers]
assert np.array_equal(plan.run(x)["scores"], wanted)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_forked_process_goes_on_with_a_handle_that_others_were_using(plan_path, threads):
    done = subprocess.run(
        [sys.executable, "-c", FORKS, plan_path, threads], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_two_copies_of_the_library_live_in_one_process(dsr, plan_path, tmp_path):
    copy = tmp_path / f"copy{library().suffix}"
    shutil.copy(library(), copy)
    other = declared(ctypes.CDLL(str(copy), mode=ctypes.RTLD_GLOBAL))
    assert ctypes.cast(other.dsr_run, ctypes.c_void_p).value != ctypes.cast(dsr.dsr_run, ctypes.c_void_p).value
    results = []
    for one in (dsr, other):
        handle, y = ctypes.c_void_p(one.dsr_open(os.fsencode(plan_path), 2)), np.empty((1, 7), np.float32)
        assert run(one, handle, tensor(X), tensor(y)) == 0
        results.append(y)
        one.dsr_close(ctypes.byref(handle))
    assert np.array_equal(*results)
    assert dsr.dsr_open(None, 1) is None
    assert other.dsr_last_error() != dsr.dsr_last_error()


PROGRAM = r"""
#include <dsr.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char **argv) {
    int closed = 0;
    for (int i = 1; i < argc; i++) {
        dsr_plan *plan = dsr_open(argv[i], 2);
        if (!plan) { printf("%s\n", dsr_last_error()); continue; }
        dsr_tensor x = dsr_input(plan, 0), y = dsr_output(plan, 0);
        size_t entries = 1;
        for (int axis = 0; axis < x.rank; axis++) entries *= (size_t)x.shape[axis];
        float *in = calloc(entries, sizeof *in), *out = calloc((size_t)y.shape[1], sizeof *out);
        x.data = in;
        y.data = out;
        if (dsr_run(plan, &x, 1, &y, 1) != DSR_OK) printf("%s\n", dsr_last_error());
        printf("%s %.6g\n", dsr_text(plan, "level"), (double)out[0]);
        dsr_close(&plan);
        dsr_close(&plan);
        closed += plan == NULL;
        free(in);
        free(out);
    }
    printf("%d\n", closed);
    return 0;
}
"""


def test_a_program_in_c_opens_runs_and_closes(compiler, linked, called, plan_path, tmp_path):
    (tmp_path / "program.c").write_text(PROGRAM)
    options = ["-x", "c", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{include_dir()}"]
    called(compiler, *options, tmp_path / "program.c", "-x", "none", "-o", tmp_path / "program", *linked)
    printed = called(tmp_path / "program", plan_path, tmp_path / "none", plan_path).splitlines()
    plan = PlanFile(plan_path)
    assert printed[0] == printed[2] == f"{plan.text('level')} {plan.run(np.zeros_like(X))['scores'][0, 0]:.6g}"
    assert "No such file" in printed[1]
    assert printed[3] == "2"


def test_the_library_needs_nothing_but_the_system(called):
    reader = shutil.which("readelf")
    if reader is None:
        pytest.skip("there is no readelf here")
    needed = [
        line.split("[")[1].rstrip("]") for line in called(reader, "-d", library()).splitlines() if "NEEDED" in line
    ]
    system = {"libc", "libm", "libpthread", "ld-linux-x86-64"}
    # One that is named by its path may be built with sanitizers.
    checks = {"libasan", "libubsan"} if library().parent != FOLDER else set()
    assert {name.split(".")[0] for name in needed} <= system | checks


def test_a_python_handle_that_is_closed_runs_no_more(plan_path):
    plan = PlanFile(plan_path)
    plan.close()
    plan.close()
    assert plan.text("level") is None
    with pytest.raises(Exception, match="plan is NULL"):
        plan.run(X)
    with pytest.raises(FormatError, match="threads 0"):
        PlanFile(plan_path, 0)


def test_the_checksum_is_that_of_zip(plan_of):
    content = plan_of()
    assert struct.unpack("<q", content[40:48])[0] == zlib.crc32(content[48:])
