"""``osler recipes`` and ``osler show``: the list of recipes, and one of them with every default filled in. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from osler.config.decode import decode
from osler.config.explain import explained
from osler.config.recipe import available_recipes, load_recipe, merge, parse_overrides
from osler.config.schema import config, encode
from osler.config.yaml12 import dump_yaml
from osler.eval.config import EvalConfig
from osler.model.config import ModelConfig
from osler.quickstart.config import QuickstartConfig
from osler.rl.config import GrpoConfig
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig


@config
class ModelFamily:
    """A recipe that is only a model, for others to build on."""

    model: ModelConfig


# The config of each `kind` of recipe; a recipe without a kind is a model family.
KINDS: dict[str, type[Any]] = {
    "pretrain": TrainConfig,
    "sft": TrainConfig,
    "grpo": GrpoConfig,
    "quickstart": QuickstartConfig,
}
# The config of each command that runs without a recipe, and the fields that it cannot do without.
WITHOUT_RECIPE: dict[str, tuple[type[Any], Mapping[str, Any]]] = {
    "pretrain": (TrainConfig, {"kind": "pretrain"}),
    "sft": (TrainConfig, {"kind": "sft"}),
    "grpo": (GrpoConfig, {"init_from": "RUN"}),
    "eval": (EvalConfig, {}),
}


def list_recipes() -> str:
    """Return name, parameters and description of every recipe, one line each."""
    rows = []
    for name, description in available_recipes().items():
        model = load_recipe(name).get("model")
        size = f"{decode(ModelConfig, model, source=name).num_parameters:,}" if model else ""
        rows.append((name, size, description))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {size:>13}  {description}" for name, size, description in rows)


def show_recipe(recipe: str | None, overrides: Sequence[str] = (), *, explain: bool = False) -> str:
    """Return a recipe as YAML with every default filled in, and the numbers that follow from it as comments.

    Instead of a recipe the name of a command may be given; ``explain`` adds what each field means.
    """
    if recipe is None:
        names = ", ".join(WITHOUT_RECIPE)
        raise UserError(f"which recipe? `osler recipes` lists them; {names} show what a command does without one.")
    if recipe in WITHOUT_RECIPE:
        cls, given = WITHOUT_RECIPE[recipe]
        resolved = decode(cls, merge(given, parse_overrides(overrides)), source=recipe)
    else:
        resolved = decode_recipe(load_recipe(recipe, overrides), source=recipe)
    text = "\n".join([*explained(resolved), ""]) if explain else dump_yaml(encode(resolved))
    return "\n".join([text, *(f"# {name}: {value:,}" for name, value in derived(resolved).items())])


def decode_recipe(recipe: dict[str, Any], *, source: str = "") -> Any:
    """Decode a recipe as what its `kind` says it is, or as a model family when it has none."""
    kind = recipe.get("kind")
    if kind is not None and kind not in KINDS:
        raise UserError(f"{source}: kind {kind!r} is not one of {', '.join(KINDS)}.")
    return decode(KINDS[kind] if kind else ModelFamily, recipe, source=source)


def derived(resolved: Any) -> dict[str, int]:
    """Return the numbers that follow from a decoded recipe, each with its name and unit.

    Nothing follows from the section ``model`` when there is ``init_from``, which replaces it; ``--dry-run`` reads the checkpoint.
    """
    numbers: dict[str, int] = {}
    model = getattr(resolved, "model", None) if getattr(resolved, "init_from", None) is None else None
    if isinstance(model, ModelConfig):
        seq_len = getattr(resolved, "seq_len", model.max_seq_len)
        numbers["parameters"] = model.num_parameters
        numbers[f"training FLOPs per token at seq_len {seq_len}"] = model.flops_per_token(seq_len)
        row = f"bytes of KV cache for one row of {model.max_seq_len} tokens in bf16"
        numbers[row] = model.kv_cache_bytes(1, model.max_seq_len)
    if isinstance(resolved, TrainConfig):
        numbers["optimizer steps"] = resolved.total_steps
        if isinstance(model, ModelConfig):
            numbers["training FLOPs"] = resolved.training_flops(model)
    if isinstance(resolved, GrpoConfig):
        numbers["completions per step"] = resolved.algorithm.completions_per_step
        numbers["completion tokens at most"] = resolved.steps * resolved.budget_tokens_per_step
    return numbers
