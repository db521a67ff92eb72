"""The kernel library is chosen by processor and environment, and a damaged one is never loaded."""

import ctypes
import json
import shutil
import subprocess
import sys

import pytest

from dsr_tool.errors import UsageError
from dsr_tool.runtime.kernels import cpu
from dsr_tool.runtime.kernels import library as library_module
from dsr_tool.runtime.kernels.library import ABI, choose

GXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LEVEL = cpu.supported_levels()[-1]

pytestmark = pytest.mark.skipif(GXX is None, reason="needs a C++ compiler")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Returns a function that compiles a library with nothing but an ABI number; None for one without."""
    folder = tmp_path_factory.mktemp("libraries")

    def make(abi):
        path = folder / f"{abi}{SUFFIX}"
        if not path.exists():
            source = folder / f"{abi}.cpp"
            source.write_text("" if abi is None else f'extern "C" int dsr_kernels_abi() {{ return {abi}; }}')
            subprocess.run([GXX, "-shared", "-fPIC", source, "-o", path], check=True)
        return path

    return make


@pytest.fixture
def built(tmp_path, compiled):
    """Returns a function that copies such libraries under the names of levels, with their record of checksums."""

    def build(*levels, abi=ABI, record=True):
        import hashlib

        entries = {}
        for level in levels:
            target = tmp_path / f"_kernels_{level}{SUFFIX}"
            shutil.copy(compiled(abi), target)
            entries[level] = {"sha256": hashlib.sha256(target.read_bytes()).hexdigest()}
        if record:
            (tmp_path / "_kernels.json").write_text(json.dumps(entries))
        return tmp_path

    return build


def library_of(folder, level):
    return folder / f"_kernels_{level}{SUFFIX}"


def test_the_fastest_supported_level_is_loaded(built, monkeypatch):
    monkeypatch.setattr(library_module, "supported_levels", lambda: ("avx2", "baseline"))
    found = choose("", built("avx512", "avx2", "baseline"))
    assert isinstance(found.library, ctypes.CDLL)
    assert (found.level, found.built, found.problems) == ("avx2", ("avx512", "avx2", "baseline"), ())


def test_a_level_can_be_chosen_by_name(built):
    assert choose(LEVEL, built(LEVEL)).level == LEVEL


def test_none_disables_the_kernels(built):
    found = choose("none", built(LEVEL))
    assert (found.library, found.level, found.problems) == (None, None, ())


def test_without_libraries_the_problem_says_how_to_build_them(tmp_path):
    found = choose("", tmp_path)
    assert found.library is None
    assert "make kernels" in found.problems[0]


def test_a_library_of_another_abi_is_refused(built):
    found = choose("", built(LEVEL, abi=ABI + 1))
    assert found.library is None
    assert f"has interface {ABI + 1}, and this version needs {ABI}" in found.problems[0]


def test_a_library_without_kernels_is_refused(built):
    assert "holds no kernels" in choose("", built(LEVEL, abi=None)).problems[0]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data + b"\0"])
def test_a_damaged_library_is_refused_before_it_is_mapped(built, damage):
    path = library_of(built(LEVEL), LEVEL)
    path.write_bytes(damage(path.read_bytes()))
    found = choose("", path.parent)
    assert found.library is None
    assert "is damaged" in found.problems[0]


def test_the_next_level_is_loaded_if_the_fastest_is_damaged(built, monkeypatch):
    monkeypatch.setattr(library_module, "supported_levels", lambda: ("avx512", "avx2", "baseline"))
    folder = built("avx512", "avx2", "baseline")
    library_of(folder, "avx512").write_bytes(b"no library")
    found = choose("", folder)
    assert found.level == "avx2"
    assert "_kernels_avx512" in found.problems[0]


def test_a_file_that_is_no_library_is_refused_even_without_a_record(built):
    folder = built(LEVEL, record=False)
    library_of(folder, LEVEL).write_bytes(b"no library")
    assert "cannot be loaded" in choose("", folder).problems[0]


@pytest.mark.parametrize("record", ["", "[]", "{", '{"baseline": 3}'])
def test_a_damaged_record_does_not_crash(built, record):
    folder = built(LEVEL)
    (folder / "_kernels.json").write_text(record)
    choose("", folder)


def test_a_path_is_loaded_as_a_custom_level(built):
    assert choose(str(library_of(built(LEVEL), LEVEL)), built(LEVEL)).level == "custom"


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ("avx51", "did you mean avx512"),
        ("/nowhere/kernels" + SUFFIX, "cannot be used"),
        (LEVEL, "were not built"),
    ],
)
def test_a_choice_that_cannot_be_loaded_is_refused(tmp_path, expected, message):
    with pytest.raises(UsageError, match=message):
        choose(expected, tmp_path)


def test_an_unsupported_level_is_refused_with_its_missing_features(built, monkeypatch):
    monkeypatch.setattr(library_module, "supported_levels", lambda: ("baseline",))
    monkeypatch.setattr(library_module, "missing_features", lambda level: ["avx512f"])
    with pytest.raises(UsageError, match="lacks avx512f"):
        choose("avx512", built("avx512"))


FLAGS = (
    "abm avx avx2 bmi1 bmi2 cx16 f16c fma lahf_lm movbe pni popcnt sse4_1 sse4_2 ssse3 xsave "
    "avx512f avx512bw avx512cd avx512dq avx512vl"
)


@pytest.mark.parametrize(
    ("absent", "levels"),
    [
        ((), ("avx512", "avx2", "baseline")),
        (("avx512vl",), ("avx2", "baseline")),
        (("fma",), ("baseline",)),
        # An operating system that does not save the wide registers: Linux lists none of these then.
        (("avx", "avx2", "fma", "f16c", "avx512f"), ("baseline",)),
        (tuple(FLAGS.split()), ("baseline",)),
    ],
)
def test_levels_follow_the_cpu_flags(tmp_path, monkeypatch, absent, levels):
    path = tmp_path / "cpuinfo"
    flags = " ".join(flag for flag in FLAGS.split() if flag not in absent)
    path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} ht\nbogomips: 1\n\nprocessor\t: 1\nflags: fpu\n")
    monkeypatch.setattr(cpu, "Path", lambda _: path)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu.sys, "platform", "linux")
    assert cpu.supported_levels() == levels


def test_levels_without_cpu_flags_follow_the_machine_type(monkeypatch):
    monkeypatch.setattr(cpu, "_cpu_flags", lambda _: frozenset())
    monkeypatch.setattr(cpu.sys, "platform", "win32")
    for machine, levels in (("AMD64", ("baseline",)), ("arm64", ("neon",)), ("riscv64", ("baseline",))):
        monkeypatch.setattr(cpu.platform, "machine", lambda machine=machine: machine)
        assert cpu.supported_levels() == levels


def test_levels_on_macos_follow_sysctl(monkeypatch):
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "_sysctl", lambda name: "avx512" not in name)
    assert cpu.supported_levels() == ("avx2", "baseline")


def test_loading_the_kernels_imports_no_torch():
    code = "import sys; from dsr_tool.runtime.kernels.library import level; level(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
