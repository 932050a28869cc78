"""Recipes: YAML files that build on one another, changed by ``key.path=value`` on the command line.

Precedence: bases < recipe < overrides. Mappings merge, lists replace, and a mapping with another ``type`` replaces the whole
mapping, because the fields of the old type mean nothing to the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from osler.config.schema import ConfigError, nearest, shown
from osler.config.yaml12 import load_yaml

RECIPES = Path(__file__).parents[1] / "recipes"


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
        candidates = [(folder or Path()) / given]
    else:
        candidates = [RECIPES / f"{name}.yaml", *([folder / f"{name}.yaml"] if folder else [])]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    if given.suffix in (".yaml", ".yml"):
        shipped = f"; the recipe that ships with Osler is `{given.with_suffix('')}`" if (RECIPES / given).is_file() else ""
        raise ConfigError(f"{user}there is no recipe file {given}{shipped}")
    if given.exists():
        kind = "folder" if given.is_dir() else "file"
        raise ConfigError(f"{user}{name} is no recipe but a {kind}; to train on it: data.type=files data.path={name}")
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"{user}there is no file or folder {name}; text to train on: data.type=files data.path=PATH")
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
