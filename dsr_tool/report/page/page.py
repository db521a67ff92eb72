"""Renders the report as one self-contained page, with the same bytes for the same input.

The page loads nothing from the network and has no framework.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dsr_tool.files import new_file
from dsr_tool.report.page import numbers
from dsr_tool.report.page.accuracy_view import accuracy_headline
from dsr_tool.report.page.extras_view import budget_headline, coverage_headline, extra_sections
from dsr_tool.report.page.footprint_view import footprint_sections, headline
from dsr_tool.report.page.mask_pictures import ramp
from dsr_tool.report.page.parts import Section, kind_of_file, setup_section
from dsr_tool.report.page.run_view import run_headline, run_section
from dsr_tool.report.sources import Source

__all__ = ["page_html", "rendered", "write_page"]

# Marks that override the direction of text could make one name look like another.
_DIRECTION_MARKS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = (*range(9), 11, 12, *range(14, 32), 127)
# Half of a UTF-16 pair, which a name from a file system or from JSON may hold, and which UTF-8 cannot encode.
_LONE_SURROGATES = range(0xD800, 0xE000)
_REPLACEMENTS = dict.fromkeys((*_CONTROLS, *_DIRECTION_MARKS, *_LONE_SURROGATES), "\ufffd")
"""Characters that names in a file must not bring onto a page: they are invisible, reverse text or break UTF-8."""


def write_page(path: str | Path, source: Source, document: Mapping[str, Any], *, force: bool = False) -> None:
    """Writes the page of a report; no file is left if that fails.

    Args:
        path: the new file.
        source: the measured file or folder.
        document: the report as plain values; its budget, memory and accuracy get sections if they are there.
        force: replace an existing file.

    Raises:
        FileError: the file exists and `force` is not given, or it cannot be written.
    """
    # Rendered before the file is opened, so that an error in it leaves nothing behind. Names of files may hold bytes
    # that are no text, which the page shows as escapes.
    content = page_html(source, document).encode("utf-8", "backslashreplace")
    with new_file(Path(path), force=force) as part:
        part.write_bytes(content)


def page_html(source: Source, document: Mapping[str, Any]) -> str:
    """Returns the page; the arguments are those of `write_page`."""
    config = source.config
    return rendered(
        what="report",
        title=config.architecture if config else source.path.name,
        kind=kind_of_file(source.kind),
        path=str(source.path),
        headline=[
            *headline(source),
            *accuracy_headline(document),
            *coverage_headline(document),
            *budget_headline(document),
            *(run_headline(source.log) if source.log else []),
        ],
        sections=_sections(source, document),
        input_shape=numbers.dimensions(*config.input_shape) if config else "",
        folded=source.kind == "onnx",
        closing="",
    )


def rendered(**values: Any) -> str:
    """Renders the page template with style, script and security policy.

    Args:
        values: variables of the template: `what` (kind of page), `title`, `kind`, `path`, `headline` (numbers),
            `sections`, and for the foot either `closing` or `input_shape` and `folded`.
    """
    style, script = _asset("page.css"), _asset("page.js")
    page = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            version=version("dsr-tool"),
            policy=_policy(style, script),
            style=Markup(style),  # noqa: S704 - files of this package, and nothing is inserted into them
            script=Markup(script),  # noqa: S704
            **values,
        )
    )
    return _compact(page)


def _sections(source: Source, document: Mapping[str, Any]) -> list[Section]:
    """Returns all sections, the run first and the settings last."""
    return [
        # The course of the run comes first: a reader of a run folder asks for accuracy before bytes.
        *(run_section(source.log) if source.log else []),
        *extra_sections(source, document),
        *footprint_sections(source, document),
        *setup_section(source.config, source.log),
    ]


@cache
def _environment() -> Environment:
    """Returns templates that escape every variable and fail for a missing one."""
    environment = Environment(
        loader=PackageLoader("dsr_tool.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt variable must fail, not leave a gap
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Once for the page: every color scale refers to this one by its identifier.
    environment.globals["ramp"] = ramp()
    return environment


def _clean(value: object) -> object:
    """Replaces unsafe characters in a variable; `Markup`, a subclass of str, is left as it is."""
    return value.translate(_REPLACEMENTS) if type(value) is str else value


def _asset(name: str) -> str:
    """Returns a style sheet or script of the package."""
    return _compact((files("dsr_tool.report.page") / "templates" / name).read_text(encoding="utf-8"))


def _compact(text: str) -> str:
    """Removes indentation and empty lines, which add up over hundreds of layers."""
    return "\n".join(line.strip(" ") for line in text.split("\n") if line.strip(" ")) + "\n"


def _policy(style: str, script: str) -> str:
    """Returns a content security policy that allows this style and this script, pictures in the page, and no more."""
    # Hashes instead of 'unsafe-inline', which would also run code that comes in with a name.
    hashes = (
        base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") for text in (style, script)
    )
    styles, scripts = hashes
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{styles}'; script-src 'sha256-{scripts}'; "
        f"base-uri 'none'; form-action 'none'"
    )
