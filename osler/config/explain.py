"""A config as YAML with a comment at every field that says what it means. Torch-free.

The comment is the one behind the field in its config class, or directly above it where it is long. A section is explained by the
docstring of its class. Both are read from the source when somebody asks; choices and ranges come from the types.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from typing import Any, Literal, get_args, get_origin

from osler.config.schema import encode, hints, members_of, range_of, tag_of
from osler.config.yaml12 import dump_yaml

COLUMNS = 120  # longer lines put their comment above


def explained(value: Any, indent: str = "") -> list[str]:
    """Return the lines of a config as YAML, with comments behind the fields, or above them where they are too long."""
    cls: Any = type(value)
    meanings = explanations(cls)
    lines: list[str] = []
    for name, annotation in hints(cls).items():
        field = getattr(value, name)
        sections = field if isinstance(field, tuple) else (field,)
        if not sections or not all(map(dataclasses.is_dataclass, sections)):
            text = textwrap.indent(dump_yaml({name: encode(field)}).removesuffix("\n"), indent)
            lines += _commented(text, [meanings[name], _choices(annotation)], indent)
            continue
        lines += _commented(f"{indent}{name}:", [meanings[name] or _purpose(type(sections[0])), _choices(annotation)], indent)
        for section in sections:
            lines += [f"{indent}  -"] if sections is field else []
            lines += explained(section, f"{indent}    " if sections is field else f"{indent}  ")
    return lines


def explanations(cls: type) -> dict[str, str]:
    """Return the comment behind or directly above each field of a config class, empty where there is none."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__[:-1]):
        found |= _comments_in(part)
    return found


def _comments_in(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    alone = {row for row, token in comments.items() if token.line.lstrip().startswith("#")}
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            rows = range(first, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(comments[row].string.lstrip("# ") for row in rows if row in comments)
    return found


def _purpose(cls: type) -> str:
    """Return the first paragraph of a config class's docstring on one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split()).replace("``", "").removesuffix(".")


def _choices(annotation: Any) -> str:
    """Return the values, the types or the range that a field may have."""
    members, tagged = members_of(annotation)
    if tagged:
        return f"type is one of {', '.join(str(tag_of(member)) for member in members)}"
    values = [str(value) for member in members if get_origin(member) is Literal for value in get_args(member)]
    return f"one of {', '.join(values)}" if len(values) > 1 else range_of(annotation)


def _commented(text: str, comments: list[str], indent: str) -> list[str]:
    """Return the lines of a YAML item with its comment."""
    comment = "; ".join(part for part in comments if part)
    first, *rest = text.split("\n")
    if not comment:
        return [first, *rest]
    behind = f"{first}  # {comment}"
    if len(behind) <= COLUMNS and (not rest or first.endswith(":")):
        return [behind, *rest]
    return [*(f"{indent}# {line}" for line in textwrap.wrap(comment, COLUMNS - len(indent) - 2)), first, *rest]
