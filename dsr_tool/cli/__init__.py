"""The command line: one file a command, imported only when it is called, so that help answers at once."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

from dsr_tool.errors import DsrError, closest, first_line, unknown_name

__all__ = ["cli", "main"]

_COMMANDS = {
    "convert": "Convert a torchvision model, or one of your own, to an exact sparse budget.",
    "train": "Train a converted model at its budget: DSR, SET, RigL, static masks or gradual pruning.",
    "recipes": "List, print and copy the recipes: rows of published tables, ready to be run.",
    "compare": "Methods side by side at one budget: a table, a page with plots, and the raw runs.",
    "export": "Write a model as one file: archive, ONNX, CSR for scipy, safetensors or state_dict.",
    "report": "Say where every weight, byte and multiply-add is.",
    "predict": "Run an archive on pictures or arrays.",
    "verify": "Check that a file computes what its model computes.",
    "bench": "Measure a file against its dense model: latency, start and memory.",
    "demo": "The main job on a small real data set, in a few minutes.",
    "doctor": "Versions, devices, and what does not fit together.",
}


class _LazyGroup(click.Group):
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
    "all else to stderr.",
)
@click.version_option(package_name="dsr-tool", prog_name="dsr-tool")
@click.pass_context
def cli(context: click.Context) -> None:
    """Fit a vision model into a budget: exact sparsity, trained masks, files that are really small."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Entry point: run a command and turn what goes wrong into one sentence and an exit code."""
    sys.exit(_run())


def _run() -> int:
    try:
        result = cli.main(prog_name="dsr-tool", standalone_mode=False)
    except click.ClickException as error:
        return _say(_usage(error), error.exit_code)
    except DsrError as error:
        return _say(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted; whatever was written whole before is kept.", 130)
    except BrokenPipeError:
        # The reader of our stdout has gone; closing it again at exit would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        return _say(f"an import failed ({first_line(error)}); `dsr-tool doctor` says what does not fit together.", 1)
    except MemoryError:
        return _say("memory ran out; use a smaller model, input or batch, or a larger machine.", 1)
    except OSError as error:
        where = f" {error.filename!r}" if error.filename else ""
        return _say(f"the system refused{where}: {error.strerror or error}.", 1)
    except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback at a user's hand
        if os.environ.get("DSR_TOOL_TRACEBACK"):
            traceback.print_exc()
        return _say(
            f"unexpected {type(error).__name__}: {first_line(error)} "
            f"(this is a defect in dsr-tool; set DSR_TOOL_TRACEBACK=1 to see where).",
            1,
        )
    return result if isinstance(result, int) else 0


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "dsr-tool"
    if isinstance(error, click.NoSuchOption):
        options = context.command.get_params(context) if context else []
        names = [name for option in options for name in (*option.opts, *option.secondary_opts) if name[:2] == "--"]
        close = [f"--{name}" for name in closest(error.option_name.lstrip("-"), [name[2:] for name in names])]
        hint = f"did you mean {' or '.join(close)}?" if close else f"`{path} --help` lists those that there are."
        return f"option {error.option_name} is unknown; {hint}"
    return f"{error.format_message().rstrip('.')}; `{path} --help` says what is allowed."


def _say(message: str, code: int) -> int:
    click.echo(f"dsr-tool: {message}", err=True)
    return code
