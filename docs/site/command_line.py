"""The reference of the command line, read from the commands themselves, so that it lacks nothing."""

from __future__ import annotations

import contextlib
import html
import inspect
import re
from collections.abc import Iterator, Sequence

import click

from dsr_tool.cli.group import cli


class _Sections(click.HelpFormatter):
    """Keeps the sections of a help text as rows instead of writing them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str]]]] = []

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Opens a section."""
        self.found.append((name, []))
        yield

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:  # noqa: ARG002 - click's signature
        """Keeps the rows of the section that is open."""
        self.found[-1][1].extend(rows)


def commands() -> str:
    """Returns the sections of all commands as Markdown."""
    top = click.Context(cli, info_name="dsr-tool")
    parts = [_command("dsr-tool", cli, top)]
    for name in cli.list_commands(top):
        command = cli.get_command(top, name)
        parts.append(_command(f"dsr-tool {name}", command, click.Context(command, info_name=name, parent=top)))
    return "\n\n" + "\n\n".join(parts) + "\n"


def _command(title: str, command: click.Command, context: click.Context) -> str:
    usage = " ".join([title, *command.collect_usage_pieces(context)])
    parts = [f"## {title}", f"```text\n{usage}\n```", _prose(command.help or "")]
    sections = _Sections()
    command.format_options(context, sections)
    for name, rows in sections.found:
        if name != "Commands":
            parts += [f"**{name}**", _rows(rows)]
    parts += [_example(command.epilog)] if command.epilog and "Examples:" in command.epilog else []
    return "\n\n".join(parts)


def _prose(text: str) -> str:
    return "\n\n".join(f"<p>{_inline(part)}</p>" for part in inspect.cleandoc(text).split("\n\n"))


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    """Returns a list of names and what they mean; HTML, since help texts hold characters that Markdown reads."""
    items = "\n".join(f"<dt><code>{html.escape(name)}</code></dt>\n<dd>{_inline(text)}</dd>" for name, text in rows)
    return f'<dl class="options">\n{items}\n</dl>'


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(" ".join(text.split()), quote=False))


def _example(epilog: str) -> str:
    lines = [line.strip() for line in epilog.partition("Examples:")[2].splitlines()]
    return "**Examples**\n\n```bash\n" + "\n".join(filter(None, lines)) + "\n```"
