"""Mutants of every kind of file that is read: each loads, or is refused in one sentence, within time and memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = ("archive", "predict", "onnx", "npz", "plan", "weights", "masks", "config", "safetensors", "pickle")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus") / "files"
    subprocess.run([sys.executable, HERE / "corpus.py", root], check=True)
    return root


def _read_mutants(kind, corpus, scratch, seed, count):
    shutil.copytree(corpus / "folder", scratch / "folder")
    command = [sys.executable, HERE / "worker.py", kind, corpus / kind, scratch, seed, 0, count]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    at = (scratch / "at").read_text()
    assert ended.returncode == 0, f"ended at mutant {at} of seed {seed}: {ended.stderr[-3000:]}"
    result = json.loads(ended.stdout)
    assert not result["failures"], "\n\n".join(f"mutant {number}: {what}" for number, what in result["failures"][:3])
    # A reader that accepts nearly everything checks nothing.
    assert result["rejected"] > count / 4
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutants_are_read_or_refused(kind, corpus, tmp_path):
    _read_mutants(kind, corpus, tmp_path, seed=1, count=1000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_thousand_mutants_are_read_or_refused(kind, corpus, tmp_path):
    result = _read_mutants(kind, corpus, tmp_path, seed=2, count=20_000)
    print(kind, {key: result[key] for key in ("accepted", "rejected", "slowest_s")})
