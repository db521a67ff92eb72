"""Installs the wheel of this machine from dist/ in empty environments, and does the main job there.

    python tests/wheels/smoke.py lowest       packages at the lowest versions that the metadata allows
    python tests/wheels/smoke.py newest       at the newest
    python tests/wheels/smoke.py prediction   numpy, scipy and safetensors alone, with the files of one of the above
    python tests/wheels/smoke.py emulated     the same with the wheel for aarch64, on the emulated Python of `make neon`

The environments have the Python that runs this script, which needs no packages. They stay in build/smoke.
"""

import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "smoke"
EMULATED = ROOT / "build" / "neon"
ALONE = ("numpy", "scipy", "safetensors")
INPUTS = """
import numpy, PIL.Image
random = numpy.random.default_rng(0)
numpy.save("x.npy", random.standard_normal((3, 32, 32), numpy.float32))
PIL.Image.fromarray(random.integers(0, 255, (40, 50, 3), numpy.uint8)).save("x.png")
"""
MAKE = """
doctor
convert resnet18 --num-classes 10 --input-size 32 --sparsity 0.9 -o net --force
train net -o run --data digits --epochs 1 --batch-size 64 --lr 0.05 --force
export run -o net.dsr --force
export run -o net.onnx --force
export run -o net.npz --force
export run -o net.dsrplan --force
export run -o native.onnx --encoding native --batch 1 --force
verify net.dsr --against run
report net.dsr --html net.html --force
"""
PREDICT = ("net.dsr x.npy", "net.dsr x.npy --runtime scipy", "net.dsrplan x.npy")
PREDICT_MORE = ("net.onnx x.npy", "net.dsr x.npy --runtime onnxruntime")
SESSION = """
import numpy, dsr_tool
session, x = dsr_tool.Session("net.dsr"), numpy.load("x.npy")[None]
assert session.runtime == "native", session.runtime
numpy.testing.assert_allclose(session.run(x), dsr_tool.Session("net.dsr", runtime="scipy").run(x), atol=1e-4)
"""
PLAN = """
import numpy, dsr_tool
from dsr_tool.runtime.deploy.writer import chosen_levels, plan_bytes
from dsr_tool.runtime.source import open_model
open("net.dsrplan", "wb").write(plan_bytes(open_model("net.dsr"), 1, chosen_levels(()), {}))
"""


def main() -> None:
    """Runs the checks that the arguments name."""
    if not list((ROOT / "dist").glob("*.whl")):
        sys.exit("dist/ holds no wheels; run `make wheels` first.")
    for kind in sys.argv[1:]:
        print(f"== {kind}, Python {platform.python_version()}", flush=True)
        {"lowest": full, "newest": full, "prediction": prediction, "emulated": emulated}[kind](kind)


def full(kind: str) -> None:
    """Does the main job with every package, and compares what the files predict."""
    wheel, files = _wheel(platform.machine()), FOLDER / f"{kind}-files"
    pinned = FOLDER / "lowest.txt"
    FOLDER.mkdir(parents=True, exist_ok=True)
    pinned.write_text("".join(f"{name}=={least}\n" for name, least in _requirements(wheel)))
    limits = ["--constraint", str(pinned)] if kind == "lowest" else []
    python = _environment(kind, f"dsr-tool[digits] @ {wheel.as_uri()}", *limits)
    files.mkdir(exist_ok=True)
    _run([*python, "-c", INPUTS], files)
    for line in MAKE.strip().splitlines():
        _call(python, line, files)
    _same([_predicted(python, line, files) for line in (*PREDICT, *PREDICT_MORE)])
    _same([_predicted(python, line.replace("x.npy", "x.png"), files) for line in PREDICT])
    _run([*python, "-c", SESSION], files)


def prediction(kind: str) -> None:
    """Predicts with numpy, scipy and safetensors alone; everything else ends in a sentence."""
    python = _environment(kind, *ALONE, "--no-deps")
    _run([*python, "-m", "pip", "install", "--quiet", "--no-deps", str(_wheel(platform.machine()))])
    _alone(python, _copied(kind, "net.dsr", "net.dsrplan", "x.npy", "x.png"))


def emulated(kind: str) -> None:
    """Does the same with the wheel for aarch64 under qemu-user, and a plan that is compiled there."""
    site = FOLDER / "aarch64"
    shutil.rmtree(site, ignore_errors=True)
    zipfile.ZipFile(_wheel("aarch64")).extractall(site)
    (site / "alone").mkdir()
    for name in ALONE:
        for part in EMULATED.glob(f"site/{name}*"):
            (site / "alone" / part.name).symlink_to(part)
    os.environ |= {"PYTHONPATH": f"{site}:{site / 'alone'}", "OPENBLAS_NUM_THREADS": "1"}
    python = ["qemu-aarch64", "-L", str(EMULATED / "root"), str(EMULATED / "root/usr/bin/python3.11")]
    files = _copied(kind, "net.dsr", "x.npy", "x.png")
    expected = json.loads((files / "expected.json").read_text())
    _run([*python, "-c", PLAN], files)
    _same([expected, *_alone(python, files)])


def _alone(python: list[str], files: Path) -> list[list[float]]:
    """Predicts with few packages; returns the probabilities."""
    found = [_predicted(python, line, files) for line in PREDICT]
    _same(found)
    _run([*python, "-c", SESSION], files)
    for line, missing in (("predict net.dsr x.png", "pillow"), ("convert resnet18 -o m", "click"), ("--help", "click")):
        done = _call(python, line, files, fails=True)
        assert done.returncode == 1, done.stdout
        assert re.fullmatch(rf"dsr-tool: .* needs the package {missing}, which is not installed; .*\n", done.stderr), (
            done.stderr
        )
    return found


def _requirements(wheel: Path) -> list[tuple[str, str]]:
    """Returns the packages that a wheel requires with their lowest versions; those of developers are left out."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    return re.findall(r"^Requires-Dist: ([\w.-]+)>=([\d.]+)(?!.*extra == 'dev')", text, re.M)


def _wheel(machine: str) -> Path:
    (wheel,) = (ROOT / "dist").glob(f"*_{machine}.whl")
    return wheel


def _environment(kind: str, *requirements: str) -> list[str]:
    """Makes an environment with packages; returns the command of its Python."""
    _run([sys.executable, "-m", "venv", str(FOLDER / kind)])
    python = [str(FOLDER / kind / "bin" / "python")]
    # Wheels alone: no package is built here, and versions without a wheel for this Python are not skipped silently.
    _run([*python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *requirements])
    return python


def _copied(kind: str, *names: str) -> Path:
    """Copies files of a full run, with what that predicted, into a folder of this kind."""
    made = [FOLDER / f"{one}-files" for one in ("newest", "lowest")]
    source = next((one for one in made if (one / "expected.json").exists()), None)
    if source is None:
        sys.exit("there are no files to predict with; run `smoke.py newest` first.")
    files = FOLDER / f"{kind}-files"
    files.mkdir(exist_ok=True)
    for name in (*names, "expected.json"):
        shutil.copy(source / name, files)
    return files


def _predicted(python: list[str], line: str, files: Path) -> list[float]:
    """Predicts; returns the probability of each class, which the first prediction in a folder leaves there."""
    document = json.loads(_call(python, f"predict {line} --top 10 --json", files).stdout)
    scores = sorted((one["class"], one["probability"]) for one in document["predictions"][0]["top"])
    values = [score for _, score in scores]
    if not (files / "expected.json").exists():
        (files / "expected.json").write_text(json.dumps(values))
    return values


def _same(predictions: list[list[float]]) -> None:
    """Checks that predictions agree."""
    for one in predictions:
        assert len(one) == 10
        assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(one, predictions[0])), (one, predictions[0])  # noqa: B905 - Python 3.10 and lengths are checked


def _call(python: list[str], line: str, files: Path, *, fails: bool = False) -> "subprocess.CompletedProcess[str]":
    """Runs a command line of dsr-tool as its entry point does, and prints how long it took."""
    start = time.perf_counter()
    entry = "import sys; sys.argv[0] = 'dsr-tool'; from dsr_tool.cli import main; main()"
    done = _run([*python, "-c", entry, *line.split()], files, fails=fails)
    print(f"   {time.perf_counter() - start:6.1f} s  dsr-tool {line}", flush=True)
    return done


def _run(command: list[str], folder: Path = ROOT, *, fails: bool = False) -> "subprocess.CompletedProcess[str]":
    """Runs a command; its output is shown if it fails unexpectedly."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and not fails:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


if __name__ == "__main__":
    main()
