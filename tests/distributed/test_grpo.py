"""GRPO on one, two and four processes: the same questions, completions and rewards, and the same policy."""

from __future__ import annotations


def test_every_number_of_ranks_draws_and_learns_the_same(run_cases, tiny, runs, tmp_path):
    assert run_cases("distributed/grpo_runs.py", tiny.grpo, runs.sft, tmp_path) == 11
