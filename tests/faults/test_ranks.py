"""Several processes: one dies, one computes NaN, all are interrupted."""

import importlib.util

import pytest


@pytest.mark.slow
def test_what_breaks_one_rank_is_agreed_on_by_all(run_cases, tiny, runs, tmp_path):
    cases = run_cases("faults/broken_ranks.py", tiny.pretrain, tiny.grpo, runs.sft, tmp_path, DS_ACCELERATOR="cpu")
    assert cases == 8 + (2 if importlib.util.find_spec("deepspeed") else 0)
