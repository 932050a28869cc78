"""`osler eval prompt=plain` against lm-evaluation-harness with our model as its LM: every item of five exams, one by one.

    pip install -e '.[harness]'
    python benchmarks/harness_parity.py --data DIR [--run RUN] [--limit N] [--out FILE]

DIR/exams has medqa-dev.jsonl, medmcqa-validation-2000.jsonl, pubmedqa-labeled-train-500.jsonl and gsm8k-train.jsonl, DIR/text
some text. There is no file of HellaSwag: 500 rows in the format of the official one are drawn from the text, activity labels,
brackets and all. Without --run a small model is trained first, for some minutes, on the text and over and over on some of the
questions of GSM8K, so that it gets some items right and others wrong.

The harness runs its own task files (`include:`), with `dataset_path: json` and the fields of the rows renamed to those of its
datasets. Per item: the texts of the prompts, the log-likelihood of every option, the option chosen, right or wrong; of GSM8K the
text written and what both of the harness's filters make of it. Answers of ours come from the file in the run folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measuring import ROOT, publish

NEW_TOKENS = 256  # the harness's default
LEARNED = 300  # questions of GSM8K that the model sees again and again
HELLASWAG_ROWS = 500
Row = dict[str, Any]


class Exam(NamedTuple):
    """An exam: its file, the harness's task, how a row becomes one of the harness's dataset, and how Osler takes the exam."""

    file: str
    task: str
    convert: Callable[[Row], Row]
    method: str
    shots: str = ""


def medqa(row: Row) -> Row:
    endings = {f"ending{number}": row["options"][letter] for number, letter in enumerate("ABCD")}
    return {"sent1": row["question"], **endings, "label": "ABCD".index(row["answer_idx"])}


def pubmedqa(row: Row) -> Row:
    return {"CONTEXTS": row["context"]["contexts"], "QUESTION": row["question"], "final_decision": row["final_decision"]}


EXAMS = {
    "medqa": Exam("medqa-dev.jsonl", "medqa/medqa.yaml", medqa, "letters"),
    "medmcqa": Exam("medmcqa-validation-2000.jsonl", "medmcqa/medmcqa.yaml", dict, "letters"),
    "pubmedqa": Exam("pubmedqa-labeled-train-500.jsonl", "pubmedqa/pubmedqa.yaml", pubmedqa, "cloze"),
    "hellaswag": Exam("hellaswag.jsonl", "hellaswag/hellaswag.yaml", dict, "cloze"),
    "gsm8k": Exam("gsm8k-train.jsonl", "gsm8k/gsm8k.yaml", dict, "generation"),
}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def drawn_hellaswag(texts: Sequence[str], count: int) -> list[Row]:
    """Rows in the format of the official file, made of sentences: one ending follows, three come from elsewhere."""
    rng, sentences = random.Random(0), [one.split(". ") for one in texts]
    long = [[each.strip() for each in one if 20 < len(each) < 200 and "\n" not in each] for one in sentences]
    long = [one for one in long if len(one) > 3]
    rows = []
    for number in range(count):
        text = rng.choice(long)
        place, label = rng.randrange(len(text) - 2), rng.randrange(4)
        endings = [rng.choice(rng.choice(long)) for _ in range(4)]
        endings[label] = text[place + 2]
        marks = ("[header] ", " [title] ", " [step] ") if number % 2 else ("", " ", "")
        first = f"{marks[0]}{text[place]}.{marks[1]}" + ("How to  go on." if number % 2 else "")
        second = text[place + 1].split(" ")[0].lower() if number % 3 else ""
        rows.append({
            "activity_label": ("Reading", "Health", "Getting a Haircut")[number % 3], "ctx_a": first, "ctx_b": second,
            "endings": [f"{marks[2].lstrip()}{ending}." for ending in endings], "label": str(label),
        })  # fmt: skip
    return rows


def train(data: Path, folder: Path) -> Path:
    """A model of five million parameters that has read some text, and knows some answers by heart."""
    texts, solved = folder / "texts", folder / "solved.jsonl"
    texts.mkdir()
    for file in sorted((data / "text").glob("openstax-*.parquet")):
        shutil.copy(file, texts)
    known = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in read(data / "exams" / EXAMS["gsm8k"].file)]
    write(solved, [{"text": text} for text in known[:LEARNED] for _ in range(2)])
    sources = (
        f"data.sources=[{{type: files, name: texts, path: {texts}, weight: 30}}, "
        f"{{type: files, name: solved, path: {solved}, weight: 70, holdout_fraction: 0}}]"
    )
    command = ["pretrain", "text-10min", "data.type=mixture", sources, "tokenizer.vocab_size=4096", "model.vocab_size=4096"]
    size = ["model.max_seq_len=2048", "total_tokens=5000000", "eval_every_tokens=5000000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    run = folder / "run"
    subprocess.run([sys.executable, "-m", "osler.cli", *command, *size, "--run", str(run)], env=environment, check=True)
    return run


def ours(run: Path, kind: str, file: Path, method: str, shots: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The answers of `osler eval` to a file, in its order."""
    from osler.cli.main import main
    from osler.records import jsonl

    shutil.rmtree(run / "answers", ignore_errors=True)
    fields = [f"method={method}", "prompt=plain", "normalise=characters", f"max_new_tokens={NEW_TOKENS}", "device=cpu"]
    if main(["eval", str(run), f"task.type={kind}", f"task.path={file}", *shots, *fields]):
        raise SystemExit(1)
    [written] = (run / "answers").glob("*.jsonl")
    return sorted(jsonl.read(written)[0][1:], key=lambda row: int(row["number"]))


def theirs(run: Path, exam: Exam, file: Path, shots: Path | None = None, count: int = 0) -> list[dict[str, Any]]:
    """What the harness says of every item, in the order of the file, by its own task on local data."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from osler.eval.harness import OslerLM

    stock = Path(lm_eval.__file__).parent / "tasks" / exam.task
    files = {"test": str(file), **({"train": str(shots)} if shots else {})}
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "train" if shots else None}
    local = {"include": str(stock), "task": "local", "dataset_path": "json", "dataset_name": None, **splits}
    sampler = {"fewshot_config": {"sampler": "first_n"}} if shots else {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "local.yaml").write_text(json.dumps({**local, **sampler, "dataset_kwargs": {"data_files": files}}))
        found = lm_eval.simple_evaluate(
            model=OslerLM(run, device="cpu"),
            tasks=["local"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            num_fewshot=count,
            bootstrap_iters=0,
        )
    return sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])


def compared_options(run: Path, kind: str, file: Path, exam: Exam, own: Sequence[Row], harness: Sequence[Row]) -> Row:
    """How the log-likelihoods, the choices and the scores of two lists of answers differ."""
    from osler.eval.run import FORMS
    from osler.tasks.item import answer_texts, render_plain, wording

    form, items = FORMS[exam.method], load(kind, file, exam)
    texts, options, twice, chosen, right, differences = 0, 0, 0, 0, 0, []
    for item, mine, sample in zip(items, own, harness, strict=True):
        sums = [float(one[0]) for one in mine["output"]]
        said = [float(one[0][0]) for one in sample["resps"]]
        asked = [tuple(one) for one in arguments(sample)]
        answers = answer_texts(item, form)
        texts += asked == [(render_plain(item, form), f" {answer}") for answer in answers]
        differences += [abs(one - other) for one, other in zip(sums, said, strict=True)]
        per_character = [total / len(answer) for total, answer in zip(sums, answers, strict=True)]
        theirs_per_character = [total / len(answer) for total, answer in zip(said, answers, strict=True)]
        choices = [values.index(max(values)) for values in (sums, said, per_character, theirs_per_character)]
        chosen += choices[0] == choices[1] and choices[2] == choices[3]
        twice += len(set(map(wording, item.options))) < len(item.options)
        metric = "acc_norm" if exam.method == "cloze" and "acc_norm" in sample else "acc"
        value = choices[2] if metric == "acc_norm" else choices[0]
        right += float(sample[metric]) == float(value == item.answer_index)
        options += len(sums)
    raw = [float(sample["acc"]) for sample in harness]
    norm = [float(sample["acc_norm"]) for sample in harness if "acc_norm" in sample]
    return {
        "items": len(items),
        "options": options,
        "items_with_equal_prompts": texts,
        "items_with_equal_choices": chosen,
        "items_scored_equally": right,
        "items_that_print_an_option_twice": twice,
        "largest_difference_nats": max(differences),
        "options_equal_to_the_bit": sum(one == 0 for one in differences),
        "harness_acc": sum(raw) / len(raw),
        **({"harness_acc_norm": sum(norm) / len(norm)} if norm else {}),
        "osler_accuracy": accuracies(run),
    }


def compared_texts(run: Path, kind: str, file: Path, exam: Exam, own: Sequence[Row], harness: Sequence[Row]) -> Row:
    """How the written answers and their scores differ; the harness has one sample for each filter."""
    from osler.eval.exams import STOPS, parse_text
    from osler.inference.load import open_model
    from osler.tasks.answers import PUBLISHED, published_reading
    from osler.tasks.item import render_plain

    tokenizer, items = open_model(run, device="cpu").tokenizer, load(kind, file, exam)
    result: Row = {"items": len(items)}
    for rule in PUBLISHED:
        samples = [sample for sample in harness if sample["filter"] == rule]
        prompts, texts, right, scores = 0, 0, 0, []
        for item, mine, sample in zip(items, own, samples, strict=True):
            completion = parse_text(tokenizer, mine["output"], STOPS)
            prompts += next(iter(arguments(sample)))[0] == render_plain(item, "letters")
            texts += completion.answer == sample["resps"][0][0]
            scores.append(published_reading(rule, item, completion).right)
            right += float(scores[-1]) == float(sample["exact_match"])
        said = sum(float(sample["exact_match"]) for sample in samples) / len(samples)
        result[rule] = {
            "items_with_equal_prompts": prompts,
            "items_with_equal_texts": texts,
            "items_scored_equally": right,
            "harness_exact_match": said,
            "osler_accuracy": sum(scores) / len(scores),
        }
    return {**result, "osler_accuracy": accuracies(run)}


def arguments(sample: Row) -> Iterator[Sequence[Any]]:
    """The arguments of the harness's requests for an item."""
    for arguments in sample["arguments"].values() if isinstance(sample["arguments"], dict) else sample["arguments"]:
        yield list(arguments.values()) if isinstance(arguments, dict) else arguments


def accuracies(run: Path) -> dict[str, float]:
    """The scores that `osler eval` put into the run folder."""
    [scores] = json.loads((run / "exams.json").read_text()).values()
    return {split: row["accuracy"] for split, row in scores.items()}


def load(kind: str, file: Path, exam: Exam) -> list[Any]:
    """The items of a file, as `osler eval` reads them."""
    from osler.data.named import load_task
    from osler.eval.config import config_of

    shots = [f"task.shots={exam.shots.split(',')[0]}", f"task.shots_path={exam.shots.split(',')[1]}"] if exam.shots else []
    return load_task(config_of([f"task.type={kind}", f"task.path={file}", *shots]).task)


def compare(run: Path, kind: str, rows: Sequence[Row], folder: Path, shots: Sequence[Row] = ()) -> Row:
    """Let both score ``rows`` of an exam, after the solved examples ``shots`` if there are any."""
    exam, file = EXAMS[kind], write(folder / f"{kind}.jsonl", rows)
    local = write(folder / f"{kind}-harness.jsonl", [exam.convert(row) for row in rows])
    examples, solved, options = None, None, list[str]()
    if shots:
        examples = write(folder / f"{kind}-shots.jsonl", shots)
        solved = write(folder / f"{kind}-shots-harness.jsonl", [exam.convert(row) for row in shots])
        options = [f"task.shots={len(shots)}", f"task.shots_path={examples}"]
        exam = exam._replace(shots=f"{len(shots)},{examples}")
    (run / "exams.json").unlink(missing_ok=True)
    own = ours(run, kind, file, exam.method, options)
    harness = theirs(run, exam, local, solved, len(shots))
    return (compared_texts if exam.method == "generation" else compared_options)(run, kind, file, exam, own, harness)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with exams/ and text/")
    parser.add_argument("--run", type=Path, help="a run folder, instead of a model that is trained here")
    parser.add_argument("--exams", nargs="+", choices=EXAMS, default=list(EXAMS))
    parser.add_argument("--limit", type=int, help="take so many items of each exam")
    parser.add_argument("--shots", type=int, default=0, help="solved examples; the first rows, which are not asked then")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    asked = parser.parse_args()
    results: Row = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = asked.run or train(asked.data, folder)
        for kind in asked.exams:
            if kind == "hellaswag":
                texts = [text for file in (asked.data / "text").glob("openstax-*.parquet") for text in read_texts(file)]
                rows = drawn_hellaswag(texts, HELLASWAG_ROWS)
            else:
                rows = read(asked.data / "exams" / EXAMS[kind].file)
            if kind == "gsm8k" and asked.shots:  # Osler shows solutions without the calculator's annotations
                rows = [{**row, "answer": re.sub(r"<<[^<>]*>>", "", row["answer"])} for row in rows]
            shots, rows = rows[: asked.shots], rows[asked.shots :][: asked.limit]
            results[kind] = compare(run, kind, rows, folder, shots)
            print(kind, json.dumps(results[kind]), file=sys.stderr)
    import lm_eval

    version = lm_eval.__version__
    publish({"benchmark": "harness-parity", "lm_eval": version, "shots": asked.shots, "exams": results}, asked.out)


def read_texts(file: Path) -> list[str]:
    from osler.files.rows import read_rows

    return [row.values["text"] for row in read_rows(file, ("text",))]


if __name__ == "__main__":
    main()
