"""`export --to plan`, `verify` and `predict` of plans, and what is refused."""

from __future__ import annotations

import json
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

import dsr_tool
from dsr_tool.errors import FormatError, UsageError
from dsr_tool.runtime.deploy.library import level_rows
from dsr_tool.runtime.deploy.plan import PlanFile
from dsr_tool.runtime.deploy.session import PlanSession

try:
    HERE = next(row.name for row in level_rows() if row.runs)
except UsageError as error:  # the library was not built
    pytest.skip(str(error), allow_module_level=True)


class Net(nn.Sequential):
    def __init__(self):
        conv = nn.Conv2d(3, 8, 3, padding=1)
        super().__init__(conv, nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(), nn.Linear(400, 5))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return dsr_tool.convert(Net(), sparsity=0.6, input_shape=(3, 12, 12))


@pytest.fixture
def exported(model, tmp_path):
    def export(name="net.dsrplan", **options):
        return dsr_tool.export(model, tmp_path / name, **options), tmp_path / name

    return export


def test_a_plan_is_verified_by_the_level_that_runs_here(exported, model):
    found, path = exported()
    assert found.kind == "plan" and list(found.runtimes) == [f"kernels ({HERE})"]
    # The weights are folded into the plan, so nobody may claim that they were compared.
    assert found.masks_equal is None and found.weights_equal is None
    assert dsr_tool.verify(path, model).passed
    x = np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(np.float32)
    with torch.no_grad():
        expected = model.module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(PlanSession(path).run(x), expected, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_any_number_of_inputs_is_predicted_with_any_batch(exported, batch):
    _, path = exported(batch=batch)
    assert PlanFile(path).inputs[0].shape == (batch, 3, 12, 12)
    x = np.random.default_rng(1).standard_normal((7, 3, 12, 12)).astype(np.float32)
    _, one = exported("one.dsrplan")
    np.testing.assert_allclose(PlanSession(path).run(x), PlanSession(one).run(x), atol=1e-6)


def test_a_session_of_a_plan_is_pickled_by_its_path(exported):
    _, path = exported()
    session, x = dsr_tool.PlanSession(str(path), threads=2), np.ones((2, 3, 12, 12), np.float32)
    again = pickle.loads(pickle.dumps(session))  # noqa: S301
    assert again.path == path.absolute() and again.threads == 2
    np.testing.assert_array_equal(again.run(x), session.run(x))


@pytest.mark.parametrize("values", ["int8", "int5", "int4"])
def test_rounded_weights_are_verified_against_the_model_rounded_likewise(exported, model, values):
    found, path = exported(values=values)
    assert found.rounding_largest > 0
    # A text of the plan says how it was rounded, so it can be verified later as well.
    again = dsr_tool.verify(path, model)
    assert again.passed and again.rounding_largest == found.rounding_largest


def test_a_plan_of_another_model_is_not_verified(exported):
    _, path = exported()
    torch.manual_seed(1)
    other = dsr_tool.convert(Net(), sparsity=0.6, input_shape=(3, 12, 12), seed=1)
    assert not dsr_tool.verify(path, other).passed


def test_a_plan_for_other_processors_alone_is_not_left_behind(exported, tmp_path):
    foreign = [row.name for row in level_rows() if not row.runs]
    if not foreign:
        pytest.skip("this processor runs every level")
    with pytest.raises(FormatError, match=rf"for processors with {foreign[0]}, and this one runs .*{HERE}"):
        exported(levels=foreign[:1])
    assert not list(tmp_path.iterdir())


def test_levels_share_the_weights(exported):
    sizes = [exported(f"{len(levels)}.dsrplan", levels=levels)[1].stat().st_size for levels in ([HERE], [])]
    values = sum(4 * 0.4 * n for n in (216, 1152, 2000))
    assert sizes[1] - sizes[0] < 2 * sizes[0] - 2 * values


def test_an_operator_without_a_kernel_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.cumsum(x.flatten(1), 1)

    net = nn.Sequential(Net(), Odd())
    with pytest.raises(UsageError, match="operator CumSum .* has no kernel"):
        dsr_tool.export(dsr_tool.convert(net, sparsity=0.5, input_shape=(3, 12, 12)), tmp_path / "odd.dsrplan")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], r"--batch 0 is not in \[1, 65536\]"),
        (["--level", "sse9"], "--level 'sse9' is not in .*baseline"),
        (["--values", "palette"], "--values 'palette' does not exist in plan files"),
        (["--to", "archive", "-o", "x.dsr", "--batch", "2"], "--batch is for plans"),
        (["--to", "archive", "-o", "x.dsr", "--level", "avx2"], "--level is for plans"),
    ],
)
def test_options_that_do_not_fit_are_refused(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    dsr_tool.convert("lenet-300-100", sparsity=0.9).save("m")
    code, _, error = run("export", "m", "-o", "x.dsrplan", *options)
    assert code == 2
    assert re.search(message, error) and error.count("\n") == 1
    assert not list(tmp_path.glob("x*"))


def test_predict_runs_a_plan_and_report_says_what_it_is(exported, run, tmp_path):
    _, path = exported()
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 12, 12), np.float32))
    code, out, _ = run("predict", path, tmp_path / "x.npy", "--json")
    assert code == 0
    assert [len(one["top"]) for one in json.loads(out)["predictions"]] == [5, 5]
    code, _, error = run("predict", path, tmp_path / "x.npy", "--runtime", "scipy")
    assert code == 2 and "does not run plans" in error
    code, _, error = run("report", path)
    assert code == 2 and "holds a program for the kernels" in error


def test_a_damaged_plan_fails_its_verification(run, tmp_path):
    model = dsr_tool.convert("lenet-300-100", sparsity=0.9)
    model.save(tmp_path / "m")
    path = tmp_path / "net.dsrplan"
    dsr_tool.export(model, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match="checksum does not fit"):
        dsr_tool.verify(path, model)
    code, _, error = run("verify", path, "--against", tmp_path / "m")
    assert code == 3 and "checksum does not fit" in error
