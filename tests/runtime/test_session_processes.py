"""Sessions in processes: pickled, copied, and forked while other threads predict or train."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.formats.archive import open_archive, write_archive
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime import Session
from dsr_tool.runtime.kernels.library import library
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

X = np.random.default_rng(0).standard_normal((2, 8, 24, 24)).astype(np.float32)
FORKS = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="nothing forks here")
CASES = [("native", 1), ("native", 2), ("scipy", 1), ("onnxruntime", 1), ("onnxruntime", 2)]


def write(path: Path, density: float = 0.1, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(shape) for name, shape in {"a": (32, 8, 3, 3), "b": (8, 32, 3, 3)}.items()}
    tensors = {
        name: SparseTensor.from_dense(weight.astype("f4"), Mask.from_bool(rng.random(weight.shape) < density))
        for name, weight in weights.items()
    }
    graph = Graph(
        (Value("x", (None, 8, 24, 24)),),
        (Value("y", (None, 8, 24, 24)),),
        (
            Node("Conv", ("x", "a"), ("h",), {"pads": (1, 1, 1, 1)}),
            Node("Relu", ("h",), ("r",)),
            Node("Conv", ("r", "b"), ("y",), {"pads": (1, 1, 1, 1)}),
        ),
        {},
        ("a", "b"),
        20,
    )
    specs = {name: LayerSpec(name, one.mask.shape, "Conv2d", "sparse", True, "") for name, one in tensors.items()}
    write_archive(path, tensors, specs, graph, ModelConfig("module", "Net", 8, (8, 24, 24)))
    return path


def unpickled(content: bytes) -> Session:
    return pickle.loads(content)  # noqa: S301 - written by the test itself


def opened(path: Path, runtime: str, threads: int) -> Session:
    """Opens a file in the runtime; it is dense for ONNX Runtime, which only `auto` picks."""
    if library() is None and runtime != "scipy":
        pytest.skip("no kernels were built here")
    dense = runtime == "onnxruntime"
    session = Session(write(path, 1.0 if dense else 0.1), threads, 2, "auto" if dense else runtime)
    assert session.runtime == runtime
    return session


@pytest.mark.parametrize(("runtime", "threads"), CASES)
@pytest.mark.parametrize("way", [lambda s: unpickled(pickle.dumps(s)), copy.copy, copy.deepcopy])
def test_a_copy_has_the_options_of_its_original_and_computes_the_same(tmp_path, way, runtime, threads):
    session = opened(tmp_path / "net.dsr", runtime, threads)
    copied = way(session)
    assert (copied.runtime, copied.threads, copied.config) == (runtime, threads, session.config)
    np.testing.assert_array_equal(copied.run(X), session.run(X))
    # Each has a plan of its own, so that one does not wait for the other.
    assert copied._plan is not session._plan


def test_a_pickle_is_a_path_and_opens_it_from_any_folder(tmp_path, monkeypatch):
    write(tmp_path / "net.dsr")
    monkeypatch.chdir(tmp_path)
    session = Session("net.dsr")
    content = pickle.dumps(session)
    assert len(content) < 1000
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(unpickled(content).run(X), session.run(X))


def test_a_session_of_an_open_archive_is_pickled_by_its_path(tmp_path):
    session = Session(open_archive(write(tmp_path / "net.dsr")))
    np.testing.assert_array_equal(unpickled(pickle.dumps(session)).run(X), session.run(X))


def test_a_session_of_an_onnx_file_is_pickled_by_its_path(tmp_path):
    pytest.importorskip("onnx")
    from exporters.onnx.write import to_onnx

    archive = open_archive(write(tmp_path / "net.dsr"))
    tensors = {name: archive.tensor(name) for name in archive.graph.parameters}
    (tmp_path / "net.onnx").write_bytes(to_onnx(archive.graph, tensors).SerializeToString())
    session = Session(tmp_path / "net.onnx")
    np.testing.assert_array_equal(unpickled(pickle.dumps(session)).run(X), session.run(X))


def test_a_model_without_a_file_cannot_be_pickled_but_copied(tmp_path):
    path = write(tmp_path / "net.dsr")
    session = Session(open_archive(path))
    path.unlink()
    with pytest.raises(UsageError, match=r"pickled by the path of its file, and '.*net\.dsr' is no file"):
        pickle.dumps(session)
    np.testing.assert_array_equal(copy.deepcopy(session).run(X), session.run(X))


def test_a_pickle_of_a_file_that_was_replaced_or_removed_is_refused(tmp_path):
    path = write(tmp_path / "net.dsr")
    content = pickle.dumps(Session(path))
    write(tmp_path / "other.dsr", seed=1).replace(path)
    with pytest.raises(FormatError, match="holds other weights than the session that was pickled"):
        unpickled(content)
    path.unlink()
    with pytest.raises(FileError, match="does not exist"):
        unpickled(content)


class Named(Session):
    """A session with an attribute of its own."""

    name = ""


def test_attributes_of_a_subclass_are_kept(tmp_path):
    session = Named(write(tmp_path / "net.dsr"))
    session.name = "mine"
    for copied in (unpickled(pickle.dumps(session)), copy.copy(session), copy.deepcopy(session)):
        assert (type(copied), copied.name) == (Named, "mine")


SCRIPT = """
import multiprocessing, os, sys, threading, time
import numpy as np
from dsr_tool.runtime import Session

def close(session, x, y):
    np.testing.assert_allclose(session.run(x), y, rtol=1e-5, atol=1e-5)

if __name__ == "__main__":
    path, runtime, threads, x = sys.argv[1], sys.argv[2], int(sys.argv[3]), np.load(sys.argv[4])
    session = Session(path, threads, 2, runtime)
    y = session.run(x)
"""

PROCESS = """
    for method in multiprocessing.get_all_start_methods():
        child = multiprocessing.get_context(method).Process(target=close, args=(session, x, y))
        child.start()
        child.join(60)
        print(method, child.exitcode)
"""

FORK = """
    stop = []
    def loop():
        while not stop:
            session.run(x)
    threads = [threading.Thread(target=loop) for _ in range(2)]
    for thread in threads: thread.start()
    time.sleep(0.05)
    for child in range(5):
        pid = os.fork()
        if not pid:
            import signal
            signal.alarm(20)
            close(session, x, y)
            # The fifth ends as Python does, which frees sessions and pools. That of a process which ONNX Runtime has
            # threads in waits for them in ONNX Runtime's own exit handler, whoever started them.
            if child < 4 or session.runtime == "onnxruntime": os._exit(0)
            stop.append(1)
            sys.exit(0)
        print(os.waitpid(pid, 0)[1], flush=True)  # a child would print what is in the buffer again
    stop.append(1)
    for thread in threads: thread.join()
"""


def output(tmp_path: Path, script: str, runtime: str, threads: int) -> list[str]:
    session = opened(tmp_path / "net.dsr", runtime, threads)
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "script.py").write_text(SCRIPT + script, encoding="utf-8")
    wanted = "auto" if runtime == "onnxruntime" else runtime
    command = [sys.executable, "-W", "ignore", "script.py", str(session._path), wanted, str(threads), "x.npy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("runtime", "threads"), [("native", 2), ("scipy", 1), ("onnxruntime", 2)])
def test_every_way_to_start_a_process_may_take_a_session(tmp_path, runtime, threads):
    expected = [f"{method} 0" for method in multiprocessing.get_all_start_methods()]
    assert output(tmp_path, PROCESS, runtime, threads) == expected


@FORKS
@pytest.mark.parametrize(("runtime", "threads"), CASES)
def test_a_process_forked_while_threads_predict_predicts_and_ends(tmp_path, runtime, threads):
    assert output(tmp_path, FORK, runtime, threads) == ["0"] * 5


TRAINING = """
import os, signal, sys, threading, time
import numpy as np
from dsr_tool.runtime.kernels.training import ConvPlan, Layer
layer = Layer(8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 20, 20, 16, 1)
positions = np.arange(576, dtype=np.int32)
values, x = np.ones(576, np.float32), np.ones((4, 8, 20, 20, 16), np.float32)
plan = ConvPlan(layer, positions.ctypes.data, 576)
def run():
    out = np.empty_like(x)
    plan.gather(x.ctypes.data, 4, values.ctypes.data, None, out.ctypes.data, THREADS)
    assert out[0, 0, 5, 5, 0] == 72
stop = []
def loop():
    while not stop: run()
threads = [threading.Thread(target=loop) for _ in range(2)]
for thread in threads: thread.start()
time.sleep(.05)
for child in range(5):
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        run()
        if child < 4: os._exit(0)
        stop.append(1)
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0, child
stop.append(1)
for thread in threads: thread.join()
"""


@FORKS
@pytest.mark.skipif(library() is None, reason="no kernels were built here")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_forked_while_threads_train_computes_and_ends(threads):
    script = TRAINING.replace("THREADS", str(threads))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


class Outputs:
    """A data set whose items a session computes."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> np.ndarray:
        return self.session.run(X[index % 2 :][:1])[0]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_of_a_data_loader_may_have_a_session(tmp_path, method):
    data = pytest.importorskip("torch.utils.data")
    session = Session(write(tmp_path / "net.dsr"))
    loader = data.DataLoader(Outputs(session), 4, num_workers=1, multiprocessing_context=method, timeout=100)
    (batch,) = loader
    expected = session.run(X)
    np.testing.assert_allclose(batch.numpy(), np.concatenate([expected, expected]), rtol=1e-5, atol=1e-5)


@FORKS
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_read_an_archive_that_is_open_in_both(tmp_path):
    archive = open_archive(write(tmp_path / "net.dsr", 1.0))
    expected = {name: archive.tensor(name).values.copy() for name in ("a", "b")}
    children = []
    for _ in range(3):
        pid = os.fork()
        if not pid:
            # A shared position in the file would mix up the reads.
            equal = all(np.array_equal(archive.tensor(n).values, v) for _ in range(200) for n, v in expected.items())
            os._exit(0 if equal else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]


def test_a_config_is_that_of_the_file(tmp_path):
    session = Session(write(tmp_path / "net.dsr"))
    session.config = replace(session.config, labels=("changed",))
    assert unpickled(pickle.dumps(session)).config.labels == ()
