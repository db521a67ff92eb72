"""The report as one self-contained page: no network, no framework, the same bytes for the same input."""

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
from dsr_tool.report.page.extras_view import budget_headline, extra_sections
from dsr_tool.report.page.footprint_view import footprint_sections, headline
from dsr_tool.report.page.mask_pictures import ramp
from dsr_tool.report.page.parts import Section, kind_of_file, setup_section
from dsr_tool.report.page.run_view import run_headline, run_section
from dsr_tool.report.sources import Source

__all__ = ["page_html", "rendered", "write_page"]

_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_UNSEEN = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127, *_DIRECTIONS, *range(0xD800, 0xE000)), "\ufffd")
"""Control characters, changes of direction and half pairs, which no name may bring onto a page."""


def write_page(path: str | Path, source: Source, document: Mapping[str, Any], *, force: bool = False) -> None:
    """Write the page of a report; nothing is left when that fails.

    Args:
        path: the new file.
        source: what was measured.
        document: the report as plain values; its budget and memory, where it has them, get sections.
        force: replace an existing file.

    Raises:
        FileError: the file exists without `force`, or the disk refuses it.
    """
    content = page_html(source, document).encode("utf-8")
    with new_file(Path(path), force=force) as part:
        part.write_bytes(content)


def page_html(source: Source, document: Mapping[str, Any]) -> str:
    """The page itself; the arguments are those of `write_page`."""
    config = source.config
    return rendered(
        what="report",
        title=config.architecture if config else source.path.name,
        kind=kind_of_file(source.kind),
        path=str(source.path),
        headline=[
            *headline(source),
            *budget_headline(document),
            *(run_headline(source.log) if source.log else []),
        ],
        sections=_sections(source, document),
        input_shape=numbers.by(*config.input_shape) if config else "",
        folded=source.kind == "onnx",
        closing="",
    )


def rendered(**values: Any) -> str:
    """A page with style, script and policy put in.

    Args:
        values: what the template shows: `what` the page is, `title`, `kind`, `path`, `headline` (numbers), `sections`,
            and at the foot either `closing` or what `input_shape` and `folded` say about a footprint.
    """
    style, script = _asset("page.css"), _asset("page.js")
    page = (
        _environment()
        .get_template("page.html.jinja")
        .render(
            version=version("dsr-tool"),
            policy=_policy(style, script),
            style=Markup(style),  # noqa: S704 - our own files, and nothing is put into them
            script=Markup(script),  # noqa: S704
            **values,
        )
    )
    return _compact(page)


def _sections(source: Source, document: Mapping[str, Any]) -> list[Section]:
    return [
        *(run_section(source.log) if source.log else []),
        *extra_sections(source, document),
        *footprint_sections(source),
        *setup_section(source.config, source.log),
    ]


@cache
def _environment() -> Environment:
    """Templates that escape whatever they are given, and fail for what they are not given."""
    environment = Environment(
        loader=PackageLoader("dsr_tool.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["ramp"] = ramp()
    return environment


def _clean(value: Any) -> Any:
    return value.translate(_UNSEEN) if type(value) is str else value


def _asset(name: str) -> str:
    return _compact((files("dsr_tool.report.page") / "templates" / name).read_text(encoding="utf-8"))


def _compact(text: str) -> str:
    """The text without indentation and empty lines, of which hundreds of layers make many."""
    return "\n".join(line.strip(" ") for line in text.split("\n") if line.strip(" ")) + "\n"


def _policy(style: str, script: str) -> str:
    """Nothing but this page's own style, script and pictures."""
    hashes = (
        base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") for text in (style, script)
    )
    styles, scripts = hashes
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{styles}'; script-src 'sha256-{scripts}'; "
        f"base-uri 'none'; form-action 'none'"
    )
