"""The command line: one file per command, imported only when it is called, so that help answers at once."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

from dsr_tool.cli.streams import write_anything
from dsr_tool.errors import DsrError, closest, first_line, unknown_name

__all__ = ["cli", "main"]

_COMMANDS = {
    "convert": "Convert a torchvision model, or your own, to an exact sparse budget.",
    "train": "Train a converted model at its budget: DSR, SET, RigL, static masks or gradual pruning.",
    "recipes": "List, print and copy recipes: rows of published tables, ready to run.",
    "compare": "Train methods side by side at one budget: a table, a page with plots, and all runs.",
    "export": "Write a model as one file: archive, ONNX, CSR for scipy, safetensors or state_dict.",
    "report": "Account for every weight, byte and multiply-add.",
    "predict": "Run an archive or ONNX file on pictures or arrays.",
    "verify": "Check that a file computes what its model computes.",
    "bench": "Measure a file against its dense model: latency, load time and memory.",
    "demo": "Convert, train and export on a small real data set, in a few minutes.",
    "doctor": "Print versions and devices, and find what does not fit together.",
}


class _LazyGroup(click.Group):
    """A group that imports a command when it is called, not when help lists it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            raise unknown_name("command", cmd_name, _COMMANDS)
        command: click.Command = importlib.import_module(f"dsr_tool.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


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


def main() -> None:
    """Runs a command; the entry point. Every error becomes one sentence and an exit code."""
    write_anything()
    sys.exit(_run())


def _run() -> int:
    try:
        result = cli.main(prog_name="dsr-tool", standalone_mode=False)
    except click.ClickException as error:
        return _fail(_usage_message(error), error.exit_code)
    except DsrError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; what was completely written before is kept.", 130)
    except BrokenPipeError:
        # The reader of our stdout is gone, as in `dsr-tool ... | head`. Python flushes stdout at exit, which would fail
        # again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:  # a broken or mixed installation
        return _fail(f"an import failed ({first_line(error)}); run `dsr-tool doctor` to see what is missing.", 1)
    except MemoryError:
        return _fail("out of memory; use a smaller model, input or batch, or a larger machine.", 1)
    except OSError as error:
        where = f" for {error.filename!r}" if error.filename else ""
        reason = error.strerror or error
        return _fail(f"the system reports an error{where}: {reason}; check path, permissions and disk space.", 1)
    except Exception as error:  # noqa: BLE001 - users get a sentence, never a traceback
        if os.environ.get("DSR_TOOL_TRACEBACK"):
            traceback.print_exc()
        return _fail(
            f"unexpected {type(error).__name__}: {first_line(error)} "
            f"(this is a bug in dsr-tool; set DSR_TOOL_TRACEBACK=1 to see the traceback).",
            1,
        )
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


def _fail(message: str, code: int) -> int:
    """Prints an error to stderr and returns its exit code."""
    # The stream is named, since click would write UTF-8 to a stderr that has ASCII.
    click.echo(f"dsr-tool: {message}", file=sys.stderr)
    return code
