"""JSON documents inside of files: parsed strictly, and decompressed within limits, since files may be hostile."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.tensor import Array

__all__ = ["compress_document", "decompress_document", "is_count", "parse_json"]

_MAX_DOCUMENT_BYTES = 64 << 20
"""Largest decompressed document, in bytes."""

_FREE_DOCUMENT_BYTES = 4 << 20
"""Bytes that any document may have, however small its file is."""

_MAX_DOCUMENT_RATIO = 256
"""Bytes that a document may have beyond that, per stored byte, so that small files fail fast."""

_MAX_QUOTED = 80
"""Characters of a repeated name that an error quotes."""


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """Parses a JSON object in UTF-8 that has no name twice.

    JSON readers disagree about a name that stands twice, so a file with one could mean different models to them.

    Args:
        raw: the text.
        what: start of the error message, such as "its header".

    Raises:
        FormatError: `raw` is anything else.
    """
    # json raises RecursionError for deep nesting and ValueError for numbers of more than 4,300 digits.
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (RecursionError, ValueError) as error:
        raise FormatError(f"{what} cannot be parsed ({str(error)[:200]})") from error
    if not isinstance(document, dict):
        raise FormatError(f"{what} is not a JSON object")
    return document


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        # The most common name is one of those that stand twice.
        duplicate, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has the name {duplicate[:_MAX_QUOTED]!r} twice")
    return document


def is_count(value: object) -> bool:
    """Returns whether a value of a JSON document is an integer of at least 0; true and false are not."""
    return type(value) is int and value >= 0


def compress_document(text: str) -> Array:
    """Returns a document as zlib-compressed bytes, a uint8 array."""
    return np.frombuffer(zlib.compress(text.encode("utf-8"), 9), np.uint8)


def decompress_document(stored: Array) -> bytes:
    """Returns the bytes of a compressed document.

    Raises:
        FormatError: the bytes are damaged, or the document is larger than 256 times its stored bytes plus 4 MiB, or
            than 64 MiB.
    """
    limit = min(_FREE_DOCUMENT_BYTES + _MAX_DOCUMENT_RATIO * stored.nbytes, _MAX_DOCUMENT_BYTES)
    decoder = zlib.decompressobj()
    try:
        raw = decoder.decompress(stored.tobytes(), limit)  # stops at the limit, however much there is
    except zlib.error as error:
        raise FormatError(f"a document of the archive cannot be decoded ({error}); the file is damaged.") from error
    if not decoder.eof or decoder.unused_data:
        raise FormatError(f"a document of the archive does not end within {limit:,} bytes; the file is damaged.")
    return raw
