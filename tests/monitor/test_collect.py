"""What a run logs at each level, that it logs all that the table declares, and that watching changes nothing."""

import json
import math

import pytest
import torch

from osler.cli.main import main
from osler.inference.load import load_model
from osler.model.config import ModelConfig
from osler.model.transformer import Transformer
from osler.monitor.collect import Collector, step_stats
from osler.monitor.config import MonitorConfig
from osler.monitor.metrics import METRICS, declared_name
from osler.runtime import faults

# What needs a GPU, and what only GRPO logs.
ON_GPU = {"perf/mfu", "perf/memory_allocated_bytes", "perf/memory_reserved_bytes"}
OF_GRPO = {"perf/step_seconds", "perf/rollout_tokens_per_second", "perf/train_tokens_per_second", "perf/rollout_frac"}
OF_TEXT = {  # what only supervised training logs
    "train/loss", "train/perplexity", "train/bits_per_byte", "train/stage", "train/seq_len", "train/batch_tokens",
    "train/unlearned_steps", "perf/tokens_per_second", "perf/data_ms", "eval/loss", "eval/train_gap", "eval/bits_per_byte",
    "eval/token_accuracy", "eval/<set>/loss", "eval/<set>/bits_per_byte", "eval/<set>/token_accuracy",
    "distill/kl",
    "index/kl",
    "index/recall",
    "index/entropy",
    "index/distance",
}  # fmt: skip
AREAS = ("train/", "grad/", "update/", "model/", "data/", "eval/", "perf/")
UNREADABLE = "eval/<split>_unparsed_frac"  # the small exam of training counts right answers alone
CLOCKS = ("time", "eval/seconds", "perf/")
FULL = ["monitor.level=full", "monitor.full_every_steps=5"]


def lines(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_of(found) -> set[str]:
    names = {name for line in found for name in line} - {"step", "tokens", "time"}
    assert [name for name in names if declared_name(name) is None] == []
    return {declared_name(name) for name in names}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(folder).model.state_dict()


@pytest.fixture(scope="module")
def watched(tiny, tmp_path_factory):
    """The same pretraining run at every level."""
    folder = tmp_path_factory.mktemp("watched")
    more = ["curriculum=[{seq_len: 32, until_tokens: 1024}, {seq_len: 64}]", "exam={every_tokens: 1536, items: 2}"]
    more += ["validation=[{type: clinic, passages: 1, examples: 0, cards: 0, drills: 0, validation_passages: 4}]"]
    for level in ("off", "basic", "full"):
        changes = [f"monitor.level={level}", "monitor.full_every_steps=5", "micro_batch_tokens=128"]
        assert main(["pretrain", tiny.pretrain, *more, *changes, "--run", str(folder / level)]) == 0
    return folder


def test_every_level_logs_what_the_table_says(watched):
    declared = {name for name in METRICS if name.startswith(AREAS)}
    off, basic, full = (rows_of(lines(watched / level)) for level in ("off", "basic", "full"))
    assert declared - ON_GPU - OF_GRPO - {UNREADABLE} == full and len(declared) >= 45
    assert full - basic == {name for name in full if METRICS[name].cost.startswith("full")} and basic <= full
    assert {METRICS[name].cost for name in off} == {"free", "evaluation"}


def test_watching_changes_nothing(watched):
    for level in ("basic", "full"):
        torch.testing.assert_close(weights(watched / level), weights(watched / "off"), rtol=0, atol=0)
    for names in zip(*(lines(watched / level) for level in ("off", "basic", "full")), strict=True):
        assert len({(line["step"], line.get("train/loss"), line.get("eval/loss")) for line in names}) == 1


def test_numbers_of_a_run_fit_together(watched):
    found = lines(watched / "full")
    assert [line["step"] for line in found if "train/loss" in line] == [5, 10, 12]
    assert [line["step"] for line in found if "grad/mean" in line] == [5, 10], "probes fall on lines"
    for line in found:
        if "grad/mean" in line:
            parts = [line[name] for name in line if name.startswith("grad/norm/")]
            assert math.sqrt(sum(norm**2 for norm in parts)) == pytest.approx(line["train/grad_norm"], rel=1e-4)
            assert math.isclose(line["train/perplexity"], math.exp(line["train/loss"]))
            assert 0 < line["update/ratio"] < 1 and 0 <= line["train/token_accuracy"] <= 1
            assert line["train/label_probability"] <= line["train/top_probability"]
            assert [line[name] for name in line if name.startswith("data/consumed_frac/")] == [1]
            assert sum(line[name] for name in line if name.startswith("data/tokens/")) == line["tokens"]
            assert line["perf/memory_peak_bytes"] >= 1e7 and line["data/padding_frac"] == 0
        if "eval/loss" in line:
            before = [other["train/loss"] for other in found if other["step"] <= line["step"] and "train/loss" in other][-1]
            assert line["eval/train_gap"] == pytest.approx(line["eval/loss"] - before)


def test_a_killed_full_run_logs_what_a_whole_one_does(tiny, tmp_path, monkeypatch):
    """Nothing that was measured lies between a checkpoint and its line; only clocks and memory differ."""
    command = ["pretrain", tiny.pretrain, *FULL, "--run"]
    monkeypatch.setenv(faults.VARIABLE, "train-step:sigterm:7")
    assert main([*command, str(tmp_path / "broken")]) == 130
    monkeypatch.delenv(faults.VARIABLE)
    for folder in ("whole", "broken"):
        assert main([*command, str(tmp_path / folder)]) == 0
    whole, broken = (
        [{name: value for name, value in line.items() if not name.startswith(CLOCKS)} for line in lines(tmp_path / folder)]
        for folder in ("whole", "broken")
    )
    assert whole == broken


def test_fine_tuning_pads_and_grpo_is_watched(tiny, runs, tmp_path):
    assert main(["sft", tiny.sft, f"init_from={runs.pretrain}", *FULL, "--run", str(tmp_path / "sft")]) == 0
    looked = [line for line in lines(tmp_path / "sft") if "grad/mean" in line]
    assert all(0 < line["data/padding_frac"] < 0.9 and "train/bits_per_byte" not in line for line in looked)
    assert all(line["data/tokens/turns"] <= line["tokens"] * 129 / 128 for line in looked)
    for level in ("off", "full"):
        changes = [f"monitor.level={level}", "steps=3", "monitor.full_every_steps=3"]
        assert main(["grpo", tiny.grpo, f"init_from={runs.sft}", *changes, "--run", str(tmp_path / level)]) == 0
    torch.testing.assert_close(weights(tmp_path / "full"), weights(tmp_path / "off"), rtol=0, atol=0)
    found = lines(tmp_path / "full")
    assert set(METRICS) - ON_GPU - OF_TEXT == rows_of(found)
    looks = [line for line in found if "grad/mean" in line]
    assert [line["step"] for line in looks] == [1, 3]
    steps = [line for line in found if "reward" in line]
    assert [line["data/epoch"] for line in steps] == pytest.approx([3 / 60, 6 / 60, 9 / 60])
    assert all(0 < line["data/padding_frac"] < 0.5 for line in steps)
    assert [line["data/tokens/clinic"] for line in looks] == [line["tokens"] for line in looks]
    assert all(line["data/epoch/clinic"] == line["data/epoch"] for line in looks)
    assert all(line["data/target_frac/clinic"] == line["data/consumed_frac/clinic"] == 1 for line in looks)


def test_the_wait_for_a_batch_is_measured(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("osler.runtime.device.time.perf_counter", lambda: now[0])

    def batches():
        while True:
            now[0] += 0.004
            yield None

    collector, endless = Collector(MonitorConfig(), Transformer(ModelConfig(num_layers=1)), torch.device("cpu")), batches()
    for step in range(1, 3):
        collector.fetch(endless, step)
        now[0] += 0.008
        collector.mark("forward")
    line = collector.line()
    assert (line["perf/data_ms"], line["perf/forward_ms"]) == pytest.approx((4, 8))


def test_steps_that_were_skipped_or_clipped_are_counted():
    window = [[2.0, 0.5, 0.0], [math.nan, math.inf, 1.0], [4.0, 3.0, 0.0]]
    found = step_stats(window, clip_norm=1.0, bytes_per_token=4.0)
    assert found["train/loss"] == 3.0 and found["train/perplexity"] == math.exp(3.0)
    assert found["train/bits_per_byte"] == pytest.approx(3.0 / math.log(2) / 4)
    assert found["train/grad_norm"] == found["grad/norm_max"] == 3.0
    assert found["grad/clipped_frac"] == 0.5 and found["train/skipped_steps"] == 1.0
    alone = step_stats(window[1:2], clip_norm=1.0, bytes_per_token=None)
    assert math.isnan(alone["train/loss"]) and math.isnan(alone["grad/clipped_frac"]) and "train/bits_per_byte" not in alone
