"""Values from files that may be partly wrong or of another version: an unusable value becomes NaN, empty, or a default.

No value raises an error; only a file that is not JSON at all does.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from osler.runtime.files import read_json

NAN = math.nan
T = TypeVar("T")


def as_number(raw: object) -> float:
    """Return a finite number, or NaN."""
    try:
        value = float(raw) if isinstance(raw, (int, float, str)) else NAN
    except (ValueError, OverflowError):
        return NAN
    return value if math.isfinite(value) else NAN


def as_text(raw: object) -> str:
    """Return text as it is, null as empty text, and anything else as JSON."""
    if raw is None:
        return ""
    return raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)


def as_list(raw: object) -> list[Any]:
    """Return a list, and for a mapping its values; empty for anything else."""
    if isinstance(raw, dict):
        return list(raw.values())
    return list(raw) if isinstance(raw, (list, tuple)) else []


def as_dict(raw: object) -> dict[str, Any]:
    """Return a mapping with keys of text, empty for anything else."""
    return {str(key): value for key, value in raw.items()} if isinstance(raw, dict) else {}


READERS: dict[Any, Callable[[Any], Any]] = {
    float: as_number,
    str: as_text,
    bool: lambda raw: raw is True,
    bool | None: lambda raw: raw if isinstance(raw, bool) else None,
    list[str]: lambda raw: [as_text(item) for item in as_list(raw)],
    dict[str, float]: lambda raw: {key: as_number(value) for key, value in as_dict(raw).items()},
    dict[str, Any]: as_dict,
    tuple[float, float]: lambda raw: (*map(as_number, as_list(raw)), NAN, NAN)[:2],
}


def from_json(record: type[T], fields: Mapping[str, Any]) -> T:
    """Return a record from a JSON object. Unknown keys are ignored; fields that the object lacks get their defaults."""
    kinds = get_type_hints(record)
    return record(**{name: READERS[kinds[name]](raw) for name, raw in fields.items() if name in kinds})


def read_records(record: type[T], path: Path) -> list[T]:
    """Return the records of a JSON file that holds a list, none when there is no file; raises UserError when it is damaged."""
    rows = as_list(read_json(path)) if path.exists() else []
    return [from_json(record, row) for row in rows if isinstance(row, dict)]
