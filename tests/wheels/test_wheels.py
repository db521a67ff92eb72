"""What `make wheels` leaves in dist/: tags, contents, and what the libraries need of the system."""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from hatch_build import EXPORTED, LEVELS, LIBRARY, NATIVE, RECORD  # noqa: E402

sys.path.remove(str(ROOT))

WHEELS = {path.stem.rpartition("2_17_")[2]: path for path in (ROOT / "dist").glob("*.whl")}
MACHINES = {"x86_64": "Advanced Micro Devices X86-64", "aarch64": "AArch64"}
"""Machine -> its name in the head of a library, as readelf writes it."""
LIBC = re.compile(r"lib(c|m|pthread|dl|rt)\.so\.\d|ld-linux-[\w-]+\.so\.\d")
"""Libraries of the C library, which every Linux of this kind has."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WHEELS, reason="`make wheels` has not been run"),
    pytest.mark.parametrize("machine", MACHINES),
]


@pytest.fixture
def wheel(machine):
    with zipfile.ZipFile(WHEELS[machine]) as archive:
        yield archive


@pytest.fixture
def libraries(machine, wheel, tmp_path):
    """Paths of the libraries of a wheel by name."""
    names = [f"_kernels_{level}.so" for level in LEVELS[machine]] + [f"{LIBRARY}.so"]
    return {name: Path(wheel.extract(f"{NATIVE.as_posix()}/{name}", tmp_path)) for name in names}


def told(path, *options):
    done = subprocess.run(["readelf", "--wide", *options, path], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_tag_is_that_of_the_name(machine, wheel):
    tag = f"py3-none-manylinux_2_17_{machine}"
    assert WHEELS[machine].name.endswith(f"-{tag}.whl")
    (text,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
    assert re.findall("^Tag: (.*)$", text, re.M) == [tag]
    assert "Root-Is-Purelib: false" in text


def test_a_wheel_holds_the_packages_of_the_sdist_and_the_libraries(wheel, libraries):
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    packages = {name for name in members if name.startswith(("dsr_tool/", "converters/", "exporters/"))}
    assert {"hatch_build.py", "pyproject.toml", "LICENSE", "README.md"} <= members
    assert {
        "dsr_tool/runtime/deploy/include/dsr.h",
        "dsr_tool/runtime/kernels/ops.def",
        "dsr_tool/py.typed",
    } <= packages
    built = {f"{NATIVE.as_posix()}/{name}" for name in (*libraries, RECORD)}
    assert built.isdisjoint(members)
    found = set(wheel.namelist())
    metadata = {name for name in found if ".dist-info/" in name}
    assert found - metadata == packages | built
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_the_record_of_the_libraries_holds(wheel, libraries):
    record = json.loads(wheel.read(f"{NATIVE.as_posix()}/{RECORD}"))
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in libraries.items()}
    assert {entry["sha256"] for entry in record.values()} == set(digests.values())


def test_libraries_need_nothing_newer_than_glibc_2_17(machine, libraries):
    for name, path in libraries.items():
        assert re.search(r"Machine:\s+(.*)", told(path, "-h"))[1] == MACHINES[machine], name
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", told(path, "-d"))
        assert needed and all(LIBC.fullmatch(one) for one in needed), (name, needed)
        versions = set(re.findall(r"Name: (\S+)", told(path, "-V")))
        assert versions, name
        for one in versions:
            libc, numbers = one.split("_")
            assert libc == "GLIBC" and tuple(map(int, numbers.split("."))) <= (2, 17), (name, one)


def test_the_library_for_c_programs_exports_its_interface_alone(libraries):
    lines = told(libraries[f"{LIBRARY}.so"], "--dyn-syms").splitlines()
    defined = [line.split() for line in lines if re.search(r" (GLOBAL|WEAK) +DEFAULT +\d+ ", line)]
    assert {words[7].partition("@")[0] for words in defined} == set(EXPORTED)
