"""Training in stages: every step at its length, resumed exactly inside a stage and at its edge, a run without stages as ever."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from run_folders import assert_same_tensors, logged, untimed

from osler.checkpoint import store
from osler.cli.main import main
from osler.config.recipe import load_recipe
from osler.config.schema import decode, encode
from osler.data.config import CurriculumStage as Stage
from osler.data.loader import Batch, Loader
from osler.data.order import Order
from osler.data.packing import StreamPacking
from osler.report.page import build_report
from osler.runtime.errors import UserError
from osler.train.batches import make_loader
from osler.train.config import TrainConfig

# Batches of 256 tokens: steps 0 to 2 of 16 rows of 16, steps 3 to 5 of 6 rows of 32, from step 6 on 4 rows of 64.
STAGES = (Stage(seq_len=16, until_tokens=700), Stage(seq_len=32, until_tokens=1_300, batch_tokens=192), Stage(seq_len=64))
ROWS = [16] * 3 + [6] * 3 + [4] * 6
LENGTHS = [16] * 3 + [32] * 3 + [64] * 6
TOKENS = [256, 512, 768, 960, 1_152, 1_344, *(1_344 + 256 * step for step in range(1, 7))]  # after each step
IN_STAGES = f"curriculum={json.dumps(encode(STAGES))}"
LENGTH = f"total_tokens={TOKENS[-1]}"


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A run of twelve steps through three stages, never interrupted."""
    folder = tmp_path_factory.mktemp("staged") / "run"
    assert main(["pretrain", tiny.pretrain, IN_STAGES, LENGTH, "log_every_steps=1", "--run", str(folder)]) == 0
    return folder


def test_every_step_is_logged_with_its_stage(whole):
    found = [line for line in logged(whole) if "train/loss" in line]
    assert [line["tokens"] for line in found] == TOKENS
    assert [line["train/seq_len"] for line in found] == LENGTHS
    assert [line["train/stage"] for line in found] == [1] * 3 + [2] * 3 + [3] * 6
    assert [line["train/batch_tokens"] for line in found] == [256] * 3 + [192] * 3 + [256] * 6


def test_intervals_and_schedule_are_in_tokens(whole):
    """Held out every 6 x 256 = 1,536 tokens; the learning rate of a step is that of the middle of its tokens."""
    assert [line["tokens"] for line in logged(whole) if "eval/loss" in line] == [1_600, TOKENS[-1]]
    rates = [line["train/lr"] for line in logged(whole) if "train/lr" in line]
    warm = [(before + after) / 2 / 512 for before, after in pairwise([0, *TOKENS]) if after <= 512]
    assert rates[: len(warm)] == pytest.approx([2.5e-3 * share for share in warm])
    after_warmup = [(before + after) / 2 for before, after in pairwise(TOKENS[1:])]
    assert rates[2:] == pytest.approx([2.5e-3 * (1 - (middle - 512) / (TOKENS[-1] - 512)) for middle in after_warmup])


def test_the_report_draws_the_stages(whole):
    page = build_report(whole).read_text(encoding="utf-8")
    assert "train/stage: stage from 1 at step 1 to 3 at step 12." in page
    assert "train/seq_len: seq_len from 16 at step 1 to 64 at step 12." in page


@pytest.mark.parametrize("step", [3, 4, 11], ids=lambda step: f"after_{step}_steps")
def test_stopped_inside_and_at_the_edge_of_a_stage_and_resumed(step, tiny, whole, launch, tmp_path):
    """Step 3 is the last of its stage."""
    overrides = [IN_STAGES, LENGTH, "log_every_steps=1"]
    assert launch("pretrain", tmp_path, *overrides, fault=f"train-step:sigterm:{step}") == 130
    assert store.load(store.resolve(tmp_path)).state["tokens"] == TOKENS[step - 1]
    assert main(["pretrain", "--run", str(tmp_path), "--resume"]) == 0
    assert_same_tensors(tmp_path, whole)
    assert [*map(untimed, logged(tmp_path))] == [*map(untimed, logged(whole))]


def test_one_stage_of_the_same_length_is_the_constant_run(tiny, runs, tmp_path):
    assert main(["pretrain", tiny.pretrain, "curriculum=[{seq_len: 64}]", "--run", str(tmp_path)]) == 0
    assert_same_tensors(tmp_path, runs.pretrain)
    assert not any("train/stage" in line for line in logged(runs.pretrain))


@pytest.fixture
def staged(config, prepared) -> Loader:
    return make_loader(replace(config, curriculum=STAGES, loader_workers=2), prepared)


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("ids", "labels", "document_ids")))


def test_batches_begin_at_any_step_with_any_ranks_and_workers(config, shards, staged):
    expected = list(islice(staged.batches(), 12))
    assert [tuple(batch.ids.shape) for batch in expected] == list(zip(ROWS, LENGTHS, strict=True))
    for start in range(12):
        ranks = [replace(staged, rank=rank, world_size=2, workers=rank) for rank in range(2)]
        parts = [list(islice(loader.batches(start), 12 - start)) for loader in ranks]
        for step, batch in enumerate(expected[start:]):
            found = joined([part[step] for part in parts])
            assert all(torch.equal(getattr(found, name), getattr(batch, name)) for name in ("ids", "labels", "document_ids"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": "whole"}, r"curriculum cuts one stream.*packing=whole.*set packing=stream"),
        ({"kind": "sft"}, r"curriculum cuts one stream.*packing=auto \(kind=sft\)"),
        ({"curriculum": [{"seq_len": 128}]}, r"stage 1 of 1 \(seq_len 128\): its rows are longer than the run's seq_len 64"),
    ],
)
def test_impossible_combinations_name_the_numbers(tiny, changes, message):
    recipe = load_recipe(tiny.pretrain) | {"curriculum": encode(STAGES), **changes}
    with pytest.raises(UserError, match=message):
        decode(TrainConfig, recipe)


def test_stages_out_of_reach_are_pointed_out(tiny, tmp_path, capsys):
    short = ["total_tokens=1024", "schedule.warmup_tokens=0"]
    assert main(["pretrain", tiny.pretrain, IN_STAGES, *short, "--run", str(tmp_path)]) == 0
    assert "stage 3 of the curriculum would begin at 1,344 tokens, but total_tokens is 1,024" in capsys.readouterr().err


def test_the_flops_of_a_run_are_those_of_its_stages(config):
    model, staged = config.model, replace(config, curriculum=STAGES)
    expected = 768 * model.flops_per_token(16) + 576 * model.flops_per_token(32) + 1_000 * model.flops_per_token(64)
    assert replace(staged, total_tokens=1_344 + 1_000).training_flops(model) == expected


@pytest.mark.parametrize("rows", [0, 1, 7, 48])
def test_what_was_passed_over_is_passed_over_in_every_stage(config, shards, staged, rows):
    """A stage reads the rows of its order behind those that are passed over, each of them once."""
    skipped = rows * STAGES[-1].seq_len
    batches = list(islice(staged.batches(0, skipped), 12))
    for span in staged.timeline.spans:
        steps = range(span.first_step, span.end_step or 12)
        seen = torch.cat([batches[step].ids for step in steps])
        packing = StreamPacking(
            Order(shards, config.seed), span.seq_len, first_token=span.first_token, num_rows=span.num_rows or None
        )
        first = skipped // span.seq_len
        assert torch.equal(seen, torch.stack([torch.from_numpy(packing.row(first + row).ids) for row in range(len(seen))]))
