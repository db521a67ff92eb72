"""Packages that are not installed: one sentence with the package, what needs it, and the command that installs it.

Predictions need numpy, scipy and safetensors alone, so an installation may lack everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires

from dsr_tool.errors import DsrError

__all__ = ["MissingPackage", "needed_by"]

_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Modules whose package has another name."""


class MissingPackage(DsrError, ImportError):  # noqa: N818 - named by what is wrong, as the other errors
    """A package that dsr-tool requires is not installed (exit code 1)."""


@contextmanager
def needed_by(what: str) -> Iterator[None]:
    """Turns the failed import of a package that dsr-tool requires into `MissingPackage`.

    An import that fails for another reason, such as a module of the user's own or a damaged package, is left alone.

    Args:
        what: what is done within, as the subject of the message: "`dsr-tool convert`".

    Raises:
        MissingPackage: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = _NAMES.get(error.name or "", error.name or "")
        if (requirement := _requirement(package)) is None:
            raise
        raise MissingPackage(
            f"{what} needs the package {package}, which is not installed; run: pip install '{requirement}', or: pip "
            f"install dsr-tool, for all packages."
        ) from error


def _requirement(package: str) -> str | None:
    """Returns what dsr-tool requires of a package, such as `torch>=2.6`; None if it does not require the package."""
    try:
        listed = requires("dsr-tool") or []
    except PackageNotFoundError:  # the sources alone, without an installation
        return None
    found = (text.partition(";")[0].strip() for text in listed)
    return next((text for text in found if re.split(r"[^\w.-]", text)[0] == package), None)
