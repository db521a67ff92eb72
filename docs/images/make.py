"""Makes the pictures of this folder: what commands print, as SVG, and the top of a report's page, as WebP.

    python docs/images/make.py

The commands are run as written in a scratch folder, and a picture has what they wrote to a pipe, so that seconds and
latencies are those of this machine. The page needs a Chromium.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

FOLDER = Path(__file__).parent

COLUMNS = 122
"""Characters of a terminal's line; longer lines go on in the next, as in a terminal."""

TERMINALS = {
    "convert": "dsr-tool convert resnet18 --num-classes 10 --input-size 32 --sparsity 0.9 -o resnet18-90",
    "train": "dsr-tool train resnet18-90 -o run --data digits --epochs 6 --batch-size 64 --lr 0.05",
    "export": "dsr-tool export run -o resnet18-90.dsr",
    "bench": "dsr-tool bench resnet18-90.dsr",
    "report": "dsr-tool report resnet18-90.dsr | tail -n 11",
}
"""Name of a picture -> its command. They build on each other, in this order."""
UNPICTURED = ("export",)
"""Commands that only later ones need."""

PAGE, PAGE_SIZE = "page", (1100, 1000)
"""Name of the picture of a page, and the size of the window in pixels."""

SVG = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
font: {char_height}px/{line_height}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}}
.{unique_id}-title {{ font: bold 18px system-ui, "Segoe UI", Arial, sans-serif; }}
{styles}
</style>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""rich's own form of an SVG, without the font that it loads from the network, and without clip paths: no line is wider
than the terminal."""


def main() -> None:
    """Runs the commands and writes the pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, command in TERMINALS.items():
            printed = _run(command, Path(scratch))
            if name not in UNPICTURED:
                (FOLDER / f"{name}.svg").write_text(terminal(name, command, printed), encoding="utf-8")
        _run(f"dsr-tool report resnet18-90.dsr --html {PAGE}.html", Path(scratch))
        _page(Path(scratch) / f"{PAGE}.html", FOLDER / f"{PAGE}.webp")


def _run(command: str, folder: Path) -> str:
    """Returns what a shell's command writes to stdout and stderr, in its order."""
    programs = Path(sys.executable).parent
    done = subprocess.run(  # noqa: S602 - our own command
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command}: {done.stdout.strip()}")
    return done.stdout.rstrip("\n")


def terminal(name: str, command: str, printed: str) -> str:
    """Returns the SVG of a terminal with a command and what it printed."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(Text.assemble(("$ ", "green"), (command, "bold")))
    for line in printed.splitlines():
        # A terminal breaks lines at its edge, rich between words.
        for start in range(0, max(len(line), 1), COLUMNS):
            console.print(Text(line[start : start + COLUMNS]), no_wrap=True)
    console.print()  # room below the last line
    svg = console.export_svg(title=command.split()[1], code_format=SVG, unique_id=name)
    svg = re.sub(r" clip-path=\"[^\"]*\"", "", svg)
    # The ends of lines are elements too.
    svg = re.sub(r"<text [^>]*>\n</text>", "", svg).replace("</text>", "</text>\n")
    return "\n".join(line.strip() for line in svg.splitlines() if line.strip()) + "\n"


def _page(page: Path, picture: Path) -> None:
    """Writes the top of a page as a WebP of few colors."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next((path for name in names if (path := shutil.which(name))), None)
    if executable is None:
        raise SystemExit(f"the picture of the page needs one of {', '.join(names)} on the path; the others are made.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        width, height = PAGE_SIZE
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.goto(page.as_uri())
        shot = Image.open(io.BytesIO(tab.screenshot()))
        browser.close()
    shot.convert("RGB").save(picture, lossless=True, method=6)


if __name__ == "__main__":
    main()
