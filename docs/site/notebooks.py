"""Notebooks made from the tutorials."""

from __future__ import annotations

import re

import jupytext
import nbformat

_HEADER = "---\njupyter:\n  kernelspec:\n    display_name: Python 3\n    language: python\n    name: python3\n---\n\n"
_FILE = re.compile(r'^```[a-z]+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
"""A block that the reader saves as a file."""


def notebook(markdown: str) -> str:
    """Returns a tutorial as a notebook of nbformat 4, in JSON.

    Blocks of Python and bash are cells that run (bash by the `%%bash` magic). A block with a title is a cell that
    writes the file of that name. Text and output stay as they are on the page.

    Args:
        markdown: the tutorial.
    """
    text = _FILE.sub(r"```python\n%%writefile \1\n\2```", markdown)
    made = jupytext.reads(_HEADER + text, fmt="md")
    for number, cell in enumerate(made.cells):
        # Random otherwise, and the same page must give the same bytes.
        cell["id"] = f"cell-{number}"
    return nbformat.writes(made) + "\n"
