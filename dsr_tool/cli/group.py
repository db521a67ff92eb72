"""The command line as click reads it: one file per command, imported only when it is called."""

from __future__ import annotations

import importlib

import click

from dsr_tool.cli import COMMANDS
from dsr_tool.errors import DsrError, UsageError, closest, unknown_name

__all__ = ["cli", "run"]


class _LazyGroup(click.Group):
    """A group that imports a command when it is called, not when help lists it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            raise unknown_name("command", cmd_name, COMMANDS)
        command: click.Command = importlib.import_module(f"dsr_tool.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 error, 2 wrong usage, 3 a check failed, 130 interrupted. Results go to stdout, "
    "everything else to stderr.",
)
@click.version_option(package_name="dsr-tool", prog_name="dsr-tool")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fit a vision model into a budget: exact sparsity, trained masks, small files."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def run() -> int:
    """Reads the arguments of the process, and runs a command. Returns its exit code.

    Raises:
        DsrError: the arguments are wrong, or the command fails.
        KeyboardInterrupt: the user interrupted it.
    """
    try:
        result = cli.main(prog_name="dsr-tool", standalone_mode=False)
    except click.ClickException as error:
        kind = UsageError if error.exit_code == UsageError.exit_code else DsrError
        raise kind(_usage_message(error)) from error
    except click.Abort as error:
        raise KeyboardInterrupt from error
    return result if isinstance(result, int) else 0


def _usage_message(error: click.ClickException) -> str:
    """Returns click's complaint as one sentence, with close names for an unknown option."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "dsr-tool"
    if isinstance(error, click.NoSuchOption):
        options = context.command.get_params(context) if context else []
        names = [name for option in options for name in (*option.opts, *option.secondary_opts) if name[:2] == "--"]
        close = [f"--{name}" for name in closest(error.option_name.lstrip("-"), [name[2:] for name in names])]
        hint = f"did you mean {' or '.join(close)}?" if close else f"`{path} --help` lists all options."
        return f"option {error.option_name} is unknown; {hint}"
    return f"{error.format_message().rstrip('.')}; see `{path} --help`."
