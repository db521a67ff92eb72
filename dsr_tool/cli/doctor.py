"""dsr-tool doctor: versions, devices, and what does not fit together."""

from __future__ import annotations

import click

from dsr_tool.cli.common import emit, examples, result_options

__all__ = ["command"]


@click.command("doctor", epilog=examples("dsr-tool doctor", "dsr-tool doctor --json"))
@result_options
def command(as_json: bool) -> int:
    """Print versions and devices, and for everything that does not fit together the remedy; exit code 3 if any."""
    from dsr_tool.measure.health import doctor_document, doctor_text

    document = doctor_document()
    emit(document, doctor_text(document), as_json=as_json)
    return 3 if document["problems"] else 0
