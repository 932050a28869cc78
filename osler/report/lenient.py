"""Reading files that may be torn, half right, or written by another version: what cannot be read becomes NaN or empty.

Nothing here raises for what a file holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from osler.monitor.sinks import RESERVED

NAN = math.nan
NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file and how many lines before the last were not objects."""
    try:
        # The newline byte alone ends a line; str.splitlines would also cut at characters JSON strings may hold.
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError:
        return [], 0
    found = [parse_line(line) for line in lines]
    return [item for item in found if item is not None], sum(item is None for item in found[:-1])


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a line, or None when there is none."""
    try:
        item = json.loads(line)
    except ValueError:
        return None
    return item if isinstance(item, dict) else None


def measurements(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics of a line of ``metrics.jsonl``, NaN where a value was not finite."""
    for name, raw in line.items():
        if name not in RESERVED and is_measurement(raw):
            yield name, as_number(raw)


def is_measurement(raw: object) -> bool:
    """Whether a value of a line is that of a metric: a number, or what stands for one that was not finite."""
    return raw is None or isinstance(raw, (int, float)) or raw in NOT_FINITE


def as_number(raw: object) -> float:
    """A finite number, or NaN."""
    if isinstance(raw, (int, float, str)):
        try:
            value = float(raw)
        except (ValueError, OverflowError):
            return NAN
        return value if math.isfinite(value) else NAN
    return NAN


def as_pair(raw: object) -> tuple[float, float]:
    """Two numbers, or two NaN."""
    two = as_list(raw)
    return (as_number(two[0]), as_number(two[1])) if len(two) == 2 else (NAN, NAN)


def as_text(raw: object) -> str:
    """Text as it is, nothing as empty text, all else as JSON."""
    if raw is None:
        return ""
    return raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)


def as_list(raw: object) -> list[Any]:
    """A list, empty for what is none."""
    return list(raw) if isinstance(raw, (list, tuple)) else []


def as_dict(raw: object) -> dict[str, Any]:
    """A mapping with keys of text, empty for what is none."""
    return {str(k): v for k, v in raw.items()} if isinstance(raw, dict) else {}


def as_dicts(raw: object) -> list[dict[str, Any]]:
    """The mappings of a list."""
    return [row for row in as_list(raw) if isinstance(row, dict)]
