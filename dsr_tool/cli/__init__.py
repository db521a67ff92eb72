"""The command line: one file per command, imported only when it is called, so that help answers at once.

click reads the arguments (`group.py`). Where it is not installed, `predict` still runs (`without_click.py`): a program
that only predicts needs numpy, scipy and safetensors alone.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from dsr_tool.cli.streams import write_anything
from dsr_tool.errors import DsrError, first_line
from dsr_tool.packages import needed_by

__all__ = ["COMMANDS", "main"]

COMMANDS = {
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
"""Every command, and what it does."""


def main() -> None:
    """Runs a command; the entry point. Every error becomes one sentence and an exit code."""
    write_anything()
    sys.exit(_run())


def _run() -> int:
    try:
        with needed_by(f"`{_called()}`"):
            return _reader()()
    except DsrError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
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


def _reader() -> Callable[[], int]:
    """Returns the function that reads the arguments and runs a command: with click if it is installed."""
    try:
        from dsr_tool.cli.group import run
    except ModuleNotFoundError as error:
        if error.name != "click" or sys.argv[1:2] != ["predict"]:
            raise
        from dsr_tool.cli.without_click import run
    return run


def _called() -> str:
    """Returns the command that the arguments name, such as `dsr-tool convert`."""
    return " ".join(["dsr-tool", *(word for word in sys.argv[1:2] if word in COMMANDS)])


def _fail(message: str, code: int) -> int:
    """Prints an error to stderr and returns its exit code."""
    print(f"dsr-tool: {message}", file=sys.stderr)
    return code
