"""One optimizer step: micro-batches change nothing, and a gradient that is not finite changes nothing at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from osler.data.mixture import Mixture
from osler.data.order import Order
from osler.data.packing import MixedPacking, WholePacking
from osler.monitor.collect import Collector
from osler.monitor.config import MonitorConfig
from osler.records.jsonl import FAILED, read_events
from osler.runs.loop import Loop
from osler.runs.micro_batch import MicroBatchLimit
from osler.runs.process import Run
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder
from osler.runtime.world import World
from osler.train.batches import make_loader
from osler.train.trainer import TrainStep

pytestmark = pytest.mark.usefixtures("no_compiled_code")


def clones(model, optimizer):
    state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    return [parameter.detach().clone() for parameter in model.parameters()], state


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_gradient_accumulation_is_one_batch(kind, config, prepared, make_step):
    """Micro-batches weigh by their learned tokens, so rows that are mostly prompt or padding count for less."""
    loader = make_loader(config, prepared)
    if kind == "sft":
        whole = WholePacking(Order(prepared.train[0], 0), config.seq_len)
        loader = replace(loader, packings=[MixedPacking({"notes": whole}, Mixture([1]))])
    batches = [loader.batch(index) for index in range(5)]
    learned = torch.stack([(batch.labels >= 0).sum(1) for batch in batches])
    assert kind == "pretrain" or (learned.amin(1) < learned.amax(1)).any()
    results = {}
    for micro in (None, 128, 64):
        model, _, step = make_step(replace(config, micro_batch_tokens=micro, optim=replace(config.optim, eps=1e-3)))
        made = [step(batch) for batch in batches]
        numbers = torch.stack([result.row for result in made])
        results[micro] = numbers, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for micro in (128, 64):
        for found, expected in zip(results[micro], results[None], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_step_without_memory_is_made_again_in_smaller_passes(config, prepared, make_learner, tmp_path):
    """Allocations really fail: what stands for a teacher asks for more than any machine has, once in the middle of a step."""
    run = Run(RunFolder.create(tmp_path / "run"), World())
    batches = [make_loader(config, prepared).batch(index) for index in range(4)]
    learner, twin = (make_learner(replace(config, optim=replace(config.optim, eps=1e-3))) for _ in range(2))
    too_many, passes, made = [9, 1], [], []  # rows from which on a pass does not fit, and the first pass of those that does not

    def hungry(ids, documents):
        passes.append(len(ids))
        torch.empty(2**60 if len(ids) >= too_many[0] and passes.count(len(ids)) >= too_many[1] else 1)
        return ()

    step = TrainStep(learner, micro_batch_limit=MicroBatchLimit(learner, None, run, lambda: len(made) + 1), teacher=hungry)
    plain = TrainStep(twin)
    for given, expected in (((9, 1), [4]), ((3, 1), [4, 2, 2]), ((2, 2), [2, 2, 1, 1, 1, 1])):
        too_many[:] = given
        passes.clear()
        result, same = (each(batches[len(made)]).row for each in (step, plain))
        made.append(result)
        assert passes == expected
        torch.testing.assert_close(result, same, rtol=1e-6, atol=1e-6)
    for found, same in zip(learner.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(found, same, rtol=1e-6, atol=1e-6)

    events = read_events(run.folder.events)
    assert [(event.step, event.details["micro_batch_tokens"]) for event in events] == [(2, 128), (3, 64)]
    assert "memory" in events[0].message and "micro_batch_tokens=128" in events[0].message
    resumed = [MicroBatchLimit(learner, None, run, lambda number=number: number).tokens() for number in (1, 2, 3, 9)]
    assert resumed == [None, 128, 64, 64], "a step that is made again has the passes that it had"
    assert MicroBatchLimit(learner, 256, run, lambda: 9).tokens() == 256, "a start with another limit begins with that"
    too_many[:] = [1, 1]
    with pytest.raises(UserError, match=r"one row at once.*recompute=selective, then full.*seq_len"):
        step(batches[3])


def test_memory_that_runs_out_beside_the_passes_ends_a_run_with_what_helps(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.learner.optimizer.register_step_pre_hook(lambda *_: torch.empty(2**60))
    with pytest.raises(UserError, match=r"beside the passes.*parallel.type=fsdp"):
        Loop(trainer).fit()
    assert read_events(trainer.run.folder.events)[-1].name == FAILED


def test_a_step_that_is_not_finite_leaves_no_trace(config, prepared, make_step):
    loader = make_loader(config, prepared)
    model, optimizer, step = make_step(config)
    twin, twin_optimizer, twin_step = make_step(config)
    for each in (step, twin_step):
        assert each(loader.batch(0)).skipped == 0
    with torch.no_grad():
        poisoned = model.layers[0].self_attn.q_proj.weight
        healthy = poisoned[0, 0].clone()
        poisoned[0, 0] = float("nan")
    before = clones(model, optimizer)
    result = step(loader.batch(1))
    assert result.skipped == 1 and not torch.isfinite(result.grad_norm)
    for found, expected in zip(clones(model, optimizer), before, strict=True):
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():
        poisoned[0, 0] = healthy
    step(loader.batch(1))
    twin_step(loader.batch(1))
    for found, expected in zip(clones(model, optimizer), clones(twin, twin_optimizer), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_compiled_step_is_not_compiled_again(config, prepared, make_step):
    """The look goes through a twin, so that what torch.compile has guarded is as it was."""
    batches = [make_loader(config, prepared).batch(index) for index in range(4)]
    ends = []
    for level in ("off", "full"):
        model, _, step = make_step(config)
        counter = CompileCounter()
        step.engine.loss = torch.compile(step.engine.loss, backend=counter, fullgraph=True, dynamic=False)
        monitor = MonitorConfig(level=level, full_every_steps=2)
        collector = Collector(monitor, model, torch.device("cpu"))
        step.mark, step.around_update = collector.mark, collector.update
        stream, looks = iter(batches), []
        for number in range(1, 5):
            step(collector.fetch(stream, number))
            looks.append("grad/mean" in collector.line())
        assert counter.frame_count == 1
        assert looks == ([True, True, False, True] if level == "full" else [False] * 4)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
