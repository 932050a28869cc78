"""Decoding: a mapping of plain values becomes a config, or a list of everything that is wrong with it.

Pydantic finds the errors. Here each becomes one line with the path as the user wrote it, the value, and the nearest key that
exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args, get_origin

from osler.config.schema import ConfigError, encode, hints, is_config_class, members_of, nearest, range_of, shown, tag_of
from osler.runtime.errors import UserError

T = TypeVar("T")

_MAPPING = ("dataclass_type", "dataclass_exact_type", "model_attributes_type", "dict_type")
_SHOULD = {
    **dict.fromkeys(("int_type", "int_from_float"), "should be an integer"),
    **dict.fromkeys(_MAPPING, "should be a mapping of keys to values"),
    **dict.fromkeys(("tuple_type", "list_type"), "should be a list"),
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "path_type": "should be a path",
    "none_required": "should be null",
}


# Names of other libraries: what they are called here. Everything is counted in tokens.
_ELSEWHERE = {
    "learning_rate": ("lr",),
    "epochs": ("total_tokens", "steps"),
    "num_train_epochs": ("total_tokens", "steps"),
    "max_steps": ("total_tokens", "steps"),
    "batch_size": ("batch_tokens", "prompts_per_step"),
    "warmup_steps": ("warmup_tokens",),
    "block_size": ("seq_len",),
    "context_length": ("seq_len",),
    "n_layer": ("num_layers",),
}


def decode(cls: type[T], mapping: Mapping[str, Any], *, source: str = "") -> T:
    """Build ``cls`` from a mapping of plain values.

    Types are strict, except that lists become tuples, text becomes a path, and integers are taken where floats are
    asked for. A nested mapping of the same ``type`` as the default value changes only the fields it names. ``source``
    is named in the message. Raises ConfigError with every error of the mapping, one line each.
    """
    from pydantic import ValidationError

    source = source or "the configuration"
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source}: should be a mapping of keys to values, given {shown(mapping)}")
    completed = _complete(cls, encode(mapping))
    try:
        text = json.dumps(completed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: a value is no text, number, list or mapping ({error})") from None
    try:
        # Strict JSON is exactly the wanted rule: "3" is no integer and 1 no boolean, but a list may become a tuple.
        return cast(T, _adapter(cast(Any, cls)).validate_json(text))
    except UserError as error:  # of a __post_init__: pydantic files only ValueErrors under their path
        raise ConfigError(f"{source}: {error}") from None
    except ValidationError as error:
        lines = error_lines(cls, error.errors(include_url=False))
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    raise ConfigError("\n  ".join([f"{source}: {count}", *lines]))


@functools.cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _complete(annotation: Any, given: Any, default: Any = None) -> Any:
    """Return what is given of a field, at every depth completed with the field's default where that is of the same type."""
    members, tagged = members_of(annotation)
    if isinstance(given, list) and len(members) == 1 and get_origin(members[0]) in (list, tuple):
        return [_complete(get_args(members[0])[0], item) for item in given]
    if not isinstance(given, Mapping):
        return given
    kind = getattr(default, "type", None)
    if is_config_class(type(default)) and given.get("type", kind) == kind:
        owner: Any = type(default)
        defaults, completed = vars(default), encode(default)
    else:
        members = [member for member in members if not tagged or tag_of(member) == given.get("type")]
        if len(members) != 1 or not is_config_class(members[0]):
            return given
        owner, completed = members[0], {}
        fields = dataclasses.fields(owner)
        defaults = {field.name: field.default_factory() if callable(field.default_factory) else field.default for field in fields}
    return {**completed, **{key: _complete(hints(owner).get(key), item, defaults.get(key)) for key, item in given.items()}}


def error_lines(cls: type, errors: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return one line per wrong path; alternatives of a union share a line, and an error of the whole config has no path."""
    found: dict[str, tuple[list[str], str]] = {}
    for error in errors:
        path, owner = _locate(cls, error["loc"])
        if error["type"] == "unexpected_keyword_argument":
            problem, show_given = _unknown_key(cls, path, owner), True
        else:
            problem, show_given = _problem(error, path, owner)
        problems, _ = found.setdefault(path, ([], f", given {shown(error['input'])}" if show_given else ""))
        if problem not in problems:
            problems.append(problem)
    return [f"{path}{': ' if path else ''}{_join(problems)}{given}" for path, (problems, given) in found.items()]


def _join(problems: Sequence[str]) -> str:
    return " or ".join([*problems[:1], *(problem.removeprefix("should be ") for problem in problems[1:])])


def _problem(error: Mapping[str, Any], path: str, owner: Any) -> tuple[str, bool]:
    """Return what is wrong, and whether the message should show the given value."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return "is required and missing", False
    if kind == "union_tag_not_found":
        tags = sorted(tag for tag in map(tag_of, owner or ()) if tag)
        return f"needs `type`, one of: {', '.join(tags)}", False
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"unknown type `{context['tag']}`{nearest(str(context['tag']), tags)}", False
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"should be {context['expected']}{nearest(str(given), choices, list_all=False)}", True
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return f"must be {range_of(hints(owner)[path.rpartition('.')[2]])}", True
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", error["msg"])), False
    problem = _SHOULD.get(kind) or error["msg"].replace("Input should", "should", 1)
    if kind == "float_type" and str(given).lower() in ("nan", "inf", "-inf", "infinity"):
        problem = "should be a finite number"
    if kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        problem += f" (write {int(given)})"
    return problem, True


def _unknown_key(cls: type, path: str, owner: Any) -> str:
    """Suggest the key that may be meant, written from the top: one of this section, of another, or of another `type`."""
    above, _, name = path.rpartition(".")
    above = f"{above}." if above else ""
    reachable = _reachable(cls)
    if path in reachable:
        return f"unknown key of this type; it needs {reachable[path]}"
    here = [field.name for field in dataclasses.fields(owner)] if owner else []
    namesakes = [key for meant in (name, *_ELSEWHERE.get(name, ())) for key in _named(meant, reachable, above)]
    meant = [*namesakes, *(above + close for close in difflib.get_close_matches(name, here, n=1))]
    if not meant:
        nearest_name = difflib.get_close_matches(name, {key.rpartition(".")[2] for key in reachable}, n=1)
        meant = [key for close in nearest_name for key in _named(close, reachable, above)]
    if not meant:
        return f"unknown key; known: {', '.join(sorted(here))}"
    own = {above + field for field in here}
    said = [f"`{key}`{f' (with {reachable[key]})' if reachable.get(key) and key not in own else ''}" for key in meant]
    return f"unknown key; did you mean {' or '.join(said)}?"


def _named(name: str, reachable: Iterable[str], above: str) -> list[str]:
    """Return the keys whose last part is ``name``: that of the section ``above`` if there is one, else the three highest."""
    keys = sorted((key for key in reachable if key.rpartition(".")[2] == name), key=lambda key: (key.count("."), key))
    return [key for key in keys if above and key == above + name] or keys[:3]


def _reachable(cls: Any, above: str = "") -> dict[str, str]:
    """Return every key that an override can name but `type`, and what must be set too where only some types have it."""
    keys: dict[str, str] = {}
    for name, annotation in hints(cls).items():
        if name == "type":
            continue
        path = above + name
        keys[path] = ""
        sections = [member for member in members_of(annotation)[0] if is_config_class(member)]
        below = {tag_of(section): _reachable(section, f"{path}.") for section in sections}
        for key, needs in (item for section in below.values() for item in section.items()):
            tags = [tag for tag, section in below.items() if key in section]
            choice = " or ".join(f"{path}.type={tag}" for tag in tags) if len(tags) < len(below) else ""
            keys[key] = " and ".join(filter(None, (choice, needs)))
    return keys


def _locate(annotation: Any, loc: Sequence[str | int]) -> tuple[str, Any]:
    """Return the path as the user wrote it (pydantic adds union labels to it) and the config that owns its last key.

    Where the path ends at a tagged union, the second value is the list of its members.
    """
    path, owner = "", None
    for part in loc:
        members, tagged = members_of(annotation)
        if tagged:
            annotation = next((member for member in members if tag_of(member) == part), None)
        elif len(members) > 1:
            inside = [member for member in members if getattr(member, "__name__", None) == part or get_args(member)]
            annotation = inside[0] if inside else None
        elif is_config_class(members[0]):
            owner = members[0]
            path += f".{part}" if path else str(part)
            annotation = hints(owner).get(str(part))
        else:
            path += f"[{part}]" if isinstance(part, int) else f".{part}"
            arguments = get_args(members[0])
            annotation = arguments[-1 if get_origin(members[0]) is dict else 0] if arguments else None
    members, tagged = members_of(annotation)
    return path, members if tagged else owner
