import json
import shutil

import pytest

QUICK = ("--data", "fake:300", "--quiet")


@pytest.fixture
def grid(family, tmp_path):
    """A grid file of one cell that works, and one that fails."""
    path = tmp_path / "grid.toml"
    path.write_text(f'recipe = "{family}"\ndata = "fake:300"\nmethods = ["static", "broken"]\nseeds = 1\n')
    return path


def test_a_failing_cell_gives_exit_code_3_and_the_others_finish(run, grid, tmp_path):
    code, text, err = run("compare", grid, "-o", tmp_path / "out", "--quiet")
    assert code == 3 and err == ""
    assert "failed: broken@0.9-s0: " in text and "no such layer" in text
    assert (tmp_path / "out" / "table.txt").read_text().rstrip() == text.rstrip()
    assert {"compare.json", "table.csv", "table.json", "page.html", "runs", "cells"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    # Repeated, the command skips the complete cell and tries the other again.
    code, text, err = run("compare", grid, "-o", tmp_path / "out", "--json")
    document = json.loads(text)
    assert code == 3 and document["counts"]["complete"] == 1 and "static@0.9-s0" not in err
    assert "broken@0.9-s0: begins" in err
    # Options override the file. Without either, the command continues every cell of the folder.
    code, text, _ = run("compare", grid, "--methods", "static", "-o", tmp_path / "out", "--quiet")
    assert code == 3 and "static" in text
    code, text, err = run("compare", "-o", tmp_path / "out")
    assert code == 3 and "broken@0.9-s0: begins" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--methods", "dsr"], 2, "compare: recipe is missing. data is missing."),
        (["--recipe", "lenet-300-100", "--methods", "dsr,sett", *QUICK], 2, "method 'sett' is unknown"),
        (
            ["--recipe", "lenet-300-100", "--methods", "dsr", "--sparsity", "a", *QUICK],
            2,
            "'a' is not a list of numbers",
        ),
        (["--recipe", "lenet-300-100", "--methods", "dsr", "--sparsity", "", *QUICK], 2, "'' is not a list of numbers"),
        (["--recipe", "lenet-300-100", "--methods", "dsr", "--seeds", "", *QUICK], 2, "seeds '' is not allowed"),
        (["--recipe", "lenet-300-100", "--methods", "dsr", "--set", "epochs", *QUICK], 2, "write it as key=value"),
        (["--recipe", "lenet-300-100", "--methods", "dsr", "--set", "seed=3", *QUICK], 2, "is varied by the grid"),
        (["--recipe", "lenet-300-100", "--methods", "dsr", "--data", "mnist:none"], 1, "has no train-images"),
        (["--recipe", "lenet-300-100", "--methods", "dsr", "--data", "mnits:x"], 2, "did you mean mnist"),
        (
            ["--recipe", "lenet-300-100", "--methods", "dsr", "--max-time", "0", *QUICK],
            2,
            "--max-time 0.0 is not allowed",
        ),
        (["none.toml"], 1, "GRID 'none.toml' does not exist"),
        ([], 1, "cannot be read"),
    ],
)
def test_wrong_options_give_one_sentence_and_create_nothing(run, tmp_path, arguments, code, message):
    found, text, err = run("compare", *arguments, "-o", tmp_path / "out")
    assert found == code and message in err and text == "" and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_logs_no_errors_and_fits_a_phone(tables, tmp_path, scheme):
    from playwright.sync_api import sync_playwright

    from dsr_tool.compare.cells import Comparison
    from dsr_tool.compare.grid import make_grid
    from dsr_tool.compare.outputs import write_outputs

    comparison = Comparison(tmp_path / "out")
    grid = make_grid(tables(methods=["dsr", "static", "dense", "gmp"], seeds=2), "grid")
    comparison.add(grid)
    for i, cell in enumerate(grid.cells):
        sizes = {"archive_bytes": 10**5 + i, "inference_macs": 10**4 + i, "nonzeros": 100, "model_sparsity": 0.9}
        comparison.write_record(cell.name, {"status": "complete", "test_accuracy": 0.9 + i / 100, **sizes})
    write_outputs(comparison, grid)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_context(viewport={"width": 320, "height": 640}, color_scheme=scheme).new_page()
        messages = []
        tab.on("console", lambda message: messages.append(message.text))
        tab.goto((comparison.path / "page.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == 320 and messages == []
        assert tab.evaluate("document.querySelectorAll('.dot').length") >= 6
        browser.close()
