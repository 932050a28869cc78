"""Sparse attention in three stages: dense, a warm-up of the indexers alone, sparse. What each moves, logs and refuses."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_folders import STOPPED, assert_same_run, logged

from osler.checkpoint import store
from osler.config.recipe import load_yaml
from osler.config.schema import decode
from osler.inference.load import described_model, load_model
from osler.model.config import ContextConfig, ModelConfig, SparseAttentionConfig
from osler.model.init import is_of_indexer
from osler.model.sparse_attention import MEASURED
from osler.optim.build import build_optimizer
from osler.parallel.config import DeepSpeedConfig, NoParallelConfig
from osler.parallel.parallelize import parallelize
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner
from osler.runtime.errors import UserError
from osler.runtime.faults import InjectedError
from osler.runtime.files import RunFolder
from osler.runtime.world import World
from osler.train.batches import make_loader
from osler.train.config import TrainConfig
from osler.train.run import next_steps
from osler.train.trainer import TrainStep

SPARSE = "model.attention={type: sparse, top_k: 8, local_window: 2, index_heads: 2, index_head_dim: 8}"
LONGER = "seq_len=128"  # than the rows of the dense run
WARMUP = ["trains=indexers", SPARSE, "optim.lr=1e-2", "schedule.type=constant"]


def checkpoint(run):
    return store.load(store.resolve(run))


@pytest.fixture(scope="module")
def stages(tiny, runs, tmp_path_factory) -> SimpleNamespace:
    """Finished runs: ``warmup`` on the dense run of the tests, and ``sparse`` on that; what the first said at its start."""
    from osler.cli.main import main

    root = tmp_path_factory.mktemp("stages")
    warmup, sparse = root / "warmup", root / "sparse"
    assert main(["pretrain", tiny.pretrain, f"init_from={runs.pretrain}", *WARMUP, LONGER, "--run", str(warmup)]) == 0
    assert main(["pretrain", tiny.pretrain, f"init_from={warmup}", LONGER, "--run", str(sparse)]) == 0
    return SimpleNamespace(dense=runs.pretrain, warmup=warmup, sparse=sparse)


def test_the_warm_up_moves_the_indexers_and_nothing_else_by_a_bit(stages):
    dense, warm, sparse = (checkpoint(run) for run in (stages.dense, stages.warmup, stages.sparse))
    before, after, end = (each.tensors["model"] for each in (dense, warm, sparse))
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    new = after.keys() - before.keys()
    assert new and all(map(is_of_indexer, new))
    fresh = load_model(stages.warmup).model
    fresh.init_weights(0)
    assert not any(torch.equal(after[name], weight) for name, weight in fresh.state_dict().items() if name in new)
    assert {name for group in warm.state["optimizer"]["groups"] for name in group["params"]} == new, "frozen weights, too"
    assert {name.rpartition("/")[0] for name in warm.tensors["optimizer"]} == new, "moments of frozen weights"
    assert not any(torch.equal(end[name], weight) for name, weight in after.items()), "the last stage trains all"
    lengths = [load_model(run).model.trained_seq_len for run in (stages.dense, stages.warmup, stages.sparse)]
    assert lengths == [64, 64, 128], "frozen weights do not learn longer rows"
    assert {name.rpartition("/")[0] for name in sparse.tensors["optimizer"]} == after.keys()
    assert described_model(sparse).attention == described_model(warm).attention, "taken over from where it starts"


def test_after_the_warm_up_the_sparse_run_comes_next(stages):
    config = decode(TrainConfig, load_yaml((stages.warmup / "config.yaml").read_text(), ""))
    told = next_steps(config, RunFolder(stages.warmup))
    assert f"osler pretrain RECIPE init_from={stages.warmup} " in told and "osler sft" not in told
    assert len({line.rindex("   ") for line in told.splitlines()[1:]}) == 1, "in columns"


def test_the_warm_up_lowers_the_kl_and_raises_the_recall_and_both_stages_log_the_index(stages, osler):
    for run in (stages.warmup, stages.sparse):
        lines = [line for line in logged(run) if "train/loss" in line]
        assert all(line.keys() >= set(MEASURED) for line in lines)
    lines = [line for line in logged(stages.warmup) if "train/loss" in line]
    assert lines[-1]["index/kl"] < lines[0]["index/kl"] and lines[-1]["index/recall"] > lines[0]["index/recall"]
    assert not any(name.startswith("index/") for line in logged(stages.dense) for name in line)
    assert osler("report", stages.warmup) == 0
    page = (stages.warmup / "report.html").read_text()
    assert "index/recall" in page


def make_step(config, run, micro_batch_tokens=None):
    """A step on the model of a run, whose indexers alone are trained if the config says so."""
    model = load_model(run).model.train()
    if config.trains == "indexers":
        model.warm_up_indexers()
    engine = parallelize(model, NoParallelConfig(), World())
    learner = Learner(model, build_optimizer(model, config.optim), engine, config.clip_norm)
    return model, TrainStep(learner, micro_batch_limit=MicroBatchLimit(learner, micro_batch_tokens))


@pytest.mark.parametrize("trains", ["indexers", "all"])
def test_micro_batches_and_prompts_scale_the_kl_as_they_scale_the_cross_entropy(trains, config, prepared, stages):
    """What is logged is the mean over learned tokens, whatever the rows are cut into and however unevenly they are learned."""
    batch = make_loader(config, prepared).batch(0)
    batch.labels[:, ::3] = -100
    batch.labels[0, 5:] = -100
    learned_BT = batch.labels >= 0
    config = decode(TrainConfig, {"trains": trains, "init_from": "run", "optim": {"eps": 1e-3}})
    ends, rows = [], []
    for micro in (None, 128, 64):
        model, step = make_step(config, stages.sparse, micro_batch_tokens=micro)
        if micro is None:
            expected = model.with_index(batch.ids)[1][learned_BT].mean(0)
        rows.append(step(batch).row)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(rows[0][3:], expected.detach())
    for row, end in zip(rows[1:], ends[1:], strict=True):
        torch.testing.assert_close(row, rows[0], rtol=1e-5, atol=1e-6)
        assert (end - ends[0]).abs().max() < 1e-6


def test_the_indexers_gradient_does_not_shrink_the_models_step(config, prepared, stages):
    """It would if both were clipped together: here the indexers have a thousand times the gradient."""
    batch, ends = make_loader(config, prepared).batch(0), []
    for factor in (1.0, 1000.0):
        model, step = make_step(decode(TrainConfig, {"clip_norm": 0.1}), stages.sparse)
        for name, parameter in model.named_parameters():
            if is_of_indexer(name):
                parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
        step(batch)
        ends.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items() if not is_of_indexer(name))


@pytest.mark.parametrize("optim", ["{type: muon}", "{type: adamw, weight_decay: 0.5}"])
def test_no_optimizer_touches_what_is_frozen(optim, tiny, stages, osler, tmp_path):
    fields = [f"optim={optim}", "total_tokens=512", "recompute=full", "document_mask=true", "trains=indexers"]
    assert osler("pretrain", tiny.pretrain, f"init_from={stages.warmup}", *fields, "--run", tmp_path / "run") == 0
    before, after = (checkpoint(run).tensors["model"] for run in (stages.warmup, tmp_path / "run"))
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == set(filter(is_of_indexer, after))


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_an_interrupted_stage_ends_as_without_the_interruption(stage, stages, tiny, osler, tmp_path):
    start = [f"init_from={stages.dense}", *WARMUP] if stage == "warmup" else [f"init_from={stages.warmup}"]
    command = ["pretrain", tiny.pretrain, *start, LONGER, "--run", tmp_path / "run"]
    assert osler(*command, fault="train-step:sigterm:7") == STOPPED
    assert osler(*command) == 0
    assert_same_run(tmp_path / "run", getattr(stages, stage))


@pytest.mark.slow
def test_a_pipeline_of_the_stages_goes_on_at_their_edges(tiny, stages, osler, tmp_path, capsys):
    """It crashes in the last evaluation of the warm-up, which is saved by then, and is stopped in the first sparse step."""
    dense = json.loads(Path(tiny.pretrain).read_text())
    model = {**dense["model"], "attention": {"type": "sparse", "top_k": 8, "local_window": 2}}
    recipe = {
        "kind": "pipeline",
        "dense": dense,
        "warmup": {**dense, "init_from": "dense", "trains": "indexers", "model": model},
        "sparse": {**dense, "init_from": "warmup"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    command = ["pipeline", file, "--run"]
    assert osler(*command, tmp_path / "whole") == 0
    # Every stage makes twelve steps and two evaluations.
    with pytest.raises(InjectedError):
        osler(*command, tmp_path / "cut", fault="evaluate:crash:4")
    assert osler(*command, tmp_path / "cut", fault="train-step:sigterm:1") == STOPPED
    assert osler(*command, tmp_path / "cut") == 0
    for stage in ("dense", "warmup", "sparse"):
        assert_same_run(tmp_path / "cut" / stage, tmp_path / "whole" / stage)
    told = capsys.readouterr().err
    assert "has no indexers. New ones are drawn, and this run teaches them what attention looks at" in told


@pytest.mark.parametrize(
    ("start", "overrides", "told"),
    [
        ("dense", [SPARSE], "New ones would choose keys by chance, so they warm up first: make a run with trains=indexers"),
        ("dense", ["trains=indexers"], "the one to start from is dense: set model.attention.type=sparse"),
        ("warmup", [SPARSE.replace("index_heads: 2", "index_heads: 4")], "have index_heads 2 and index_head_dim 8: set the same"),
        ("dense", ["trains=indexers", SPARSE.replace("top_k: 8", "top_k: 512")], "top_k 512 exceeds max_seq_len 256"),
        ("", ["trains=indexers", SPARSE], "trains=indexers teaches indexers what the attention of a trained model looks at"),
        ("dense", ["trains=indexers", SPARSE, "precision=pure-bf16"], "which would round those that trains=indexers leaves"),
        ("branch", ["trains=all", "total_tokens=9999"], "trains is all here and indexers in"),
        ("branch", [SPARSE.replace("top_k: 8", "top_k: 16"), "total_tokens=9999"], "extend its context or change its attention"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["start", "plan"])
def test_a_stage_out_of_its_place_is_refused(start, overrides, told, dry, tiny, stages, osler, tmp_path, capsys):
    words = ["--branch", stages.warmup] if start == "branch" else [tiny.pretrain]
    words += [f"init_from={getattr(stages, start)}"] if hasattr(stages, start) else []
    assert osler("pretrain", *words, *overrides, "--run", tmp_path / "run", *dry) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "run" / "config.yaml").exists()


def test_another_choice_of_keys_may_be_made_of_the_same_indexers_and_is_told(tiny, stages, osler, tmp_path, capsys):
    given = [SPARSE.replace("top_k: 8", "top_k: 16"), "total_tokens=256"]
    assert osler("pretrain", tiny.pretrain, f"init_from={stages.warmup}", *given, "--run", tmp_path / "run") == 0
    after, before = checkpoint(tmp_path / "run"), checkpoint(stages.warmup)
    assert described_model(after).attention.top_k == 16
    assert f"The attention differs from that of {before.path}: top_k 8 → 16." in " ".join(capsys.readouterr().err.split())
    step = 5 * 2.5e-3  # no weight moves further in a step, and new ones would be anywhere
    assert all((after.tensors["model"][name] - weight).abs().max() < step for name, weight in before.tensors["model"].items())


def test_deepspeed_knows_no_sparse_attention():
    with pytest.raises(ValueError, match=r"sparse attention was never tried with .* use parallel\.type=ddp or fsdp"):
        TrainConfig(trains="indexers", init_from="run", parallel=DeepSpeedConfig())
    with pytest.raises(UserError, match="The model to start from is sparse: sparse attention was never tried"):
        TrainConfig(init_from="run", parallel=DeepSpeedConfig()).model_from(ModelConfig(attention=SparseAttentionConfig()), 128)


def test_sparse_attention_has_to_fit_the_model_to_start_from_and_not_the_one_of_the_recipe():
    attention = SparseAttentionConfig(top_k=4096, index_heads=3, selection="per_kv_group")
    config = TrainConfig(init_from="run", trains="indexers", model=ModelConfig(attention=attention))
    assert config.model_from(ModelConfig(max_seq_len=8192, num_kv_heads=1), 128).attention == attention
    with pytest.raises(UserError, match="top_k 4096 exceeds max_seq_len 2048"):
        config.model_from(ModelConfig(), 128)
    with pytest.raises(ValueError, match="top_k 4096 exceeds max_seq_len 2048"):
        TrainConfig(model=ModelConfig(attention=attention))


def test_a_context_shorter_than_top_k_is_refused():
    config = TrainConfig(init_from="run", context=ContextConfig(max_seq_len=200))
    with pytest.raises(UserError, match=r"cannot have this .* context: attention\.top_k 256 exceeds max_seq_len 200"):
        config.model_from(ModelConfig(attention=SparseAttentionConfig()), 128)
