"""dsr-tool: sparse models at an exact budget, trained, exported small, and measured.

The public names below are imported when they are first used, so a program that only predicts never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converters.conversion import convert as convert
    from converters.loading import load as load
    from dsr_tool.formats.archive import open_archive as open_archive
    from dsr_tool.formats.csr_file import load_csr as load_csr
    from dsr_tool.methods import attach as attach
    from dsr_tool.report.footprints import footprint as footprint
    from dsr_tool.runtime import Session as Session
    from dsr_tool.runtime.deploy.library import include_dir as include_dir
    from dsr_tool.runtime.deploy.library import library as library
    from dsr_tool.runtime.deploy.library import ort_library as ort_library
    from dsr_tool.runtime.deploy.session import PlanSession as PlanSession
    from dsr_tool.sparse.model import SparseModel as SparseModel
    from exporters.export import export as export
    from exporters.export import verify as verify
    from exporters.onnx.session import onnx_session as onnx_session

_PUBLIC = {
    "SparseModel": "dsr_tool.sparse.model",
    "Session": "dsr_tool.runtime",
    "PlanSession": "dsr_tool.runtime.deploy.session",
    "attach": "dsr_tool.methods",
    "convert": "converters.conversion",
    "export": "exporters.export",
    "footprint": "dsr_tool.report.footprints",
    "include_dir": "dsr_tool.runtime.deploy.library",
    "library": "dsr_tool.runtime.deploy.library",
    "load": "converters.loading",
    "load_csr": "dsr_tool.formats.csr_file",
    "onnx_session": "exporters.onnx.session",
    "ort_library": "dsr_tool.runtime.deploy.library",
    "open_archive": "dsr_tool.formats.archive",
    "verify": "exporters.export",
}
"""Module of each public name. The imports above say the same to type checkers."""

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dsr_tool' has no attribute {name!r}")
    from dsr_tool.packages import needed_by

    with needed_by(f"dsr_tool.{name}"):
        value: object = getattr(importlib.import_module(_PUBLIC[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
