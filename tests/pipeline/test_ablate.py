"""``osler ablate``: pairs of runs with the same seeds, what is reported of them, and an ablation that was interrupted."""

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from osler.cli.main import main
from osler.config.schema import decode
from osler.eval.score import mean_change
from osler.pipeline.ablate import RECIPE, configs_of, read_grid, within
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig


@pytest.fixture
def ablate(tiny, tmp_path, capsys):
    def run(*more: str, seeds: int = 2, length: Sequence[str] = ("--tokens", "512"), name: str = "runs") -> tuple[int, str, str]:
        given = ["ablate", tiny.pretrain, "eval_every_tokens=512", "optim.lr=1e-3", "optim.lr=1e-3|1e-2", *length]
        code = main([*given, "--seeds", str(seeds), "--run", str(tmp_path / name), *more])
        return code, *capsys.readouterr()

    return run


def test_a_grid_is_one_change_for_each_value():
    fixed, changes = read_grid(["data.path=a b", "optim.lr=0.1| 0.2", "x.y=1 z=[1, 2]|x.y=2 z={a: 3}"])
    assert fixed == ["data.path=a b"]
    assert changes == [("optim.lr=0.1",), ("optim.lr=0.2",), ("x.y=1", "z=[1, 2]"), ("x.y=2", "z={a: 3}")]


def test_a_value_that_the_recipe_has_is_no_change():
    changes = [("optim.lr=0.03",), ("optim.lr=0.04",), ("seq_len=1024",), ("total_tokens=4096",), ("max_minutes=2",)]
    fitted = partial(within, minutes=None, flops=None, tokens=512)
    configs = configs_of("text-10min", ["data.path=x"], changes, fitted)
    assert list(configs) == [RECIPE, "optim.lr=0.04"] and configs["optim.lr=0.04"].optim.lr == 0.04
    for recipe, changes, told in (
        ("text-10min", [("seq_len=1024",)], "nothing to compare"),
        ("grpo-medqa", [("steps=3",)], "is of kind grpo"),
        ("text-10min", [("optim.lrr=3",)], "text-10min with optim.lrr=3: 1 error"),
    ):
        with pytest.raises(UserError, match=told):
            configs_of(recipe, [], changes, fitted)
    with pytest.raises(UserError, match="Which changes"):
        read_grid(["seq_len=256"])


def test_equal_flops_give_a_larger_model_fewer_tokens():
    curriculum = [{"seq_len": 64, "until_tokens": 8192}, {"seq_len": 128}]
    for more in ({}, {"curriculum": curriculum}):
        for layers in (2, 4):
            config = decode(TrainConfig, {"kind": "pretrain", "model": {"num_layers": layers}, "max_minutes": 3, **more})
            asked = within(config, minutes=None, flops=1e12, tokens=None)
            assert asked.max_minutes is None and asked.training_flops(asked.model) == pytest.approx(1e12, rel=1e-3)


def test_the_interval_is_students():
    change = mean_change([0.1, 0.2, 0.6])  # mean 0.3, standard deviation 0.264575, t 4.30265
    assert (change.mean, change.n) == (pytest.approx(0.3), 3)
    assert change.interval == pytest.approx((0.3 - 0.65724, 0.3 + 0.65724), abs=1e-4)
    assert mean_change([0.5]).interval == (-float("inf"), float("inf"))


def test_runs_are_paired_and_go_on_where_they_stopped(ablate, tmp_path: Path, fault):
    fault("train-step:sigterm:5")  # in the third run of two steps
    code, _, told = ablate()
    assert code == 130 and "Stopped and saved. The same command goes on." in told
    names = ["optim.lr=1e-2-seed0", "optim.lr=1e-2-seed1", "recipe-seed0", "recipe-seed1"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == names[:3]
    fault("nowhere:crash")
    code, table, _ = ablate("--metric", "eval/bits_per_byte", "--metric", "eval/loss")
    assert code == 0
    runs = [tmp_path / "runs" / name for name in names]
    lines = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in runs]
    change = [lines[seed]["eval/bits_per_byte"] - lines[seed + 2]["eval/bits_per_byte"] for seed in (0, 1)]
    rows = json.loads((tmp_path / "runs" / "ablation.json").read_text())["rows"]
    assert [row["change"] for row in rows] == [RECIPE, "optim.lr=1e-2"] * 2 and rows[1]["metric"] == "eval/bits_per_byte"
    assert rows[1]["difference"] == pytest.approx(mean_change(change).mean)
    assert rows[1]["interval"] == pytest.approx(list(mean_change(change).interval))
    assert rows[1]["tokens"] == {"0": 512, "1": 512}
    _, base, changed, *_ = table.splitlines()
    assert base.split()[0] == RECIPE and changed.split()[0] == "optim.lr=1e-2" and f"{rows[1]['difference']:+.4f}"[1:] in changed
    whole = (runs[0] / "metrics.jsonl").read_bytes()

    assert ablate()[:2] == (0, table.split("\n\n")[0] + "\n") and (runs[0] / "metrics.jsonl").read_bytes() == whole
    assert ablate(seeds=1)[1].splitlines()[2].split()[3:7] == ["–", "needs", "2", "seeds"]
    code, _, told = ablate("--metric", "eval/test_accuracy")
    assert code == 2 and "has no eval/test_accuracy, which --metric asks for. It has: " in told and "eval/loss" in told
    code, _, told = ablate("batch_tokens=512")
    assert code == 2 and "holds another run: batch_tokens is 512 here and 256 there" in told
    for more in (["--minutes", "1"], ["--tokens", "0"]):
        code, _, told = ablate(*more)
        assert code == 2 and "give one of them, above 0" in told


def test_what_cannot_be_compared_is_told_before_the_first_run(ablate, tmp_path: Path):
    for more, word in (
        (["--metric", "eval/bits_per_bite"], "no metric has this name; did you mean `eval/bits_per_byte`?"),
        (["seed=1|2"], "--seeds says with how many"),
        (["optim.lr=1e-2|optim.lr=1e-2 seed=3"], "--seeds says with how many"),
    ):
        code, _, told = ablate(*more)
        assert code == 2 and word in told and not (tmp_path / "runs").exists()


def test_a_run_that_diverged_has_no_interval(ablate, tmp_path: Path):
    """Its metric is null in the file, and of what follows from it the table says so."""
    assert ablate()[0] == 0
    metrics = tmp_path / "runs" / "optim.lr=1e-2-seed1" / "metrics.jsonl"
    metrics.write_text(re.sub(r'"eval/bits_per_byte": [\d.]+', '"eval/bits_per_byte": null', metrics.read_text()))
    code, table, _ = ablate()
    assert code == 0 and table.splitlines()[2].split()[1:6] == ["nan", "–", "–", "no", "number"]
    assert "difference" not in json.loads((tmp_path / "runs" / "ablation.json").read_text())["rows"][1]


def test_runs_by_the_clock_compile_into_a_cache_of_their_own(ablate, monkeypatch):
    """What one run leaves in a cache would give a later one more steps."""
    import torch._inductor.utils

    caches = []
    monkeypatch.setattr(torch._inductor.utils, "fresh_cache", lambda dir: nullcontext(caches.append(dir)))
    assert ablate(seeds=1)[0] == 0 and not caches
    assert ablate(length=("--minutes", "0.005"), name="timed", seeds=1)[0] == 0 and len(set(caches)) == len(caches) == 2
    assert not any(Path(cache).exists() for cache in caches)
