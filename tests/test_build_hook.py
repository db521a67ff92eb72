"""The build hook compiles each level once, rebuilds what has changed, reports failures, and finds a compiler."""

import ctypes
import importlib.util
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parent.parent
SOURCE = 'extern "C" int dsr_kernels_abi() { return 1; }\n'

needs_compiler = pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="needs a C++ compiler")


@pytest.fixture
def module(monkeypatch):
    specification = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "hatch_build", module)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    for name in ("CXX", "DSR_TOOL_KERNELS", "DSR_TOOL_REQUIRE_KERNELS", "DSR_TOOL_WHEEL_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    # Without a value for -march, any compiler can build them.
    monkeypatch.setattr(module, "LEVELS", {"x86_64": {"fast": "", "slow": ""}})
    return module


@pytest.fixture
def hook(module, tmp_path):
    """The hook over a folder with one source; it collects its warnings."""
    native = tmp_path / module.NATIVE
    native.mkdir(parents=True)
    (native / "kernels.cpp").write_text(SOURCE)
    hook = module.KernelsHook(str(tmp_path), {}, None, None, str(tmp_path), "wheel")
    hook.warnings = []
    hook.app.display_warning = hook.warnings.append
    hook.native = native
    return hook


def initialized(hook):
    data = {"artifacts": [], "pure_python": True}
    hook.initialize("standard", data)
    return data


def names(hook):
    return sorted(path.name for path in hook.native.iterdir() if path.name.startswith("_kernels_"))


@needs_compiler
def test_every_level_is_built_and_the_wheel_is_one_of_this_platform(hook, module):
    data = initialized(hook)
    assert names(hook) == [f"_kernels_fast{module.SUFFIX}", f"_kernels_slow{module.SUFFIX}"]
    assert data["pure_python"] is False
    assert data["tag"].startswith("py3-none-") and "any" not in data["tag"]
    assert hook.warnings == []


@needs_compiler
def test_the_platform_of_the_tag_can_be_given(hook, module, monkeypatch):
    monkeypatch.setenv("CXX", shlex.join(module.compiler()))
    monkeypatch.setenv("DSR_TOOL_WHEEL_PLATFORM", "manylinux_2_17_x86_64")
    assert initialized(hook)["tag"] == "py3-none-manylinux_2_17_x86_64"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_zig_builds_for_the_platform_of_the_tag(hook, module, monkeypatch, machine):
    monkeypatch.setenv("DSR_TOOL_WHEEL_PLATFORM", f"manylinux_2_17_{machine}")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: object())
    assert module.compiler() == [sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-gnu.2.17"]
    assert module._machine() == machine
    # Another compiler of this machine could not build it, so Zig's is installed.
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    assert module.compiler() is None
    assert hook.dependencies() == ["ziglang>=0.13"]


@needs_compiler
def test_only_changed_sources_are_built_again(hook, module, monkeypatch):
    for name in ("kernels.cpp", "header.h", "ops.def"):
        (hook.native / name).write_text(f"{SOURCE if name.endswith('cpp') else ''}// {name}\n")
        with monkeypatch.context() as patch:
            patch.setattr(module.Build, "_build", lambda self, due, objects: {name: f"{name} again" for name in due})
            initialized(hook)
            assert "fast, slow" in hook.warnings.pop()
        initialized(hook)
        with monkeypatch.context() as patch:
            patch.setattr(module.Build, "_build", lambda self, due, objects: {name: f"{name} again" for name in due})
            initialized(hook)
        assert hook.warnings == []


@needs_compiler
def test_the_library_for_c_programs_holds_every_level_and_exports_its_interface_alone(hook, module):
    deploy = hook.native.parent / "deploy"
    deploy.mkdir()
    names_of_levels = "#define X(level) #level,\nstatic const char* const NAMES[] = {DSR_LEVELS};\n"
    interface = 'extern "C" const char* dsr_text(int i) { return NAMES[i]; }\nextern "C" int hidden() { return 1; }\n'
    (deploy / "dsr.cpp").write_text(names_of_levels + interface)
    (hook.native / "kernels.cpp").write_text("namespace DSR_LEVEL { int lanes() { return 1; } }\n")
    (hook.native / "exports.cpp").write_text('extern "C" int dsr_lanes() { return 1; }\n')
    data = initialized(hook)
    assert hook.warnings == []
    assert any(name.endswith(f"libdsr{module.SUFFIX}") for name in data["artifacts"])
    library = ctypes.CDLL(str(hook.native / f"libdsr{module.SUFFIX}"))
    library.dsr_text.restype = ctypes.c_char_p
    assert [library.dsr_text(0), library.dsr_text(1)] == [b"fast", b"slow"]
    assert not hasattr(library, "hidden") and not hasattr(library, "dsr_lanes")


def test_only_changed_files_are_compiled_again(hook, module, monkeypatch):
    deploy = hook.native.parent / "deploy"
    (deploy / "include").mkdir(parents=True)
    (deploy / "dsr.cpp").write_text("")
    (hook.native / "more.cpp").write_text("")
    compiled = []

    def call(_, level, arguments, output):
        compiled.extend(f"{level} {Path(name).stem}" for name in arguments[1:] if arguments[0] == "-c")
        output.write_bytes(b"")
        return ""

    monkeypatch.setattr(module.Build, "_call", call)
    monkeypatch.setattr(module, "compiler", lambda: ["c++"])
    every = {f"{level} {name}" for level in ("fast", "slow") for name in ("kernels", "more")}
    initialized(hook)
    assert (len(compiled), set(compiled)) == (5, every | {"libdsr dsr"})
    for path, expected in (
        (deploy / "dsr.cpp", {"libdsr dsr"}),
        (deploy / "include" / "dsr.h", {"libdsr dsr"}),
        (hook.native / "more.cpp", {"fast more", "slow more"}),
        (hook.native / "x.def", every | {"libdsr dsr"}),
    ):
        compiled.clear()
        path.write_text(f"{path.read_text() if path.exists() else ''}// changed\n")
        initialized(hook)
        assert set(compiled) == expected
    # Files that are outdated are not kept.
    assert len(list((hook.native / module.OBJECTS).iterdir())) == 5


@needs_compiler
def test_a_damaged_library_is_built_again(hook, module):
    initialized(hook)
    path = hook.native / f"_kernels_fast{module.SUFFIX}"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    (hook.native / module.RECORD).write_text("{")
    initialized(hook)
    assert len(path.read_bytes()) == len(whole)
    assert set(json.loads((hook.native / module.RECORD).read_text())) == {"fast", "slow"}


@needs_compiler
def test_broken_sources_do_not_break_the_install_and_leave_no_old_library(hook):
    initialized(hook)
    (hook.native / "kernels.cpp").write_text("int x = ;\n")
    data = initialized(hook)
    assert data["pure_python"] is True and "tag" not in data
    assert len(hook.warnings) == 1 and "were not built" in hook.warnings[0] and "error" in hook.warnings[0]
    assert names(hook) == []


@needs_compiler
def test_a_level_that_the_compiler_does_not_support_is_skipped(hook, module, monkeypatch):
    monkeypatch.setattr(module, "LEVELS", {"x86_64": {"fast": "no-such-processor", "slow": ""}})
    data = initialized(hook)
    assert names(hook) == [f"_kernels_slow{module.SUFFIX}"]
    assert "kernels for fast were not built" in hook.warnings[0]
    assert data["pure_python"] is False


@needs_compiler
@pytest.mark.parametrize("source", ["int x = ;\n", SOURCE + "static int unused() { return 0; }\n"])
def test_errors_and_warnings_stop_the_build_if_kernels_are_required(hook, monkeypatch, source):
    monkeypatch.setenv("DSR_TOOL_REQUIRE_KERNELS", "1")
    (hook.native / "kernels.cpp").write_text(source)
    with pytest.raises(RuntimeError, match="were not built"):
        initialized(hook)


@needs_compiler
def test_warnings_do_not_stop_an_install(hook):
    (hook.native / "kernels.cpp").write_text(SOURCE + "static int unused() { return 0; }\n")
    assert initialized(hook)["pure_python"] is False


def test_no_kernels_are_built_if_none_are_wanted(hook, monkeypatch):
    monkeypatch.setenv("DSR_TOOL_KERNELS", "none")
    assert initialized(hook) == {"artifacts": [], "pure_python": True}
    assert hook.dependencies() == []


def test_without_a_compiler_zig_is_required_and_the_install_continues(hook, module, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    assert hook.dependencies() == ["ziglang>=0.13"]
    data = initialized(hook)
    assert data["pure_python"] is True
    assert "found no C++ compiler" in hook.warnings[0]
    monkeypatch.setattr(module.platform, "machine", lambda: "vax")
    assert hook.dependencies() == []


def test_zig_is_the_compiler_of_last_resort(module, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: object())
    command = module.compiler()
    assert command == [sys.executable, "-m", "ziglang", "c++"]
    monkeypatch.setattr(module, "LEVELS", {"x86_64": {"avx512": "x86-64-v4"}})
    assert "-march=x86_64_v4" in module.Build(command, ROOT, ROOT, "x86_64").flags("avx512")


def test_the_compiler_of_the_environment_comes_first(hook, module, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++ -m64")
    assert module.compiler() == ["/nowhere/c++", "-m64"]
    assert hook.dependencies() == []
    initialized(hook)
    assert "/nowhere/c++ -m64:\nNo such file" in hook.warnings[0]
