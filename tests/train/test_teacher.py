"""A run with a teacher: what it minimises and logs, how it resumes, which teachers are refused; on two ranks and compiled."""

import json

import pytest
import torch
from run_folders import STOPPED, assert_same_tensors, logged, untimed

from osler.config.schema import decode
from osler.inference.load import load_model
from osler.ops.distillation import Mix, distillation_reference
from osler.optim.build import build_optimizer
from osler.parallel.config import DeepSpeedConfig, NoParallelConfig
from osler.parallel.parallelize import parallelize
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Learner, Machine
from osler.runtime.errors import UserError
from osler.runtime.world import World
from osler.train.batches import make_loader
from osler.train.config import TeacherConfig, TrainConfig
from osler.train.teacher import DistilledLoss, Teacher
from osler.train.trainer import TrainStep

pytestmark = pytest.mark.usefixtures("no_compiled_code")
ON_CPU = Machine(torch.device("cpu"), torch.float32, compile=False)


@pytest.fixture(scope="session")
def other_teacher(tiny, tmp_path_factory):
    """A wider model of the tiny runs' tokenizer, and the recipe of a distilled run, which gives neither tokenizer nor start."""
    from osler.cli.main import main

    run = tmp_path_factory.mktemp("teacher") / "run"
    assert main(["pretrain", tiny.pretrain, "model.hidden_size=64", "seed=3", "--run", str(run)]) == 0
    return run


@pytest.fixture
def distil(osler, tiny, runs):
    """``distil(folder, *overrides, fault=...)`` trains a new tiny model with the fine-tuned one as its teacher."""

    def train(folder, *overrides, fault=""):
        teacher = ["tokenizer.path=null", f"teacher.path={runs.sft}", "teacher.temperature=2"]
        return osler("pretrain", tiny.pretrain, "seed=1", *teacher, *overrides, "--run", folder, fault=fault)

    return train


def make_step(config, runs, teacher, mix, compile=False, micro_batch_tokens=None, **fields):
    model = load_model(runs.sft).model.train()
    loss_of = lambda model: DistilledLoss(model, mix)  # noqa: E731
    engine = parallelize(model, NoParallelConfig(), World(), compile=compile, loss_of=loss_of)
    learner = Learner(model, build_optimizer(model, config.optim), engine, config.clip_norm)
    return model, TrainStep(learner, micro_batch_limit=MicroBatchLimit(learner, micro_batch_tokens), teacher=teacher, **fields)


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_micro_batches_and_document_masks_change_nothing_but_what_they_should(kind, config, prepared, runs, other_teacher):
    """The step minimises what the definition says of both models' own logits, over learned tokens, however the batch is cut."""
    batch = make_loader(config, prepared).batch(0)
    batch.document_ids[:] = torch.arange(config.seq_len) // 5  # short ones, so that masks change many logits
    if kind == "sft":
        batch.labels[:, ::3] = -100
        batch.labels[0, 5:] = -100
    teacher = Teacher(other_teacher / "checkpoints" / "step-000000012", "", ON_CPU)
    mix = TeacherConfig(path="", weight=0.7, temperature=2.0)
    ends, results = [], []
    for micro in (None, 128, 64):
        model, step = make_step(config, runs, teacher, mix, micro_batch_tokens=micro, document_mask=True)
        if micro is None:
            with torch.no_grad():
                heads = [m.head(m(batch.ids, document_BT=batch.document_ids)) for m in (model, teacher.model)]
                expected = distillation_reference(*heads[0], batch.labels.flatten(), heads[1], Mix(0.7, 2.0, 512))
        results.append(step(batch).row)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0][[0, 3]], expected[:2] / (batch.labels >= 0).sum())
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-5, atol=1e-6)
    assert all((end - ends[0]).abs().max() < 1e-5 for end in ends[1:])


@pytest.mark.slow
def test_the_step_compiles_to_the_same_losses(config, prepared, runs, other_teacher, monkeypatch):
    """With graphs of autograd, not the C++ compiler: the student's loss and the teacher's forward pass are one each."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend="aot_eager", **options))
    batches = [make_loader(config, prepared).batch(index) for index in range(2)]
    told = []
    for compile in (False, True):
        teacher = Teacher(other_teacher / "checkpoints" / "step-000000012", "", Machine(ON_CPU.device, torch.bfloat16, compile))
        _, step = make_step(config, runs, teacher, TeacherConfig(path="", temperature=1.5), compile=compile)
        told.append(torch.stack([step(batch).row for batch in batches]))
    torch.testing.assert_close(*told, rtol=1e-4, atol=1e-5)


def test_a_distilled_run_is_an_ordinary_run(distil, osler, runs, tmp_path, capsys):
    """It logs cross-entropy and KL, comes near its teacher, and after an interruption ends bit for bit as without one."""
    whole, cut, moved = tmp_path / "whole", tmp_path / "cut", tmp_path / "moved"
    assert distil(whole, "optim.lr=1e-2") == 0
    assert f"The teacher is {runs.sft}/checkpoints/step-" in capsys.readouterr().err
    lines = [line for line in logged(whole) if "train/loss" in line]
    assert lines[-1]["distill/kl"] < lines[0]["distill/kl"] and lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert (whole / "tokenizer.json").read_bytes() == (runs.sft / "tokenizer.json").read_bytes()
    assert distil(cut, "optim.lr=1e-2", fault="train-step:sigterm:7") == STOPPED
    moved.symlink_to(runs.sft)
    assert distil(cut, "optim.lr=1e-2", f"teacher.path={moved}") == 0  # its teacher lies elsewhere now
    assert_same_tensors(cut, whole)
    assert [untimed(line) for line in logged(cut)] == [untimed(line) for line in logged(whole)]
    assert osler("report", whole) == 0 and "distill/kl" in (whole / "report.html").read_text()


def test_the_teacher_of_a_run_that_has_begun_is_refused_when_it_is_another(distil, osler, other_teacher, tmp_path, capsys):
    run, branch = tmp_path / "run", tmp_path / "branch"
    assert distil(run, fault="train-step:sigterm:5") == STOPPED
    before = (run / "config.yaml").read_bytes()
    assert distil(run, f"teacher.path={other_teacher}") == 2
    assert "The teacher changed since checkpoint" in capsys.readouterr().err and (run / "config.yaml").read_bytes() == before
    assert distil(run, "teacher.weight=0.9") == 2 and "teacher.weight is 0.9 here and 0.5 there" in capsys.readouterr().err
    assert osler("pretrain", "--branch", run, f"teacher.path={other_teacher}", "--run", branch) == 0
    assert json.loads((branch / "checkpoints/step-000000012/state.json").read_text())["fingerprints"].keys() > {"teacher"}


@pytest.mark.parametrize("temperature", [1e-40, 0, 1e30])
def test_temperatures_that_leave_the_range_of_fp32_are_refused(temperature):
    with pytest.raises(UserError, match=r"teacher\.temperature: must be"):
        decode(TrainConfig, {"teacher": {"path": "run", "temperature": temperature}})


def test_deepspeed_knows_no_teacher():
    with pytest.raises(ValueError, match=r"use parallel\.type=ddp or fsdp"):
        TrainConfig(teacher=TeacherConfig(path="run"), parallel=DeepSpeedConfig())


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["start", "plan"])
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["teacher.path=''"], "No teacher is named: give teacher.path=RUN"),
        (["teacher.path=runs/gone"], "teacher.path=runs/gone: runs/gone is no folder"),
        (["model.vocab_size=600"], "a vocabulary of 512 tokens and the model to train one of 600: set model.vocab_size=512"),
        (["seq_len=128", "teacher.path=SHORT"], "reads 64 tokens (max_seq_len), and a row has seq_len 128"),
        (["init_from=CLINIC"], "has another tokenizer (512 tokens, fingerprint "),
        (["init_from=CLINIC"], "`osler distill` writes the teacher's right answers as examples"),
        (["teacher.path=TORN"], "teacher.path=TORN: No checkpoint in TORN"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_with_both_named(
    overrides, told, dry, distil, runs, clinic_runs, tiny, osler, tmp_path, capsys
):
    if "teacher.path=SHORT" in overrides:
        assert osler("pretrain", tiny.pretrain, "model.max_seq_len=64", "--run", tmp_path / "short") == 0
    if "teacher.path=TORN" in overrides:
        assert osler("pretrain", tiny.pretrain, "total_tokens=256", "--run", tmp_path / "torn") == 0
        [saved] = (tmp_path / "torn" / "checkpoints").glob("step-*")
        (saved / "model.safetensors").write_bytes(b"torn")
    places = {"SHORT": tmp_path / "short", "TORN": tmp_path / "torn", "CLINIC": clinic_runs / "sft"}
    for name, place in places.items():
        overrides = [override.replace(name, str(place)) for override in overrides]
        told = told.replace(name, str(place))
    assert distil(tmp_path / "run", *overrides, *dry) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "run" / "config.yaml").exists()
