"""An exam by likelihood: how long a model takes for 500 questions, and how much the shared prompt saves.

    python benchmarks/bench_eval.py [--exam FILE --tokenizer FILE] [--questions 500] [--threads 2] [--out FILE]

The model has 85M random weights and runs in fp32. Without --exam the questions are made up, about as long as MedQA's: 130 words,
and four options of four. Each form (the letters, and the cloze: the texts of the options without a list of them) is scored in a
process of its own. "apart" runs prompt and option through the training model once per option, all options of a question as one
batch, for the first ``--apart`` questions; the ratio compares the seconds of a question.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from measuring import measured, publish

SHAPE = {"num_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "num_heads": 12, "num_kv_heads": 4, "head_dim": 64}
INIT = {"head_init": "normal", "residual_init": "scaled"}  # no zeros
VOCAB, MAX_SEQ_LEN = 12_800, 1024  # the vocabulary at least
QUESTION_WORDS, OPTION_WORDS = 130, 4
LETTERS = "abcdefghilmnoprstuv"


def made_up(count: int) -> list[Any]:
    """Questions of random words, the frequent ones short."""
    from osler.tasks.item import ExamItem

    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=2 + number // 400)) for number in range(3200)]

    def text(size: int) -> str:
        return " ".join(words[int(rng.random() ** 3 * len(words))] for _ in range(size))

    options = [tuple(text(OPTION_WORDS) for _ in range(4)) for _ in range(count)]
    return [ExamItem(f"q{number}", f"{text(QUESTION_WORDS)}?", each, number % 4) for number, each in enumerate(options)]


def measure(form: Any, asked: argparse.Namespace) -> dict[str, float]:
    """Time one form in this process."""
    import torch

    from osler.data.named import load_task
    from osler.eval.exams import option_rows, score_by_likelihood
    from osler.eval.likelihood import label_logprobs, pad_rows
    from osler.model.config import ModelConfig
    from osler.model.transformer import Transformer
    from osler.records.answers import AnswerLog
    from osler.tasks.config import MedqaTask
    from osler.tasks.item import render_question
    from osler.tokenizer.bpe import Tokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    items = load_task(MedqaTask(path=asked.exam))[: asked.questions] if asked.exam else made_up(asked.questions)
    if asked.tokenizer:
        tokenizer = Tokenizer.load(asked.tokenizer)
    else:
        tokenizer = Tokenizer.train([render_question(item) for item in items], 8000)
    vocab_size = max(VOCAB, tokenizer.vocab_size)
    config = ModelConfig(**SHAPE, vocab_size=vocab_size, max_seq_len=MAX_SEQ_LEN, tie_embeddings=True, **INIT)
    model = Transformer(config)
    model.init_weights(0)
    rows = [option_rows(tokenizer, item, form, template=False, max_seq_len=MAX_SEQ_LEN) or [] for item in items]
    score_by_likelihood(model, tokenizer, items[:2], form=form, template=False)  # warms up
    answers, started = AnswerLog(), time.perf_counter()
    score_by_likelihood(model, tokenizer, items, form=form, template=False, answers=answers)
    seconds = time.perf_counter() - started
    largest, started = 0.0, time.perf_counter()
    with torch.inference_mode():
        for number, options in enumerate(rows[: asked.apart]):
            labelled = [(ids[:-1], [-100] * (start - 1) + ids[start:]) for ids, start in options]
            row_N, logp_N, *_ = label_logprobs(model, *pad_rows(labelled))
            sums = torch.zeros(len(options), dtype=torch.float64).index_add_(0, row_N, logp_N.double())
            shared = torch.tensor([output[0] for output in answers.outputs[number]])
            largest = max(largest, (sums - shared).abs().max().item())
    apart = (time.perf_counter() - started) / asked.apart
    return {
        "parameters": config.num_parameters,
        "questions": len(items),
        "mean_tokens": round(sum(len(options[0][0]) for options in rows if options) / len(items), 1),
        "seconds": round(seconds, 2),
        "questions_per_second": round(len(items) / seconds, 3),
        "speed_over_apart": round(apart / (seconds / len(items)), 2),
        "largest_difference_nats": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--exam", help="a file of MedQA")
    parser.add_argument("--tokenizer", help="a tokenizer.json")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--apart", type=int, default=20)
    parser.add_argument("--forms", nargs="+", choices=["letters", "cloze"], default=["letters", "cloze"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked.child, asked)))
        return
    given = [f"--questions={asked.questions}", f"--apart={asked.apart}"]
    given += [f"--{name}={value}" for name in ("exam", "tokenizer") if (value := getattr(asked, name))]
    results = {form: measured([__file__, "--child", form, *given], threads=asked.threads) for form in asked.forms}
    publish({"benchmark": "eval", "threads": asked.threads, "exam": asked.exam or "made up", "forms": results}, asked.out)


if __name__ == "__main__":
    main()
