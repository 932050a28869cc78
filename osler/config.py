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
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

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

# The range of a number is declared once, in its type; others are written out: Annotated[float, Ge(0), Lt(1)].
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]


class ConfigError(UserError):
    """A recipe, an override or a mapping that does not describe a valid configuration."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that ``decode`` reads strictly and that checks the ranges of its numbers.

    Its own ``__post_init__`` comes after that, and raises ValueError for fields that do not fit each other.
    """
    cls.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # type: ignore[attr-defined]
    check_fields_together = getattr(cls, "__post_init__", None)

    def __post_init__(self: T) -> None:
        _check_ranges(self)
        if check_fields_together:
            check_fields_together(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
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


# -- ranges ------------------------------------------------------------------------------------------------------------


_WORDS = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}


def _bounds(annotation: Any) -> list[Any]:
    """Return the bounds in an annotation: ``Ge(1)`` and the like."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return [*_bounds(inner), *(item for item in metadata if type(item) in _WORDS)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [bound for member in get_args(annotation) for bound in _bounds(member)]
    return []


def _limit(bound: Any) -> tuple[str, float]:
    """Return the name of a bound's comparison in ``operator`` and the number to compare with."""
    name = type(bound).__name__.lower()
    return name, getattr(bound, name)


def range_of(annotation: Any) -> str:
    """Return the range of an annotated number in words, as in "at least 0 and below 1"; empty without one."""
    return " and ".join(f"{_WORDS[type(bound)]} {_limit(bound)[1]}" for bound in _bounds(annotation))


def _check_ranges(value: object) -> None:
    """Raise ValueError for a number outside of its range; ``decode`` finds the same through pydantic, at every path."""
    cls: Any = type(value)
    for field, annotation in hints(cls).items():
        number = getattr(value, field)
        limits = map(_limit, _bounds(annotation)) if isinstance(number, (int, float)) else ()
        if not all(getattr(operator, name)(number, limit) for name, limit in limits):
            raise ValueError(f"{field} must be {range_of(annotation)}, given {number}")


# -- decoding ----------------------------------------------------------------------------------------------------------


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
    completed = _complete_type(cls, encode(mapping))
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
        from osler.mistakes import error_lines

        lines = error_lines(cls, error.errors(include_url=False))
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    raise ConfigError("\n  ".join([f"{source}: {count}", *lines]))


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


def is_config_class(annotation: Any) -> bool:
    """Tell a section of a config from a plain value."""
    return dataclasses.is_dataclass(annotation) and isinstance(annotation, type)


@functools.cache
def hints(cls: Any) -> dict[str, Any]:
    """Return the annotations of a config class by field name, the metadata of ``Annotated`` included."""
    return get_type_hints(cls, include_extras=True)


def members_of(annotation: Any) -> tuple[list[Any], bool]:
    """Return the types that an annotation allows (None left out) and whether they are told apart by ``type``."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        members, tagged = members_of(inner)
        return members, tagged or (any(item is TAGGED for item in metadata) and len(members) > 1)
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [members_of(member) for member in get_args(annotation) if member is not type(None)]
        return [member for members, _ in parts for member in members], any(tagged for _, tagged in parts)
    return [annotation], False


def tag_of(cls: Any) -> str | None:
    """Return the ``type`` that chooses a config class in a tagged union; None for one without."""
    return str(get_args(hints(cls)["type"])[0]) if is_config_class(cls) and "type" in hints(cls) else None


def _complete_type(annotation: Any, value: Any) -> Any:
    """Fill ``value`` with the default values of the config fields it only partly gives, at every depth."""
    members, tagged = members_of(annotation)
    if isinstance(value, Mapping) and tagged:
        members = [member for member in members if tag_of(member) == value.get("type")]
    if len(members) != 1:
        return value
    if isinstance(value, Mapping) and is_config_class(members[0]):
        completed = dict(value)
        for field in dataclasses.fields(members[0]):
            if field.name in value:
                default = field.default_factory() if callable(field.default_factory) else field.default
                item = _complete_value(default, value[field.name])
                completed[field.name] = _complete_type(hints(members[0])[field.name], item)
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


def nearest(name: str, known: Sequence[str], *, list_all: bool = True) -> str:
    """Return the end of a message about a name that does not exist: the one that was meant, or all there are."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(sorted(known))}" if list_all and known else ""


def shown(value: Any) -> str:
    """Return a value as a message quotes it, cut to 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
        raise ConfigError(f"{path}: `base` should be the name of a recipe or a list of names, given {shown(bases)}")
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
    raise ConfigError(f"{user}there is no recipe `{name}`{nearest(name, names)} (a file of yours ends in .yaml)")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys to values, given {shown(content)}")
    return content
