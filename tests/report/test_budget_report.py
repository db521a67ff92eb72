"""Budgets in the results of report, convert and train."""

import json

import pytest
from click.testing import CliRunner

from dsr_tool.cli.group import cli
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.report.budget import BudgetCheck
from dsr_tool.sparsity.budget import Budget

NETWORK = ("squeezenet1_1", "--num-classes", 10, "--input-size", 32)


def call(*arguments):
    """Runs a command; returns its exit code, stdout and exception."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], standalone_mode=False)
    code = getattr(done.exception, "exit_code", 1) if done.exception else done.return_value or 0
    return code, done.stdout, done.exception


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "net"
    code, out, error = call("convert", *NETWORK, "--budget", "700kB", "-o", path, "--json")
    assert code == 0, error
    (path.parent / "convert.json").write_text(out)
    return path


@pytest.fixture(scope="module")
def archive(folder):
    from dsr_tool import load
    from exporters.export import export

    path = folder.with_suffix(".dsr")
    export(load(folder), path)
    return path


def test_convert_reports_the_budget_the_sparsity_and_the_predicted_bytes(folder, archive):
    document = json.loads((folder.parent / "convert.json").read_text())
    assert document["archive_bytes"] == archive.stat().st_size
    budget = document["budget"]
    assert (budget["kind"], budget["unit"], budget["asked"]) == ("bytes", "kB", 700_000)
    assert budget["found"] == document["archive_bytes"]
    assert budget["sparsity"] == document["sparsity_of_prunable_weights"] > 0
    assert document["model"]["conversion"]["active_weights"] == document["active_weights"]


@pytest.mark.parametrize(("budget", "code"), [("700kB", 0), ("0.6MB", 3)])
def test_bytes_of_a_folder_are_those_of_its_archive(folder, archive, budget, code):
    document = json.loads(call("report", archive, "--budget", budget, "--json")[1])
    assert document["budget"]["found"] == archive.stat().st_size
    assert document["budget"]["fits"] == (code == 0)
    whole, packed = (call("report", path, "--budget", budget) for path in (folder, archive))
    assert whole[0] == packed[0] == code
    # Both are one line, and differ only in what they say was measured.
    assert whole[1].replace("as an archive", "on disk") == packed[1]
    assert packed[1].count("\n") == 1


def test_parameters_and_multiply_adds_are_those_of_the_report(archive):
    document = json.loads(call("report", archive, "--json")[1])
    assert document["budget"] is None
    assert document["config"]["architecture"] == "squeezenet1_1"
    active, macs = document["model"]["active"], document["model"]["sparse_macs"]
    for amount, code in ((active, 0), (active - 1, 3)):
        assert call("report", archive, "--budget", f"{amount}params")[0] == code
    for amount, code in ((macs, 0), (macs - 1, 3)):
        assert call("report", archive, "--budget", f"{amount}MACs")[0] == code


def test_a_budget_of_unknown_multiply_adds_is_refused(tmp_path):
    from torch import nn

    from dsr_tool import convert

    convert(nn.Sequential(nn.Linear(64, 64)), sparsity=0.5).save(tmp_path / "net")
    code, _, error = call("report", tmp_path / "net", "--budget", "1GMACs")
    assert code == 2
    assert "are unknown" in str(error)


def test_a_budget_without_a_unit_is_refused(archive):
    code, out, error = call("report", archive, "--budget", "12")
    assert (code, out) == (2, "")
    assert isinstance(error, UsageError)


def test_the_line_says_whether_the_budget_fits():
    budget = Budget.parse("12MB")
    assert BudgetCheck(budget, 11_840_123, "on disk").line == "budget 12.00 MB: fits, 11.84 MB (98.7%) on disk"
    over = BudgetCheck(budget, 12_000_010, "on disk")
    assert not over.fits
    assert over.line == "budget 12.00 MB: does not fit, 12.00 MB (100.0%) on disk, 10 bytes too many"
    assert BudgetCheck(budget, 12_000_001, "on disk").line.endswith("on disk, 1 byte too many")
    assert BudgetCheck(budget, 12_000_000, "").fits


def train(folder, run):
    return call(
        *("train", folder, "-o", run, "--data", "fake:64", "--epochs", 1, "--batch-size", 16),
        *("--lr", 0.01, "--device", "cpu", "--quiet", "--json"),
    )


def test_a_trained_model_is_checked_against_its_budget(folder, tmp_path):
    code, out, error = train(folder, tmp_path / "run")
    assert code == 0, error
    assert json.loads(out)["budget"]["fits"]


def test_a_trained_model_over_its_budget_exits_3_is_kept_and_names_a_sparsity_that_fits(folder, tmp_path):
    from dsr_tool import load

    config = folder / "config.json"
    before = config.read_text()
    small = tmp_path / "small"
    small.mkdir()
    for file in folder.iterdir():
        (small / file.name).write_bytes(file.read_bytes())
    (small / "config.json").write_text(before.replace('"budget_bytes": 700000', '"budget_bytes": 600000'))
    code, out, error = train(small, tmp_path / "run")
    assert code == 3
    assert isinstance(error, CheckFailed)
    assert not json.loads(out)["budget"]["fits"]
    sparsity = str(error).partition("--sparsity ")[2].split()[0]
    assert load(tmp_path / "run").sparsity < float(sparsity) < 1
    # At that sparsity, an archive of this architecture is near the budget.
    code, out, _ = call("convert", *NETWORK, "--sparsity", sparsity, "-o", tmp_path / "again", "--quiet")
    assert code == 0
    document = json.loads(call("report", tmp_path / "again", "--budget", "600kB", "--json")[1])
    assert document["budget"]["fraction"] == pytest.approx(1, abs=0.05)
