"""Each command does its work and reports it as JSON."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import dsr_tool
from dsr_tool.cli import COMMANDS
from dsr_tool.cli.group import cli
from dsr_tool.methods import METHODS, make
from dsr_tool.runtime.kernels.library import library


def test_help_names_every_command_and_imports_none(python):
    done = python(
        "import sys, dsr_tool.cli\n"
        "sys.argv = ['dsr-tool', '--help']\n"
        "try:\n    dsr_tool.cli.main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'onnx', 'scipy', 'rich') if m in sys.modules])"
    )
    assert done.stdout.endswith("[]\n"), done.stderr
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_examples(name):
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
    assert result.output.count(f"dsr-tool {name}") >= 2


def test_convert_says_for_each_parameter_whether_it_is_sparse_and_why(run_json, tmp_path):
    done = run_json("convert", "mobilenet_v3_small", "--sparsity", "0.75", "-o", tmp_path / "m", "--num-classes", 10)
    assert done["schema"] == "dsr-tool/convert/1"
    assert done["active_weights"] == round(done["prunable_weights"] * 0.25)
    roles = {layer["role"] for layer in done["layers"]}
    assert roles == {"sparse", "dense", "buffer"}
    assert all(layer["reason"] for layer in done["layers"])
    assert sum(layer["active"] for layer in done["layers"] if layer["role"] == "sparse") == done["active_weights"]
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "config.json",
        "model.safetensors",
        "masks.safetensors",
    }


def test_convert_meets_a_number_of_parameters_exactly(run_json, tmp_path):
    done = run_json("convert", "squeezenet1_1", "--budget", "0.3Mparams", "-o", tmp_path / "m")
    dense = sum(layer["parameters"] for layer in done["layers"] if layer["role"] == "dense")
    assert done["active_weights"] + dense == 300_000


def test_export_verify_and_report_agree(run_json, folder, tmp_path):
    for name, kind in (("a.dsr", "archive"), ("a.onnx", "onnx")):
        path = tmp_path / name
        exported = run_json("export", folder, "-o", path)
        assert exported["schema"] == "dsr-tool/export/1"
        assert exported["passed"]
        assert exported["kind"] == kind
        assert exported["file_bytes"] == path.stat().st_size
        verified = run_json("verify", path, "--against", folder)
        assert verified["passed"]
        report = run_json("report", path)
        assert report["kind"] == kind
        assert report["file_bytes"] == report["computed_bytes"] == path.stat().st_size
        assert report["prunable"]["active"] == round(report["prunable"]["parameters"] * 0.1)


def test_reports_of_all_kinds_agree_about_the_model(run_json, folder, archive, onnx_file):
    whole, packed, onnx = (run_json("report", path) for path in (folder, archive, onnx_file))
    assert whole["prunable"] == packed["prunable"]
    assert whole["model"] == packed["model"]
    for key in ("parameters", "active", "dense_macs", "sparse_macs", "csr_bytes", "bitmask_bytes"):
        assert onnx["prunable"][key] == whole["prunable"][key]
    assert whole["file_bytes"] == whole["computed_bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert whole["sparsity_of_prunable_weights"] == pytest.approx(0.9, abs=1e-5)
    assert whole["sparsity_of_whole_model"] < whole["sparsity_of_prunable_weights"]
    assert packed["parts_bytes"]["sparse weights"] <= packed["prunable"]["coded_bytes"]


class Odd(torch.nn.Sequential):
    """A network whose last node has no kernel."""

    def __init__(self):
        super().__init__(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten())

    def forward(self, x):
        return torch.exp(super().forward(x))


def test_report_and_predict_name_the_nodes_that_no_kernel_computes(run_json, run, folder, archive, onnx_file, tmp_path):
    odd = tmp_path / "odd.dsr"
    dsr_tool.export(dsr_tool.convert(Odd(), sparsity=0.9, input_shape=(3, 8, 8)), odd)
    np.save(tmp_path / "small.npy", np.zeros((3, 8, 8), np.float32))
    for done in (run_json("report", odd), run_json("predict", odd, tmp_path / "small.npy")):
        assert (done["fallback"] or {}).get("operators") == (["Exp"] if library() else None)
    assert ("nodes run on the reference: Exp" in run("report", odd)[1]) == bool(library())
    np.save(tmp_path / "x.npy", np.zeros((3, 64, 64), np.float32))
    expected = {"on_reference": 0, "operators": []} if library() else None
    for path in (archive, onnx_file):
        for done in (run_json("report", path), run_json("predict", path, tmp_path / "x.npy")):
            if expected is None:
                assert done["fallback"] is None
            else:
                assert {**done["fallback"], **expected} == done["fallback"]
                assert done["fallback"]["nodes"] > 60
    for runtime in ("scipy", "onnxruntime"):
        assert run_json("predict", archive, tmp_path / "x.npy", "--runtime", runtime)["fallback"] is None
    assert run_json("report", folder)["fallback"] is None
    assert "nodes run on the reference" not in run("report", archive)[1]


def test_the_text_report_names_the_denominator_and_cuts_nothing_off(run, archive):
    code, out, _ = run("report", archive)
    assert code == 0
    assert "of the prunable weights" in out
    assert "agrees" in out
    assert "…" not in out


def test_all_runtimes_predict_the_same(run_json, archive, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    results = [
        run_json("predict", archive, tmp_path / "a.png", "--runtime", runtime, "--top", 5)
        for runtime in ("sparse", "scipy", "onnxruntime")
    ]
    tops = [[(one["class"], one["probability"]) for one in done["predictions"][0]["top"]] for done in results]
    for other in tops[1:]:
        assert [c for c, _ in tops[0]] == [c for c, _ in other]
        assert np.allclose([p for _, p in tops[0]], [p for _, p in other], rtol=1e-4)
    assert sum(p for _, p in tops[0]) == pytest.approx(1)


@pytest.mark.parametrize("runtime", ["sparse", "onnxruntime"])
def test_predictions_do_not_depend_on_the_number_of_threads(run_json, run, archive, tmp_path, runtime):
    np.save(tmp_path / "x.npy", np.ones((1, *dsr_tool.open_archive(archive).config.input_shape), np.float32))
    one, two = (
        run_json("predict", archive, tmp_path / "x.npy", "--runtime", runtime, "--threads", n)["predictions"]
        for n in (1, 2)
    )
    assert [best["class"] for best in one[0]["top"]] == [best["class"] for best in two[0]["top"]]
    assert run("predict", archive, tmp_path / "x.npy", "--threads", 0)[0] == 2


def test_predict_names_the_inputs_of_an_array_and_uses_labels(run, archive, tmp_path):
    np.save(tmp_path / "batch.npy", np.zeros((3, 3, 64, 64), np.float32))
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    code, out, _ = run("predict", archive, tmp_path / "batch.npy", "--labels", tmp_path / "names.txt", "--top", 1)
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == [f"{tmp_path / 'batch.npy'}[{i}]" for i in range(3)]
    assert out.split()[1] in {"ant", "bee", "cat", "dog", "elk"}


def test_the_default_runtime_never_imports_torch(python, archive, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 64, 64), np.float32))
    done = python(
        "import sys, dsr_tool.cli\n"
        f"sys.argv = ['dsr-tool', 'predict', {str(archive)!r}, {str(tmp_path / 'x.npy')!r}, '--json']\n"
        "try:\n    dsr_tool.cli.main()\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'torch', 'torchvision', 'onnx', 'onnxscript', 'onnxruntime'}))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
    assert json.loads(done.stdout.removesuffix("[]\n"))["predictions"]


def test_verify_tells_files_apart(run, archive, tmp_path):
    other = tmp_path / "other"
    assert run("convert", "squeezenet1_1", "--sparsity", "0.9", "--num-classes", 5, "--seed", 1, "-o", other)[0] == 0
    code, out, _ = run("verify", archive, "--against", other)
    assert code == 3
    assert "NOT VERIFIED" in out


def test_doctor_finds_no_problem_here(run_json):
    done = run_json("doctor")
    assert done["problems"] == []
    assert done["packages"]["torch"]


def test_quiet_prints_the_result_alone(run, folder, tmp_path):
    code, out, err = run("export", folder, "-o", tmp_path / "q.dsr", "--quiet")
    assert (code, err) == (0, "")
    assert "verified" in out
    code, out, err = run("convert", "squeezenet1_1", "--sparsity", "0.9", "-o", tmp_path / "m", "--quiet")
    assert (code, err, out.count("\n")) == (0, "", 1)


def test_without_a_command_there_is_help(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    assert out.startswith("Usage: dsr-tool")


def test_a_failed_download_is_one_sentence(run, tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        print("Downloading", file=sys.stderr)
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    code, out, err = run("convert", "squeezenet1_1", "--weights", "DEFAULT", "--sparsity", "0.9", "-o", tmp_path / "m")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "could not be downloaded" in err


def test_public_names_load_when_they_are_used(python):
    done = python(
        "import sys, dsr_tool\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "assert set(dsr_tool.__all__) <= set(dir(dsr_tool))\n"
        "for name in dsr_tool.__all__:\n    getattr(dsr_tool, name)"
    )
    assert done.returncode == 0, done.stderr
    assert not hasattr(dsr_tool, "nonsense")


def test_a_users_own_training_loop_needs_three_lines(python, tmp_path):
    done = python(
        "import torch, dsr_tool\n"
        "net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 128), torch.nn.ReLU(),"
        " torch.nn.Linear(128, 10))\n"
        "model = dsr_tool.convert(net, sparsity=0.9, input_shape=(1, 8, 8))\n"
        "optimizer = torch.optim.Adam(net.parameters(), lr=0.01)\n"
        "moves = dsr_tool.attach(model, optimizer, total_steps=100)\n"
        "for _ in range(100):\n"
        "    optimizer.zero_grad()\n"
        "    torch.nn.functional.cross_entropy(net(torch.randn(16, 1, 8, 8)), torch.randint(10, (16,))).backward()\n"
        "    optimizer.step()\n"
        f"dsr_tool.export(model, {str(tmp_path / 'net.dsr')!r})\n"
        "assert moves.step == 100 and moves.last is not None\n"
        "assert model.active_weights == 947\n"
    )
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path / "net.dsr").stat().st_size > 0


def test_patterns_are_printed_without_markup(run, tmp_path):
    code, out, _ = run(
        "convert", "squeezenet1_1", "--sparsity", "0.9", "-o", tmp_path / "m", "--keep-dense", "f[a-z]atures.0*"
    )
    assert code == 0
    assert "kept dense by pattern 'f[a-z]atures.0*'" in out


def test_a_log_with_a_cut_off_line_is_reported(run, run_json, tmp_path):
    model = tmp_path / "m"
    run("convert", "squeezenet1_1", "--sparsity", "0.9", "--num-classes", 10, "--input-size", 32, "-o", model)
    code, _, err = run("train", model, "-o", tmp_path / "run", "--data", "fake:40", "--epochs", 1, "--lr", 0.01, "-q")
    assert code == 0, err
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"kind": "epo')
    report = run_json("report", tmp_path / "run")
    assert report["kind"] == "run folder"
    assert report["training"]["status"] == "complete"
    assert report["training"]["epochs"] == 1


def test_computed_and_actual_bytes_agree_for_bfloat16(run_json, tmp_path):
    from converters.conversion import convert

    model = convert("squeezenet1_1", sparsity=0.9, num_classes=5, input_size=64)
    model.to(torch.bfloat16).save(tmp_path / "m")
    report = run_json("report", tmp_path / "m")
    assert report["file_bytes"] == report["computed_bytes"]


def test_stdout_is_the_result_whatever_a_network_prints(run_json, tmp_path, monkeypatch):
    (tmp_path / "talking.py").write_text(
        "import torch\nprint('import')\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self):\n        print('made')\n        super().__init__(64, 64)\n"
        "    def forward(self, x):\n        print('run')\n        return super().forward(x)\n"
    )
    monkeypatch.chdir(tmp_path)
    done = run_json("convert", "talking:Net", "--input-shape", "64", "--sparsity", "0.5", "-o", "m")
    assert done["model"]["architecture"] == "talking:Net"


def test_a_network_that_exits_is_an_error_in_one_sentence(run, tmp_path, monkeypatch):
    (tmp_path / "ending.py").write_text("def net():\n    raise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = run("convert", "ending:net", "--input-shape", "64", "--sparsity", "0.5", "-o", "m")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "failed when it was called" in err


def test_reports_recognise_a_file_by_its_content(run_json, onnx_file, tmp_path):
    for name in ("a.ONNX", "unnamed"):
        (tmp_path / name).write_bytes(onnx_file.read_bytes())
        assert run_json("report", tmp_path / name)["kind"] == "onnx"


def test_help_of_train_names_every_method_and_when_each_stops():
    text = " ".join(CliRunner().invoke(cli, ["train", "--help"]).output.split())
    said = text[text.index("--method TEXT") : text.index("--epochs")]
    assert [name for name in METHODS if name not in said.replace(",", "").split()] == []
    stops = {name: make(name, 4000, final_sparsity=0.9).schedule.stop for name in ("gmp", "dst")}
    stops |= {name: make(name, 4000).schedule.stop for name in ("dsr", "set", "deepr", "neuron-set", "rigl")}
    assert {name for name, stop in stops.items() if stop == 3000} == {"rigl", "gmp", "dst"}
    assert set(stops.values()) == {3000, 3800}
    assert "default 0.95, for rigl, gmp and dst 0.75" in text
