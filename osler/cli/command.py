"""The form of a command in the table of ``commands.py``, and how it is called. Heavy modules load only when it is called."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from osler.runtime.errors import UserError

Option = tuple[tuple[str, ...], dict[str, Any]]


def option(*flags: str, **settings: Any) -> Option:
    """Return the arguments of ``ArgumentParser.add_argument`` for an option."""
    return flags, settings


class Command(NamedTuple):
    """A command. ``line`` says what it does, and ``more`` is text for the end of its help.

    ``call`` is the function or, where its import is heavy, ``module:function``. It takes the options by name (as one ``request``
    if the command trains), and returns the exit code or a text to print.
    """

    name: str
    line: str
    example: str
    call: str | Callable[..., int | str]
    options: tuple[Option, ...] = ()
    more: str = ""


def run(command: Command, argv: Sequence[str]) -> int:
    """Call a command's function with the options in ``argv``, and return the exit code."""
    given = vars(parser(command).parse_intermixed_args(argv))
    if "items" in given:
        given["recipe"], given["overrides"] = split_items(given.pop("items"))
    elif "overrides" in given and (recipe := split_items(given["overrides"])[0]) is not None:
        raise UserError(f"`{recipe}`: this command takes no recipe, only key.path=value.")
    if "temperature" in given:
        from osler.config.schema import decode
        from osler.ops.sampling_params import SamplingParams

        sampling = {field.name: given.pop(field.name) for field in fields(SamplingParams) if field.name in given}
        given["sampling"] = decode(SamplingParams, sampling, source="the command line")
    if "branch" in given:
        from osler.plan.actual import keep_plan
        from osler.runs.command import Request

        given = {"request": Request(kind=command.name, at_end=keep_plan, **given)}
    result = function_of(command)(**given)
    if isinstance(result, str):
        print(result)
        return 0
    return result


def function_of(command: Command) -> Callable[..., int | str]:
    """Import the function that a command calls."""
    if not isinstance(command.call, str):
        return command.call
    module, _, name = command.call.partition(":")
    function: Callable[..., int | str] = getattr(importlib.import_module(module), name)
    return function


def parser(command: Command) -> argparse.ArgumentParser:
    """Return the parser of one command."""
    made = argparse.ArgumentParser(
        prog=f"osler {command.name}",
        description=command.line,
        epilog="\n".join([f"example:\n  {command.example}", command.more]).rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flags, settings in command.options:
        made.add_argument(*flags, **settings)
    return made


def split_items(items: Sequence[str]) -> tuple[str | None, list[str]]:
    """Separate the recipe, if there is one, from the overrides, which have an equals sign."""
    recipes = [item for item in items if "=" not in item]
    if len(recipes) > 1:
        raise UserError(f"one recipe at a time, not {' and '.join(recipes)}; fields are changed with key.path=value.")
    return recipes[0] if recipes else None, [item for item in items if "=" in item]
