"""A longer context: what RoPE becomes, a run that extends the model of another, and a word about positions never learned."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from run_folders import assert_same_run

from osler.checkpoint import store
from osler.cli.main import main
from osler.eval.config import EvalConfig
from osler.eval.exams import score_by_likelihood
from osler.eval.run import text_score
from osler.inference import rows
from osler.inference.engine import InferenceEngine
from osler.inference.load import load_model
from osler.model.config import ContextConfig, ModelConfig, YarnConfig
from osler.model.rope import rope_tables
from osler.ops.sampling_params import SamplingParams
from osler.pipeline.check import Origin, after, check_fit
from osler.runs.loop import Loop
from osler.runtime.errors import UserError
from osler.runtime.faults import InjectedError
from osler.tasks.registry import load_clinic
from osler.train.config import TeacherConfig, TrainConfig
from osler.train.teacher import check_teacher, described_teacher

SHAPE = ModelConfig(head_dim=32, max_seq_len=1024)


def test_another_base_slows_the_slowest_rotation_by_as_much_as_rows_grow() -> None:
    longer = ContextConfig(max_seq_len=2048, rope="base").extend(SHAPE, 512)
    slowest = [shape.rope_theta ** -(30 / 32) for shape in (SHAPE, longer)]
    assert longer.max_seq_len == 2048 and slowest[0] / slowest[1] == pytest.approx(4)
    assert ContextConfig(max_seq_len=2048, rope="base", rope_theta=5e5).extend(SHAPE, 512).rope_theta == 5e5
    with pytest.raises(UserError, match="rope_theta 100 is not larger than the 10000 of the model"):
        ContextConfig(max_seq_len=2048, rope="base", rope_theta=100.0).extend(SHAPE, 512)
    assert ContextConfig(max_seq_len=2048, rope="keep").extend(SHAPE, 512) == replace(SHAPE, max_seq_len=2048)


def test_yarn_keeps_fast_rotations_slows_slow_ones_and_sharpens_attention() -> None:
    """Published behaviour (arXiv 2309.00071); tests/model compares all numbers with another implementation."""
    longer = ContextConfig(max_seq_len=2048, rope="yarn").extend(SHAPE, 512)
    assert longer.rope_scaling == YarnConfig(factor=4, original_max_seq_len=512)
    plain, yarn = (rope_tables(9, 32, 1e4, scaling) for scaling in (None, longer.rope_scaling))
    angles = [torch.atan2(sin, cos)[1, :16] for cos, sin in (plain, yarn)]
    assert (angles[0] / angles[1])[[0, 15]].tolist() == pytest.approx([1, 4], rel=1e-4)
    lengths = (yarn[0] ** 2 + yarn[1] ** 2).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.1 * math.log(4) + 1))
    again = ContextConfig(max_seq_len=8192, rope="yarn").extend(longer, 2048)
    assert again.rope_scaling == YarnConfig(factor=16, original_max_seq_len=512), "stretched from the rows of the beginning"


def test_a_run_extends_the_context_of_another_and_resumes(tiny, runs, tmp_path, osler, capsys) -> None:
    command = ["pretrain", tiny.pretrain, f"init_from={runs.pretrain}", "seq_len=512", "batch_tokens=512", "total_tokens=3072"]
    longer = [*command, "context.max_seq_len=512", "context.rope=yarn", "checkpoint.every_tokens=1024"]
    for only in ([], ["--dry-run"]):
        assert osler(*command, "--run", tmp_path / "short", *only) == 2
        told = capsys.readouterr().err
        assert "seq_len 512 is longer than the 256 tokens" in told and "context.max_seq_len=512" in told
    assert osler(*longer, "--run", tmp_path / "plan", "--dry-run") == 0
    assert "max_seq_len 512" in capsys.readouterr().out
    assert osler(*longer, "--run", tmp_path / "whole") == 0
    with pytest.raises(InjectedError):
        osler(*longer, "--run", tmp_path / "torn", fault="train-step:crash:5")
    assert osler(*longer, "--run", tmp_path / "torn") == 0
    assert_same_run(tmp_path / "torn", tmp_path / "whole")
    model = load_model(tmp_path / "whole").model
    assert model.config.rope_scaling == YarnConfig(factor=8, original_max_seq_len=64)
    assert (model.config.max_seq_len, model.trained_seq_len) == (512, 512)
    short = [f"init_from={tmp_path / 'whole'}", "seq_len=64", "total_tokens=512", "--run", tmp_path / "shorter"]
    assert osler(*command, *short) == 0
    shorter = load_model(tmp_path / "shorter").model
    assert (shorter.config, shorter.trained_seq_len) == (model.config, 512), "short rows do not make it forget"
    again = ["context.max_seq_len=512", f"init_from={tmp_path / 'whole'}", "--run", str(tmp_path / "again")]
    assert main([*command, *again]) == 2
    assert "trained on rows of 512 tokens" in capsys.readouterr().err


def test_positions_far_behind_what_was_learned_are_warned_of_once_and_rows_counted(runs, caplog) -> None:
    ready = load_model(runs.pretrain)
    assert (ready.model.trained_seq_len, ready.model.config.max_seq_len) == (64, 256)
    engine, sampling = InferenceEngine(ready.model), SamplingParams(max_new_tokens=8, temperature=0)
    rows._lengths_read.cache_clear()
    for prompt, warnings in ((56, 0), (73, 0), (74, 1), (80, 1)):  # rows of 63, 80, 81 and 87 tokens
        engine.generate([[5] * prompt], sampling)
        assert caplog.text.count("trained on rows of at most 64 tokens") == warnings
    assert "reads one of 81 now (2 of 3 rows so far" in caplog.text
    rows._lengths_read.cache_clear()
    score_by_likelihood(ready.model, ready.tokenizer, load_clinic(split="validation", limit=2))
    assert caplog.text.count("trained on rows of at most 64 tokens") == 2
    rows._lengths_read.cache_clear()
    text_score(EvalConfig(seq_len=128), ready, iter([[5, 6, ready.tokenizer.eos_id]]), 1, 9)
    assert caplog.text.count("trained on rows of at most 64 tokens") == 3
    teacher = described_teacher(TeacherConfig(path=str(runs.pretrain)))
    for seq_len, warnings in ((64, 3), (128, 4)):
        check_teacher(teacher, ready.model.config, ready.tokenizer.fingerprint, seq_len)
        assert caplog.text.count("trained on rows of at most 64 tokens") == warnings


def test_a_rollback_takes_back_the_length_of_rows_with_the_weights(make_trainer, tmp_path) -> None:
    loop = Loop(make_trainer(tmp_path / "run", total_tokens=512))
    assert loop.fit()
    model = loop.trainer.learner.model
    model.trained_seq_len = 128
    loop._load(store.load(store.resolve(tmp_path / "run")))
    assert model.trained_seq_len == 64


REFUSED = {
    "no origin": ({}, "context extends the model of init_from"),
    "rows that the new context would allow": ({"seq_len": 2048}, "context extends the model of init_from"),
    "rows beyond it": ({"init_from": "run", "seq_len": 4096}, "seq_len 4096 is longer than context.max_seq_len 2048"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_context_that_cannot_be_is_refused(case) -> None:
    fields, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        TrainConfig(context=ContextConfig(max_seq_len=2048), **{"batch_tokens": 8192, **fields})


def test_a_stage_of_a_pipeline_fits_the_context_that_it_or_an_earlier_one_extends() -> None:
    origin = Origin("the stage read", replace(SHAPE, max_seq_len=128), 128, None, "")
    short = TrainConfig(init_from="read", seq_len=512)
    with pytest.raises(UserError, match=r"seq_len 512 is longer than the 128 .* context.max_seq_len=512 extends it"):
        check_fit(short, origin)
    longer = replace(short, context=ContextConfig(max_seq_len=512, rope="yarn"))
    check_fit(longer, origin)
    check_fit(short, after(longer, origin))
    with pytest.raises(UserError, match="has YaRN already"):
        check_fit(replace(short, seq_len=1024, context=ContextConfig(max_seq_len=1024, rope="base")), after(longer, origin))
