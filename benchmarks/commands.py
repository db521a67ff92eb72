"""Runs commands of dsr-tool in processes of their own, as users do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["run_json"]


def run_json(*arguments: object) -> dict[str, Any]:
    """Runs a command of dsr-tool, and returns its JSON document; ends this process if the command fails."""
    command = [str(Path(sys.executable).with_name("dsr-tool")), *map(str, arguments), "--json", "-q"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document
