"""Configuration: frozen dataclasses, strict decoding, and YAML recipes that build on one another.

A config class stands beside the code it configures and is a plain dataclass, so reading one needs neither torch nor
pydantic; only ``decode`` imports pydantic. Precedence: defaults < bases < recipe < overrides. Mappings merge, lists
replace, and a mapping with another ``type`` replaces the whole mapping, because the fields of the old type mean nothing
to the new one.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from osler.errors import UserError
from osler.yaml12 import load_yaml

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[T], T]:
        """Stand in for ``typing.dataclass_transform``, which Python 3.10 lacks; it only speaks to type checkers."""
        return lambda decorator: decorator


T = TypeVar("T")
RECIPES = Path(__file__).parent / "recipes"


class ConfigError(UserError):
    """A recipe, an override or a mapping that does not describe a valid configuration."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that ``decode`` reads strictly."""
    cls.__pydantic_config__ = {"extra": "forbid", "strict": True}  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class _Tagged:
    """Marks a union of configs told apart by their ``type`` field; pydantic asks it for the schema when it decodes."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic import Field

        members = [member for member in get_args(source) if member is not type(None)]
        return handler(Annotated[source, Field(discriminator="type")] if len(members) > 1 else source)

    def __repr__(self) -> str:
        return "TAGGED"


TAGGED = _Tagged()


# -- decoding ----------------------------------------------------------------------------------------------------------


def decode(cls: type[T], mapping: Mapping[str, Any], *, source: str = "") -> T:
    """Build ``cls`` from a mapping of plain values.

    Types are strict, except that lists become tuples, text becomes a path, and integers are taken where floats are
    asked for. A nested mapping of the same ``type`` as the default value changes only the fields it names. ``source``
    is named in the message. Raises ConfigError with every error of the mapping, one line each.
    """
    from pydantic import ValidationError

    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{source or cls.__name__}: should be a mapping of keys to values, given {_show(mapping)}")
    completed = _complete_type(cls, encode(mapping))
    try:
        text = json.dumps(completed)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source or cls.__name__}: a value is no text, number, list or mapping ({error})") from None
    try:
        # Strict JSON is exactly the wanted rule: "3" is no integer and 1 no boolean, but a list may become a tuple.
        return cast(T, _adapter(cast(Any, cls)).validate_json(text))
    except UserError as error:  # of a __post_init__: pydantic files only ValueErrors under their path
        raise ConfigError(f"{source or cls.__name__}: {error}") from None
    except ValidationError as error:
        lines = _error_lines(cls, error.errors(include_url=False))
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    raise ConfigError("\n  ".join([f"{source or cls.__name__}: {count}", *lines]))


@functools.cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def encode(value: Any) -> Any:
    """Turn a config into plain dicts, lists and scalars that JSON and YAML can hold; ``decode`` is its inverse."""
    if _is_config(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_config_class(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation) and isinstance(annotation, type)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _members(annotation: Any) -> tuple[list[Any], bool]:
    """Return the types that an annotation allows (None left out) and whether they are told apart by ``type``."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        members, tagged = _members(inner)
        return members, tagged or (any(item is TAGGED for item in metadata) and len(members) > 1)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [_members(member) for member in get_args(annotation) if member is not type(None)]
        return [member for members, _ in parts for member in members], any(tagged for _, tagged in parts)
    return [annotation], False


def _tag(cls: Any) -> str | None:
    return str(get_args(_hints(cls)["type"])[0]) if _is_config_class(cls) and "type" in _hints(cls) else None


def _complete_type(annotation: Any, value: Any) -> Any:
    """Fill ``value`` with the default values of the config fields it only partly gives, at every depth."""
    members, tagged = _members(annotation)
    if isinstance(value, Mapping) and tagged:
        members = [member for member in members if _tag(member) == value.get("type")]
    if len(members) != 1:
        return value
    if isinstance(value, Mapping) and _is_config_class(members[0]):
        completed = dict(value)
        for field in dataclasses.fields(members[0]):
            if field.name in value:
                default = field.default_factory() if callable(field.default_factory) else field.default
                item = _complete_value(default, value[field.name])
                completed[field.name] = _complete_type(_hints(members[0])[field.name], item)
        return completed
    if isinstance(value, list) and get_origin(members[0]) in (list, tuple):
        return [_complete_type(get_args(members[0])[0], item) for item in value]
    return value


def _complete_value(default: Any, given: Any) -> Any:
    if not (_is_config(default) and isinstance(given, Mapping)):
        return given
    kind = getattr(default, "type", None)
    if given.get("type", kind) != kind:
        return given
    completed = dict(given)
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        completed[field.name] = _complete_value(value, given[field.name]) if field.name in given else encode(value)
    return completed


# -- error messages ----------------------------------------------------------------------------------------------------

_SHOULD = {
    "int_type": "should be an integer",
    "int_from_float": "should be an integer",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "dataclass_type": "should be a mapping of keys to values",
    "dataclass_exact_type": "should be a mapping of keys to values",
    "model_attributes_type": "should be a mapping of keys to values",
    "dict_type": "should be a mapping of keys to values",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "path_type": "should be a path",
    "none_required": "should be null",
}


def _error_lines(cls: type, errors: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return one line per wrong path; the alternatives of a union that failed together share a line."""
    found: dict[str, tuple[list[str], str]] = {}
    for error in errors:
        path, owner = _locate(cls, error["loc"])
        problem, show_given = _problem(error, owner)
        problems, _ = found.setdefault(path, ([], f", given {_show(error['input'])}" if show_given else ""))
        if problem not in problems:
            problems.append(problem)
    return [f"{path or cls.__name__}: {_join(problems)}{given}" for path, (problems, given) in found.items()]


def _join(problems: Sequence[str]) -> str:
    return " or ".join([*problems[:1], *(problem.removeprefix("should be ") for problem in problems[1:])])


def _problem(error: Mapping[str, Any], owner: Any) -> tuple[str, bool]:
    """Say what is wrong, and whether the given value belongs in the message."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(owner)] if owner else []
        return f"unknown key{_nearest(str(error['loc'][-1]), known)}", True
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return "is required and missing", False
    if kind == "union_tag_not_found":
        tags = sorted(tag for tag in map(_tag, owner or ()) if tag)
        return f"needs `type`, one of: {', '.join(tags)}", False
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"unknown type `{context['tag']}`{_nearest(str(context['tag']), tags)}", False
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"should be {context['expected']}{_nearest(str(given), choices, list_all=False)}", True
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", error["msg"])), False
    problem = _SHOULD.get(kind) or error["msg"].replace("Input should", "should", 1)
    if kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        problem += f" (write {int(given)})"
    return problem, True


def _nearest(name: str, known: Sequence[str], *, list_all: bool = True) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(sorted(known))}" if list_all and known else ""


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _locate(annotation: Any, loc: Sequence[str | int]) -> tuple[str, Any]:
    """Return the path as the user wrote it (pydantic adds union labels to it) and the config that owns its last key.

    Where the path ends at a tagged union, the second value is the list of its members.
    """
    path, owner = "", None
    for part in loc:
        members, tagged = _members(annotation)
        if tagged:
            annotation = next((member for member in members if _tag(member) == part), None)
        elif len(members) > 1:
            inside = [member for member in members if getattr(member, "__name__", None) == part or get_args(member)]
            annotation = inside[0] if inside else None
        elif _is_config_class(members[0]):
            owner = members[0]
            path += f".{part}" if path else str(part)
            annotation = _hints(owner).get(str(part))
        else:
            path += f"[{part}]" if isinstance(part, int) else f".{part}"
            arguments = get_args(members[0])
            annotation = arguments[-1 if get_origin(members[0]) is dict else 0] if arguments else None
    members, tagged = _members(annotation)
    return path, members if tagged else owner


# -- recipes -----------------------------------------------------------------------------------------------------------


def available_recipes() -> dict[str, str]:
    """Return the name and the one-line description of every recipe that ships with Osler, sorted by name."""
    files = {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in RECIPES.rglob("*.yaml")}
    return {name: str(_read(files[name]).get("description", "")) for name in sorted(files)}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return a recipe merged with its bases and with ``key.path=value`` overrides, not decoded.

    A shipped recipe is named as ``osler recipes`` lists it; a name that ends in .yaml or .yml is a file. The keys
    ``base`` and ``description`` belong to the file and are left out. Raises ConfigError for an unknown recipe, invalid
    YAML, a key given twice, a circle of bases and an override that cannot be read.
    """
    merged = _load_file(_find(str(name_or_path), folder=None, user=""), ())
    return merge(merged, parse_overrides(overrides, merged))


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``below`` with ``above`` laid over it; neither is changed."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            same = value.get("type", old.get("type")) == old.get("type")
            value = merge(old, value) if same else value
        merged[key] = value
    return merged


def parse_overrides(overrides: Sequence[str], recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Turn ``a.b=value`` texts, whose values are YAML, into one nested mapping; the last of two equal paths wins.

    They become one mapping before they meet the recipe, so that ``optim.lr=1 optim.type=muon`` means the same in either
    order. Raises ConfigError where a text is malformed or a path leads through something that is no mapping.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override `{override}`: write key.path=value, for example optim.lr=3e-4")
        if not text.strip():
            raise ConfigError(f"override `{override}` has no value: write {path}=null, or {path}='\"\"' for empty text")
        node, below = tree, recipe
        for depth, key in enumerate(keys[:-1]):
            prefix = ".".join(keys[: depth + 1])
            below = below.get(key) if isinstance(below, Mapping) else None
            if isinstance(below, list) or not isinstance(node.setdefault(key, {}), dict):
                raise ConfigError(f"override `{override}`: {prefix} is not a mapping; give {prefix}=... as a whole")
            node = node[key]
        value = load_yaml(text, f"override `{override}`")
        if isinstance(node.get(keys[-1]), dict) and not isinstance(value, dict):
            raise ConfigError(f"override `{override}` contradicts an earlier override of a key below {path}")
        node.update(merge(node, {keys[-1]: value}))
    return tree


def _load_file(path: Path, users: tuple[Path, ...]) -> dict[str, Any]:
    if path in users:
        circle = " → ".join(item.stem for item in [*users[users.index(path) :], path])
        raise ConfigError(f"{path}: recipes may not be their own base ({circle})")
    content = _read(path)
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: `base` should be the name of a recipe or a list of names, given {_show(bases)}")
    content.pop("description", None)
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _load_file(_find(base, folder=path.parent, user=f"{path}: "), (*users, path)))
    return merge(merged, content)


def _find(name: str, *, folder: Path | None, user: str) -> Path:
    """Return the file that a recipe or a base names; ``folder`` is where the recipe that asks for it lies."""
    given = Path(name).expanduser()
    if given.suffix in (".yaml", ".yml"):
        candidates = [(folder or Path()) / given, RECIPES / given]
    else:
        candidates = [RECIPES / f"{name}.yaml", *([folder / f"{name}.yaml"] if folder else [])]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    if given.suffix in (".yaml", ".yml"):
        raise ConfigError(f"{user}there is no recipe file {given}")
    names = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
    raise ConfigError(f"{user}there is no recipe `{name}`{_nearest(name, names)} (a file of yours ends in .yaml)")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values, given {_show(content)}")
    return content
