"""What money buys, the scaling fit that chooses by it, and the tables."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from dataclasses import replace
from itertools import product

import pytest

from osler.cli.plan import plan
from osler.config.devices import find_device
from osler.config.recipe import load_recipe, load_yaml
from osler.config.schema import decode
from osler.model.config import ModelConfig
from osler.plan import budget, scaling
from osler.plan.budget import families, fitting, offers
from osler.plan.plan import Where
from osler.plan.scaling import Curve, Fit, Point, counted_parameters, fit_points, read_fit, tells
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig

EIGHT = Where(find_device("h100"), gpus=8, price=2.5)
TRUE = Curve(floor=0.6, of_parameters=30.0, alpha=0.32, of_tokens=400.0, beta=0.4)


def points(noise: float = 0.0) -> list[Point]:
    draw = random.Random(0)
    return [
        Point(size, tokens, TRUE.at(size, tokens) * (1 + draw.gauss(0, noise)))
        for size, tokens in product((3e5, 1e6, 3e6, 1e7), (1e6, 4e6, 1.6e7, 6.4e7))
    ]


def test_the_fit_finds_the_curve_that_runs_were_made_from() -> None:
    fit = fit_points(points(), draws=4)
    assert fit.curve.alpha == TRUE.alpha and fit.curve.beta == TRUE.beta
    assert fit.curve.floor == pytest.approx(TRUE.floor, rel=1e-3)
    assert fit.at(1e7, 6.4e7).value == pytest.approx(TRUE.at(1e7, 6.4e7), rel=1e-4)


def test_the_interval_grows_with_noise_and_with_the_distance() -> None:
    fit = fit_points(points(noise=0.02), draws=30)
    near, far = fit.at(3e6, 1.6e7), fit.at(4e8, 1e10)
    assert near.low <= near.value <= near.high and near.high - near.low < 0.05
    assert (far.high - far.low) / far.value > 2 * (near.high - near.low) / near.value
    assert fit.beyond(3e6, 1.6e7) == 1 and fit.beyond(4e8, 1e7) == 40 and fit.beyond(1e6, 1e5) == 10


def test_too_few_runs_are_no_fit() -> None:
    with pytest.raises(ValueError, match="too few for a fit"):
        fit_points(points()[:4], draws=1)
    with pytest.raises(ValueError, match="several sizes"):
        fit_points([one for one in points() if one.parameters == 3e5] * 2, draws=1)


def test_a_committed_fit_is_read_and_without_one_nothing_is_chosen(tmp_path, monkeypatch) -> None:
    file = tmp_path / "fit.json"
    monkeypatch.setattr(scaling, "FIT_FILE", file)
    assert read_fit(file) is None
    fit = fit_points(points(noise=0.01), draws=5)
    parts = {"curve": fit.curve, "drawn": fit.drawn, "parameters": fit.parameters, "tokens": fit.tokens}
    file.write_text(json.dumps({"benchmark": "scaling-fit", "fit": {name: list(part) for name, part in parts.items()}}))
    assert read_fit(file) == fit


def test_the_fit_that_ships_is_read() -> None:
    fit = read_fit()
    assert fit is not None and len(fit.drawn) >= 100
    runs = json.loads(scaling.FIT_FILE.read_text())["runs"]
    for run in runs:
        assert fit.curve.at(run["counted_parameters"], run["tokens"]) == pytest.approx(run["bits_per_byte"], rel=0.1)


def with_fit(monkeypatch, fit: Fit | None) -> str:
    monkeypatch.setattr(budget, "read_fit", lambda: fit)
    return plan(None, [], gpu="h100", gpus=8, price=2.5, budget=20.0)


def test_money_without_a_fit_says_so_and_chooses_nothing(monkeypatch) -> None:
    text = with_fit(monkeypatch, None)
    assert "there is no scaling fit yet" in text and "Best by the fit" not in text
    assert "1 h 00 min to 1 h 00 min" in text and all(name in text for name in families())


def test_the_choice_is_a_recipe_that_costs_the_money(monkeypatch, tmp_path) -> None:
    fit = Fit(TRUE, (TRUE,), (3e5, 1e7), (1e6, 6.4e8))
    text = " ".join(with_fit(monkeypatch, fit).split())
    assert "This extrapolates:" in text and "times beyond the runs of the fit" in text
    yaml = with_fit(monkeypatch, fit).split("As a recipe:\n\n")[1]
    chosen = load_yaml(yaml, "the answer")
    (tmp_path / "mine.yaml").write_text(yaml)
    config = decode(TrainConfig, load_recipe(tmp_path / "mine.yaml"))
    best = min(offers("osler-2day", [], EIGHT, 20.0, fit), key=lambda one: one.bits_per_byte.value)
    assert chosen["base"][1] == best.family and config.model == best.model and config.parallel.type == "ddp"
    again = fitting(config, EIGHT, "again")
    assert again is not None and again.usd is not None and again.usd.value == pytest.approx(20, rel=0.1)


def test_the_recipe_that_is_chosen_has_what_was_asked_and_a_tokenizer_that_fits(monkeypatch, tmp_path) -> None:
    asked = ["seq_len=512", "optim.weight_decay=0.2", "data.path=books", "model.max_seq_len=4096"]
    monkeypatch.setattr(budget, "read_fit", lambda: Fit(TRUE, (TRUE,), (3e5, 1e9), (1e6, 1e12)))
    text = budget.words_of_budget("text-10min", asked, EIGHT, 20.0)
    (tmp_path / "mine.yaml").write_text(text.split("As a recipe:\n\n")[1])
    config = decode(TrainConfig, load_recipe(tmp_path / "mine.yaml"))
    family = load_yaml((tmp_path / "mine.yaml").read_text(), "the answer")["base"][1]
    assert config.model == replace(families()[family], max_seq_len=4096)
    assert config.tokenizer.vocab_size == config.model.vocab_size
    assert (config.seq_len, config.optim.weight_decay, config.data.path, config.model.max_seq_len) == (512, 0.2, "books", 4096)
    assert config.max_minutes is None and config.total_tokens < 10**11


def test_an_interval_that_is_too_wide_chooses_nothing(monkeypatch) -> None:
    other = TRUE._replace(floor=2.0)
    fit = Fit(TRUE, (TRUE, other), (3e5, 1e7), (1e6, 6.4e7))
    assert not tells(fit.at(1e8, 1e9), 1.0) and not tells(Fit(TRUE, (TRUE,), (1, 2), (1, 2)).at(1e8, 1e9), 5e7)
    text = with_fit(monkeypatch, fit)
    assert "The fit tells nothing here" in " ".join(text.split()) and "As a recipe" not in text


def test_parameters_of_the_fit_are_those_that_flops_are_counted_of() -> None:
    model = ModelConfig()
    assert counted_parameters(model) == model.num_parameters - model.vocab_size * model.hidden_size - (
        (2 * model.num_layers + 1) * model.hidden_size if model.norm_weight else 0
    )


def test_money_needs_a_price() -> None:
    with pytest.raises(UserError, match="price of L4 is not known: give --price"):
        plan(None, [], gpu="l4", budget=20.0)
    with pytest.raises(UserError, match=r"makes a step for \$0.01"):
        plan(None, [], gpu="h100", budget=0.01)
    with pytest.raises(UserError, match="give one of them"):
        plan("debug", [], budget=20.0, hours=2.0)


def table(name: str, **options: object) -> list[list[str]]:
    text = plan(None, [], table=name, as_table="csv", **options)
    return list(csv.reader(io.StringIO(text)))


def test_a_table_is_the_same_in_markdown_and_csv() -> None:
    rows = table("devices")
    lines = plan(None, [], table="devices").splitlines()
    assert lines[1] == "|" + "---|" * len(rows[0])
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in [lines[0], *lines[2:]]] == rows
    assert ["h100", "H100 SXM", "989", "1979", "79.1", "3350", "2.40 to 4.29", "2026-11-01"] in rows


def test_the_missions_tables_have_a_row_for_each_family() -> None:
    cost, two_days, one_day = table("cost", gpu="a100"), table("tokens"), table("tokens", hours=24.0)
    assert [row[0] for row in cost[1:]] == [row[0] for row in two_days[1:]] == list(families())
    half, whole = (float(rows[-1][2].split("B")[0]) for rows in (one_day, two_days))  # pure-large on an A100
    assert math.isclose(2 * half, whole, rel_tol=0.02)
    dollars = [float(cell.split(" ")[0].strip("$").replace(",", "")) for cell in cost[-1][3:]]
    assert dollars == sorted(dollars) and dollars[-1] == pytest.approx(100 * dollars[0], rel=0.05)
