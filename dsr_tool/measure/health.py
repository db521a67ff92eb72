"""What is installed, and what of it does not fit together."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from dsr_tool.errors import UsageError, first_line

__all__ = ["doctor_document", "doctor_text"]


def doctor_document() -> dict[str, Any]:
    """Versions, devices and problems, schema `dsr-tool/doctor/1`."""
    problems: list[str] = []
    packages = _packages(problems)
    for name in ("torch", "torchvision", "onnxruntime", "onnxscript"):
        if packages.get(name):
            _import(name, problems)
    _own_packages(problems)
    if not problems:
        _capture(packages, problems)
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


def doctor_text(document: dict[str, Any]) -> str:
    """The same for a terminal."""
    lines = [f"Python {document['python']} on {document['platform']}, {document['cores']} cores"]
    lines += [f"  {name} {number or 'not installed'}" for name, number in document["packages"].items()]
    lines += [f"device: {device}" for device in document["devices"]]
    lines.append(f"kernels: {_kernels_text(document['kernels'])}")
    lines += [f"problem: {problem}" for problem in document["problems"]] or ["no problem found"]
    return "\n".join(lines)


def _packages(problems: list[str]) -> dict[str, str | None]:
    """Installed versions of what dsr-tool asks for, against the lower bounds it asks for."""
    found: dict[str, str | None] = {}
    for text in requires("dsr-tool") or []:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        name, bound = wanted.name, wanted.specifier
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
            problems.append(f"{name} is not installed; run: pip install '{name}{bound}'")
            continue
        if not bound.contains(found[name] or "", prereleases=True):
            problems.append(f"{name} {found[name]} is not {bound}; run: pip install --upgrade '{name}{bound}'")
    return found


def _import(name: str, problems: list[str]) -> None:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        remedy = f"reinstall {name}"
        if name == "torchvision":
            remedy = "install torch and torchvision together from one place, so that their builds match"
        problems.append(f"{name} cannot be imported ({first_line(error)}); {remedy}")


def _own_packages(problems: list[str]) -> None:
    """A stranger's `converters` or `exporters` earlier on the path would shadow ours."""
    for name in ("converters", "exporters"):
        module = importlib.import_module(name)
        folder = Path(module.__file__ or "").parent
        if not (folder / "py.typed").is_file() or not (module.__doc__ or "").strip():
            problems.append(f"package {name} comes from {str(folder)!r}, which is not dsr-tool's; rename that folder")


def _kernels(problems: list[str]) -> dict[str, Any]:
    """Which kernels of the sparse runtime are there, and which are used; `used` is None for scipy."""
    from dsr_tool.runtime.kernels.cpu import supported_levels
    from dsr_tool.runtime.kernels.library import VARIABLE, kernels

    document = {"used": None, "built": [], "supported": list(supported_levels()), "forced": os.environ.get(VARIABLE)}
    try:
        found = kernels()
    except UsageError as error:
        problems.append(str(error).rstrip("."))
        return document
    problems.extend(found.problems)
    return {**document, "used": found.level, "built": list(found.built)}


def _kernels_text(kernels: dict[str, Any]) -> str:
    used = f"{kernels['used']} is used" if kernels["used"] else "none is used, predictions run on scipy"
    forced = f" (DSR_TOOL_KERNELS={kernels['forced']})" if kernels["forced"] else ""
    built, supported = (", ".join(kernels[name]) or "none" for name in ("built", "supported"))
    return f"{used}{forced}; built: {built}; this processor runs: {supported}"


def _capture(packages: dict[str, str | None], problems: list[str]) -> None:
    """Torch's exporter and onnxscript are released apart, and not every pair works."""
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
