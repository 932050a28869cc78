"""Recipes of pipelines: what is laid under their stages, and every mistake that is told before anything is trained."""

import json
import re
from pathlib import Path

import pytest

from osler.cli.main import main
from osler.cli.show import show_recipe
from osler.config.recipe import dump_yaml, load_recipe, override
from osler.config.schema import encode
from osler.data.config import sources_of
from osler.pipeline.config import decode_pipeline
from osler.runtime.errors import UserError

SMALL = {
    "kind": "pipeline",
    "read": {"kind": "pretrain"},
    "teach": {"kind": "sft", "init_from": "read"},
    "tune": {"kind": "grpo", "init_from": "teach"},
    "exam": {"kind": "exam", "of": {"tuned": "tune"}, "task": {"type": "clinic"}},
}
PIPELINES = ["quickstart", "usmle-2day", "sparse-long", "textbooks/medqa", "textbooks/gsm8k", "textbooks/pubmedqa"]
QUESTION = {"question": "Which metal?", "options": dict(zip("ABCD", ("Iron", "Gold", "Tin", "Lead"), strict=True))}
DECIDED = {"question": "Does it?", "context": {"contexts": ["One."]}, "long_answer": "Yes.", "final_decision": "yes"}


def rows(path: Path, *given: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in given))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a few rows of every file that the recipes name."""
    root = tmp_path_factory.mktemp("files")
    asked = [QUESTION | {"question": f"Which metal is in {n}?", "answer": "Tin", "answer_idx": "C"} for n in range(60)]
    for place, part in {"dev": asked[:40], "train": asked[40:50], "test": asked[50:]}.items():
        rows(root / "exams" / f"medqa-{place}.jsonl", *part)
    rows(root / "medqa" / "train.jsonl", *asked[40:50])
    rows(root / "fineweb_edu" / "page.jsonl", {"text": "A page about iron and tin. " * 9})
    rows(root / "exams" / "gsm8k-train.jsonl", *({"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(40)))
    decided = (DECIDED | {"pubid": n, "question": f"Does {n}?"} for n in range(40))
    rows(root / "exams" / "pubmedqa-labeled-train-500.jsonl", *decided)
    for source in sources_of(decode_pipeline(load_recipe("textbooks/medqa")).pretrain.data).values():
        import pyarrow as pa
        import pyarrow.parquet as pq

        (root / "text").mkdir(exist_ok=True)
        text = [f"A chapter about iron, tin and lead in {n} parts." for n in range(9)]
        pq.write_table(pa.table({"text": text, "question": text, "answer": text}), root / source.path)
    return root


@pytest.mark.parametrize("recipe", PIPELINES)
def test_every_pipeline_is_ready_to_start_where_its_files_are(recipe, files, tmp_path, capsys):
    assert main(["pipeline", recipe, f"root={files}", "--run", str(tmp_path / "run"), "--dry-run"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    config = decode_pipeline(load_recipe(recipe, [f"root={files}"]))
    assert [line.split()[1] for line in shown.splitlines()] == ["run", *config.stages] and "to come" in shown
    assert not (tmp_path / "run").exists()
    resolved = dump_yaml(encode(config))
    assert "exams" not in resolved or f"path: {files}/exams" in resolved


def test_a_missing_file_is_told_with_stage_and_key_before_anything_begins(files, tmp_path, capsys):
    for key in ("pretrain.data.sources[5].path", "sft.data.path", "grpo.tasks[0].task.path", "exam.task.path"):
        run = ["--run", str(tmp_path / "run"), "--dry-run"]
        code = main(["pipeline", "textbooks/medqa", f"root={files}", f"{key}=/no/file", *run])
        told, (stage, _, inside) = capsys.readouterr().err, key.partition(".")
        assert code == 2 and f"osler: stage {stage}: " in told and f"set {inside} to one that exists" in told, told
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_all_missing_files_are_told_at_once_and_that_a_root_is(files, tmp_path, capsys):
    run = ["--run", str(tmp_path / "run"), "--dry-run"]
    assert main(["pipeline", "textbooks/medqa", "pretrain.data.sources[0].path=/no/file", *run]) == 2
    told = capsys.readouterr().err
    assert "7 files or folders that the stages read do not exist. Give root=DIR with DIR/exams and DIR/text, or" in told
    assert "\n  /no/file   (pretrain.data.sources[0].path)" in told
    gone = ["pretrain.data.sources[0].path=gone", "exam.task.path=gone", "sft.data.path=lost"]
    assert main(["pipeline", "textbooks/medqa", f"root={files}", *gone, *run]) == 2
    told = capsys.readouterr().err
    assert "2 files or folders that the stages read do not exist. Put them there, or" in told
    assert f"\n  {files}/lost   (sft.data.path)" in told


def test_seed_and_folder_are_those_of_every_stage_that_gives_none():
    mixture = {"type": "mixture", "sources": [{"type": "clinic", "seed": 3}, {"type": "hub", "name": "medqa"}]}
    config = decode_pipeline(override(SMALL | {"seed": 5, "root": "/r"}, [f"teach.data={json.dumps(mixture)}", "tune.seed=8"]))
    assert (config.read.seed, config.read.data.seed, config.teach.seed, config.tune.seed) == (5, 5, 5, 8)
    sources = list(sources_of(config.teach.data).values())
    assert [source.seed for source in sources] == [3, 5] and sources[1].place == "/r/medqa"
    task = {"type": "medqa", "path": "/abs/a.jsonl", "shots_path": "b.jsonl"}
    config = decode_pipeline(override(SMALL | {"root": "/r"}, [f"exam.task={json.dumps(task)}"]))
    assert (config.exam.task.path, config.exam.task.shots_path) == ("/abs/a.jsonl", "/r/b.jsonl")
    assert decode_pipeline(encode(config)) == config
    config = decode_pipeline(override(SMALL | {"root": "data"}, [f"exam.task={json.dumps(task)}"]))
    assert decode_pipeline(encode(config)) == config, "paths in a stored recipe are found once"


def test_each_stage_is_explained():
    text = show_recipe("quickstart", explain=True)
    assert "seed: 0  # for every stage that trains and every source of data" in text and "\nexam:" in text and "  of:" in text
    assert "  total_tokens: 3276800  # tokens to train on" in text


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ("taech.total_tokens=5", "taech: neither a known key nor a stage, which needs a `kind`; did you mean `teach`?"),
        ("teach.total_token=5", "teach.total_token: unknown key; did you mean `teach.total_tokens`?"),
        ("teach.kind=distil", "teach.kind: should be one of pretrain, sft, grpo, exam"),
        ("teach.kind=[sft]", "teach.kind: should be one of pretrain, sft, grpo, exam"),
        *((f"{name}={{kind: sft}}", f"{name}: a stage names a folder and") for name in ("answers", "stages", "warm-up", "if")),
        ("read.init_from=teach", "read refers to teach, which is not an earlier stage"),
        ("exam.of={a: exam}", "exam refers to exam, which is not an earlier stage"),
        ("late={kind: sft, init_from: exam}", "late refers to exam, which is an exam and has no checkpoint"),
        ("tune.init_from=teach@first", "teach@first; write best, start or accuracy=NUMBER after the @"),
        ("tune.init_from=teach@accuracy=70", "write an accuracy from 0 to 1"),
        ("tune.init_from=teach@accuracy=0.7", "no exam is sat during teach: give it exam.every_tokens above 0"),
        ("exam.of={a: read@start}", "read starts from no checkpoint"),
        ("exam.task=null", "an exam needs `of`, such as {tuned: grpo}, and `task` or `tasks`"),
    ],
)
def test_a_mistake_in_a_recipe_is_told(fields, told):
    with pytest.raises(UserError) as error:
        decode_pipeline(override(SMALL, [fields]), source="mine")
    assert told in str(error.value) and str(error.value).startswith("mine: ")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ("teach.init_from=raed", "stage teach: raed is no earlier stage; did you mean `read`? And no run or checkpoint either"),
        (
            "teach.init_from=gone@best",
            "gone@best is no earlier stage; known: read. And no run or checkpoint either: gone@best is no",
        ),
        ("teach.seq_len=4096", "stage teach: seq_len 4096 is longer than the 2048 tokens (max_seq_len) that the model"),
        ("teach.model.num_layers=9", "stage teach: model differs from that of the stage read, which this stage goes on from"),
        ("teach.tokenizer.vocab_size=300", "stage teach: tokenizer differs from that of the stage read"),
        ("tune.algorithm.max_new_tokens=2048", "stage tune: max_new_tokens 2048 leaves no room for a question"),
        ("exam.max_new_tokens=4000", "stage exam: max_new_tokens 4000 leaves no room for a question"),
        ("exam.task.split=nowhere", "stage exam: "),
        ("tune.eval_task.split=train", "questions of task clinic are also in eval_task"),
        ("teach.data={type: prepared, path: /no/shards}", "stage teach: "),
        ("teach.monitor.alert_command=no-such-program", "stage teach: "),
    ],
)
def test_what_a_later_stage_would_miss_is_told_before_the_first(fields, told, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(SMALL))
    assert main(["pipeline", str(recipe), fields, "--run", str(tmp_path / "run"), "--dry-run"]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_questions_that_are_both_learned_and_examined_are_told(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(SMALL))
    both = ["exam.task.split=train", "exam.task.limit=20", "tune.tasks=[{task: {type: clinic, split: train, limit: 20}}]"]
    assert main(["pipeline", str(recipe), *both, "--run", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "20 of the 20 questions of this exam are also those that tune learns from" in " ".join(capsys.readouterr().err.split())


def test_questions_of_an_exam_that_fine_tuning_learns_from_are_told(files, tmp_path, capsys):
    given = ["pipeline", "textbooks/medqa", f"root={files}", "--run", str(tmp_path / "run"), "--dry-run"]
    assert main(given) == 0
    assert "learns from" not in capsys.readouterr().err
    assert main([*given, "sft.data.fold=all"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    held_out = re.search(r"(\d+) of the (\d+) questions of this exam are also those that sft learns from", told)
    assert held_out and held_out[1] == held_out[2]
    dropped = "sft.data.clean={exams: [{type: medqa, path: exams/medqa-dev.jsonl}]}"
    assert main([*given, "sft.data.fold=all", dropped]) == 0
    assert "learns from" not in capsys.readouterr().err


@pytest.mark.parametrize("asked", [True, False])
def test_grpo_that_asks_otherwise_than_was_taught_is_told(asked, tmp_path, capsys):
    recipe, questions = tmp_path / "mine.yaml", tmp_path / "questions.jsonl"
    rows(questions, {"question": "Which metal?", "answer": "Tin"})
    recipe.write_text(json.dumps(SMALL | {"teach": SMALL["teach"] | {"data": {"type": "turns", "path": str(questions)}}}))
    task = {"task": {"type": "clinic", "split": "train", "limit": 20}, "reasoning": asked}
    given = [f"tune.tasks={json.dumps([task])}", "--run", str(tmp_path / "run"), "--dry-run"]
    assert main(["pipeline", str(recipe), *given]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert ("tune asks for answers with reasoning and teach teaches them without it" in told) == asked
    assert ("give tune.tasks[0].reasoning=false" in told) == asked
