"""``osler recipes`` and ``osler show``: the list of recipes, and one recipe with every default filled in. Torch-free.

``--explain`` adds a comment to every field. It has the comment that stands after or directly above the field in the
config class, and the choices or the range of the field's type. A section without a comment takes the docstring of its class.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from osler.config.recipe import as_comments, available_recipes, dump_yaml, load_recipe, override
from osler.config.schema import config, decode, encode, hints, members_of, range_of, tagged_members, useless_in
from osler.eval.config import DistillConfig, EvalConfig, config_of
from osler.model.config import ModelConfig, model_in
from osler.pipeline.config import decode_pipeline
from osler.rl.config import GrpoConfig
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig


@config
class ModelFamily:
    """A recipe that is only a model, for others to build on."""

    model: ModelConfig

    def numbers(self) -> dict[str, str]:
        """Return the numbers that follow from the model's shape, at its longest rows."""
        model, seq_len = self.model, self.model.max_seq_len
        return {
            "parameters": f"{model.num_parameters:,}",
            "weights": ", ".join(f"{model.weight_bytes(bits) / 2**20:,.0f} MiB in {name}" for name, bits in FORMATS.items()),
            "FLOPs per token": f"{model.flops_per_token(seq_len):.3g} in training, in rows of {seq_len:,}",
            **model.consequences(),
            "KV cache": f"{model.kv_cache_bytes(1, seq_len):,} bytes for such a row in bf16",
        }


# The config of each `kind` of recipe except pipelines; a recipe without a kind is a model family.
KINDS: dict[str, type[Any]] = {
    "pretrain": TrainConfig,
    "sft": TrainConfig,
    "grpo": GrpoConfig,
}
# Bits of a weight in each format that a checkpoint may have, the scales of a quantised one included.
FORMATS = {"fp32": 32, "bf16": 16, "int8": 8.5, "int4": 4.5}
# The config of each command that runs without a recipe, and its required fields.
WITHOUT_RECIPE: dict[str, tuple[type[Any], Mapping[str, Any]]] = {
    "pretrain": (TrainConfig, {"kind": "pretrain"}),
    "sft": (TrainConfig, {"kind": "sft"}),
    "grpo": (GrpoConfig, {"init_from": "RUN"}),
    "eval": (EvalConfig, {}),
    "distill": (DistillConfig, {"task": {"type": "clinic", "split": "train"}}),
}


def list_recipes() -> str:
    """Return name, parameters and description of every recipe, one line each."""
    rows = {}
    for name, description in available_recipes().items():
        model = model_in(load_recipe(name), name)
        rows[name] = "" if model is None else f"{model.num_parameters:,}", description
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {size:>13}  {description}" for name, (size, description) in rows.items())


def show_recipe(recipe: str | None, overrides: Sequence[str] = (), *, explain: bool = False) -> str:
    """Return a recipe as YAML with every default filled in, and the numbers that follow from it as comments.

    The name of a command may be given instead of a recipe. ``explain`` adds the meaning of each field.
    """
    if recipe is None:
        names = ", ".join(WITHOUT_RECIPE)
        raise UserError(f"which recipe? `osler recipes` lists them; {names} show what a command does without one.")
    if recipe in WITHOUT_RECIPE:
        cls, given = WITHOUT_RECIPE[recipe]
        resolved = config_of(overrides) if cls is EvalConfig else decode(cls, override(given, overrides), source=recipe)
    else:
        resolved = decode_recipe(load_recipe(recipe, overrides), source=recipe)
    text = "\n".join([*explained(resolved), ""]) if explain else dump_yaml(encode(resolved))
    numbers = as_comments(getattr(resolved, "numbers", dict)())
    wrapped = (textwrap.wrap(line, COLUMNS, subsequent_indent=f"#{'':<19}", break_on_hyphens=False) for line in numbers)
    return "\n".join([text, *(line for lines in wrapped for line in lines)])


def decode_recipe(recipe: dict[str, Any], *, source: str = "") -> Any:
    """Decode a recipe by its `kind`, or as a model family when it has no kind."""
    kind = recipe.get("kind")
    if kind == "pipeline":
        return decode_pipeline(recipe, source=source)
    if kind is not None and kind not in KINDS:
        raise UserError(f"{source}: kind {kind!r} is not one of {', '.join(KINDS)}, pipeline.")
    return decode(KINDS[kind] if kind else ModelFamily, recipe, source=source)


COLUMNS = 120  # a longer line has its comment above it


def explained(value: Any, indent: str = "", without: Sequence[str] = ()) -> list[str]:
    """Return the lines of a config as YAML, without the fields ``without``. Comments stand after fields, or above if long."""
    cls: Any = type(value)
    meanings = explanations(cls)
    lines: list[str] = []
    for name, annotation in hints(cls).items():
        if name in without:
            continue
        field = getattr(value, name)
        sections = field if isinstance(field, tuple) else (field,)
        if not sections or not all(map(dataclasses.is_dataclass, sections)):
            text = textwrap.indent(dump_yaml({name: encode(field)}).removesuffix("\n"), indent)
            lines += _commented(text, [meanings[name], _choices(annotation)], indent)
            continue
        lines += _commented(f"{indent}{name}:", [meanings.get(name) or _purpose(type(sections[0])), _choices(annotation)], indent)
        for section in sections:
            lines += [f"{indent}  -"] if sections is field else []
            lines += explained(section, f"{indent}    " if sections is field else f"{indent}  ", useless_in(annotation))
    return lines


def explanations(cls: type) -> dict[str, str]:
    """Return the comment after or directly above each field of a config class, empty where it has none."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(part))
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
        alone = {row for row, token in comments.items() if token.line.lstrip().startswith("#")}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while first - 1 in alone:
                    first -= 1
                rows = range(first, (node.end_lineno or node.lineno) + 1)
                found[node.target.id] = " ".join(comments[row].string.lstrip("# ") for row in rows if row in comments)
    return found


def _purpose(cls: type) -> str:
    """Return the first paragraph of a config class's docstring on one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split()).replace("``", "").removesuffix(".")


def _choices(annotation: Any) -> str:
    """Return the values, the types or the range that a field may have."""
    if tags := tagged_members(annotation):
        return f"type is one of {', '.join(tags)}"
    values = [str(value) for member in members_of(annotation) if get_origin(member) is Literal for value in get_args(member)]
    return f"one of {', '.join(values)}" if len(values) > 1 else range_of(annotation)


def _commented(text: str, comments: list[str], indent: str) -> list[str]:
    """Return the lines of a YAML item with its comment."""
    comment = "; ".join(part for part in comments if part)
    first, *rest = text.split("\n")
    if not comment:
        return [first, *rest]
    one_line = f"{first}  # {comment}"
    if len(one_line) <= COLUMNS and (not rest or first.endswith(":")):
        return [one_line, *rest]
    return [*(f"{indent}# {line}" for line in textwrap.wrap(comment, COLUMNS - len(indent) - 2)), first, *rest]
