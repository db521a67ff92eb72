"""dsr-tool doctor: print versions, devices and kernels, and find what does not fit together."""

from __future__ import annotations

import click

from dsr_tool.cli.common import emit, examples, result_options

__all__ = ["command"]


@click.command("doctor", epilog=examples("dsr-tool doctor", "dsr-tool doctor --json"))
@result_options
def command(as_json: bool) -> int:
    """Print versions, devices and kernels, and a remedy for each problem; exit code 3 if there is one."""
    from dsr_tool.errors import CheckFailed
    from dsr_tool.measure.health import doctor_document, doctor_text

    document = doctor_document()
    emit(document, doctor_text(document), as_json=as_json)
    return CheckFailed.exit_code if document["problems"] else 0
