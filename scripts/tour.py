"""``make tour``: the ten places that a stranger to the code looks for first, as file and line.

A place is the name of a definition, which is looked up in the source, so it may move to another file or line. What takes several
functions has several places, in the order in which they are called.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1] / "osler"
TOUR: dict[str, tuple[str, ...]] = {
    "learning-rate schedule": ("lr_scale",),
    "RoPE": ("apply_rope",),
    "KV cache": ("KVCache",),
    "GRPO loss": ("grpo_loss",),
    "packing": ("StreamPacking",),
    "resume": ("find_start", "Loop.restore"),
    "top-p": ("sampling_mask",),
    "exam scoring": ("score_by_generation", "read_answer", "summarise"),
    "confidence interval": ("mean_interval",),
    "alerts": ("RULES",),
}


class Place(NamedTuple):
    """Where a definition stands, and the first sentence of its docstring."""

    path: str
    line: int
    meaning: str


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, int, str]]:
    """Yield name, line and docstring of every class, function, method and module constant."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name, node.lineno, ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not prefix:
            yield node.target.id, node.lineno, ""


def find() -> dict[str, list[Place]]:
    """Return the places of every name of the tour: exactly one each, unless a name has gone or been taken twice."""
    found: dict[str, list[Place]] = {name: [] for names in TOUR.values() for name in names}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module = ast.get_docstring(tree) or ""
        for name, line, docstring in definitions(tree.body):
            if name in found:
                first = (docstring or module).split("\n\n")[0].replace("\n", " ")
                place = Place(path.relative_to(PACKAGE.parent).as_posix(), line, first.split(". ")[0].removesuffix("."))
                found[name].append(place)
    return found


if __name__ == "__main__":
    found = find()
    for topic, names in TOUR.items():
        for place in (place for name in names for place in found[name]):
            print(f"{topic:<23} {f'{place.path}:{place.line}':<32} {place.meaning}")
