"""What plans compute: the same for any number of threads, for any batch, and as a session of the archive."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from dsr_tool.runtime import Session
from dsr_tool.runtime.deploy.library import library
from dsr_tool.runtime.deploy.plan import PlanFile
from dsr_tool.runtime.kernels.library import level

NAMES = ["gated", "few bits", "heads"]
X = np.random.default_rng(1).standard_normal((4, 3, 40, 36)).astype(np.float32)


@pytest.fixture(scope="module")
def runs(levels):
    """Levels that run here, fastest first."""
    return [row.name for row in levels if row.runs]


def same(found, wanted):
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        assert found[name].tobytes() == wanted[name].tobytes(), f"{name} differs"
        assert np.ptp(wanted[name]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_computes_bit_for_bit_what_a_session_computes(archives, plan_of, runs, name):
    session = Session(archives[name], runtime="native", batch=1)
    assert session.runtime == "native" and not session.coverage.fallbacks
    used = level() if level() in runs else runs[0]
    plan = PlanFile(plan_of(name, levels=(used,)))
    assert plan.text("level") == used
    for x in X:
        same(plan.run(x[None]), session.run_all(x[None]))


@pytest.mark.parametrize("used", ["avx512", "avx2", "neon", "baseline"])
def test_every_level_computes_what_its_kernels_compute_in_a_session(archives, plan_of, runs, used, tmp_path):
    if used not in runs:
        pytest.skip(f"{used} does not run here")
    script = """
import sys, numpy as np
from dsr_tool.runtime import Session
x = np.load(sys.argv[1])
for name, archive in zip(sys.argv[3::2], sys.argv[4::2]):
    session = Session(archive, runtime="native", batch=4)
    assert session.runtime == "native", session.runtime
    np.savez(f"{sys.argv[2]}/{name}.npz", **session.run_all(x))
"""
    np.save(tmp_path / "x.npy", X)
    kernels = library().with_name(f"_kernels_{used}{library().suffix}")
    pairs = [str(word) for name in NAMES for word in (name, archives[name])]
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x.npy"), str(tmp_path), *pairs],
        env={**os.environ, "DSR_TOOL_KERNELS": str(kernels)},
        check=True,
    )
    for name in NAMES:
        with np.load(tmp_path / f"{name}.npz") as found:
            plan = PlanFile(plan_of(name, batch=4, levels=(used,)))
            assert plan.text("level") == used
            same(plan.run(X), dict(found))


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_number_of_threads(plan_of, name):
    content = plan_of(name)
    alone = PlanFile(content).run(X[:1])
    for threads in (2, 3, 7):
        plan = PlanFile(content, threads)
        for _ in range(3):  # later runs find in memory what earlier ones left
            same(plan.run(X[:1]), alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_what_its_inputs_give_one_by_one(plan_of, name):
    together = PlanFile(plan_of(name, batch=4)).run(X)
    one = PlanFile(plan_of(name))
    for i in range(4):
        for output, found in one.run(X[i : i + 1]).items():
            np.testing.assert_allclose(together[output][i : i + 1], found, rtol=0, atol=1e-6 * np.abs(found).max())


def test_the_best_level_of_several_is_used_and_others_are_skipped(plan_of, runs):
    every = PlanFile(plan_of())
    assert every.text("level") == runs[0]
    assert PlanFile(plan_of(levels=(runs[-1],))).text("level") == runs[-1]


def test_levels_share_one_copy_of_the_weights(plan_of, runs):
    every, first = len(plan_of()), len(plan_of(levels=(runs[0],)))
    assert first < every
    codes, floats = len(plan_of("few bits")), every
    assert codes < floats
