"""Every shipped recipe passes ``--dry-run`` as it is, and those that pretrain run, scaled down, on stand-in data."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from run_folders import logged

from osler.cli.main import main
from osler.clinic.textbook import textbook
from osler.config.recipe import available_recipes, load_recipe, run_name
from osler.config.schema import decode
from osler.data.config import sources_of
from osler.data.curriculum import rows_per_micro_batch
from osler.data.named import SOURCES, exam_by_name, load_task
from osler.data.sources import open_corpora
from osler.files.hub import hub_files
from osler.inference.load import load_model
from osler.rl.config import GrpoConfig
from osler.tasks.item import render_question
from osler.tokenizer.bpe import EOS, Tokenizer
from osler.train.config import TrainConfig
from tests.data.hub_server import cut, serving, times
from tests.data.test_named import ROWS

KINDS = {name: load_recipe(name).get("kind") for name in available_recipes()}
SPARSE_LONG = ["sparse-long/dense", "sparse-long/warmup", "sparse-long/sparse"]
PRETRAIN = [name for name, kind in KINDS.items() if kind == "pretrain" and name not in SPARSE_LONG]
GRPO = [name for name, kind in KINDS.items() if kind == "grpo"]
IN_STAGES = {"superbpe-curriculum": 6, "ultra-curriculum": 10, "four-stage/1-wikipedia-24gb": 4, "four-stage/all": 4}
NAMED = [name for name in (*PRETRAIN, *SPARSE_LONG) if load_recipe(name)["data"]["type"] in ("hub", "mixture")]
STEPS = 10
SMALL_CLINIC = [f"data.{name}={count}" for name, count in {"passages": 60, "examples": 60, "cards": 0, "drills": 0}.items()]
MODEL = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}


def write_like_the_hub(root: Path, name: str, split: str, subset: str, rows: list[dict]) -> None:
    """Write rows of a source into a file that is named as on the hub, in a folder that is named after the source."""
    known = SOURCES[name]
    pattern = known.files[0].format(split=split or known.splits[0], subset=subset or known.subsets[0])
    file = root / name / pattern.replace("*", "00000")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".txt":
        for number, row in enumerate(rows):
            file.with_stem(str(number)).write_text(row["text"])
    elif file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=10)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_with_texts(name: str, subset: str) -> list[dict]:
    """Rows of a source that have the clinic's textbook as their text, other parts of it in each source."""
    row = ROWS[name][0]
    field = next(field for field in ("text", "query", "content", "clean_text", "question", "messages") if field in row)
    values: list = textbook(len(name) + len(subset), 40)
    if name == "wikitext":
        values = [f" = Page {number} = \n{text}\n" for number, text in enumerate(values)]
    if field == "messages":
        values = [[{"role": "user", "content": text}, row[field][1]] for text in values]
    return [
        {**row, field: value} | ({"query_seed_url": f"page {place}"} if name == "synth" else {})
        for place, value in enumerate(values)
    ]


@pytest.fixture(scope="module")
def named_files(tmp_path_factory) -> Path:
    """A folder that has a folder for each source and exam by name, with files like the hub's."""
    root = tmp_path_factory.mktemp("hub")
    for name in NAMED:
        config = decode(TrainConfig, load_recipe(name))
        for source in (*sources_of(config.data).values(), *config.validation):
            subset = source.subset or SOURCES[source.name].subsets[0]
            write_like_the_hub(root, source.name, source.split, subset, rows_with_texts(source.name, subset))
        for exam in config.data.clean.exams if config.data.clean else ():
            _, subset, split = exam_by_name(exam.name)
            write_like_the_hub(root, exam.name, split, subset, [ROWS[exam.name][0]])
    return root


@pytest.fixture(scope="module")
def stand_in(tiny, runs, named_files, tmp_path_factory) -> SimpleNamespace:
    """A folder to start commands in, with text, rows of question, thinking and answer, and exam files where recipes look."""
    root = tmp_path_factory.mktemp("stand-in")
    (root / "text").mkdir()
    (root / "text" / "book.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in textbook(0, 100)))
    turns = [json.loads(line) for line in tiny.turns.read_text().splitlines()]
    (root / "turns.jsonl").write_text("".join(json.dumps({**turn, "thinking": turn["why"]}) + "\n" for turn in turns))
    (root / "exams").mkdir()
    for split in ("train", "dev"):
        options = {"options": dict(zip("ABCD", "wxyz", strict=True)), "answer": "x", "answer_idx": "B"}
        medqa = [{"question": f"{split} question {n}?", **options} for n in range(20)]
        gsm8k = [{"question": f"What is {n} and 1, {split}?", "answer": f"It is.\n#### {n + 1}"} for n in range(20)]
        for name, rows in (("medqa", medqa), ("gsm8k", gsm8k)):
            (root / "exams" / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(
        root=root, text=root / "text", turns=root / "turns.jsonl", hub=named_files, tokenizer=tiny.tokenizer, start=runs.pretrain
    )


def given(name: str, stand_in: SimpleNamespace) -> list[str]:
    """What a person adds to a recipe: the data, and the run that it starts from."""
    recipe = load_recipe(name)
    named = [f"data.root={stand_in.hub}", "data.streaming=false"]
    data = {"files": [f"data.path={stand_in.text}"], "clinic": SMALL_CLINIC, "hub": named, "mixture": named}
    start = [f"init_from={stand_in.start}"] if "init_from" in recipe else []
    tokenizer = [f"tokenizer.path={stand_in.tokenizer}"] if "path" in recipe.get("tokenizer", {}) else []
    return [*data[recipe["data"]["type"]], *start, *tokenizer]


def scaled_down(config: TrainConfig) -> list[str]:
    """Overrides that leave the structure and take the size: short rows, few of them, as many forward passes a step and stages."""
    if config.curriculum:
        seq_len, micro = config.seq_len // 8, max(config.seq_len // 8, (config.micro_batch_tokens or 0) // 64)
        batch, until, stages = config.batch_tokens // 64, 0, []
        for stage in config.curriculum:
            rows = (stage.batch_tokens or config.batch_tokens) // stage.seq_len // 8
            length = stage.seq_len // 8
            until += 2 * rows * length
            weights = {} if stage.weights is None else {"weights": stage.weights}
            stages.append({"seq_len": length, "until_tokens": until, "batch_tokens": rows * length, **weights})
        del stages[-1]["until_tokens"]
        sizes = [f"curriculum={json.dumps(stages)}"]
    else:
        seq_len = micro = config.seq_len // 32
        passes = rows_per_micro_batch(config.batch_tokens // (config.micro_batch_tokens or config.batch_tokens), 1, 16)
        batch = seq_len * passes
        until, sizes = STEPS * batch, []
    model = MODEL | ({"embed_rank": 8} if config.model.embed_rank else {})
    return [
        *sizes, f"seq_len={seq_len}", f"batch_tokens={batch}", f"micro_batch_tokens={micro}", f"total_tokens={until}",
        *(f"model.{name}={value}" for name, value in model.items()), "model.vocab_size=512",
        f"schedule.warmup_tokens={batch}", f"eval_every_tokens={until}", f"checkpoint.every_tokens={until}",
        "log_every_steps=1", "max_minutes=null", "device=cpu", "precision=fp32", "compile=never",
    ]  # fmt: skip


@pytest.mark.parametrize("name", PRETRAIN)
def test_a_pretraining_recipe_passes_the_dry_run_and_runs_scaled_down(name, stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(stand_in.root)
    rows = ["seq_len=256"] if "init_from" in load_recipe(name) else []  # all that the model reads that stands in for the start
    assert main(["pretrain", name, *given(name, stand_in), *rows, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert f"# steps             {'at most ' if 'max_minutes' in load_recipe(name) else ''}" in plan
    assert plan.count("rows at once") == IN_STAGES.get(name, 0)
    config = decode(TrainConfig, load_recipe(name))
    stages = len(config.curriculum)
    overrides = [*given(name, stand_in), *scaled_down(config), f"tokenizer.path={stand_in.tokenizer}"]
    assert main(["pretrain", name, *overrides, "--run", str(tmp_path)]) == 0
    lines = logged(tmp_path)
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == (2 * stages or STEPS)
    assert all(math.isfinite(line["train/loss"]) and math.isfinite(line["train/grad_norm"]) for line in steps)
    assert any("eval/bits_per_byte" in line for line in lines)
    assert stages == IN_STAGES.get(name, 0)
    if stages:
        assert [line["train/stage"] for line in steps] == [number for number in range(1, stages + 1) for _ in range(2)]
        assert [line["train/seq_len"] for line in steps[::2]] == [stage.seq_len // 8 for stage in config.curriculum]


def test_the_stages_of_sparse_attention_run_scaled_down(stand_in, tmp_path):
    """Each of two steps: with dense attention, of the indexers alone, and with sparse attention."""
    overrides = [f"root={stand_in.hub}", "warmup.model.attention={top_k: 16, local_window: 4}"]
    for name in SPARSE_LONG:
        given = [*scaled_down(decode(TrainConfig, load_recipe(name))), "data.streaming=false", "curriculum=[]"]
        given += ["seq_len=64", "batch_tokens=256", "micro_batch_tokens=128", "total_tokens=512"]
        given += ["schedule.warmup_tokens=256", f"tokenizer.path={stand_in.tokenizer}"]
        overrides += [f"{name.removeprefix('sparse-long/')}.{field}" for field in given]
    assert main(["pipeline", "sparse-long", *overrides, "--run", str(tmp_path)]) == 0
    lines = {stage.name: logged(stage)[1] for stage in tmp_path.iterdir() if (stage / "metrics.jsonl").exists()}
    assert {stage: math.isfinite(line.get("index/recall", math.nan)) for stage, line in lines.items()} == {
        "dense": False, "warmup": True, "sparse": True
    }  # fmt: skip
    attention = load_model(tmp_path / "sparse").model.config.attention
    assert (attention.type, attention.top_k) == ("sparse", 16)


@pytest.mark.slow
def test_a_stream_from_the_hub_trains_as_prepared_local_files_do(stand_in, tmp_path, monkeypatch, capsys):
    """With every source of synth-8xh100 on a server that has the hub's layout, and cuts a connection."""
    monkeypatch.chdir(tmp_path)
    overrides = [*scaled_down(decode(TrainConfig, load_recipe("synth-8xh100"))), f"tokenizer.path={stand_in.tokenizer}"]
    with serving({SOURCES[folder.name].repo: folder for folder in stand_in.hub.iterdir()}) as server:
        hub_files.cache_clear()
        server.trouble = times(1, cut)
        for name, value in {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_secret"}.items():
            monkeypatch.setenv(name, value)  # for the process that prepares
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
        assert main(["pretrain", "synth-8xh100", *overrides, "data.streaming=true", "--run", "streamed"]) == 0
    local = [f"data.root={stand_in.hub}", "data.streaming=false"]
    assert main(["pretrain", "synth-8xh100", *overrides, *local, "--run", "prepared"]) == 0
    streamed, prepared = (
        [line["train/loss"] for line in logged(Path(run)) if "train/loss" in line] for run in ("streamed", "prepared")
    )
    assert streamed == prepared and len(prepared) == STEPS
    shutil.copytree(stand_in.hub, tmp_path / "moved")
    capsys.readouterr()
    assert main(["pretrain", "--resume", "--run", "prepared", "data.root=moved"]) == 0
    assert "have moved: data.root is moved here" in capsys.readouterr().err


def test_special_tokens_that_a_tokenizer_lacks_take_padding_rows_of_the_model(tiny, tmp_path, capsys):
    """As with GPT-2's tokenizer and factorized-177m: 50,257 tokens fill the vocabulary, and the template needs three more."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(Tokenizer.train(textbook(0, 50), 300, specials=(EOS,)).to_bytes())
    command = ["pretrain", str(tiny.pretrain), f"tokenizer.path={path}", "--run", str(tmp_path / "run")]
    assert main([*command, "model.vocab_size=299"]) == 2, "the 300th token is none of the template's"
    assert "set model.vocab_size=303" in capsys.readouterr().err
    assert main([*command, "model.vocab_size=300"]) == 0
    assert "3 special tokens come after the 300 of the model" in capsys.readouterr().err
    loaded = load_model(tmp_path / "run")
    assert loaded.model.config.vocab_size == loaded.tokenizer.vocab_size == 303
    assert loaded.model.embed_tokens.weight.shape[0] == loaded.model.config.padded_vocab_size == 320
    assert loaded.model.logits(loaded.model(torch.tensor([[302]]))).shape[-1] == 303
    longer = ["seq_len=192", "batch_tokens=576", "total_tokens=1152"]
    assert main(["sft", str(tiny.sft), f"init_from={tmp_path / 'run'}", *longer, "--run", str(tmp_path / "sft")]) == 0


@pytest.mark.parametrize("name", GRPO)
def test_a_grpo_recipe_passes_the_dry_run_and_finds_its_questions(name, stand_in, monkeypatch, capsys):
    monkeypatch.chdir(stand_in.root)
    assert main(["grpo", name, f"init_from={stand_in.start}", "--dry-run"]) == 0
    assert "# completions" in capsys.readouterr().out
    config = decode(GrpoConfig, load_recipe(name))
    others = (8, 4_000, 200) if name.startswith("grpo-control/") else (16, 20, 20)
    samples, questions, held_out = (4, 4_000, 50) if name == "grpo-debug" else others
    assert config.algorithm.samples_per_prompt == samples
    assert all(len(load_task(entry.task)) == questions for entry in config.tasks)
    assert len(load_task(config.eval_task)) == held_out


def test_the_supervised_control_learns_answers_to_the_questions_of_grpo_and_no_reasoning():
    data = decode(TrainConfig, {**load_recipe("grpo-control/supervised"), "init_from": "run"}).data
    grpo = decode(GrpoConfig, load_recipe("grpo-control/correct"))
    [corpus] = open_corpora(data).values()
    turns = [document.turn for document in corpus.documents()]
    asked = {render_question(item) for entry in grpo.tasks for item in load_task(entry.task)}
    assert {turn.question for turn in turns} == asked and {turn.thinking for turn in turns} == {None}


def test_the_chain_of_usmle_2day_runs_scaled_down_and_not_without_its_middle(stand_in, tmp_path, monkeypatch, capsys):
    """Each recipe starts by itself from what the one before it left; GRPO on a model that never saw the template is refused."""
    shutil.copytree(stand_in.root / "exams", tmp_path / "exams")
    monkeypatch.chdir(tmp_path)
    plain = ["device=cpu", "precision=fp32"]
    first = [*given("usmle-2day/pretrain", stand_in), *scaled_down(decode(TrainConfig, load_recipe("usmle-2day/pretrain")))]
    assert main(["pretrain", "usmle-2day/pretrain", *first, f"tokenizer.path={stand_in.tokenizer}", "model.max_seq_len=256"]) == 0
    grpo = ["grpo", "usmle-2day/grpo", *plain, "algorithm.max_new_tokens=64", "algorithm.samples_per_prompt=4", "steps=2"]
    grpo += ["schedule.warmup_tokens=4096", "eval_task.limit=4"]
    assert main([*grpo, "init_from=runs/usmle-2day-pretrain"]) == 2
    told = capsys.readouterr().err
    assert "GRPO would learn nothing from runs/usmle-2day-pretrain" in told and "osler sft usmle-2day/format" in told
    assert not Path("runs/usmle-2day-grpo").exists()
    assert main(["sft", "usmle-2day/format", *plain, "seq_len=256", "--dry-run"]) == 0  # on the clinic, as it is
    middle = ["data.type=turns", f"data.path={stand_in.turns}", "data.thinking_field=thinking", "seq_len=128"]
    middle += ["batch_tokens=512", "micro_batch_tokens=512", "total_tokens=60_000", "optim.lr=1e-2", "schedule.warmup_tokens=999"]
    assert main(["sft", "usmle-2day/format", *plain, *middle, "compile=never"]) == 0
    assert main(grpo) == 0
    told = capsys.readouterr().err
    assert "Warning: none of" not in told and "Done: runs/usmle-2day-grpo" in told
    assert [load_model(f"runs/usmle-2day-{name}").state["kind"] for name in ("format-sft", "grpo")] == ["sft", "grpo"]


def test_a_run_is_named_after_its_recipe_and_the_folder_of_that_or_else_after_its_data(tiny, stand_in, monkeypatch, capsys):
    monkeypatch.chdir(stand_in.root)
    start, text = f"init_from={stand_in.start}", f"data.root={stand_in.hub}"
    for command, folder in (
        (["pretrain", "usmle-2day/pretrain", text], "runs/usmle-2day-pretrain"),
        (["pretrain", "four-stage/1-wikipedia", text], "runs/four-stage-1-wikipedia-pretrain"),
        (["grpo", "usmle-2day/grpo", start], "runs/usmle-2day-grpo"),
        (["sft", tiny.sft], "runs/sft-sft"),
        (["sft"], "runs/clinic-sft"),
        (["sft", "data.type=turns", "data.path=turns.jsonl"], "runs/turns-sft"),
    ):
        assert main([*command, "--dry-run"]) == 0
        assert f"# run folder        {folder}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in KINDS if load_recipe(name).get("init_from")])
def test_a_recipe_that_goes_on_starts_where_the_one_before_it_ends(name):
    assert load_recipe(name)["init_from"] in {f"runs/{run_name(other, kind)}" for other, kind in KINDS.items() if kind}


def test_the_start_that_a_recipe_leaves_open(capsys):
    assert main(["grpo", "grpo-medqa", "--dry-run"]) == 2
    assert "No checkpoint is named: give a run folder or one of its checkpoints" in capsys.readouterr().err
