"""One run on one, two and four processes, by DDP and FSDP2: the same losses or completions, whoever wrote the checkpoint."""

import importlib.util

import pytest

from osler.cli.main import main
from osler.parallel.config import DeepSpeedConfig
from osler.parallel.deepspeed import read_settings
from osler.parallel.parallelize import check_strategy
from osler.runtime.errors import UserError


@pytest.mark.slow
def test_every_number_of_ranks_and_strategy_is_the_same_run(run_cases, tiny, tmp_path):
    compiling = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    cases = run_cases("distributed/parallel_runs.py", tiny.pretrain, tiny.sft, tmp_path, DS_ACCELERATOR="cpu", **compiling)
    assert cases == 29 + (4 if importlib.util.find_spec("deepspeed") else 0)


@pytest.mark.slow
def test_grpo_draws_and_learns_the_same_on_every_number_of_ranks(run_cases, tiny, runs, tmp_path):
    assert run_cases("distributed/grpo_runs.py", tiny.grpo, runs.sft, tmp_path) == 14


@pytest.mark.slow
def test_validation_sets_are_measured_alike_on_two_ranks(run_cases, tiny, tmp_path):
    assert run_cases("distributed/validation_runs.py", tiny.pretrain, tmp_path) == 2


@pytest.mark.slow
def test_a_teacher_teaches_the_same_on_two_ranks(run_cases, tiny, runs, tmp_path):
    assert run_cases("distributed/teacher_runs.py", tiny.pretrain, runs.sft, tmp_path) == 2


@pytest.mark.slow
def test_stages_of_sparse_attention_are_the_same_on_two_ranks_and_after_a_kill_at_their_edges(run_cases, tiny, runs, tmp_path):
    assert run_cases("distributed/sparse_runs.py", tiny.pretrain, runs.pretrain, tmp_path) == 9


def test_muon_shared_and_sharded_is_muon_on_one_rank(run_cases, tmp_path):
    assert run_cases("distributed/muon_ranks.py", tmp_path) == 1


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_without_deepspeed_its_strategy_says_what_to_install():
    with pytest.raises(UserError, match=r"pip install -e '\.\[deepspeed\]'.*parallel.type=fsdp"):
        check_strategy(DeepSpeedConfig(), 2)


def test_what_deepspeed_is_told_beside_the_run_is_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # reading the file needs no DeepSpeed
    file = tmp_path / "zero.json"
    config = DeepSpeedConfig(config_file=str(file))
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert read_settings(config) == {"zero_optimization": {"stage": 3}}
    for content, word in (('{"optimizer": {}, "bf16": {}}', "sets bf16, optimizer"), ("[]", "no JSON object")):
        file.write_text(content)
        with pytest.raises(UserError, match=word):
            check_strategy(config, 2)
    file.unlink()
    with pytest.raises(UserError, match="does not exist"):
        check_strategy(config, 2)


def test_deepspeed_on_one_process_is_refused_before_anything_is_written(tiny, tmp_path, capsys):
    assert main(["pretrain", tiny.pretrain, "parallel.type=deepspeed", "--run", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "parallel.type=deepspeed trains on several processes" in told and "parallel.type=none" in told
    assert not (tmp_path / "run").exists()
