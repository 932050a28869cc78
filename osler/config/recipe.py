"""Recipes: YAML files that build on one another, changed by ``key.path=value`` on the command line.

Precedence: bases < recipe < overrides. Mappings merge, lists replace, and a mapping with another ``type`` replaces the whole
mapping, because the fields of the old type mean nothing to the new one.

Scalars are those of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema) except octal numbers, with ``_``
allowed between digits. A key that is given twice is an error. PyYAML follows YAML 1.1: it reads ``1e-3`` as text, ``no`` as
false, ``010`` as 8 and ``1:30`` as 90, and keeps the last of two equal keys.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from osler.config.schema import encode, nearest, shown
from osler.runtime.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"
OF_THE_FILE = ("description", "meant_for")  # keys that say something about a recipe and configure nothing
_KEY = re.compile(r"\[[0-9]+\]|[^.\[\]]+")
_PATH = re.compile(r"[^.\[\]]+(?:\[[0-9]+\]|\.[^.\[\]]+)*")
_SCALARS = {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?(?:0x[0-9a-fA-F]+|[0-9][0-9_]*)",
    "float": r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


def available_recipes() -> dict[str, str]:
    """Return the name and the one-line description of every recipe that ships with Osler, sorted by name."""
    return {name: str(_read(path).get("description", "")) for name, path in _shipped().items()}


def _shipped() -> dict[str, Path]:
    return dict(sorted((path.relative_to(RECIPES).with_suffix("").as_posix(), path) for path in RECIPES.rglob("*.yaml")))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), *, others: Iterable[str] = ()) -> dict[str, Any]:
    """Return a recipe merged with its bases and with ``key.path=value`` overrides, as plain dicts that are not checked yet.

    A shipped recipe is named as ``osler recipes`` lists it; a name that ends in .yaml or .yml is a file. The keys ``base``,
    ``description`` and ``meant_for`` belong to the file and are left out. Raises UserError for invalid YAML, a key given twice, a
    circle of bases, an override that cannot be read, and an unknown recipe; this last error also proposes the names ``others``.
    """
    return override(_load_file(_find(str(name_or_path), others=others), ()), overrides)


def meant_for(name_or_path: str) -> dict[str, Any]:
    """Return the hardware that a recipe is meant for: ``gpu``, and perhaps ``gpus`` and ``hours``; {} where it does not say."""
    return dict(_read(_find(name_or_path)).get("meant_for", {}))


def run_name(recipe: str, kind: str) -> str:
    """Return the name of a recipe's run, unless --run gives one: ``usmle-2day-grpo`` for ``usmle-2day/grpo``."""
    name = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")
    return name if name.endswith(f"-{kind}") else f"{name}-{kind}"


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


def difference(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``merge`` has to lay over ``below`` to make ``above``, which has its keys and perhaps more."""
    changed: dict[str, Any] = {}
    for key, value in above.items():
        old = below.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and old.get("type") == value.get("type"):
            changed |= {key: inner} if (inner := difference(old, value)) else {}
        elif key not in below or old != value:
            changed[key] = value
    return changed


def override(
    recipe: Mapping[str, Any], overrides: Sequence[str], sections: Mapping[str, Callable[[Any], Any]] | None = None
) -> dict[str, Any]:
    """Return a recipe changed by ``a.b=value`` texts, whose values are YAML; ``a[0]`` is the first element of a list.

    Whatever their order, a section is set before the keys in it and a ``type`` before the fields beside it, so that
    ``optim.lr=1 optim.type=muon`` means the same in either order; the last of two equal paths wins. ``sections`` read the values
    of some first keys, such as the text of an exam, so that further overrides change their fields. Raises UserError where a text
    is malformed, or a path leads through something that is neither a mapping nor a list, or to an element that is not there.
    """
    given = []
    for text in overrides:
        path, equals, value = text.partition("=")
        path = path.strip()
        if not equals or not _PATH.fullmatch(path):
            raise UserError(f"override `{text}`: write key.path=value, for example optim.lr=3e-4 or data.sources[0].weight=2")
        if not value.strip():
            raise UserError(f"override `{text}` has no value: write {path}=null, or {path}='\"\"' for empty text")
        read = (sections or {}).get(path, lambda value: value)
        given.append((_KEY.findall(path), read(load_yaml(value, f"override `{text}`")), text))
    changed: dict[str, Any] = encode(recipe)
    for keys, value, text in sorted(given, key=lambda one: (len(one[0]), one[0][-1] != "type")):
        try:
            _set(changed, keys, value)
        except ValueError as error:
            raise UserError(f"override `{text}`: {error}") from None
    return changed


def _set(node: Any, keys: Sequence[str], value: Any) -> None:
    """Lay a value over what a config has at a path, and make mappings that are missing; raises ValueError for a wrong path."""
    place = ""
    for number, name in enumerate(keys, 1):
        key: Any = int(name[1:-1]) if name.startswith("[") else name
        if isinstance(key, int) and not isinstance(node, list):
            raise ValueError(f"{place} is {'no list' if node else 'not given'} here; give {place}=[...] as a whole")
        if isinstance(key, int) and key >= len(node):
            raise ValueError(f"{place} has no element [{key}]; it has {len(node)}, counted from [0]")
        if isinstance(key, str) and isinstance(node, list):
            raise ValueError(f"{place} is a list: name an element, as in {place}[0], or give {place}=[...] as a whole")
        if isinstance(key, str) and not isinstance(node, dict):
            example = f"{place}='{{type: NAME, {name}: VALUE}}'"
            raise ValueError(f"{place} is not a mapping; give {place}=... as a whole, such as {example}")
        old = node[key] if isinstance(key, int) else node.get(key)
        if number == len(keys):
            if key == "type" and old != value:
                node.clear()
            node[key] = merge({name: old}, {name: value})[name]  # merges mappings, replaces anything else
        elif old is None:
            node[key] = {}
        place += name if isinstance(key, int) else f"{'.' * bool(place)}{name}"
        node = node[key]


def _load_file(path: Path, users: tuple[Path, ...]) -> dict[str, Any]:
    """Return the recipe in a file, laid over its bases; ``users`` are the recipes that are built on it, outermost first."""
    if path in users:
        circle = " → ".join(item.stem for item in [*users[users.index(path) :], path])
        raise UserError(f"{path}: recipes may not be their own base ({circle})")
    content = _read(path)
    for key in OF_THE_FILE:
        content.pop(key, None)
    return _laid_over_bases(content, path, (*users, path))


def _laid_over_bases(content: Mapping[str, Any], path: Path, users: tuple[Path, ...]) -> dict[str, Any]:
    """Return a recipe, or a section of one such as a stage of a pipeline, laid over its bases."""
    bases = content.get("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: `base` should be the name of a recipe or a list of names, given {shown(bases)}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _load_file(_find(base, folder=path.parent, user=f"{path}: "), users))
    own = {key: value for key, value in content.items() if key != "base"}
    has_base = [key for key, value in own.items() if isinstance(value, Mapping) and "base" in value]
    return merge(merged, own | {key: _laid_over_bases(own[key], path, users) for key in has_base})


def _find(name: str, *, folder: Path | None = None, user: str = "", others: Iterable[str] = ()) -> Path:
    """Return the file of the recipe or base called ``name``.

    ``folder`` is the folder of the recipe that asks for it; error messages begin with ``user``.
    """
    given = Path(name).expanduser()
    is_file_name = given.suffix in (".yaml", ".yml")
    places = [(folder or Path()) / given] if is_file_name else [RECIPES / f"{name}.yaml", (folder or RECIPES) / f"{name}.yaml"]
    for place in places:
        if place.is_file():
            return place.resolve()
    if is_file_name:
        shipped = f"; Osler's own recipe has no ending: `{given.with_suffix('')}`" if (RECIPES / given).is_file() else ""
        raise UserError(f"{user}there is no recipe file {given}{shipped}")
    if given.exists():
        if (given / "config.yaml").is_file():
            raise UserError(f"{user}{name} is a run, not a recipe; its recipe is {given / 'config.yaml'}")
        kind = "folder" if given.is_dir() else "file"
        raise UserError(f"{user}{name} is a {kind}, not a recipe; to train on it, give data.type=files data.path={name}")
    if name.startswith((".", "/", "~")):
        raise UserError(f"{user}there is no file or folder {name}; to train on your text, give data.type=files data.path=PATH")
    known, what = [*_shipped(), *others], "recipe or source" if others else "recipe"
    raise UserError(f"{user}there is no {what} `{name}`{nearest(name, known)} (give your own recipe file with its ending .yaml)")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, given {shown(content)}")
    return content


def load_yaml(text: str, source: str) -> Any:
    """Parse one YAML document. Raises UserError, in which ``source`` names the text, when it is not valid."""
    import yaml

    try:
        return yaml.load(text, Loader=_yaml_classes()[0])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None


def dump_yaml(value: Any) -> str:
    """Write plain dicts, lists and scalars as YAML, keys in the order given; ``load_yaml`` reads it back."""
    import yaml

    return yaml.dump(value, Dumper=_yaml_classes()[1], sort_keys=False, allow_unicode=True, width=100)


def as_comments(numbers: Mapping[str, str]) -> list[str]:
    """Return derived numbers as comments, to be printed below a config."""
    return [f"# {name:<18}{value}" for name, value in numbers.items()]


@functools.cache
def _yaml_classes() -> tuple[Any, Any]:
    """Return a loader by the rules of this module, and a dumper that quotes texts that YAML would take for something else."""
    import yaml

    resolvers = [(f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})$")) for name, pattern in _SCALARS.items()]

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {None: resolvers}  # noqa: RUF012 (PyYAML reads the class attribute)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str) or key in seen:
                    problem = f"key {key!r} is {'given twice' if isinstance(key, str) else 'not text'}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

        def construct_integer(self, node: Any) -> int:
            digits = self.construct_scalar(node).replace("_", "")
            return int(digits, 16 if "x" in digits else 10)

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: resolvers}  # noqa: RUF012

        def ignore_aliases(self, data: Any) -> bool:
            return True

        def represent_text(self, text: str) -> Any:
            # PyYAML loses these three line breaks in any style but double quotes.
            style = '"' if re.search("[\x85\u2028\u2029]", text) else "|" if "\n" in text else None
            return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_integer)
    Dumper.add_representer(str, Dumper.represent_text)
    return Loader, Dumper
