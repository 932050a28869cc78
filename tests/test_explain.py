"""Every field says what it means, in one place, and what is printed is still the config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

import pytest

from osler.cli import main as cli
from osler.cli.show import COLUMNS, KINDS, WITHOUT_RECIPE, ModelFamily, explained, explanations, show_recipe
from osler.config.recipe import available_recipes, load_yaml
from osler.config.schema import TAGGED, Fraction, config, decode, encode, hints, is_config_class, members_of
from osler.runtime.errors import UserError


@config
class Tea:
    """Leaves in water,
    without milk.

    More about tea.
    """

    type: Literal["tea"] = "tea"
    minutes: Fraction | None = 0.5  # in the water


@config
class Coffee:
    """Beans."""

    type: Literal["coffee"] = "coffee"
    strength: Literal["weak", "strong"] = "weak"  # of the taste


@config
class Breakfast:
    """What there is in the morning."""

    guests: int = 1  # people # not dogs

    # who is hungry, how hungry they are and what they would rather have than that which stands before them on the table,
    # as far as they have said
    wishes: str = "a # b"
    remarks: str = "first line\n\nsecond line: with a colon"
    drink: Annotated[Tea | Coffee, TAGGED] = Tea()
    later: Annotated[Tea | Coffee, TAGGED] | None = None  # after breakfast
    pots: tuple[Coffee, ...] = (Coffee(), Coffee(strength="strong"))  # on the table
    prices: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"bread": 2.5},
    )  # of each thing
    none: tuple[Coffee, ...] = ()  # never


def test_what_is_explained_is_still_the_config():
    breakfast = Breakfast()
    lines = explained(breakfast)
    assert list(explanations(Breakfast)) == [field.name for field in dataclasses.fields(Breakfast)]
    text = "\n".join(lines)
    assert load_yaml(text, "test") == encode(breakfast) and decode(Breakfast, load_yaml(text, "test")) == breakfast
    assert "guests: 1  # people # not dogs" in lines
    assert "drink:  # Leaves in water, without milk; type is one of tea, coffee" in lines
    assert "  minutes: 0.5  # in the water; at least 0 and at most 1" in lines
    assert "later: null  # after breakfast; type is one of tea, coffee" in lines
    assert text.count("    strength: ") == 2 and "    strength: strong  # of the taste; one of weak, strong" in lines
    assert "prices:  # of each thing" in lines and "none: []  # never" in lines
    above = lines.index("wishes: 'a # b'")
    assert lines[above - 2].startswith("# who is hungry") and lines[above - 1].endswith("far as they have said")
    assert all(len(line) <= COLUMNS for line in lines)


@pytest.mark.parametrize("name", [*available_recipes(), *WITHOUT_RECIPE])
def test_every_recipe_and_command_is_explained_and_resolves_to_the_same(name):
    text = show_recipe(name, explain=True)
    assert load_yaml(text, name) == load_yaml(show_recipe(name), name)
    assert max(map(len, text.splitlines())) <= COLUMNS


def classes(annotation: Any) -> Iterator[type]:
    for member in members_of(annotation):
        if is_config_class(member):
            yield member
            for inner in hints(member).values():
                yield from classes(inner)
        else:
            for argument in get_args(member):
                yield from classes(argument)


ALL = {cls for top in (ModelFamily, *KINDS.values(), *(cls for cls, _ in WITHOUT_RECIPE.values())) for cls in classes(top)}


@pytest.mark.parametrize("cls", sorted(ALL, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_every_field_says_what_it_means(cls):
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), f"{cls.__name__} needs a docstring"
    found = explanations(cls)
    for name, annotation in hints(cls).items():
        is_section = any(map(is_config_class, members_of(annotation)))  # explained by the docstring of its class
        assert found[name] or is_section or name == "type", f"{cls.__name__}.{name} needs a comment that says what it means"


def test_the_command_line_explains(capsys):
    assert cli.main(["show", "sft", "data.type=turns", "data.path=cases.jsonl", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "kind: sft" in out and "  thinking_field: null  # the column with the reasoning" in out
    assert cli.main(["show", "eval", "task.type=medqa", "task.path=x.jsonl"]) == 0
    assert "  path: x.jsonl\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="grpo, eval, distill show what a command does"):
        show_recipe(None)
