"""Blind mutants: changes of bytes in any file, and of values in any JSON document. They test parsers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from numpy.random import Generator

__all__ = ["NUMBERS", "TEXTS", "any_bytes", "choose", "json_bytes", "json_tree"]

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**63 - 1,
    2**63,
    2**64,
    10**400,
    0.5,
    1e308,
)
TEXTS = (
    "",
    "x",
    "../../etc/passwd",
    "/dev/zero",
    "os:system",
    "\0",
    "é" * 300,
    "float32",
    "object",
    "|O",
    "NaN",
    "__class__",
)


def choose(random: Generator, choices: Sequence[Any]) -> Any:
    """Draws one of the choices."""
    return choices[int(random.integers(len(choices)))]


def any_bytes(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes one to four blind changes of one of the files."""
    data = bytearray(choose(random, corpus))
    for _ in range(int(random.integers(1, 5))):
        data = choose(random, _BLIND)(random, data, corpus)
    return bytes(data)


def _span(random: Generator, data: bytearray, longest: int = 64) -> tuple[int, int]:
    start = int(random.integers(0, len(data) + 1))
    return start, min(len(data), start + int(random.integers(1, longest)))


def _flip(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    if data:
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    return data


def _cut(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    return data[: int(random.integers(0, len(data) + 1))]


def _remove(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start, end = _span(random, data)
    return data[:start] + data[end:]


def _insert(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start, _end = _span(random, data)
    return data[:start] + random.bytes(int(random.integers(1, 32))) + data[start:]


def _repeat(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start, end = _span(random, data, 512)
    return data[:end] + data[start:end] + data[end:]


def _number(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    width = int(random.choice([1, 2, 4, 8]))
    value = int(random.choice([0, 1, 255, 2**31 - 1, 2**31, 2**63, 2**64 - 1], shuffle=False).astype(object))
    start, _end = _span(random, data)
    return data[:start] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[start + width :]


def _splice(random: Generator, data: bytearray, corpus: Sequence[bytes]) -> bytearray:
    other = choose(random, corpus)
    return data[: int(random.integers(0, len(data) + 1))] + other[int(random.integers(0, len(other) + 1)) :]


_BLIND = (_flip, _flip, _cut, _remove, _insert, _repeat, _number, _splice)


def json_tree(random: Generator, document: Any) -> Any:
    """Makes one to three changes anywhere in a document."""
    for _ in range(int(random.integers(1, 4))):
        document = _changed(random, document)
    return document


def _changed(random: Generator, value: Any) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = choose(random, list(value))
        if random.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if random.random() < 0.1:
            return {**value, choose(random, [*TEXTS, *value]): value[key]}
        return {**value, key: _changed(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.9:
        i = int(random.integers(len(value)))
        choice = random.random()
        if choice < 0.1:
            return value[:i] + value[i + 1 :]
        if choice < 0.2:
            return [*value[:i], value[i], *value[i:]]
        return [*value[:i], _changed(random, value[i]), *value[i + 1 :]]
    if isinstance(value, int) and random.random() < 0.4:
        return value + int(random.integers(-2, 3))
    return choose(random, (*NUMBERS, *TEXTS, None, True, [], {}, [[]], {"a": {}}, float("inf"), float("nan")))


def json_bytes(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes a JSON file with wrong values, or with brackets without end."""
    if random.random() < 0.02:
        return b"[" * int(random.integers(10**5))
    document = json.loads(choose(random, corpus))
    return json.dumps(json_tree(random, document), ensure_ascii=False).encode("utf-8", "surrogatepass")
