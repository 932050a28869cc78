"""Config classes: frozen dataclasses that say which types, choices and ranges their fields have.

A config class stands beside the code it configures, and reading one needs neither torch nor pydantic. ``decode.py`` fills
one from a mapping, ``recipe.py`` reads the mapping from files and the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt  # noqa: F401 - configs import them from here
from typing_extensions import dataclass_transform

from osler.runtime.errors import UserError

T = TypeVar("T")

# The range of a number is declared once, in its type; others are written out: Annotated[float, Ge(0), Lt(1)].
PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # every generator takes it, and a little more when a constant is added


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
    """Mark a union of configs that are told apart by their ``type`` field; pydantic asks it for the schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic import Field

        members = [member for member in get_args(source) if member is not type(None)]
        return handler(Annotated[source, Field(discriminator="type")] if len(members) > 1 else source)


TAGGED = _Tagged()
_WORDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # as Ge(1).ge and operator.ge are named


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


def _check_ranges(value: object) -> None:
    """Raise ValueError for a number outside of its range; ``decode`` finds the same through pydantic, at every path."""
    cls: Any = type(value)
    for field, annotation in hints(cls).items():
        number = getattr(value, field)
        bounds = _bounds(annotation) if isinstance(number, (int, float)) else []
        if not all(getattr(operator, name)(number, limit) for name, limit in bounds):
            raise ValueError(f"{field} must be {range_of(annotation)}, given {number}")


def encode(value: Any) -> Any:
    """Turn a config into plain dicts, lists and scalars that JSON and YAML can hold; ``decode`` is its inverse."""
    if is_config_class(type(value)):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, Path) else value


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
