"""YAML as people expect it: scalars as in YAML 1.2, and an error for a key that is given twice.

PyYAML follows YAML 1.1, which reads ``1e-3`` as text, ``no`` as false, ``010`` as 8 and ``1:30`` as 90. It keeps the last of two
equal keys. The rules here are those of the 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema), and ``_`` may stand
between digits.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from osler.runtime.errors import UserError


def load_yaml(text: str, source: str) -> Any:
    """Parse one YAML document. Raises UserError, in which ``source`` names the text, when it is not valid."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None


def dump_yaml(value: Any) -> str:
    """Write plain dicts, lists and scalars as YAML, keys in the order given; ``load_yaml`` reads it back."""
    import yaml

    return yaml.dump(value, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=100)


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML reads the class attribute)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str) or key in seen:
                    problem = f"key {key!r} is {'given twice' if isinstance(key, str) else 'not text'}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

    def integer(loader: Any, node: Any) -> int:
        digits = loader.construct_scalar(node).replace("_", "")
        return int(digits, 16 if "x" in digits else 10)

    def resolve(tag: str, pattern: str, first: str) -> None:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})$"), list(first))

    resolve("null", "~|null|Null|NULL|", "~nN\0")
    Loader.yaml_implicit_resolvers[""] = Loader.yaml_implicit_resolvers.pop("\0")  # an empty value has no first letter
    resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
    resolve("int", "[-+]?(?:0x[0-9a-fA-F]+|[0-9][0-9_]*)", "-+0123456789")
    resolve("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789")
    resolve("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.")
    Loader.add_constructor("tag:yaml.org,2002:int", integer)
    return Loader


@functools.cache
def _dumper() -> Any:
    """Return a safe YAML dumper that writes no aliases and quotes what YAML 1.1 or 1.2 would not read as text."""
    import yaml

    ours, theirs = _loader().yaml_implicit_resolvers, yaml.SafeDumper.yaml_implicit_resolvers

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML reads the class attribute)
            first: [*theirs.get(first, []), *ours.get(first, [])] for first in {*ours, *theirs}
        }

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def represent_text(self, text: str) -> Any:
            # PyYAML loses these three line breaks in any style but double quotes.
            style = '"' if re.search("[\x85\u2028\u2029]", text) else None
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, Dumper.represent_text)
    return Dumper
