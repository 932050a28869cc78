"""What a sum of money buys: for each model family the tokens that it pays for, and which of them the scaling fit likes best.

Torch-free. Without a fit (``scaling.py``) nothing is chosen. The shapes are those of the shipped families; data, batch and
schedule are those of a recipe.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from osler.config.recipe import available_recipes, difference, dump_yaml, load_recipe, merge, override
from osler.config.schema import decode, encode
from osler.model.config import ModelConfig
from osler.parallel.config import DdpConfig, NoParallelConfig
from osler.plan.estimate import Estimate, exact
from osler.plan.plan import HOUR, Plan, Where
from osler.plan.planner import plan_of
from osler.plan.scaling import Fit, counted_parameters, read_fit, tells
from osler.plan.words import money, wrapped
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig

DATA_RECIPE = "osler-2day"  # whose data, batch and schedule a budget takes when no recipe is named


@dataclass(frozen=True)
class Offer:
    """A model family, the tokens that the money pays for, and the bits per byte that the fit expects (None: no fit)."""

    family: str
    model: ModelConfig
    plan: Plan
    tokens: Estimate
    bits_per_byte: Estimate | None
    beyond: float  # times as far as the runs of the fit


@functools.cache
def families() -> Mapping[str, ModelConfig]:
    """Return the shipped model families, the smallest first."""
    found = {name: load_recipe(name) for name in available_recipes()}
    shapes = {name: recipe["model"] for name, recipe in found.items() if list(recipe) == ["model"]}
    models = {name: decode(ModelConfig, shape, source=name) for name, shape in shapes.items()}
    return dict(sorted(models.items(), key=lambda one: one[1].num_parameters))


def seconds_for(usd: float, where: Where) -> Estimate:
    """Return how long the devices can be had for so much money; raises UserError where their price is not known."""
    price = where.usd_per_hour
    if price is None:
        raise UserError(f"The price of {where.device.title} is not known: give --price USD, of an hour of one.")
    return exact(usd * HOUR).over(price, price.source)


def offers(recipe: str, overrides: Sequence[str], where: Where, usd: float, fit: Fit | None) -> list[Offer]:
    """Return what the money buys of each family that surely fits into memory, with the micro-batch and mode that do."""
    seconds = seconds_for(usd, where)
    found = []
    for family in families():
        config = decode_with(recipe, overrides, family)
        plan = fitting(config, where, family)
        if plan is None:
            continue
        tokens, one_step = plan.tokens_within(seconds), plan.pace.stretches[0].step_tokens
        if tokens.value < one_step:
            continue
        tokens = replace(tokens, low=max(tokens.low, float(one_step)))
        size = counted_parameters(config.model)
        expected = None
        if fit is not None:  # fewer tokens, more bits per byte
            at = [fit.at(size, count) for count in tokens.numbers]
            expected = Estimate(at[2].low, at[1].value, at[0].high, at[1].source)
        found.append(Offer(family, config.model, plan, tokens, expected, 1.0 if fit is None else fit.beyond(size, tokens.value)))
    if not found:
        raise UserError(
            f"No model family surely fits into {where.device.title} with the rows of {recipe} and makes a step for {money(usd)}."
        )
    return found


def laid_out(recipe: str, overrides: Sequence[str], family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a recipe laid under a family, and the same with what is changed besides.

    The first is what ``base: [recipe, family]`` reads. Changed are fields of the recipe's model that the family leaves at their
    defaults, the size of the tokenizer, and what the overrides say.
    """
    below, of_family = load_recipe(recipe), load_recipe(family)
    if (kind := below.get("kind")) != "pretrain":
        raise UserError(f"--budget chooses a model to pretrain, and `{recipe}` is a recipe of kind {kind}.")
    base, model = merge(below, of_family), encode(families()[family])
    own = {key: model[key] for key in base["model"] if key not in of_family["model"]}
    tokenizer = {"vocab_size": model["vocab_size"]}
    return base, override(merge(base, {"model": own, "tokenizer": tokenizer}), overrides)


def decode_with(recipe: str, overrides: Sequence[str], family: str) -> TrainConfig:
    """Return the config of a recipe with the model of a family, without a clock."""
    given = laid_out(recipe, overrides, family)[1] | {"max_minutes": None, "total_tokens": 10**11}
    return decode(TrainConfig, given, source=f"{recipe} with {family}")


def fitting(config: TrainConfig, where: Where, family: str) -> Plan | None:
    """Return the plan with the least recomputation and the largest micro-batch that surely fit; None where nothing does."""
    config = replace(config, parallel=DdpConfig() if where.gpus > 1 else NoParallelConfig())
    for mode in ("off", "selective", "full"):
        plan = plan_of(replace(config, recompute=mode), where, name=family)
        if plan.fits == "yes":
            return plan
        rows = plan.most_rows[mode]
        while rows and config.batch_tokens % (rows * config.seq_len):
            rows -= 1
        if rows:
            plan = plan_of(replace(config, recompute=mode, micro_batch_tokens=rows * config.seq_len), where, name=family)
            if plan.fits == "yes":
                return plan
    return None


def words_of_budget(recipe: str | None, overrides: Sequence[str], where: Where, usd: float) -> str:
    """Return what the money buys, which model to take and its recipe, as text."""
    recipe = recipe or DATA_RECIPE
    fit = read_fit()
    found = offers(recipe, overrides, where, usd, fit)
    seconds = seconds_for(usd, where)
    many = f"{where.gpus} x " if where.gpus > 1 else ""
    time = f"{fmt.duration(seconds.low)} to {fmt.duration(seconds.high)}"
    title = f"{money(usd)} on {many}{where.device.title}: {time} ({seconds.source}); data, batch and schedule of {recipe}"
    lines = [*wrapped(title, ""), ""]
    if fit is not None:
        found.sort(key=lambda one: one.bits_per_byte.value if one.bits_per_byte else 0.0)
    rows = [["model", "parameters", "tokens", "", "a parameter", "bits per byte", ""]]
    for one in found:
        expected = one.bits_per_byte
        told = ["", ""] if expected is None else [f"{expected.value:.3f}", f"{expected.low:.3f} to {expected.high:.3f}"]
        interval = f"{fmt.count(one.tokens.low)} to {fmt.count(one.tokens.high)}"
        ratio = f"{one.tokens.value / one.model.num_parameters:.1f}"
        rows.append([one.family, f"{one.model.num_parameters:,}", fmt.count(one.tokens.value), interval, ratio, *told])
    lines += [fmt.table(rows), "", *_verdict(found, fit, recipe, overrides)]
    return "\n".join(lines)


def _verdict(found: Sequence[Offer], fit: Fit | None, recipe: str, overrides: Sequence[str]) -> list[str]:
    if fit is None:
        return wrapped(
            "Nothing is chosen: there is no scaling fit yet. benchmarks/scaling_fit.py makes one from small runs; until then the "
            "table says only what the money buys.",
            "",
        )
    best = found[0]
    assert best.bits_per_byte is not None
    lines = []
    if best.beyond > 1:
        lines += wrapped(
            f"This extrapolates: {best.family} is {best.beyond:,.0f} times beyond the runs of the fit, which end at "
            f"{fmt.count(fit.parameters[1])} parameters of matrices and head and {fmt.count(fit.tokens[1])} tokens of textbooks.",
            "",
        )
    if not tells(best.bits_per_byte, best.beyond):
        return lines + wrapped(
            "The fit tells nothing here, because its interval is too wide or its runs are too far away, so nothing is chosen.", ""
        )
    base, given = laid_out(recipe, overrides, best.family)
    chosen = {
        **given, "total_tokens": round(best.tokens.value), "max_minutes": None,
        "micro_batch_tokens": best.plan.rows * best.plan.seq_len, "recompute": best.plan.recompute,
        **({"parallel": {"type": "ddp"}} if best.plan.where.gpus > 1 else {}),
    }  # fmt: skip
    text = {"base": [recipe, best.family], **difference(base, chosen)}
    close = [one.family for one in found[1:] if one.bits_per_byte and one.bits_per_byte.low <= best.bits_per_byte.high]
    beside = f" Within its interval lie {', '.join(close)} too." if close else ""
    lines += wrapped(f"Best by the fit: {best.family} on {fmt.count(best.tokens.value)} tokens.{beside}", "")
    return [*lines, "", "As a recipe:", "", *dump_yaml(text).rstrip().splitlines()]
