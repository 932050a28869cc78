"""The model card: what a model is, what it learned from and how, what it scored, and what it is not for, in Markdown.

It states only what the records of the runs say (after Mitchell et al. 2019, Model Cards for Model Reporting). Of a path it
shows only the last part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from osler.checkpoint import store
from osler.config.recipe import dump_yaml, load_yaml
from osler.export.folder import made_in_words
from osler.inference.load import MADE_BY, LoadedModel, training_of
from osler.model.config import ModelConfig
from osler.records import jsonl
from osler.records.results import ExamScore, read_exams
from osler.runtime.errors import UserError
from osler.runtime.files import RunFolder

DATA_CARD = "DATA_CARD.md"  # beside the shards of a run (``data/card.py``)
HEADER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [osler]
---"""
WARNING = """\
**A research model, not medical advice.** It is small, states wrong things in a sure voice, and was not tested on patients. Nobody
should decide about a person's health by what it says."""
CHAT = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER)
messages = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=200)[0]))
```"""


def card_files(loaded: LoadedModel, config: ModelConfig) -> dict[str, bytes]:
    """Return README.md, the card of a model that is written with this config, and the data card of its run, if it has one."""
    shape = f"{config.num_layers} layers of width {config.hidden_size}, {config.vocab_size:,} tokens of vocabulary"
    stages = list(stages_of(loaded))
    parts = [
        HEADER,
        f"# A language model of {config.num_parameters:,} parameters",
        WARNING,
        f"A decoder-only transformer ({shape}, a context of {config.max_seq_len:,} tokens), trained with Osler. The architecture "
        "is that of Qwen3; the weights are its own, unless the first stage below says that they were imported.",
        "## How to ask it",
        CHAT if loaded.answers_questions else "It was not taught to answer questions: give it the beginning of a text.",
        "## What it learned from, and how",
        *(stages or ["The checkpoint does not say."]),
        "## Scores",
        *_scores(loaded),
        "## Limits",
        f"It was trained on rows of at most {loaded.model.trained_seq_len:,} tokens. What it was not examined on above is not "
        "known: other questions, other languages, bias, and how it can be misused. What it writes is not filtered.",
    ]
    files = {"README.md": ("\n\n".join(parts) + "\n").encode()}
    if loaded.shards is not None and (data_card := loaded.shards / DATA_CARD).is_file():
        files[DATA_CARD] = data_card.read_bytes()
    return files


def stages_of(loaded: LoadedModel) -> Iterator[str]:
    """Yield what each run in the history of a model did, oldest first; a run whose folder is gone ends the history."""
    chain: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    state, training = loaded.state, loaded.training
    while training or state:
        chain.append((state, training))
        origin = training.get("init_from")
        if not origin:
            break
        try:
            before = store.load(store.resolve(origin), names=[])
        except (UserError, OSError):
            chain.append(({}, {}))
            break
        state, training = before.state, training_of(before)
    number = 0
    for state, training in reversed(chain):
        if training or not state:  # a checkpoint that a command made has state alone
            kind, seen = training.get("kind", "run"), f"{state.get('tokens', 0):,} tokens, {state.get('step', 0):,} steps"
            told = f"**{kind}**: {seen}. {training.get('description', '')}".rstrip()
            yield f"{(number := number + 1)}. {told if training else 'another run, which is not there any more'}"
        if training:  # a run with init_from took its model and tokenizer from there
            unused = ("model", "tokenizer") if training.get("init_from") else ()
            counted = _without_places({key: value for key, value in training.items() if key not in unused})
            yield f"<details><summary>every field</summary>\n\n```yaml\n{dump_yaml(counted)}```\n</details>"
        if made_by := state.get(MADE_BY):
            yield f"{(number := number + 1)}. {made_in_words(made_by)}"


def _without_places(value: Any) -> Any:
    """Return plain values with the last part of each absolute path in its place."""
    if isinstance(value, Mapping):
        return {key: _without_places(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_places(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _scores(loaded: LoadedModel) -> Iterator[str]:
    scores = scores_of(loaded)
    for_training = {score.split for score in scores if re.search(r"\btrain\b(?!.*held-out)", score.split)}
    rows = [
        f"| {score.split}{' (questions for training)' * (score.split in for_training)} | {score.accuracy:.1%} "
        f"| [{score.low:.1%}, {score.high:.1%}] | {score.chance:.1%} | {score.n:,.0f} |"
        for score in scores
    ]
    if not rows:
        yield "None are known: `osler eval` examines a model."
        return
    yield "\n".join(["| exam | right | 95 % interval | chance | questions |", "|---|---|---|---|---|", *rows])
    if for_training:
        yield "A score on questions for training does not say how the model answers new ones."
    yield "Exams of the clinic ask about a world that was made up to test training code." if loaded.knows_clinic else ""


def scores_of(loaded: LoadedModel) -> list[ExamScore]:
    """Return the exam scores of a checkpoint, from the records of its run and of the pipeline that has this run as a stage.

    Of an exam that both have, the score on more questions is returned.
    """
    if loaded.run is None:
        return []
    found: dict[str, ExamScore] = {}
    own = loaded.run.root.resolve()
    for folder, labels in ((RunFolder(own), None), (RunFolder(own.parent), _labels_in(RunFolder(own.parent), own.name))):
        heads = [rows[0] for path in sorted(folder.answers.glob("*.jsonl")) if (rows := jsonl.read(path)[0])]
        sat = {
            (head.get("label"), head.get("exam"))
            for head in heads
            if head.get("checkpoint") == loaded.path.name and (labels is None or head.get("label") in labels)
        }
        for score in read_exams(folder.exams):
            known = found.get(score.split)
            if (score.label, score.split.partition(",")[0]) in sat and (known is None or score.n > known.n):
                found[score.split] = score
    return list(found.values())


def _labels_in(pipeline: RunFolder, stage: str) -> set[str]:
    """Return the labels that the exams of a pipeline give to checkpoints of one stage."""
    config = load_yaml(pipeline.config.read_text("utf-8"), str(pipeline.config)) if pipeline.config.is_file() else {}
    exams = [section["of"] for section in (config or {}).values() if isinstance(section, dict) and section.get("kind") == "exam"]
    named = [(label, reference.partition("@")) for examined in exams for label, reference in examined.items()]
    return {label for label, (name, _, which) in named if name == stage and which != "start"}
