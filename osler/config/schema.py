"""Config classes: frozen dataclasses that say which types, choices and ranges their fields have.

A config class is in the package that it configures, and importing one needs neither torch nor pydantic. ``decode`` fills one from
a mapping, which ``recipe.py`` reads from files and the command line. If the mapping is wrong, pydantic finds the errors, and
``decode`` lists them: one line for each, with the path as the user wrote it, what is wrong there, and what may be meant.
"""

import dataclasses
import difflib
import functools
import json
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt  # noqa: F401 - configs import them from here
from typing_extensions import dataclass_transform

from osler.runtime.errors import UserError

T = TypeVar("T")

# The range of a number is declared once, in its type. Ranges without a name are written out: Annotated[float, Ge(0), Lt(1)].
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
MOST_ERRORS, MOST_LINES = 1000, 20  # of a mapping: those that are looked at, and the lines of a message, which a person reads
TOO_DEEP = "lists or mappings are nested too deeply"
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # every generator takes it, also after a small number was added to it


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that ``decode`` reads strictly and that checks the ranges of its numbers.

    A number out of its range raises ValueError; ``decode`` lists the same error, found by pydantic. The class's own
    ``__post_init__`` runs after these checks, and raises ValueError for fields that do not fit each other.
    """
    cls.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # type: ignore[attr-defined]
    check_fields_together = getattr(cls, "__post_init__", None)

    def __post_init__(self: T) -> None:
        for field, annotation in hints(cast(Any, type(self))).items():
            number = getattr(self, field)
            bounds = _bounds(annotation) if isinstance(number, (int, float)) else []
            if not all(getattr(operator, name)(number, limit) for name, limit in bounds):
                raise ValueError(f"{field} must be {range_of(annotation)}, given {number}")
        if check_fields_together:
            check_fields_together(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class Without(NamedTuple):
    """Mark a list of sections that do not use some of their fields; those fields are not shown."""

    fields: tuple[str, ...]


class _Tagged:
    """Mark a union of configs that differ in their ``type`` field; pydantic asks the mark for the union's schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic import Field

        return handler(Annotated[source, Field(discriminator="type")])


TAGGED = _Tagged()


_WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # keys are names of `operator`


def is_config_class(annotation: Any) -> bool:
    """Return whether an annotation is a config class; a field with it is a section, any other a plain value."""
    return dataclasses.is_dataclass(annotation) and isinstance(annotation, type)


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """Return the annotations of a config class by field name, the metadata of ``Annotated`` included."""
    return get_type_hints(cls, include_extras=True)


def members_of(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, None left out."""
    if get_origin(annotation) is Annotated:
        return members_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) if part is not type(None) for member in members_of(part)]
    return [annotation]


def tagged_members(annotation: Any) -> dict[str, Any]:
    """Return the config classes of a union by the ``type`` that chooses each; empty for anything else."""
    members = members_of(annotation)
    if len(members) < 2 or not all(map(is_config_class, members)):
        return {}
    return {get_args(hints(member)["type"])[0]: member for member in members}


def useless_in(annotation: Any) -> tuple[str, ...]:
    """Return the fields that the sections in a list do not use."""
    metadata = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((item.fields for item in metadata if isinstance(item, Without)), ())


def _bounds(annotation: Any) -> list[tuple[str, float]]:
    """Return the bounds in an annotation, such as ("ge", 1)."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return [*_bounds(inner), *((name, getattr(item, name)) for item in metadata for name in _WORDS if hasattr(item, name))]
    if get_origin(annotation) in (Union, types.UnionType):
        return [bound for member in get_args(annotation) for bound in _bounds(member)]
    return []


def range_of(annotation: Any) -> str:
    """Return the range of an annotated number in words, as in "at least 0 and below 1"; empty without one."""
    return " and ".join(f"{_WORDS[name]} {limit}" for name, limit in _bounds(annotation))


def encode(value: Any, *, defaults: bool = True) -> Any:
    """Turn a config into plain dicts, lists and scalars that JSON and YAML can hold; ``decode`` is its inverse.

    Fields that ``Without`` marks are left out and, without ``defaults``, fields that have their default, except the type.
    """
    if is_config_class(type(value)):
        given = {field: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        out = {
            field.name: encode(item, defaults=defaults)
            for field, item in given.items()
            if defaults or field.name == "type" or item != field.default
        }
        for name, annotation in hints(cast(Any, type(value))).items():
            if name in out and (useless := useless_in(annotation)):
                out[name] = [{key: item for key, item in section.items() if key not in useless} for section in out[name]]
        return out
    if isinstance(value, Mapping):
        return {key: encode(item, defaults=defaults) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, defaults=defaults) for item in value]
    return str(value) if isinstance(value, Path) else value


def decode(cls: type[T], mapping: Mapping[str, Any], *, source: str = "") -> T:
    """Build ``cls`` from a mapping of plain values.

    Types are strict, except that lists become tuples, text becomes a path, and integers are taken where floats are
    asked for. A nested mapping of the same ``type`` as the default value changes only the fields it names. ``source``
    is named in the message. Raises UserError with the errors of the mapping, one line each, at most ``MOST_LINES``.
    """
    from pydantic import ValidationError

    source = source or "the configuration"
    if not isinstance(mapping, Mapping):
        raise UserError(f"{source}: should be a mapping of keys to values, given {shown(mapping)}")
    try:
        text = json.dumps(_complete(cls, encode(mapping)))
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: a value is no text, number, list or mapping ({error})") from None
    except RecursionError:
        raise UserError(f"{source}: {TOO_DEEP}") from None
    try:
        # Strict JSON is exactly the wanted rule: "3" is no integer and 1 no boolean, but a list may become a tuple.
        return cast(T, _adapter(cast(Any, cls)).validate_json(text))
    except UserError as error:  # raised by a __post_init__; pydantic collects only ValueErrors
        raise UserError(f"{source}: {error}") from None
    except ValidationError as error:
        found = error.errors(include_url=False)[:MOST_ERRORS]
        if found[0]["type"] == "json_invalid":  # the JSON was made above, so it can only be too deep for pydantic
            raise UserError(f"{source}: {TOO_DEEP}") from None
        lines = _error_lines(cls, found)
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    if len(lines) > MOST_LINES:
        count, lines = f"more than {MOST_LINES} errors, the first of which are", lines[:MOST_LINES]
    raise UserError("\n  ".join([f"{source}: {count}", *lines]))


def json_schema(cls: Any) -> dict[str, Any]:
    """Return what ``decode`` takes as a JSON schema, whose parts are in ``$defs`` and are named as OpenAPI's components."""
    schema: dict[str, Any] = _adapter(cls).json_schema(ref_template="#/components/schemas/{model}")
    return schema


@functools.cache
def _adapter(cls: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _complete(annotation: Any, given: Any, default: Any = None) -> Any:
    """Return a field's given value, completed at every depth from the default if both have the same ``type``."""
    members = members_of(annotation)
    if isinstance(given, list) and len(members) == 1 and get_origin(members[0]) in (list, tuple):
        return [_complete(get_args(members[0])[0], item) for item in given]
    if not isinstance(given, Mapping):
        return given
    kind = getattr(default, "type", None)
    if is_config_class(type(default)) and given.get("type", kind) == kind:
        owner: Any = type(default)
        defaults, completed = vars(default), encode(default)
    else:
        owner = tagged_members(annotation).get(str(given.get("type")), members[0] if len(members) == 1 else None)
        if not is_config_class(owner):
            return given
        fields, completed = dataclasses.fields(owner), {}
        defaults = {field.name: field.default_factory() if callable(field.default_factory) else field.default for field in fields}
    return {**completed, **{key: _complete(hints(owner).get(key), item, defaults.get(key)) for key, item in given.items()}}


_SHOULD = {
    "int_type": "should be an integer",
    "int_from_float": "should be an integer",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "string_type": "should be text",
    "path_type": "should be a path",
    "none_required": "should be null",
    **dict.fromkeys(("tuple_type", "list_type"), "should be a list"),
    **dict.fromkeys(("dataclass_type", "dataclass_exact_type", "dict_type"), "should be a mapping of keys to values"),
}

# Names that other libraries use, and what Osler calls the same thing or uses in its place.
_ELSEWHERE = {
    "learning_rate": ("lr",),
    "batch_size": ("batch_tokens", "prompts_per_step"),
    "warmup_steps": ("warmup_tokens",),
    "n_layer": ("num_layers",),
    **dict.fromkeys(("epochs", "num_train_epochs", "max_steps"), ("total_tokens", "steps")),
    **dict.fromkeys(("block_size", "context_length"), ("seq_len",)),
}


def _error_lines(cls: type, errors: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return one line per wrong path; alternatives of a union share a line, and an error of the whole config has no path."""
    found: dict[str, str] = {}
    given: dict[str, str] = {}
    for error in errors:
        path, annotation, owner = _locate(cls, error["loc"])
        if error["type"] == "unexpected_keyword_argument":
            problem, show_given = _unknown_key(cls, path, owner), True
        else:
            problem, show_given = _problem(error, annotation)
        if path not in found:
            found[path], given[path] = problem, f", given {shown(error['input'])}" if show_given else ""
        elif problem not in found[path]:
            found[path] += f" or {problem.removeprefix('should be ')}"
    return [f"{path}{': ' if path else ''}{problem}{given[path]}" for path, problem in found.items()]


def _problem(error: Mapping[str, Any], annotation: Any) -> tuple[str, bool]:
    """Return what is wrong, and whether the message should show the given value."""
    kind, given, context = error["type"], error["input"], error.get("ctx", {})
    tags = sorted(tagged_members(annotation))
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return "is required and missing", False
    if kind == "union_tag_not_found":
        return f"needs `type`, one of: {', '.join(tags)}", False
    if kind == "union_tag_invalid":
        return f"unknown type `{context['tag']}`{nearest(str(context['tag']), tags)}", False
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"should be {context['expected']}{nearest(str(given), choices, list_all=False)}", True
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return f"must be {range_of(annotation) or ' and '.join(f'{_WORDS[name]} {context[name]}' for name in context)}", True
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", error["msg"])), False
    problem = _SHOULD.get(kind) or error["msg"].replace("Input should", "should", 1)
    if kind == "float_type" and str(given).lower() in ("nan", "inf", "-inf", "infinity"):
        problem = "should be a finite number"
    if kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        problem += f" (write {int(given)})"
    return problem, True


def _unknown_key(cls: type, path: str, owner: Any) -> str:
    """Return the message about an unknown key: which keys may be meant, as full paths, or else the keys of its section."""
    section, _, name = path.rpartition(".")
    keys = _reachable(cls)
    if path in keys:
        return f"unknown key of this type; it needs {keys[path]}"
    above = f"{section}." if section else ""
    keys |= {above + field: "" for field in hints(owner)}
    meant = [key for word in (name, *_ELSEWHERE.get(name, ())) for key in _named(word, keys, above)]
    meant += [above + close for close in difflib.get_close_matches(name, hints(owner), n=1)]
    if not meant:
        close = difflib.get_close_matches(name, {key.rpartition(".")[2] for key in keys}, n=1)
        meant = _named(close[0], keys, above) if close else []
    if not meant:
        return f"unknown key; known: {', '.join(sorted(hints(owner)))}"
    said = [f"`{key}` (with {keys[key]})" if keys[key] else f"`{key}`" for key in meant]
    return f"unknown key; did you mean {' or '.join(said)}?"


def _named(name: str, keys: Iterable[str], above: str) -> list[str]:
    """Return the key ``name`` of the section ``above`` if there is one, else up to three keys that end so, least nested first."""
    found = sorted((key for key in keys if key.rpartition(".")[2] == name), key=lambda key: (key.count("."), key))
    return [above + name] if above + name in found else found[:3]


def _reachable(cls: Any, above: str = "") -> dict[str, str]:
    """Return every key but `type` that an override can name, with the settings that a key of only some types needs."""
    keys: dict[str, str] = {}
    for name, annotation in hints(cls).items():
        if name == "type":
            continue
        path = above + name
        keys[path] = ""
        tagged = tagged_members(annotation)
        sections = tagged or {member.__name__: member for member in members_of(annotation) if is_config_class(member)}
        below = {tag: _reachable(section, f"{path}.") for tag, section in sections.items()}
        for key, needs in (item for section in below.values() for item in section.items()):
            tags = [tag for tag, section in below.items() if key in section]
            choice = " or ".join(f"{path}.type={tag}" for tag in tags) if len(tags) < len(below) else ""
            keys[key] = " and ".join(filter(None, (choice, needs)))
    return keys


def _locate(annotation: Any, loc: Sequence[str | int]) -> tuple[str, Any, Any]:
    """Return where an error is: the path as the user wrote it, the annotation there, and the config class that has the field.

    ``loc`` is pydantic's path, which also has labels of unions.
    """
    path, owner = "", None
    for part in loc:
        members = members_of(annotation)
        if tagged := tagged_members(annotation):
            annotation = tagged.get(str(part))
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
    return path, annotation, owner


def nearest(name: str, known: Sequence[str], *, list_all: bool = True) -> str:
    """Return the end of a message about a name that does not exist: the name that may be meant, else with ``list_all`` all."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(sorted(known))}" if list_all and known else ""


def shown(value: Any) -> str:
    """Return a value as a message quotes it, cut to 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
