"""Runs in too little memory go on in smaller passes, alone and on several ranks; see memory_runs.py."""

import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space of a process")
def test_a_run_without_memory_halves_its_micro_batch_and_goes_on(run_cases, tiny, runs, tmp_path):
    # Every thread would reserve 64 MB of the address space for a heap of its own.
    assert run_cases("faults/memory_runs.py", tiny.pretrain, tiny.grpo, runs.sft, tmp_path, MALLOC_ARENA_MAX="1") == 7
