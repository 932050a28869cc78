"""Plans of recipes: every shipped one has a plan, and it is honest about what does not fit."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest

from osler.cli.plan import plan, plans_of
from osler.cli.show import decode_recipe
from osler.config.devices import devices, find_device, peak_flops_of
from osler.config.recipe import available_recipes, load_recipe
from osler.config.schema import decode
from osler.plan.estimate import Estimate, exact, total
from osler.plan.plan import HOUR, Measured, Plan, Where
from osler.plan.planner import plan_of
from osler.runtime.errors import UserError
from osler.train.config import TrainConfig

H100 = Where(find_device("h100"))
TRAINED = [name for name in available_recipes() if "kind" in load_recipe(name)]


def planned(recipe: str, *overrides: str, where: Where = H100) -> Plan:
    return plans_of(recipe, overrides, where)[-1]


@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_that_trains_has_a_plan(name) -> None:
    recipe = load_recipe(name)
    starts = ["init_from=pure-medium-large"] if recipe.get("init_from") == "" else []
    for one in plans_of(name, starts, H100):
        for estimate in (one.tokens, one.seconds, one.memory_bytes, one.disk_bytes, one.tokens_per_second, one.flops, one.usd):
            assert estimate is not None and 0 <= estimate.low <= estimate.value <= estimate.high and estimate.source
        assert one.parameters > 0 and one.fits in ("yes", "no", "unsure")


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from osler.cli.main import main; main(['plan', 'a100-1day']);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "15.0B tokens do not fit into 24 hours" in " ".join(done.stdout.split())
    assert "Even at 100 % of the peak" in " ".join(done.stdout.split())


def test_the_published_day_on_an_a100_has_the_flops_of_far_fewer_tokens() -> None:
    one = planned("a100-1day", where=Where(find_device("a100")))
    per_token = decode_recipe(load_recipe("a100-1day")).model.flops_per_token(2048)
    assert per_token == pytest.approx(2.626e9, rel=1e-3)
    assert one.flops.value == 15e9 * per_token
    within = one.tokens_within(exact(24 * HOUR))
    assert within.high < 24 * HOUR * 312e12 * 0.5 / per_token and within.low > 1e9
    assert one.seconds.low > 2 * 24 * HOUR


def test_a_clock_ends_the_run_and_decides_the_tokens() -> None:
    one = planned("osler-20usd", "parallel.type=ddp", where=Where(find_device("h100"), gpus=8, price=2.5))
    assert one.seconds.high < 1.2 * HOUR and one.tokens.low < one.tokens.value < one.tokens.high < 100e9
    assert one.usd is not None and one.usd.value == pytest.approx(20, rel=0.05)
    assert one.tokens_within(exact(HOUR)).value == pytest.approx(one.tokens.value, rel=0.1)


def test_what_lies_within_the_clock_and_what_comes_after_it() -> None:
    """The clock ends at 0.97 × 600 = 582 s: 60 to start, 100 steps of 2, an evaluation of 30, 100 steps, another, 31 steps."""
    batch = 32_768
    config = decode(TrainConfig, {**load_recipe("debug"), "max_minutes": 10, "eval_every_tokens": 100 * batch})
    known = Measured(step_seconds={1: exact(2.0)}, start_seconds=exact(60.0), evaluation_seconds=exact(30.0))
    one = plan_of(config, H100, measured=known)
    assert one.tokens.value == pytest.approx(231 * batch, rel=1e-4)
    assert one.time["training"].value == pytest.approx(462, rel=1e-4)
    assert one.time["evaluations"].value == 3 * 30, "the last one comes after the clock"
    assert one.seconds.value == pytest.approx(582 + 30 + one.time["checkpoints"].value, rel=1e-4)

    late = plan_of(config, H100, measured=replace(known, start_seconds=Estimate(30, 60, 300, "measured")))
    assert late.tokens.low == pytest.approx(126 * batch, rel=1e-4), "582 - 300 - 30 = 252 s of training"
    assert late.tokens.high == pytest.approx(246 * batch, rel=1e-4)
    for place in (0, 2):  # a late start makes the run shorter, not its time longer
        assert late.seconds.numbers[place] == pytest.approx(612 + late.time["checkpoints"].numbers[place], rel=0.001)


def test_a_run_that_ends_before_its_clock_takes_the_time_of_its_parts() -> None:
    config = decode(TrainConfig, {**load_recipe("debug"), "compile": "always"})
    one, timed = (plan_of(each, H100) for each in (config, replace(config, max_minutes=1e6)))
    assert timed.tokens == one.tokens == exact(10e6) and timed.time == one.time
    assert one.seconds.numbers == pytest.approx(total(one.time.values()).numbers)


@pytest.mark.parametrize(
    ("changes", "gpus", "why"),
    [
        ({"parallel": {"type": "ddp"}}, 7, "cannot be shared equally by 7 ranks"),
        ({"parallel": {"type": "fsdp"}, "precision": "pure-bf16"}, 2, "pure-bf16 does not work with parallel.type=fsdp"),
    ],
)
def test_processes_that_cannot_train_together_are_refused_in_the_words_of_training(changes, gpus, why) -> None:
    from osler.train.setup import check_processes

    config = decode(TrainConfig, {**load_recipe("debug"), **changes})
    told = []
    for refuse in (lambda: plan_of(config, Where(find_device("h100"), gpus=gpus)), lambda: check_processes(config, gpus)):
        with pytest.raises(UserError, match=why) as error:
            refuse()
        told.append(str(error.value))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("data", "bytes_of_token"),
    [
        ({"type": "files", "path": "FILE"}, 2),
        ({"type": "turns", "path": "FILE"}, 3),  # with a loss mask
        ({"type": "hub", "name": "pubmed", "path": "FILE"}, 2),
        ({"type": "hub", "name": "synth", "path": "FILE"}, 3),
    ],
)
def test_only_questions_with_answers_have_a_loss_mask_on_the_disk(data, bytes_of_token, tmp_path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"x" * 4500)
    config = decode(TrainConfig, {**load_recipe("debug"), "data": {**data, "path": str(file)}})
    assert config.model.vocab_size < 2**16 and plan_of(config, H100).disk["data"].value == 1000 * bytes_of_token


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ([], [1, 32, 3]),  # the supervised stage sits an exam, after a checkpoint, 32 times
        (["sft.checkpoint.keep_last=8", "grpo.checkpoint.every_steps=240"], [1, 9, 3]),
        (["sft.exam.every_tokens=0", "grpo.init_from=sft", "grpo.eval_task=null", "grpo.checkpoint.every_steps=240"], [1, 1, 1]),
    ],
)
def test_checkpoints_are_saved_before_exams_too(changes, kept) -> None:
    plans = plans_of("quickstart", changes, Where(find_device("cpu")))
    sizes = [4 * 3 * one.parameters for one in plans]  # fp32: the weights and the two moments of AdamW
    found = [one.disk["checkpoints"].value / size for one, size in zip(plans, sizes, strict=True)]
    assert found == pytest.approx(kept)


@pytest.mark.parametrize(
    ("recipe", "options", "told"),
    [
        ("debug", {"gpu": "cpu", "gpus": 4}, "--gpus 4 counts GPUs, and .* are none"),
        ("debug", {"gpu": "h100", "as_table": "csv"}, "--as csv is the form of a table"),
        ("debug", {"table": "cost"}, "leave the recipe and its changes out"),
        (None, {"table": "tokens", "gpu": "h100", "price": 2.0}, "--table tokens does not depend on --gpu and --price"),
    ],
)
def test_options_that_would_change_nothing_are_refused(recipe, options, told) -> None:
    with pytest.raises(UserError, match=told):
        plan(recipe, [], **options)


def test_processes_on_a_cpu_share_its_cores() -> None:
    config = decode(TrainConfig, {**load_recipe("debug"), "parallel": {"type": "ddp"}, "compile": "always"})
    one, two = (plan_of(config, Where(find_device("cpu"), gpus=count)) for count in (1, 2))
    assert one.tokens_per_second == two.tokens_per_second


@pytest.mark.parametrize(
    ("hours", "told"), [(1e-6, "Not even one step does."), (0.05, "(total_tokens="), (1.0, "(total_tokens=")]
)
def test_no_run_without_a_token_is_advised(hours, told) -> None:
    text = " ".join(plan("debug", ["total_tokens=100000000000"], gpu="t4", hours=hours).split())
    assert told in text and "total_tokens=0" not in text


@pytest.mark.parametrize(
    "options", [{"hours": -1.0}, {"hours": math.nan}, {"budget": 0.0}, {"budget": math.inf}, {"gpus": 0}, {"price": math.nan}]
)
def test_numbers_that_are_none_are_refused(options) -> None:
    with pytest.raises(UserError, match=r"--\w+ \S+ must be a number above 0"):
        plan("debug", [], gpu="h100", **options)


@pytest.mark.parametrize(
    ("recipe", "overrides", "told"),
    [
        ("usmle-2day/pretrain", [], "head_dim 72: kernels of current GPUs compute it as 96"),
        ("debug", ["model.head_dim=96"], "head_dim 96: kernels of current GPUs compute it as 128"),
        ("debug", ["precision=fp8"], "precision=fp8 loses at hidden_size 512: nanochat measured"),
        ("debug", ["model.attention={type: sparse, top_k: 300}"], "sparse attention costs more FLOPs than dense in rows of 512"),
        ("debug", ["micro_batch_tokens=512"], "hardly fills a GPU"),
        ("synth-8xh100", [], "does not fit: it takes"),
    ],
)
def test_warnings_come_with_evidence(recipe, overrides, told) -> None:
    assert any(told in note for note in planned(recipe, *overrides).notes)


def test_what_is_told_to_fit_fits() -> None:
    one = planned("synth-8xh100")
    advice = next(note for note in one.notes if "What surely fits" in note)
    micro, mode = (part.split("=")[1].strip(".") for part in advice.split("fits: ")[1].split())
    assert planned("synth-8xh100", f"micro_batch_tokens={micro}", f"recompute={mode}").fits == "yes"


def test_measurements_take_the_place_of_assumptions() -> None:
    config = decode(TrainConfig, load_recipe("debug"))
    step = Estimate(1.9, 2.0, 2.1, "measured")
    measured = Measured(step_seconds={1: step}, memory_bytes=Estimate(0.9e9, 1e9, 1.1e9, "measured"))
    one = plan_of(config, Where(find_device("cpu")), measured=measured)
    assert one.time["training"].value == pytest.approx(2.0 * 10e6 / 32_768) and one.memory_bytes.value == pytest.approx(1e9)
    assert one.tokens_per_second.low == pytest.approx(32_768 / 2.1)


def test_a_stage_of_a_pipeline_has_the_model_of_the_one_that_it_starts_from() -> None:
    plans = plans_of("quickstart", [], Where(find_device("cpu")))
    assert [one.kind for one in plans] == ["pretrain", "sft", "grpo"] and len({one.parameters for one in plans}) == 1


def test_the_exam_of_a_pipeline_is_said_to_be_left_out() -> None:
    [line] = [line for line in plan("quickstart", [], gpu="cpu").splitlines() if "Not planned" in line]
    assert line == "Not planned: the exam in the stage exam, which takes time of its own."


def test_devices_are_found_by_name_driver_or_file(tmp_path) -> None:
    assert find_device("NVIDIA H100 80GB HBM3") is find_device("h100") and peak_flops_of("NVIDIA T400") is None
    own = tmp_path / "own.yaml"
    own.write_text("mine: {title: My card, tflops: 100, memory_gib: 12, bandwidth_gb: 500, usd: [0.1, 0.2]}")
    assert planned("debug", where=Where(find_device(str(own)))).usd is not None
    with pytest.raises(UserError, match="did you mean `h100`"):
        find_device("h10")
    own.write_text("{title: My card, tflop: 100}")
    with pytest.raises(UserError, match="tflop"):
        find_device(str(own))
    with pytest.raises(UserError, match="cannot be read"):
        find_device(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(("name", "gib_of_the_name"), [("h100", 80), ("a100", 80), ("h200", 141), ("gh200", 96), ("rtx4090", 24)])
def test_a_card_has_the_memory_that_a_program_finds(name, gib_of_the_name) -> None:
    assert 0.97 * gib_of_the_name < find_device(name).memory_gib < 0.995 * gib_of_the_name


def test_every_device_of_the_table_plans_and_prices_have_a_day() -> None:
    config = decode(TrainConfig, load_recipe("debug"))
    for device in devices().values():
        assert plan_of(config, Where(device)).seconds.value > 0
        assert (device.usd is None) == (device.seen == "")


def test_what_cannot_be_planned_is_said(tmp_path) -> None:
    with pytest.raises(UserError, match="is a model and no run"):
        plan("pure-tiny", [])
    with pytest.raises(UserError, match="init_from is not given, so its size is unknown"):
        plan("grpo-medqa", [])
    with pytest.raises(UserError, match="which recipe"):
        plan(None, [])
    text = plan("distill/sft", ["init_from=distill/pretrain", "teacher.path=runs/none"])
    assert "Not planned: the teacher runs/none" in text


def test_a_run_fits_only_where_the_upper_end_does() -> None:
    one, device = planned("usmle-2day/pretrain"), find_device("h100")
    for size, told in ((one.memory_bytes.high, "yes"), (one.memory_bytes.value, "unsure"), (one.memory_bytes.low - 1e6, "no")):
        assert replace(one, where=Where(replace(device, memory_gib=size / 2**30))).fits == told


def test_a_cpu_of_the_kind_that_was_measured_learns_about_as_fast() -> None:
    measured = {"quickstart": 45_000, "text-10min": 13_000, "pure-tiny": 1_870}  # tokens/s with two threads on a Xeon with AMX
    here = replace(find_device("cpu"), tflops=1.0, fp32_tflops=0.16, bf16=True)
    for recipe, speed in measured.items():
        base = [] if recipe != "pure-tiny" else ["total_tokens=8192000", "batch_tokens=4096", "micro_batch_tokens=4096"]
        one = plans_of("debug" if base else recipe, base, Where(here))[0]
        assert one.tokens_per_second.low < speed < one.tokens_per_second.high
        assert one.tokens_per_second.value == pytest.approx(speed, rel=0.5)
