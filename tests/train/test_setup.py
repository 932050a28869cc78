"""What is checked before several processes connect: how they share the batches of a run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from osler.config.recipe import available_recipes, load_recipe
from osler.config.schema import decode
from osler.data.config import CurriculumStage as Stage
from osler.parallel.config import DdpConfig, DeepSpeedConfig
from osler.parallel.fp8 import float8_linear
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig
from osler.train.setup import check_plan, check_processes, warn_of_small_passes

CONFIG = TrainConfig(seq_len=128, batch_tokens=12 * 128, micro_batch_tokens=2 * 128, parallel=DdpConfig())
PRETRAIN = [name for name in available_recipes() if load_recipe(name).get("kind") == "pretrain"]


def warning(config: TrainConfig, processes: int, capsys: pytest.CaptureFixture[str]) -> str:
    check_processes(config, processes)
    warn_of_small_passes(config, processes)
    return capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2, 3, 6, 12])
def test_shares_that_keep_the_forward_passes_are_silent(processes, capsys):
    assert warning(CONFIG, processes, capsys) == ""


def test_a_share_that_splits_into_smaller_passes_is_told_with_numbers_that_mend_it(capsys):
    told = warning(CONFIG, 4, capsys)
    assert "each of 4 processes has 3 rows of 128 tokens" in told and "passes of 1 only" in told
    for field, value in (("batch_tokens", 2048), ("micro_batch_tokens", 384)):
        assert f"{field}={value} " in told
        assert warning(replace(CONFIG, **{field: value}), 4, capsys) == ""


def test_the_stage_of_a_curriculum_is_named(capsys):
    stages = (Stage(seq_len=64, until_tokens=6144), Stage(seq_len=128, batch_tokens=1536))
    config = replace(CONFIG, batch_tokens=2048, curriculum=stages)
    told = warning(config, 4, capsys)
    assert told.count("Warning") == 1 and "stage 2 of the curriculum: each of 4 processes has 3 rows" in told
    with pytest.raises(UserError, match=r"Stage 2 of the curriculum: a batch of 12 rows .* 8 ranks"):
        check_processes(config, 8)


def largest_pass(rows: int, fitting: int) -> int:
    return max(part for part in range(1, rows + 1) if rows % part == 0 and part <= max(1, fitting))


def test_every_share_keeps_its_passes_or_is_told_with_numbers_that_are_accepted_and_mend_it(capsys):
    """Over many batches, with and without a curriculum, whose first stage has rows half as long and a batch of its own."""
    advised = Counter()
    for rows, first, micro, processes in product((4, 6, 12), (0, 6, 10, 12, 20, 24), (1, 2, 3, 4, 6), (1, 2, 3, 4)):
        stages = (Stage(seq_len=64, until_tokens=6144, batch_tokens=first * 64), Stage(seq_len=128)) if first else ()
        try:
            config = replace(CONFIG, batch_tokens=rows * 128, micro_batch_tokens=micro * 128, curriculum=stages)
            warnings = warning(config, processes, capsys).splitlines()
        except (ValueError, UserError):
            continue
        falls = [
            f"stage {span.number} " if first else "Warning: each"
            for span in config.timeline.spans
            for share, fitting in [(span.rows_per_batch // processes, micro * 128 // span.seq_len)]
            if largest_pass(share, fitting) < min(share, largest_pass(span.rows_per_batch, fitting))
        ]
        assert [where in line for where, line in zip(falls, warnings, strict=True)] == [True] * len(falls)
        for where, line in zip(falls, warnings, strict=True):
            batch, larger = re.search(r" batch_tokens=(\d+) keeps", line), re.search(r"micro_batch_tokens=(\d+) makes", line)
            changed = {"batch_tokens": int(batch[1])}
            if first:
                number = int(where.split()[1]) - 1
                own = replace(stages[number], batch_tokens=int(batch[1]))
                changed = {"curriculum": (*stages[:number], own, *stages[number + 1 :])}
            for change in [changed, *([{"micro_batch_tokens": int(larger[1])}] if larger else [])]:
                advised[bool(first), min(change)] += 1
                assert where not in warning(replace(config, **change), processes, capsys)
    assert min(advised.values()) > 3 and len(advised) == 4, advised


def test_a_plan_misses_the_packages_that_a_run_would_miss(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    float8_linear.cache_clear()
    config = TrainConfig(device="cpu", precision="fp8")
    with pytest.raises(UserError, match=r"precision=fp8 needs torchao .*\[fp8\]"):
        check_plan(config, is_new=True)
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(UserError, match=r"needs the package DeepSpeed"):
            check_plan(replace(config, precision="fp32", parallel=DeepSpeedConfig()), is_new=True)


def test_no_fewer_than_no_threads_prepare_batches():
    with pytest.raises(ValueError, match="loader_workers must be at least 0, given -1"):
        TrainConfig(loader_workers=-1)


@pytest.mark.parametrize("name", PRETRAIN)
def test_up_to_eight_processes_share_the_batches_of_a_recipe(name):
    config = replace(decode(TrainConfig, load_recipe(name)), parallel=DdpConfig())
    for processes in (2, 4, 8):
        check_processes(config, processes)
