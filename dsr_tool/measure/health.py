"""The state of an installation: versions, devices, kernels, and problems with their remedies."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TypedDict

from packaging.requirements import Requirement

from dsr_tool.errors import UsageError, first_line

__all__ = ["DoctorDocument", "doctor_document", "doctor_text"]


class KernelState(TypedDict):
    """The kernels by instruction set.

    Attributes:
        used: the one that runs predictions; None if the reference does.
        built: those that are installed.
        supported: those that this processor runs.
        forced: the one that the environment variable DSR_TOOL_KERNELS asks for; None if it is not set.
    """

    used: str | None
    built: list[str]
    supported: list[str]
    forced: str | None


class DoctorDocument(TypedDict):
    """The result of `dsr-tool doctor`, schema `dsr-tool/doctor/1`."""

    schema: str
    python: str
    platform: str
    cores: int | None
    packages: dict[str, str | None]
    devices: list[str]
    kernels: KernelState
    problems: list[str]


def doctor_document() -> DoctorDocument:
    """Looks for problems, and returns them with versions, devices and kernels."""
    problems: list[str] = []
    packages = _packages(problems)
    # Packages that can be installed and still fail to load, because their builds do not match each other.
    for name in ("torch", "torchvision", "onnxruntime", "onnxscript"):
        if packages.get(name):
            _check_import(name, problems)
    _check_shadowing(problems)
    # A broken package would fail here once more, with a worse message.
    if not problems:
        _check_tracing(packages, problems)
    kernels = _kernels(problems)
    return {
        "schema": "dsr-tool/doctor/1",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": packages,
        "devices": _devices(),
        "kernels": kernels,
        "problems": problems,
    }


def doctor_text(document: DoctorDocument) -> str:
    """Returns the document as text."""
    lines = [f"Python {document['python']} on {document['platform']}, {document['cores']} cores"]
    lines += [f"  {name} {number or 'not installed'}" for name, number in document["packages"].items()]
    lines += [f"device: {device}" for device in document["devices"]]
    lines.append(f"kernels: {_kernels_text(document['kernels'])}")
    lines += [f"problem: {problem}" for problem in document["problems"]] or ["no problem found"]
    return "\n".join(lines)


def _packages(problems: list[str]) -> dict[str, str | None]:
    """Returns the installed version of every requirement, and checks it against the requirement's bounds."""
    installed: dict[str, str | None] = {}
    for text in requires("dsr-tool") or []:
        requirement = Requirement(text)
        # Requirements of extras, and of other Pythons, do not apply here.
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, bounds = requirement.name, requirement.specifier
        try:
            number = installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
            problems.append(f"{name} is not installed; run: pip install '{name}{bounds}'")
            continue
        if not bounds.contains(number, prereleases=True):
            problems.append(f"{name} {number} is not {bounds}; run: pip install --upgrade '{name}{bounds}'")
    return installed


def _check_import(name: str, problems: list[str]) -> None:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        # Wheels of torchvision are built for one release of torch and do not load with another.
        remedy = f"reinstall {name}"
        if name == "torchvision":
            remedy = "install torch and torchvision together from one place, so that their builds match"
        problems.append(f"{name} cannot be imported ({first_line(error)}); {remedy}")


def _check_shadowing(problems: list[str]) -> None:
    """Checks that no other package named `converters` or `exporters` shadows ours from earlier on the path."""
    for name in ("converters", "exporters"):
        module = importlib.import_module(name)
        folder = Path(module.__file__ or "").parent
        # Our packages are typed and documented; a folder of scripts that happens to be called so is neither.
        if not (folder / "py.typed").is_file() or not (module.__doc__ or "").strip():
            problems.append(f"package {name} comes from {str(folder)!r}, which is not dsr-tool's; rename that folder")


def _kernels(problems: list[str]) -> KernelState:
    """Returns the state of the sparse runtime's kernels."""
    from dsr_tool.runtime.kernels.cpu import supported_levels
    from dsr_tool.runtime.kernels.library import VARIABLE, kernels

    supported, forced = list(supported_levels()), os.environ.get(VARIABLE)
    try:
        found = kernels()
    except UsageError as error:
        # The environment variable asks for an instruction set that is unknown or not built.
        problems.append(str(error).rstrip("."))
        return {"used": None, "built": [], "supported": supported, "forced": forced}
    problems.extend(found.problems)
    return {"used": found.level, "built": list(found.built), "supported": supported, "forced": forced}


def _kernels_text(kernels: KernelState) -> str:
    used = f"{kernels['used']} is used" if kernels["used"] else "none is used, predictions run on scipy"
    forced = f" (DSR_TOOL_KERNELS={kernels['forced']})" if kernels["forced"] else ""
    built, supported = (", ".join(levels) or "none" for levels in (kernels["built"], kernels["supported"]))
    return f"{used}{forced}; built: {built}; this processor runs: {supported}"


def _check_tracing(packages: dict[str, str | None], problems: list[str]) -> None:
    """Traces a tiny network: torch's exporter and onnxscript are released apart, and not every pair works."""
    from torch import nn

    from dsr_tool.sparse.trace import trace

    try:
        trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (3, 8, 8))
    except UsageError as error:
        problems.append(
            f"torch {packages['torch']} with onnxscript {packages['onnxscript']} cannot export a model ({error}); "
            f"install an onnxscript of the time of that torch (for torch 2.6: pip install 'onnxscript<0.3')"
        )


def _devices() -> list[str]:
    try:
        import torch
    except (ImportError, OSError):
        return []
    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return [f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", *gpus]
